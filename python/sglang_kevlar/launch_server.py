"""``python -m sglang_kevlar.launch_server``: SGLang's launch_server with worker groups that may die."""

from __future__ import annotations

import sys

from sglang_kevlar.launcher.main import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
