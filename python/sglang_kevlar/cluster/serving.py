"""``python -m sglang_kevlar.cluster.serving --frontend URL[,URL...] --name NAME``: does this worker group serve?

For readiness probes of groups, which have no HTTP of their own. Asks the status of each frontend until one counts the
group among those that take requests; exit status 0, or 1 with the reason. The key of a server with --api-key is taken
from the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request
from collections.abc import Sequence

#: the server's --api-key
API_KEY = "SGLANG_KEVLAR_API_KEY"
#: states in which a group gets requests: one under suspicion does, when there is no better one
_SERVING = ("ready", "suspect")
_MAX_BYTES = 16 * 1024 * 1024


def problem(frontend: str, name: str, timeout: float) -> str | None:
    """Why the group does not serve for this frontend; None: it does."""
    request = urllib.request.Request(f"{frontend.rstrip('/')}/kevlar/status")
    if key := os.environ.get(API_KEY):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            groups = json.loads(answer.read(_MAX_BYTES))["groups"]
        state = next((group["state"] for group in groups if group.get("name") == name), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{frontend}: {type(error).__name__}: {error}"
    if state is None:
        return f"{frontend}: knows no group {name}"
    return None if state in _SERVING else f"{frontend}: {name} is {state}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_kevlar.cluster.serving", description=__doc__)
    parser.add_argument("--frontend", required=True, metavar="URL[,URL...]")
    parser.add_argument("--name", required=True)
    parser.add_argument("--timeout", type=float, default=2.0, metavar="SECONDS", help="of each frontend; default 2")
    args = parser.parse_args(argv)
    problems = []
    for frontend in args.frontend.split(","):
        found = problem(frontend, args.name, args.timeout)
        if found is None:
            return 0
        problems.append(found)
    print("\n".join(problems), file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
