"""Upstream's commands in an image of ours: ``python3 -m sglang.launch_server ...`` and ``sglang serve ...``.

They start upstream's server, as everywhere else. With ``SGLANG_KEVLAR_REPLACE=1`` they start ours, for those who can
set a variable of a container and not its command. A ``.pth`` file of the image calls `replace` whenever a Python
starts: before anything of upstream is imported, which takes seconds, and in no process but those that are meant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

REPLACE = "SGLANG_KEVLAR_REPLACE"
#: as `protocol.launch.EXIT_CONFIG`; every Python of the image starts with this module, so it imports little
_EXIT_CONFIG = 78


def flags(argv: Sequence[str], original: Sequence[str]) -> list[str] | None:
    """Those of a server of upstream's, if that is what this Python was started for.

    ``argv``, ``original``: ``sys.argv`` and ``sys.orig_argv`` while the interpreter starts.
    """
    if argv[:1] == ["-m"]:
        # The interpreter's own options stand before the module, as many as there may be.
        module = original[-len(argv)].removeprefix("-m")
        return list(argv[1:]) if module == "sglang.launch_server" else None
    if len(argv) < 2 or PurePath(argv[0]).name != "sglang" or argv[1] != "serve":
        return None
    if len(argv) > 2 and not argv[2].startswith("-"):
        return ["--model-path", *argv[2:]]
    return list(argv[2:])


def replace() -> None:
    """Become our server, if this process was to be upstream's and the environment says so."""
    wanted = os.environ.get(REPLACE, "")
    if wanted in ("", "0"):
        return
    given = flags(getattr(sys, "argv", []), sys.orig_argv)
    if given is None:
        return
    try:
        if wanted != "1":
            raise ValueError(
                f"{REPLACE} is 1 (upstream's commands start SGLang-Kevlar), 0 or not set, and not {wanted!r}"
            )
        os.execv(sys.executable, [sys.executable, "-m", "sglang_kevlar.launch_server", *given])
    except (OSError, ValueError) as error:
        # What a .pth file raises is printed and forgotten, and upstream's server would start after all.
        print(f"sglang-kevlar: error: {error}", file=sys.stderr, flush=True)
        os._exit(_EXIT_CONFIG)
