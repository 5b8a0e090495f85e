"""What the offline Engine makes of its arguments."""

from __future__ import annotations

import json

import pytest
import torch

from frontend_fakes import plan
from sglang_kevlar.engine import Engine, to_flags
from sglang_kevlar.frontend.groups_engine import GroupsEngine
from sglang_kevlar.protocol.launch import KevlarArgs

# isort: split
from sglang.srt.arg_groups.argparse_actions import LoRAPathAction
from sglang.srt.utils import MultiprocessingSerializer


def test_keyword_arguments_become_flags() -> None:
    flags = to_flags({"model_path": "m", "tp_size": 2, "enable_lora": True, "disable_x": False, "port": None})
    assert flags == ["--model-path", "m", "--tp-size", "2", "--enable-lora"]
    assert to_flags({"json_model_override_args": {"a": 1}}) == ["--json-model-override-args", '{"a": 1}']


@pytest.mark.parametrize(
    ("paths", "parsed"),
    [
        ({"a": "/p", "b": "/q=r"}, [{"lora_name": "a", "lora_path": "/p"}, {"lora_name": "b", "lora_path": "/q=r"}]),
        (
            ["/p", "b=/q", {"lora_name": "c", "lora_path": "/r", "pinned": True}],
            ["/p", "b=/q", {"lora_name": "c", "lora_path": "/r", "pinned": True}],
        ),
    ],
)
def test_adapters_are_given_in_every_way_that_upstream_takes(paths: object, parsed: list[object]) -> None:
    flag, *values = to_flags({"lora_paths": paths})
    namespace = type("Namespace", (), {})()
    LoRAPathAction([flag], "lora_paths")(None, namespace, values)
    assert flag == "--lora-paths" and namespace.lora_paths == parsed
    assert json.dumps(parsed)


def test_cpu_tensors_travel_by_value_so_that_every_group_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupsEngine, "plan", plan(KevlarArgs()), raising=False)
    engine = Engine.__new__(Engine)
    weight = torch.arange(6.0).reshape(2, 3)
    for tensors in ([("w", weight)], {"w": weight}):
        (payload,) = engine._serialize_tensors_per_rank(tensors, None)
        for _ in range(2):
            ((name, read),) = dict(MultiprocessingSerializer.deserialize(payload)).items()
            assert name == "w" and torch.equal(read, weight) and not read.is_shared()
