"""The supervisors of a worker group on several hosts: that of the first node leads, the others follow."""

from __future__ import annotations

from typing import Any

import zmq

from sglang_kevlar.cluster.keys import KeyProblem
from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.launch import EXIT_CONFIG, LaunchPlan, Paths
from sglang_kevlar.worker.follower import Follower
from sglang_kevlar.worker.head import Head
from sglang_kevlar.worker.supervisor import Supervisor


def run(paths: Paths, plan: LaunchPlan, group: int, status: StatusWriter | None, how: dict[str, Any]) -> int:
    """The supervisor of this node, until it ends. Returns the exit status."""
    assert plan.node is not None
    kind: type[Supervisor] = Follower if plan.node.rank else Head
    try:
        supervisor = kind(paths, plan, group, status=status, **how)
    except (KeyProblem, ValueError, zmq.ZMQError) as problem:
        if status is not None:
            status.send({"status": "failed", "cause": f"--dist-init-addr {plan.node.head}: {problem}"})
        return EXIT_CONFIG
    return supervisor.run()
