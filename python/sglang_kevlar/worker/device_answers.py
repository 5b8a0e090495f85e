"""What SGLang asks about the devices while it is imported is answered without beginning to use them.

A process that uses CUDA cannot be forked, and imports begin to use it: `sgl_kernel/load_utils.py`, FlashInfer and some
of upstream's own modules choose their kernels by what the device is when they are imported. A child that is gone at
once looks for this process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

#: seconds for the child: the driver's start takes one per some GPUs
PATIENCE = 60.0
#: upstream (`get_device_sm`) asks NVML first, which leaves a thread behind, and `torch.cuda` if this cannot say whom
_OF_NVML = "_get_nvml_device_index"


@contextmanager
def from_a_child() -> Iterator[None]:
    """While this lasts, `torch.cuda` says what the devices are, and uses none. Before the driver is used, with one
    thread. Without devices, or if the child cannot say, nothing is changed."""
    devices = _ask() if torch.version.cuda or torch.version.hip else []
    if not devices:
        yield
        return
    importing = True

    def answered(name: str, answer: Callable[[Any], Any]) -> Callable[..., Any]:
        former = getattr(torch.cuda, name)

        # Who keeps this beyond the imports has what was there before.
        def function(device: Any = None) -> Any:
            if importing:
                return answer(device)
            return former() if device is None else former(device)

        return function

    def told(device: Any) -> dict[str, Any]:
        index = torch.device(device).index if isinstance(device, str | torch.device) else device
        return devices[index or 0]

    answers: dict[str, Callable[[Any], Any]] = {
        "is_available": lambda _: True,
        "device_count": lambda _: len(devices),
        "current_device": lambda _: 0,
        "get_device_capability": lambda device: (told(device)["major"], told(device)["minor"]),
        "get_device_name": lambda device: told(device)["name"],
        "get_device_properties": lambda device: SimpleNamespace(**told(device)),
    }
    formers = {name: getattr(torch.cuda, name) for name in (*answers, _OF_NVML)}
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answered(name, answer))
        setattr(torch.cuda, _OF_NVML, _not_asked)
        yield
    finally:
        importing = False
        for name, former in formers.items():
            setattr(torch.cuda, name, former)


def _not_asked(_: object) -> int:
    raise RuntimeError("NVML is not asked while SGLang is imported")


def _ask() -> list[dict[str, Any]]:
    """The properties of each device, by their names in `torch.cuda.get_device_properties`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            devices = [torch.cuda.get_device_properties(each) for each in range(torch.cuda.device_count())]
            os.write(writer, json.dumps([_plain(each) for each in devices]).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    said = b""
    with os.fdopen(reader, "rb") as answer:
        if select.select([answer], [], [], PATIENCE)[0]:
            said = answer.read()
        else:
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(said) if said else []


def _plain(properties: Any) -> dict[str, Any]:
    found = {name: getattr(properties, name) for name in dir(properties) if not name.startswith("_")}
    return {name: value for name, value in found.items() if isinstance(value, int | float | str)}
