"""The launch plan and the names of everything in the run directory."""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang_kevlar.protocol.cluster import Configuration

PROTOCOL_VERSION = 1

#: Exit status of a child whose configuration can never work (sysexits EX_CONFIG).
#: The launcher stops the server on it instead of trying again.
EXIT_CONFIG = 78
#: Exit status of a supervisor whose first start failed, when it was told not to try again by itself.
EXIT_FAILED_START = 79
#: Exit status of a rank whose weights were those of a weight cache daemon that died.
EXIT_WEIGHTS_GONE = 80


class KevlarArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Our own flags, validated. Times are in seconds unless the name says otherwise."""

    worker_groups: int = 2
    standby_groups: int = 0
    run_dir: str | None = None
    #: a process in /proc state T (stopped) for this long makes its group down
    stop_grace: float = 0.25
    #: base deadline of one forward step, to which hang_per_ktoken * batch tokens / 1000 is added
    hang_timeout: float = 30.0
    hang_per_ktoken: float = 10.0
    #: a rank that never becomes ready within this time is started again
    start_timeout: float = 1800.0
    #: with no group to run on, a request waits this long, then ends with a clear error
    hold_timeout: float = 60.0
    hold_queue: int = 4096
    #: how often one request may be moved to another group
    max_redirects: int = 8
    #: refuse a request under which this many groups died with no token delivered in between
    poison_deaths: int = 2
    #: internal errors of one group within error_window that make it down
    error_budget: int = 8
    error_window: float = 30.0
    #: whether members are forked of a process that has the imports behind it (`worker.warm_start`)
    warm_start: Literal["auto", "off"] = "auto"
    #: whether ranks outlive the death of others of their group (`control.reforming`); "on": also where not shown
    reform: Literal["auto", "on", "off"] = "auto"
    #: ranks a group keeps ready beside those that serve, the first ones
    spare_ranks: int = 0
    restart_backoff: float = 0.5
    restart_backoff_max: float = 30.0
    #: deadline of a control request (flush, weight update, ...) in every group
    control_timeout: float = 600.0
    #: tokens between two reports of a request that does not stream
    journal_interval: int = 4
    #: GiB of host memory in which a rank keeps the shadow of another group's; 0: no shadows
    shadow_memory: float = 4.0
    #: contexts shorter than this are not worth shadowing
    shadow_min_context: int = 64
    #: MB/s that a rank sends at most; 0: no limit
    shadow_bandwidth: float = 0.0
    #: how its bytes travel (`transport.choose`)
    shadow_transport: Literal["shm", "tcp", "mooncake"] = "shm"
    #: share of the promotions that are computed instead, and compared
    shadow_audit: float = 0.0
    #: how long a request with an Idempotency-Key is kept without a client, and MiB for all of them (`frontend.kept`)
    stream_retention: float = 60.0
    stream_memory: int = 256
    #: ranks take orders of `sglang_kevlar.chaos`
    allow_chaos: bool = False
    #: where the operator's endpoints are; 0: beside the clients'
    admin_port: int = 0
    admin_host: str = "127.0.0.1"
    #: HOST:PORT at which groups of other hosts join; None: none do
    listen: str | None = None
    #: they may be of another version of this software
    allow_version_skew: bool = False
    #: silence of a joined group, or of its host, after which it is lost
    lease: float = 3.0
    #: without it the environment's (`cluster.keys`)
    cluster_key_file: str | None = None
    #: all frontends of the same groups, by name: where each listens. "a=HOST:PORT,b=HOST:PORT"; None: this one alone
    peers: str | None = None
    #: which of them this is
    frontend_name: str | None = None
    #: label of this host; None: its name
    host_label: str | None = None
    #: address of this host at which ranks of other hosts reach its ranks
    advertise: str | None = None


class NodeArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a group that is on several hosts (upstream's ``--nnodes``) a launch is."""

    count: int
    rank: int
    #: HOST:PORT at which the first node is reached by the others (``--dist-init-addr``)
    head: str


class JoinArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Of a launch that is one worker group of servers on other hosts."""

    #: HOST:PORT of each frontend; the first that is connected may change the group
    frontends: list[str]
    #: one in a cluster
    name: str
    host: str
    standby: bool = False
    #: None: all of the group is on this host
    node: NodeArgs | None = None


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """``plan.json`` in the run directory: what the launcher resolved, once for all processes."""

    version: int
    upstream: str
    launch_id: str
    kevlar: KevlarArgs
    tp_size: int
    pp_size: int
    #: device index of rank r of group g is gpu_ids[g][r]; zeros on CPU
    gpu_ids: list[list[int]]
    #: the ranks compute on those, and not on CPUs
    on_device: bool = False
    host: str
    port: int
    #: where upstream's resolved ServerArgs lie, pickled by `launcher.prepare` (same host, same user)
    server_args_file: str
    #: None: a server of its own
    join: JoinArgs | None = None
    #: what groups that serve the same requests must have in common; None where nobody joins
    configuration: Configuration | None = None
    #: and what the nodes of one group must; None where it is on one host
    node_configuration: Configuration | None = None
    #: flags of upstream by which another launch is configured as this one was
    argv: list[str] = []

    @property
    def node(self) -> NodeArgs | None:
        return None if self.join is None else self.join.node

    @property
    def ranks(self) -> range:
        """Those of each group that are on this host."""
        count = self.tp_size * self.pp_size
        if self.node is None:
            return range(count)
        share = count // self.node.count
        return range(self.node.rank * share, (self.node.rank + 1) * share)


class Paths:
    """Every file name under one run directory. The only place that spells them."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.lock = f"{run_dir}/lock"
        self.plan = f"{run_dir}/plan.json"
        self.server_args = f"{run_dir}/server_args.pickle"
        self.control = f"ipc://{run_dir}/control"
        self.prometheus = f"{run_dir}/metrics"
        #: a directory with one file per running role, "pid start_ticks", read by the janitor
        self.processes = f"{run_dir}/processes"

        #: what was changed at run time (weights, adapters), for a frontend that takes over
        self.changes = f"{run_dir}/changes.pickle"

    def epoch_file(self, group: int) -> str:
        return f"{self.run_dir}/g{group}.epoch"

    def heartbeat(self, group: int, epoch: int, member: str) -> str:
        """``member`` is ``rank0``, ``rank1``, ... or ``detokenizer``."""
        return f"{self.run_dir}/g{group}e{epoch}.{member}.hb"

    def shadow_counters(self, group: int, epoch: int, rank: int) -> str:
        return f"{self.run_dir}/g{group}e{epoch}.rank{rank}.shadow"

    def shadow_stores(self, group: int, epoch: int) -> str:
        """Of a group on several hosts: the endpoints of all its shadow stores, by rank."""
        return f"{self.run_dir}/g{group}e{epoch}.stores"

    def weights(self, group: int, epoch: int, rank: int) -> str:
        """What a rank says of the transfer of weights that it took part in last."""
        return f"{self.run_dir}/g{group}e{epoch}.rank{rank}.weights"

    def mapped(self, group: int, rank: int) -> str:
        """There once this rank has had the weights of a weight cache daemon."""
        return f"{self.run_dir}/g{group}.rank{rank}.mapped"

    def channel(self, group: int, epoch: int, name: str) -> str:
        """ZMQ endpoint of one incarnation; ``name``: tokenizer, scheduler, detokenizer, rpc, shadow0, chaos0, ..."""
        return f"ipc://{self.run_dir}/g{group}e{epoch}.{name}"


def window_name(launch_id: str, group: int, epoch: int, rank: int, number: int) -> str:
    """File in /dev/shm of a rank's shadow window. Gone as soon as the target has it; the janitor knows the name."""
    return f"{instance_id(launch_id, group, epoch)}.window{rank}.{number}"


def member_record(name: str, pid: int) -> str:
    """Under which a member of a group is recorded in ``Paths.processes``: no other one's is a prefix of it."""
    return f"{name}.{pid}."


def process_name(launch_id: str, group: int, pid: int) -> str:
    """What a member keeps in shared memory whatever its epoch is called by; ended by something else than a digit."""
    return f"kevlar-{launch_id}-g{group}p{pid}"


def instance_id(launch_id: str, group: int, epoch: int) -> str:
    """Upstream derives its /dev/shm load snapshot from this; the janitor removes it by ``launch_id``."""
    return f"kevlar-{launch_id}-g{group}e{epoch}"
