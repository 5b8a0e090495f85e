"""Which ranks of a group are on which of its hosts: as upstream spreads them, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.launcher.prepare import LaunchRefused, ranks_of_a_node
from sglang_kevlar.protocol.launch import JoinArgs, KevlarArgs, LaunchPlan, NodeArgs

from sglang.srt.entrypoints import engine  # isort: skip


def plan(tp: int, pp: int, nodes: int, rank: int) -> LaunchPlan:
    return LaunchPlan(
        version=1, upstream="", launch_id="", kevlar=KevlarArgs(), tp_size=tp, pp_size=pp, gpu_ids=[], host="", port=0,
        server_args_file="",
        join=JoinArgs(frontends=[], name="g", host="h", node=NodeArgs(count=nodes, rank=rank, head="h:1")),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tp", "pp", "nodes"), [(2, 1, 2), (8, 1, 2), (8, 1, 4), (1, 2, 2), (4, 2, 2), (4, 4, 2), (4, 2, 4), (2, 2, 4)]
)
def test_as_upstream_does(tp: int, pp: int, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "get_parallel", lambda: SimpleNamespace(nnodes=nodes, tp_size=tp, pp_size=pp))
    everywhere = []
    for node in range(nodes):
        stages, parts, *_ = engine._calculate_rank_ranges(node)
        theirs = [stage * tp + part for stage in stages for part in parts]
        assert list(plan(tp, pp, nodes, node).ranks) == theirs
        assert ranks_of_a_node(tp, pp, nodes) == len(theirs)
        everywhere += theirs
    assert everywhere == list(range(tp * pp))


@pytest.mark.parametrize(("tp", "pp", "nodes"), [(2, 1, 3), (2, 3, 2), (3, 2, 4), (1, 1, 2), (4, 3, 4)])
def test_what_upstream_would_leave_out_is_refused(tp: int, pp: int, nodes: int) -> None:
    with pytest.raises(LaunchRefused, match=f"--nnodes {nodes}: must divide --pp-size"):
        ranks_of_a_node(tp, pp, nodes)
