"""``python -m sglang_kevlar.ctl COMMAND``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from sglang_kevlar import shadow_sizing
from sglang_kevlar.ctl import tables
from sglang_kevlar.ctl.moves import Moves
from sglang_kevlar.ctl.server import Failed, Server

API_KEY, ADMIN_API_KEY = "SGLANG_KEVLAR_API_KEY", "SGLANG_KEVLAR_ADMIN_API_KEY"
_EXIT_STATUS = """exit status:
  0  done
  1  the server refuses it, or it did not come to its end in time
  2  the command line is wrong
  3  nobody answers at --url, or not SGLang-Kevlar
  4  the key is missing or wrong
"""


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--url", default="http://127.0.0.1:30000", help="of the server, or its --admin-port")
    common.add_argument("--api-key", metavar="KEY", help=f"the server's --api-key; better {API_KEY}")
    common.add_argument("--admin-api-key", metavar="KEY", help=f"its --admin-api-key; better {ADMIN_API_KEY}")
    common.add_argument("--json", action="store_true", help="for programs")
    waits = argparse.ArgumentParser(add_help=False)
    waits.add_argument(
        "--grace",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="requests may end where they are for so long, then they are moved; default 60",
    )
    waits.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="of each wait; default 600")
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kevlar.ctl",
        description="A running server from a terminal.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("status", parents=[common], help="the groups")
    commands.add_parser("failovers", parents=[common], help="what was lost, and what it cost")
    drain = commands.add_parser("drain", parents=[common, waits], help="no new requests to a group; returns when empty")
    undrain = commands.add_parser("undrain", parents=[common], help="requests to it again")
    restart = commands.add_parser("restart", parents=[common, waits], help="empty a group and start it anew")
    drain.add_argument("group", type=_group)
    undrain.add_argument("group", type=_group)
    which = restart.add_mutually_exclusive_group(required=True)
    which.add_argument("group", type=_group, nargs="?")
    which.add_argument("--all", action="store_true", help="one after the other, until one does not come back")
    for command, what in ((drain, "even if no other group serves"), (restart, "that, too, and without emptying it")):
        command.add_argument("--force", action="store_true", help=what)
    weights = commands.add_parser(
        "weights", parents=[common, waits], help="other weights from disk in all groups, one after the other"
    )
    weights.add_argument("model_path", help="where they are, for every group")
    weights.add_argument("--version", metavar="NAME", help="weight_version of the answers that are made with them")
    weights.add_argument("--load-format", metavar="FORMAT", help="default: as at the start")
    weights.set_defaults(force=False, grace=600.0)
    commands.add_parser("sizing", add_help=False, help="memory and bandwidth of a shadow: sglang_kevlar.shadow_sizing")
    return parser


def _group(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"must be the number of a group, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value <= 86_400):
        raise argparse.ArgumentTypeError("must be 0 to 86400")
    return value


def run(args: argparse.Namespace) -> None:
    """Raises Failed."""
    server = Server(
        args.url,
        args.api_key or os.environ.get(API_KEY),
        args.admin_api_key or os.environ.get(ADMIN_API_KEY),
    )
    if args.command == "status":
        status = server.status()
        _show(args.json, status, tables.of_groups(status))
        return
    if args.command == "failovers":
        failovers = server.status().get("failovers", [])
        _show(args.json, failovers, tables.of_failovers(failovers))
        return
    waits = (args.grace, args.timeout, args.force) if args.command != "undrain" else (0.0, 0.0)
    moves = Moves(server, lambda text: print(text, file=sys.stderr, flush=True), *waits)
    result: Any
    if args.command == "restart":
        result = moves.restart_all() if args.all else [moves.restart(args.group)]
        text = f"restarted: {', '.join(str(each['group']) for each in result)}"
    elif args.command == "weights":
        result = moves.roll_weights(args.model_path, args.version, args.load_format)
        text = f"all groups have the weights of {args.model_path}, after {result['seconds']:.1f} s"
    elif args.command == "drain":
        moves.drain(args.group)
        result, text = {"group": args.group, "action": "drain"}, f"group {args.group} is drained and empty"
    else:
        moves.undrain(args.group)
        result, text = {"group": args.group, "action": "undrain"}, f"group {args.group} takes requests again"
    _show(args.json, result, text)


def _show(as_json: bool, value: Any, text: str) -> None:
    print(json.dumps(value, indent=2) if as_json else text, flush=True)


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["sizing"]:
        shadow_sizing.main(list(argv[1:]))
        return 0
    args = _parser().parse_args(argv)
    try:
        run(args)
    except Failed as failure:
        print(f"ctl: {failure}", file=sys.stderr)
        return failure.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
