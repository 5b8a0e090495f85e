"""In place of ``launch_worker_group``: writes who it is into a directory, and that it left on SIGTERM.

``python ray_child.py DIRECTORY STATUS FLAGS...``: with a STATUS of 78 it ends with that at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

directory, status, *flags = sys.argv[1:]
file = Path(directory) / f"{os.getpid()}"


def write(state: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"pid": os.getpid(), "state": state, "flags": flags}))
    partial.rename(file.with_suffix(".json"))


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
write("joined")
if int(status):
    sys.exit(int(status))
signal.sigwait([signal.SIGTERM])
write("left")
