"""Our own command-line flags: one table, parsed and validated once.

Nothing here imports sglang before it is needed: the launcher stays light, and SGLang's flags are parsed by
SGLang itself, in ``launcher.prepare``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, get_args, get_type_hints

import msgspec

from sglang_kevlar.protocol.launch import KevlarArgs

GROUP_TITLE = "SGLang-Kevlar"
#: `cluster.keys.ENVIRONMENT`; that module is not light
KEY_ENVIRONMENT = "SGLANG_KEVLAR_CLUSTER_KEY"
PROG = "python -m sglang_kevlar.launch_server"
#: that share worker groups
MAX_FRONTENDS = 16


class _Flag(msgspec.Struct, frozen=True):
    help: str
    #: error text when the value is out of range, None when it is fine
    check: Callable[[Any], str | None]
    metavar: str = ""


def _at_least(minimum: int) -> Callable[[Any], str | None]:
    return lambda value: None if value >= minimum else f"must be at least {minimum}, got {value}"


def _positive(value: float) -> str | None:
    return None if 0 < value < float("inf") else f"must be a positive number of seconds, got {value}"


def _not_negative(value: float) -> str | None:
    return None if 0 <= value < float("inf") else f"must be a number of seconds and not negative, got {value}"


def _not_negative_number(value: float) -> str | None:
    return None if 0 <= value < float("inf") else f"must be a number and not negative, got {value}"


def _share(value: float) -> str | None:
    return None if 0 <= value <= 1 else f"must be between 0 and 1, got {value}"


def _usable_run_dir(value: str | None) -> str | None:
    # Unix sockets are limited to 107 characters; the longest name in the directory takes about 30 of them.
    if value is None:
        return None
    if not value:
        return "must not be empty"
    length = len(os.path.abspath(value))
    return f"its absolute path is {length} characters long, at most 70 are possible" if length > 70 else None


def _one_of(choices: Sequence[str]) -> Callable[[str], str | None]:
    return lambda value: None if value in choices else f"must be one of {', '.join(choices)}, got {value!r}"


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[V6]:PORT``. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ValueError(f"must be HOST:PORT, got {text!r}")
    return host, int(port)


def peer_addresses(text: str) -> dict[str, str]:
    """Of --peers: where each frontend listens, by name. Raises ValueError."""
    addresses: dict[str, str] = {}
    for each in text.split(","):
        name, equals, at = each.strip().partition("=")
        if not equals or usable_name(name) is not None:
            raise ValueError(f"must be NAME=HOST:PORT,NAME=HOST:PORT, got {each.strip()!r}")
        address(at)
        if name in addresses:
            raise ValueError(f"must name each frontend once, got {name} twice")
        addresses[name] = at
    if not 2 <= len(addresses) <= MAX_FRONTENDS:
        raise ValueError(f"must be 2 to {MAX_FRONTENDS} frontends, got {len(addresses)}")
    return addresses


def _usable_peers(value: str | None) -> str | None:
    try:
        if value is not None:
            peer_addresses(value)
    except ValueError as error:
        return str(error)
    return None


def usable_address(value: str | None) -> str | None:
    try:
        if value is not None:
            address(value)
    except ValueError as error:
        return str(error)
    return None


def usable_name(value: str | None) -> str | None:
    if value is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        return None
    return f"must be 1 to 64 letters, digits, dots, dashes or underscores and begin with no dot or dash, got {value!r}"


def _usable_lease(value: float) -> str | None:
    return None if 0.5 <= value <= 600 else f"must be between 0.5 and 600 seconds, got {value}"


def _admin_host(value: str) -> str | None:
    return None if value else "must not be empty; 0.0.0.0 is all addresses"


def _not_empty(value: str | None) -> str | None:
    return "must not be empty" if value == "" else None


_HINTS = get_type_hints(KevlarArgs)
_TRANSPORTS, _WARM_STARTS = get_args(_HINTS["shadow_transport"]), get_args(_HINTS["warm_start"])
_REFORMS = get_args(_HINTS["reform"])

_FLAGS: dict[str, _Flag] = {
    "worker_groups": _Flag(
        "Worker groups (model replicas) on this host, all included. 1: nothing to fail over to, "
        "but a dead group is restarted and the server goes on. 0, with --listen: all groups are on other hosts.",
        _at_least(0),
    ),
    "standby_groups": _Flag(
        "How many of the worker groups are kept free as standbys. 0: all groups serve.", _at_least(0)
    ),
    "run_dir": _Flag(
        "Private directory for sockets and state; removed at the end. Default: a new one under "
        "the temporary directory.",
        _usable_run_dir,
    ),
    "stop_grace": _Flag("A process stopped (SIGSTOP) for this many seconds makes its group down.", _positive),
    "hang_timeout": _Flag(
        "A group is down when one forward step takes longer than this many seconds plus --hang-per-ktoken for "
        "every 1000 tokens of its batch.",
        _positive,
    ),
    "hang_per_ktoken": _Flag("Seconds added to --hang-timeout for every 1000 tokens of a batch.", _not_negative),
    "start_timeout": _Flag("A group that is not ready after this many seconds is started again.", _positive),
    "hold_timeout": _Flag(
        "With no group to run on, a request waits this many seconds, then ends with an error.", _not_negative
    ),
    "hold_queue": _Flag("How many requests may wait for a group at once. 0: none waits.", _at_least(0)),
    "max_redirects": _Flag("How often one request may be moved to another group.", _at_least(0)),
    "poison_deaths": _Flag(
        "Refuse a request under which this many groups died with no token delivered in between.", _at_least(1)
    ),
    "error_budget": _Flag("Internal errors of one group within --error-window that make it down.", _at_least(1)),
    "error_window": _Flag("Seconds over which --error-budget counts.", _positive),
    "warm_start": _Flag(
        "auto: each group keeps a process that has imported SGLang, of which its ranks and detokenizer are forked. "
        "Where they cannot be, and with off, every start repeats the imports.",
        _one_of(_WARM_STARTS),
        f"{{{','.join(_WARM_STARTS)}}}",
    ),
    "reform": _Flag(
        "When a rank dies, the others of its group keep their process and weights, and only that one is started. "
        "auto: on a CPU; on: also on a GPU, where it was not shown to work; off: the group restarts as a whole.",
        _one_of(_REFORMS),
        f"{{{','.join(_REFORMS)}}}",
    ),
    "spare_ranks": _Flag(
        "Ranks that each group keeps with their weights loaded, ready to take the place of one that dies: of rank 0, "
        "rank 1, and so on. Each takes the memory of a shard. Needs --reform.",
        _at_least(0),
    ),
    "restart_backoff": _Flag(
        "Seconds before the first restart of a dead group; doubled at every further failure.", _not_negative
    ),
    "restart_backoff_max": _Flag("Longest wait between two restarts, in seconds.", _not_negative),
    "control_timeout": _Flag(
        "Deadline in seconds of a control request (flush, weight update, LoRA load, ...) in every group.", _positive
    ),
    "journal_interval": _Flag(
        "Tokens between two journal entries of a request that does not stream. More recompute less often, "
        "and lose more at a failover.",
        _at_least(1),
    ),
    "shadow_memory": _Flag(
        "Most host memory, in GiB, that each rank uses to keep the KV of another group's requests, from which they "
        "go on when that group is lost. 0: none; they are computed again from their tokens.",
        _not_negative_number,
        "GIB",
    ),
    "shadow_min_context": _Flag("Contexts shorter than this many tokens are not shadowed.", _at_least(0)),
    "shadow_bandwidth": _Flag(
        "Most MB/s of KV that each rank sends to its shadow. 0: no limit.", _not_negative_number, "MB_S"
    ),
    "shadow_transport": _Flag(
        "How it travels: through shared memory of this host, and over TCP to others (shm); always over TCP; or by "
        "Mooncake Transfer Engine (RDMA, NVLink, TCP), which has to be installed.",
        _one_of(_TRANSPORTS),
        f"{{{','.join(_TRANSPORTS)}}}",
    ),
    "shadow_audit": _Flag(
        "Share (0 to 1) of the requests with KV in the shadow that are computed all the same, to compare it. The log "
        "and /kevlar/status say what came out. With it, nothing is promoted ahead.",
        _share,
        "SHARE",
    ),
    "stream_retention": _Flag(
        "A request with an Idempotency-Key can be taken up again this many seconds after its end. While it runs it is "
        "aborted when no client has been attached for as long.",
        _positive,
    ),
    "stream_memory": _Flag("Most memory, in MiB, for the bodies and responses of such requests.", _at_least(1), "MIB"),
    "allow_chaos": _Flag(
        "For staging: ranks take orders of python -m sglang_kevlar.chaos to raise, to hang, and to harm frames of the "
        "shadow.",
        lambda _: None,
    ),
    "admin_port": _Flag(
        "Port for /kevlar/ (the page, status, maintenance) and /metrics, which are then not answered on --port. "
        "0: there.",
        lambda value: None if 0 <= value < 65536 else f"must be 0 to 65535, got {value}",
        "PORT",
    ),
    "admin_host": _Flag("Address at which --admin-port listens.", _admin_host, "ADDRESS"),
    "listen": _Flag(
        "Where worker groups of other hosts join (python -m sglang_kevlar.launch_worker_group --join). Without a "
        "cluster key only a loopback address.",
        usable_address,
        "HOST:PORT",
    ),
    "allow_version_skew": _Flag(
        "Take worker groups of another version of SGLang-Kevlar, to upgrade one after the other. KV never goes from "
        "one version to the other; requests that are moved between them are computed again from their tokens.",
        lambda _: None,
    ),
    "lease": _Flag("Silence of a joined group's host, in seconds, after which it is lost.", _usable_lease),
    "cluster_key_file": _Flag(
        "File with the key that all members of the cluster share (python -m sglang_kevlar.cluster.keys). Without it, "
        f"the environment variable {KEY_ENVIRONMENT}.",
        _not_empty,
    ),
    "peers": _Flag(
        "All frontends of the same worker groups, this one too, by name, with the address at which each listens; the "
        "same text at each. They go on with each other's requests that have an Idempotency-Key.",
        _usable_peers,
        "NAME=HOST:PORT,...",
    ),
    "frontend_name": _Flag("Which of --peers this one is.", usable_name, "NAME"),
    "host_label": _Flag(
        "Label of this host, from which shadows are kept apart. Default: its name.", usable_name, "NAME"
    ),
    "advertise": _Flag(
        "Address of this host at which ranks of other hosts reach its ranks. Default: the one from which --join is "
        "reached, or that of --listen.",
        _not_empty,
        "ADDRESS",
    ),
}


def option(field: str) -> str:
    return "--" + field.replace("_", "-")


def add_settings(group: argparse._ArgumentGroup, names: Collection[str], defaults: bool = True) -> None:
    """The flags of these fields of ``KevlarArgs``. Without ``defaults`` what is not given is not in the result."""
    for field in msgspec.structs.fields(KevlarArgs):
        if field.name not in names:
            continue
        flag = _FLAGS[field.name]
        default = field.default if defaults else argparse.SUPPRESS
        if field.default is False:
            group.add_argument(option(field.name), action="store_true", default=default, help=flag.help)
            continue
        kind = str if field.default is None else type(field.default)
        shown = "" if field.default is None else f" Default: {field.default if kind is str else f'{field.default:g}'}."
        group.add_argument(
            option(field.name),
            type=kind,
            default=default,
            metavar=flag.metavar or {int: "N", float: "SECONDS", str: "PATH"}[kind],
            help=flag.help + (shown if defaults else ""),
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our flags to ``parser`` under a heading of their own, defaults from ``KevlarArgs``."""
    group = parser.add_argument_group(GROUP_TITLE, "Worker groups and failover.")
    add_settings(group, KevlarArgs.__struct_fields__)
    group.add_argument(
        "--stock",
        action="store_true",
        help="Run SGLang's own server with the remaining flags and nothing of SGLang-Kevlar.",
    )


def options(names: Collection[str]) -> dict[str, bool]:
    """Of these fields of ``KevlarArgs``: option string -> takes a value."""
    fields = msgspec.structs.fields(KevlarArgs)
    return {option(field.name): field.default is not False for field in fields if field.name in names}


def separate(argv: Sequence[str], options: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Split ``argv`` into (ours, theirs) by exact option names.

    argparse's own ``parse_known_args`` would drop a ``--`` and guess at values of options it does not know.
    """
    ours: list[str] = []
    theirs: list[str] = []
    index = 0
    while index < len(argv):
        token = argv[index]
        if token == "--":
            theirs += argv[index:]
            break
        takes_value = options.get(token.partition("=")[0])
        if takes_value is None:
            theirs.append(token)
        else:
            ours.append(token)
            if takes_value and "=" not in token and index + 1 < len(argv):
                index += 1
                ours.append(argv[index])
        index += 1
    return ours, theirs


def split_args(argv: Sequence[str]) -> tuple[KevlarArgs, list[str]]:
    """Our flags, validated, and the rest, which is SGLang's, in its order.

    ``-h``/``--help`` prints both and exits 0; ``--stock`` becomes SGLang's own server and does not return;
    a bad value of ours exits 2 with a message that names the flag, as argparse does.
    """
    ours, theirs = separate(argv, options(KevlarArgs.__struct_fields__) | {"--stock": False})
    if any(token in ("-h", "--help") for token in theirs):
        print_help()
        raise SystemExit(0)
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False, usage=f"{PROG} [flags]")
    add_flags(parser)
    values = vars(parser.parse_args(ours))
    if values.pop("stock"):
        _become_stock(theirs)
    args = KevlarArgs(**values)
    if problem := _problem(args):
        parser.error(problem)
    return args, theirs


def bad_value(values: Mapping[str, Any]) -> str | None:
    """What is wrong with one of these values of fields of ``KevlarArgs``."""
    for field, value in values.items():
        if message := _FLAGS[field].check(value):
            return f"argument {option(field)}: {message}"
    return None


def _problem(args: KevlarArgs) -> str | None:
    if problem := bad_value(msgspec.structs.asdict(args)):
        return problem
    if args.worker_groups == 0 and args.listen is None:
        return "argument --worker-groups: 0 needs --listen: somebody has to serve"
    if args.spare_ranks and args.reform == "off":
        return "argument --spare-ranks: a spare has no place to take where a group restarts as a whole (--reform off)"
    if args.standby_groups >= max(1, args.worker_groups):
        return (
            f"argument --standby-groups: must be less than --worker-groups ({args.worker_groups}), "
            f"got {args.standby_groups}: at least one group has to serve"
        )
    if args.restart_backoff_max < args.restart_backoff:
        return (
            f"argument --restart-backoff-max: must not be less than --restart-backoff "
            f"({args.restart_backoff:g}), got {args.restart_backoff_max:g}"
        )
    if (args.peers is None) != (args.frontend_name is None):
        return "argument --peers: goes with --frontend-name, which says which of them this one is"
    if args.peers is not None and args.frontend_name is not None:
        addresses = peer_addresses(args.peers)
        if args.frontend_name not in addresses:
            return (
                f"argument --frontend-name: must be one of --peers ({', '.join(addresses)}), got {args.frontend_name}"
            )
        if args.listen is None or args.worker_groups > 0:
            return (
                "argument --peers: needs --listen and --worker-groups 0: the frontends share groups that join them all"
            )
        for at in addresses.values():
            if problem := key_problem(args.cluster_key_file, "--peers", at):
                return problem
    if args.listen is not None:
        return key_problem(args.cluster_key_file, "--listen", args.listen)
    return None


def key_problem(key_file: str | None, flag: str, at: str) -> str | None:
    """Why ``at`` must not be listened on, or joined, with the key that there is."""
    from sglang_kevlar.cluster import keys

    try:
        key = keys.load(key_file)
    except keys.KeyProblem as problem:
        return f"argument --cluster-key-file: {problem}"
    if key is None and not keys.is_loopback(address(at)[0]):
        return (
            f"argument {flag}: {at} is not a loopback address, which needs a cluster key: --cluster-key-file, or the "
            f"environment variable {KEY_ENVIRONMENT}"
        )
    return None


def print_help() -> None:
    """SGLang's complete help with our flags under their own heading (imports sglang)."""
    from sglang_kevlar.platform import torchvision_shim

    torchvision_shim.install()
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    # Two parsers, so that ours is not below the 2,000 lines of SGLang's.
    ours = argparse.ArgumentParser(add_help=False, usage=f"{PROG} --model-path MODEL [flags]")
    add_flags(ours)
    theirs = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    ServerArgs.add_cli_args(theirs)
    print(ours.format_help() + "\nSGLang\n" + theirs.format_help(), end="")


def _become_stock(argv: list[str]) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "sglang_kevlar.stock", *argv])
