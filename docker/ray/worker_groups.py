"""Places worker groups with Ray: an actor each, on different nodes, with ``launch_worker_group`` as its child.

    python worker_groups.py --join HOST:PORT[,HOST:PORT] --groups 2 --gpus 1 -- --cluster-key-file /etc/kevlar/key

What follows ``--`` goes to every ``launch_worker_group``. It needs SGLang-Kevlar, the model and the key on each node.
Ends on SIGTERM or Ctrl-C, after all groups have left; or with status 78 when a frontend refuses a group. When it is
killed, the groups go on, and the same command tends them again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LAUNCH = [sys.executable, "-m", "sglang_kevlar.launch_worker_group"]
#: a configuration that can never work: starting it again would not help
REFUSED = 78
#: seconds between two looks at the groups, for an answer to one, before the next start of one that died, to leave
LOOK, ANSWER, PAUSE, LEAVE = 1.0, 10.0, 5.0, 60.0


@ray.remote(max_restarts=-1)
class WorkerGroup:
    """Ray starts it again, on another node if need be, when its process or its node is lost."""

    def __init__(self, name: str, launch: Sequence[str], flags: Sequence[str]) -> None:
        node = ray.get_runtime_context().get_node_id()
        place = ["--name", name, "--host-label", node, "--advertise", ray.util.get_node_ip_address()]
        self._command = [*launch, *place, *flags]
        self._process: subprocess.Popen | None = None
        self._ended_at = 0.0

    def tend(self) -> int | None:
        """Start it if it does not run. Its exit status when it ended, None while it runs."""
        if self._process is not None:
            status = self._process.poll()
            if status is None or status == REFUSED:
                return status
            self._ended_at = time.monotonic()
            self._process = None
            return status
        if self._ended_at and time.monotonic() - self._ended_at < PAUSE:
            return None
        # However this actor ends, its group leaves: SIGTERM at the death of its parent, who may be dead already.
        alone = ["setpriv", "--pdeathsig", "TERM", "sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
        self._process = subprocess.Popen([*alone, *self._command])
        return None

    def leave(self) -> None:
        """Its requests go on elsewhere, then it ends."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()


def tend(groups: Sequence[ray.actor.ActorHandle]) -> None:
    """Until one is refused (SystemExit)."""
    while True:
        asked = {group.tend.remote(): number for number, group in enumerate(groups)}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)
        for answer in answered:
            try:
                status = ray.get(answer)
            except RayError as error:
                print(f"group {asked[answer]}: {type(error).__name__}, Ray starts it again", file=sys.stderr)
                continue
            if status is not None:
                print(f"group {asked[answer]} ended with status {status}", file=sys.stderr)
            if status == REFUSED:
                raise SystemExit(REFUSED)
        time.sleep(LOOK)


def main(argv: Sequence[str], launch: Sequence[str] = LAUNCH) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--join", required=True, metavar="HOST:PORT[,HOST:PORT]")
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--gpus", type=float, default=0, help="of each group")
    parser.add_argument("--cpus", type=float, default=1, help="of each group")
    parser.add_argument("--name", default="ray", help="groups are NAME-0, NAME-1, ...")
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    parser.add_argument("--patience", type=float, default=600, help="seconds to wait for the nodes")
    parser.add_argument("flags", nargs="*", help="of launch_worker_group, after --")
    args = parser.parse_args(argv)

    # What is detached lives in a namespace, and outlives this process.
    ray.init(address=args.address, namespace="sglang-kevlar")
    # After Ray's own, which would end with the signal's number.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    groups: list[ray.actor.ActorHandle] = []
    places = reserve(args.name, args.groups, {"CPU": args.cpus, **({"GPU": args.gpus} if args.gpus else {})})
    try:
        if not places.wait(args.patience):
            sys.exit(f"Ray has not {args.groups} nodes with {args.cpus:g} CPUs and {args.gpus:g} GPUs free")
        for number in range(args.groups):
            name = f"{args.name}-{number}"
            actor = WorkerGroup.options(
                name=name,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=args.cpus,
                num_gpus=args.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=number),
            )
            groups.append(actor.remote(name, launch, ["--join", args.join, *args.flags]))
        tend(groups)
    finally:
        if groups:
            ray.wait([group.leave.remote() for group in groups], num_returns=len(groups), timeout=LEAVE + ANSWER)
        for group in groups:
            ray.kill(group)
        remove_placement_group(places)
        ray.shutdown()


def reserve(name: str, groups: int, bundle: dict[str, float]) -> PlacementGroup:
    """STRICT_SPREAD: a node is lost whole. With fewer nodes than groups, SPREAD."""
    try:
        return get_placement_group(name)
    except ValueError:
        return placement_group([bundle] * groups, strategy="STRICT_SPREAD", name=name, lifetime="detached")


if __name__ == "__main__":
    main(sys.argv[1:])
