"""``python -m sglang_kevlar.launcher.janitor RUN_DIR LAUNCH_ID``: cleans up after a launcher that could not.

Standard input is a pipe whose other end only the launcher holds: it ends when the launcher does, also by SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from sglang_kevlar.launcher import rundir


class Janitor:
    """The launcher's side of it."""

    def __init__(self, run_dir: rundir.RunDir) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "sglang_kevlar.launcher.janitor", run_dir.path, run_dir.launch_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def dismiss(self) -> None:
        """The launcher ends: let the janitor do what is left, and wait for it."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait()


def main() -> None:
    # Signals to "everything" must not take away the one that cleans up. SIGKILL of both is swept at the next start.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    path, launch_id = sys.argv[1:]
    while os.read(0, 1):
        pass
    rundir.remove_after(path, launch_id)
    rundir.remove_shared_memory(launch_id)


if __name__ == "__main__":
    main()
