"""The weights of a model as they lie in memory: found, read and written in pieces.

All that loading or an update may leave in it: parameters, buffers, and tensors that are plain attributes of modules.
Latent attention keeps what it makes of its weights in such (``w_kc``, ``w_vc``), which no state dict knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sglang.srt.lora.layers import BaseLayerWithLoRA
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sglang_kevlar.control.weight_layout import Region, extent, regions
from sglang_kevlar.protocol.weights import TensorLayout, WeightLayout

#: bytes that are read or written in one go, some milliseconds of work
PIECE_BYTES = 4 << 20


class NoPlainMemory(ValueError):
    """A tensor cannot be copied byte by byte; the message names it."""


class WeightMemory:
    """Of the models of a rank, by the names of their runners. To be made anew after anything that changed them.

    Whoever reads or writes makes sure that the model is not changed, or used, meanwhile. One thread at a time.
    """

    def __init__(self, models: dict[str, torch.nn.Module]) -> None:
        """Raises NoPlainMemory."""
        storages: dict[tuple[str, int], int] = {}
        self._storages: list[torch.UntypedStorage] = []
        tensors: list[TensorLayout] = []
        numbers: dict[str, float] = {}
        for role, model in models.items():
            for name, value in _state_of(model, f"{role}."):
                if isinstance(value, float):
                    numbers[name] = value
                    continue
                _check(name, value)
                storage = value.untyped_storage()
                number = storages.setdefault((str(value.device), storage.data_ptr()), len(storages))
                if number == len(self._storages):
                    self._storages.append(storage)
                shape, stride, size = tuple(value.shape), tuple(value.stride()), value.element_size()
                tensors.append(
                    TensorLayout(
                        name=name,
                        dtype=str(value.dtype).removeprefix("torch."),
                        shape=shape,
                        stride=stride,
                        storage=number,
                        offset=value.storage_offset() * size,
                        extent=extent(shape, stride, size),
                    )
                )
        self.layout = WeightLayout(tensors, numbers)
        for region in regions(self.layout):
            if region.end > self._storages[region.storage].nbytes():
                raise NoPlainMemory(f"storage {region.storage} is smaller than what lies in it")
        if any(storage.device.type == "cuda" for storage in self._storages):
            # The streams below do not wait for what was begun on others, an update for example.
            torch.cuda.synchronize()
        #: on a device, by which pieces go to and from it, beside the stream of the forward passes
        self._staging: torch.Tensor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def read(self, piece: Region) -> np.ndarray:
        """uint8; valid until the next call, and on a CPU the memory itself."""
        memory = self._at(piece)
        if memory.device.type == "cpu":
            return memory.numpy()
        torch.cuda.set_device(memory.device)  # a thread begins on the first of all
        staged = self._staged(len(memory))
        with torch.cuda.stream(self._stream(memory.device)):
            staged.copy_(memory, non_blocking=True)
        self._stream(memory.device).synchronize()
        return staged.numpy()

    def write(self, piece: Region, data: memoryview) -> None:
        """``data``: as many bytes as the piece has."""
        memory = self._at(piece)
        if memory.device.type == "cpu":
            np.copyto(memory.numpy(), np.frombuffer(data, dtype=np.uint8))
            return
        torch.cuda.set_device(memory.device)
        staged = self._staged(len(memory))
        np.copyto(staged.numpy(), np.frombuffer(data, dtype=np.uint8))
        with torch.cuda.stream(self._stream(memory.device)):
            memory.copy_(staged, non_blocking=True)
        self._stream(memory.device).synchronize()

    def _at(self, piece: Region) -> torch.Tensor:
        storage = self._storages[piece.storage]
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return flat.set_(storage, piece.start, (piece.end - piece.start,))

    def _staged(self, size: int) -> torch.Tensor:
        if self._staging is None:
            self._staging = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._staging[:size]

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _state_of(model: torch.nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor | float]]:
    for path, module in model.named_modules():
        before = prefix + (f"{path}." if path else "")
        for tensors in (module._parameters, module._buffers):
            yield from ((before + name, value) for name, value in tensors.items() if value is not None)
        # What an adapter's layer has of its own is the adapters', which are loaded by name.
        if not isinstance(module, BaseLayerWithLoRA):
            for name, value in vars(module).items():
                yield from _values(before + name, value)


def _values(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor | float]]:
    if isinstance(value, torch.Tensor | float):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if isinstance(item, torch.Tensor):
                yield f"{name}[{index}]", item


def _check(name: str, tensor: torch.Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise NoPlainMemory(f"{name} is a {type(tensor).__name__}, which is not one piece of memory")
    if tensor.device.type not in ("cpu", "cuda"):
        raise NoPlainMemory(f"{name} is on device {tensor.device}")
