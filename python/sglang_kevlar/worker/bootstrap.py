"""What a rank and a detokenizer have in common before SGLang takes over."""

from __future__ import annotations

import argparse
import multiprocessing.process
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

from sglang_kevlar.cluster import hosts
from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.launch import EXIT_CONFIG, LaunchPlan, NodeArgs, Paths, instance_id, process_name
from sglang_kevlar.worker.heartbeat import HeartbeatWriter
from sglang_kevlar.worker.orders import Order, OrderReader

if TYPE_CHECKING:
    from sglang.srt.server_args import PortArgs, ServerArgs


#: tokens between two reports of a request that is not sent as a stream: more than any answer has
_NEVER = 1 << 62


class Membership:
    """This process: a member of one worker group. Of which epoch, it is told by an order (`worker.orders`)."""

    def __init__(self, args: argparse.Namespace, role: Literal["rank", "detokenizer"], member: str) -> None:
        self.role = role
        self.paths = Paths(args.run_dir)
        self.group: int = args.group
        self.member = member
        self.status = StatusWriter(args.ready_fd)
        self.orders = OrderReader(args.orders_fd)
        with open(self.paths.plan, "rb") as file:
            self.plan = msgspec.json.decode(file.read(), type=LaunchPlan)

    def load_upstream(self) -> ServerArgs:
        """Import SGLang with our plug-ins, verified, and load what the launcher resolved."""
        name_semaphores(process_name(self.plan.launch_id, self.group, os.getpid()))
        if self.plan.node is not None:
            show_other_nodes(self.plan.node)
        server_args = import_upstream(self.plan)

        from sglang.srt.utils import set_ulimit

        from sglang_kevlar.upstream import contract, plugin

        contract.check(self.role)
        plugin.verify_applied()
        # Both are inherited from the parent where upstream's parent starts this process.
        set_ulimit()
        multiprocessing.set_start_method("spawn", force=True)
        return server_args

    def next_epoch(self) -> Incarnation | None:
        """Waits for the order. None: the supervisor is gone."""
        order = self.orders.next()
        return None if order is None else Incarnation(self, order)


class Incarnation:
    """What this process is in one epoch of its group."""

    def __init__(self, membership: Membership, order: Order) -> None:
        self.membership = membership
        self.paths, self.plan, self.group = membership.paths, membership.plan, membership.group
        self.epoch = order.epoch
        self._dist_port = order.dist_port
        if order.dist_host is not None:
            # Where ranks meet is another place for each epoch, and not the one that ``--dist-init-addr`` says.
            os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"tcp://{order.dist_host}:{order.dist_port}"
        self.instance_id = instance_id(self.plan.launch_id, self.group, self.epoch)
        self.heartbeat = HeartbeatWriter(
            self.paths.heartbeat(self.group, self.epoch, membership.member),
            f"{self.instance_id}.{membership.member}.hb",
        )

    def send(self, message: dict[str, object]) -> None:
        self.membership.status.send({**message, "epoch": self.epoch})

    def port_args(self) -> PortArgs:
        """Channels of this incarnation alone, which is what makes closing them a fence."""
        from sglang.srt.server_args import PortArgs

        def channel(name: str) -> str:
            return self.paths.channel(self.group, self.epoch, name)

        return PortArgs(
            tokenizer_ipc_name=channel("tokenizer"),
            scheduler_input_ipc_name=channel("scheduler"),
            detokenizer_ipc_name=channel("detokenizer"),
            nccl_port=self._dist_port,
            rpc_ipc_name=channel("rpc"),
            metrics_ipc_name=channel("metrics"),
            tokenizer_worker_ipc_name=None,
            decoupled_spec_ipc_config=None,
            instance_id=self.instance_id,
        )

    def label_metrics(self) -> None:
        """Tell the groups apart in upstream's metrics. After `publish`, before anything makes a collector."""
        from sglang.srt.runtime_context import get_context, get_observability

        labels = {**(get_observability().extra_metric_labels or {}), "worker_group": str(self.group)}
        get_context().override("sglang_kevlar", extra_metric_labels=labels)


def show_other_nodes(node: NodeArgs) -> None:
    """By which address of this host other nodes reach it. Before anything of upstream or torch is imported."""
    address = hosts.towards(node.head)
    if address is None:
        return
    # Left to themselves both take what this host's name stands for, which is often a loopback address.
    if not os.environ.get("HOST_IP"):
        os.environ.setdefault("SGLANG_HOST_IP", address)
    for interface, addresses in psutil.net_if_addrs().items():
        if address in [each.address.partition("%")[0] for each in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def import_upstream(plan: LaunchPlan) -> ServerArgs:
    """Import SGLang with our plug-ins, and load what the launcher resolved."""
    from sglang_kevlar.platform import torchvision_shim
    from sglang_kevlar.upstream import patches, saved_args

    # Read once, when upstream is imported. Only requests that could not be continued elsewhere are not sent as streams
    # (`frontend.in_flight`): with nothing said before their end they are simply run again.
    os.environ["SGLANG_FORCE_STREAM_INTERVAL"] = str(_NEVER)
    patches.install()
    torchvision_shim.install()
    server_args = saved_args.load(plan.server_args_file)

    from sglang.srt.plugins import load_plugins

    load_plugins()
    return server_args


def name_semaphores(owner: str) -> None:
    """Have this process and its children name their semaphores (tqdm has one) by ``owner``.

    Python's resource tracker removes them after a crash, unless somebody kills that too, as a supervisor does. By the
    name they are removed with the rest of what ``owner`` leaves in /dev/shm.
    """
    # No public way: children copy it from their parent.
    multiprocessing.process.current_process()._config["semprefix"] = f"/{owner}"  # type: ignore[attr-defined]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    for name in ("--group", "--ready-fd", "--orders-fd"):
        parser.add_argument(name, type=int, required=True)
    return parser


def run_member(membership: Membership, body: Callable[[], bool]) -> None:
    """Run ``body`` and end the process; never returns. ``body`` says whether it ended as it should.

    The end is immediate: threads of a broken engine must not keep the process, and with it its group, alive.
    """
    status = 1
    try:
        status = 0 if body() else 1
    except BaseException as error:
        traceback.print_exc()
        status = _status_of(error)
        membership.status.send({"status": "error", "error": describe(error)})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status_of(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    contract = sys.modules.get("sglang_kevlar.upstream.contract")
    mismatch = getattr(contract, "UpstreamMismatch", None)
    # Another try meets the same upstream.
    return EXIT_CONFIG if mismatch is not None and isinstance(error, mismatch) else 1


def describe(error: BaseException) -> str:
    """One line for the operator, bounded."""
    text = " ".join(str(error).split())[:1000]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
