"""Command line of `launch_worker_group`: where to join, and what is to be other than there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import msgspec

from sglang_kevlar import config
from sglang_kevlar.protocol.launch import KevlarArgs, NodeArgs

PROG = "python -m sglang_kevlar.launch_worker_group"

#: of this host; the frontend's are not taken over
_OWN = ("run_dir", "cluster_key_file", "host_label", "advertise")
#: as at the frontend, unless given here
_TAKEN = (
    "stop_grace",
    "hang_timeout",
    "hang_per_ktoken",
    "start_timeout",
    "warm_start",
    "reform",
    "spare_ranks",
    "restart_backoff",
    "restart_backoff_max",
    "control_timeout",
    "shadow_memory",
    "shadow_min_context",
    "shadow_bandwidth",
    "shadow_transport",
    "shadow_audit",
    "allow_chaos",
    "lease",
)
#: upstream's, for a group on several hosts
_NODE = ("--nnodes", "--node-rank", "--dist-init-addr")


class JoinFlags(msgspec.Struct, frozen=True, kw_only=True):
    frontends: list[str]
    name: str | None = None
    standby: bool = False
    #: None: all of the group is on this host
    node: NodeArgs | None = None
    #: fields of KevlarArgs that were given
    given: dict[str, Any]

    def settings(self, there: dict[str, object]) -> KevlarArgs:
        """What the launch is made with; ``there``: the frontend's. Raises msgspec.ValidationError."""
        taken = {name: there[name] for name in _TAKEN if name in there}
        own = {"worker_groups": 1, "standby_groups": int(self.standby)}
        return msgspec.convert({**taken, **self.given, **own}, KevlarArgs)


def split_args(argv: Sequence[str]) -> tuple[JoinFlags, list[str]]:
    """Our flags, validated, and the rest, which is SGLang's, in its order. Exits 0 with help, 2 with what is wrong."""
    options = config.options((*_OWN, *_TAKEN)) | {"--join": True, "--name": True, "--standby": False}
    options |= dict.fromkeys(_NODE, True)
    ours, theirs = config.separate(argv, options)
    parser = argparse.ArgumentParser(
        prog=PROG, add_help=False, allow_abbrev=False, usage=f"{PROG} --join HOST:PORT [flags]"
    )
    group = parser.add_argument_group(
        config.GROUP_TITLE,
        "One worker group of a server on another host. Everything else is as there, flags of SGLang included, unless "
        "given here.",
    )
    group.add_argument(
        "--join",
        required=not any(token in ("-h", "--help") for token in theirs),
        metavar="HOST:PORT[,HOST:PORT]",
        help="Where frontends listen. The first that is connected may change the group (weights, adapters, caches).",
    )
    group.add_argument(
        "--name", help="Of the group, one in the cluster. Default: the label of this host and a random end."
    )
    group.add_argument("--standby", action="store_true", help="It serves only in place of a group that does not.")
    group.add_argument(
        "--nnodes", type=int, default=1, metavar="N", help="Hosts that the group is on. Each runs the same command."
    )
    group.add_argument("--node-rank", type=int, metavar="R", help="Which of them this is; 0 is the first.")
    group.add_argument(
        "--dist-init-addr", metavar="HOST:PORT", help="Where the first of them is reached by the others; a free port."
    )
    config.add_settings(group, (*_OWN, *_TAKEN), defaults=False)
    if any(token in ("-h", "--help") for token in theirs):
        print(parser.format_help() + "\nFlags of SGLang: python -m sglang_kevlar.launch_server --help")
        raise SystemExit(0)
    values = vars(parser.parse_args(ours))
    frontends = [at.strip() for at in values.pop("join").split(",")]
    name, standby = values.pop("name"), values.pop("standby")
    count, rank, head = (values.pop(flag) for flag in ("nnodes", "node_rank", "dist_init_addr"))
    problem = _problem(frontends, name, values) or _node_problem(count, rank, head, values)
    if problem is not None:
        parser.error(problem)
    node = NodeArgs(count=count, rank=rank, head=head) if count > 1 else None
    return JoinFlags(frontends=frontends, name=name, standby=standby, node=node, given=values), theirs


def _node_problem(count: int, rank: int | None, head: str | None, given: dict[str, Any]) -> str | None:
    if count < 1:
        return f"argument --nnodes: must be at least 1, got {count}"
    if count == 1:
        alone = rank in (None, 0) and head is None
        return None if alone else "argument --nnodes: --node-rank and --dist-init-addr are for a group on several hosts"
    if rank is None or head is None:
        return f"argument --nnodes: {count} nodes need --node-rank and --dist-init-addr"
    if not 0 <= rank < count:
        return f"argument --node-rank: must be 0 to {count - 1}, got {rank}"
    if message := config.usable_address(head):
        return f"argument --dist-init-addr: {message}"
    return config.key_problem(given.get("cluster_key_file"), "--dist-init-addr", head)


def _problem(frontends: list[str], name: str | None, given: dict[str, Any]) -> str | None:
    if len(set(frontends)) != len(frontends) or len(frontends) > config.MAX_FRONTENDS:
        return f"argument --join: must be at most {config.MAX_FRONTENDS} frontends, each once"
    for at in frontends:
        if message := config.usable_address(at):
            return f"argument --join: {message}"
    if message := config.usable_name(name):
        return f"argument --name: {message}"
    if problem := config.bad_value(given):
        return problem
    for at in frontends:
        if problem := config.key_problem(given.get("cluster_key_file"), "--join", at):
            return problem
    return None
