"""The template on a GPU: the imports ask what the devices are, and nothing begins to use them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_kevlar.worker import device_answers

QUESTIONS = ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties")
DEVICES = [
    SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, uuid=object()),
    SimpleNamespace(name="NVIDIA B200", major=10, minor=0, multi_processor_count=148, uuid=object()),
]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """There are two. In this process, whoever asks is noted, and has begun to use them."""
    begun: list[str] = []
    here = os.getpid()

    def of(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            if os.getpid() == here:
                begun.append(name)
            return answer(*args)

        return function

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", of("device_count", lambda: len(DEVICES)))
    monkeypatch.setattr(torch.cuda, "current_device", of("current_device", lambda: 1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", of("get_device_properties", lambda i: DEVICES[i]))
    return begun


def test_the_imports_are_answered_and_use_no_device(devices: list[str]) -> None:
    before = {name: getattr(torch.cuda, name) for name in QUESTIONS}
    with device_answers.from_a_child():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2 and torch.cuda.current_device() == 0
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_capability("cuda:1") == torch.cuda.get_device_capability(1) == (10, 0)
        assert torch.cuda.get_device_name(torch.device("cuda", 1)) == "NVIDIA B200"
        assert torch.cuda.get_device_properties(1).multi_processor_count == 148
        kept = torch.cuda.current_device
        with pytest.raises(RuntimeError):  # upstream asks NVML with what this says, or else what is answered above
            torch.cuda._get_nvml_device_index(0)
    assert not devices
    assert {name: getattr(torch.cuda, name) for name in QUESTIONS} == before
    assert kept() == 1, "what a module imported by name tells the truth when the imports are over"
    assert devices == ["current_device"]


def test_the_child_cannot_say(devices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: 1 / 0)
    before = torch.cuda.current_device
    with device_answers.from_a_child():
        assert torch.cuda.current_device is before


def test_the_driver_does_not_answer(devices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_answers, "PATIENCE", 0.1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: time.sleep(60))
    before = torch.cuda.current_device
    with device_answers.from_a_child():
        assert torch.cuda.current_device is before


def test_without_devices_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a child"))
    with device_answers.from_a_child():
        pass
