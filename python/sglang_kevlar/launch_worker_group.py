"""``python -m sglang_kevlar.launch_worker_group --join HOST:PORT``: a worker group of a server on another host."""

from __future__ import annotations

import sys

from sglang_kevlar.launcher.join import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
