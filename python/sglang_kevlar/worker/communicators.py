"""A rank's communicators: none while it loads its weights, then those of an epoch, then those of the next.

Upstream makes its groups once in a process, before the model, because layers ask them which shard they hold. Which one
that is follows from the rank's number alone; so weights are loaded over groups that know their members and cannot speak
(`unbound`). For each epoch upstream makes real ones, by its own code, and a model that was made over others gets them
in place of those (`rebind`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.runtime_context import reset_context

from sglang_kevlar.worker.device_aborts import DeviceAborts

#: seconds for NCCL to give up what was captured in no graph any more
ABORT_WITHIN = 8.0
_BACKEND = "kevlar_unbound"


_aborts = DeviceAborts()


class Group(NamedTuple):
    """One of upstream's groups, with what it is made of: destroying it takes that away."""

    coordinator: GroupCoordinator
    device_group: Any
    cpu_group: Any


class _Silent(dist.ProcessGroup):
    """Members and no way to reach them. Every collective raises."""

    def getBackendName(self) -> str:
        return _BACKEND


class _UnboundCoordinator(GroupCoordinator):  # type: ignore[misc]
    def __init__(
        self, group_ranks: list[list[int]], local_rank: int, *_: Any, group_name: str | None = None, **__: Any
    ) -> None:
        self.rank = dist.get_rank()
        self.ranks = next(ranks for ranks in group_ranks if self.rank in ranks)
        self.rank_in_group = self.ranks.index(self.rank)
        self.world_size = len(self.ranks)
        self.local_rank = local_rank
        self.unique_name = f"{group_name}:unbound"
        self.device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.device_module = torch.get_device_module(self.device)
        self._fi_workspace_hint: str | None = None
        self.pynccl_comm = self.ca_comm = self.pymscclpp_comm = self.mq_broadcaster = None
        # One object each, so that it can be told by what it has to be replaced. Of the world's, the backend is asked.
        world = group_name == "world"
        self.device_group: Any = dist.group.WORLD if world else _Silent(self.rank_in_group, self.world_size)
        self.cpu_group: Any = _Silent(self.rank_in_group, self.world_size)

    def destroy(self) -> None:
        self.device_group = self.cpu_group = None


@contextmanager
def unbound(rank: int, ranks: int) -> Iterator[None]:
    """Groups that are made inside know their members, and cannot speak."""
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            _BACKEND, lambda _store, rank, size, _timeout: _Silent(rank, size), devices=["cpu", "cuda"]
        )
    dist.init_process_group(_BACKEND, store=dist.HashStore(), rank=rank, world_size=ranks)
    coordinator, measure = parallel_state.GroupCoordinator, bootstrap.measure_pre_model_load_memory
    parallel_state.GroupCoordinator = _UnboundCoordinator
    # The least of all ranks, for sizing the pool: it is measured again with the others.
    bootstrap.measure_pre_model_load_memory = lambda **_: 0.0
    try:
        yield
    finally:
        parallel_state.GroupCoordinator, bootstrap.measure_pre_model_load_memory = coordinator, measure


def groups() -> dict[str, Group]:
    """Upstream's groups by the names of their variables."""
    found = {name: each for name, each in vars(parallel_state).items() if isinstance(each, GroupCoordinator)}
    return {name: Group(each, each.device_group, each.cpu_group) for name, each in found.items()}


def give_up() -> None:
    """Nothing waits on a device for another rank any more. From any thread; `release` is to follow."""
    _aborts.begin(groups().values())


def release() -> None:
    """Leave all groups, and have upstream forget the engine that used them: settings, buffers, expert locations.

    Gloo closes its connections, at which others see it, with the last reference to a group. Not only in `finish`, which
    waits for NCCL, which may wait for those others.
    """
    on_device = uses_device()
    if on_device:
        give_up()
        if torch.cuda.is_initialized():
            # Nothing reads pools or graphs any more when they go; and a device that faulted says so here.
            torch.cuda.synchronize()
        for group in groups().values():
            # To destroy one of NCCL means to wait for all of its ranks; and after the abort it is an error.
            group.coordinator.device_group = None
            group.coordinator.destroy()
    parallel_state.destroy_model_parallel()
    if not on_device:
        parallel_state.destroy_distributed_environment()
    reset_context()


def finish() -> None:
    """The second half of `release`, when graphs that were captured over the groups are gone. Raises RuntimeError."""
    if uses_device():
        _aborts.finish(ABORT_WITHIN)
        parallel_state.abort_distributed_environment()  # NCCL's are; torch is to forget them
        parallel_state.destroy_distributed_environment()
        # Pools of the last epoch, which otherwise count as taken when those of the next are sized.
        torch.cuda.empty_cache()


def uses_device() -> bool:
    return torch.cuda.is_available()


def unbind(model: torch.nn.Module, former: dict[str, Group]) -> dict[str, Group]:
    """Have ``model`` hold nothing of ``former``. What it holds instead, for `rebind`."""
    stand_ins = {id(each): object() for group in former.values() for each in group}
    nothing = {name: Group(*(stand_ins[id(each)] for each in group)) for name, group in former.items()}
    rebind(model, former, nothing)
    return nothing


def rebind(model: torch.nn.Module, former: dict[str, Group], now: dict[str, Group]) -> None:
    """Have ``model`` hold groups of ``now`` wherever it holds the same of ``former``. Raises RuntimeError."""
    if missing := former.keys() - now.keys():
        raise RuntimeError(f"there is no {', '.join(sorted(missing))} any more")
    replacement = {
        id(old): new
        for name, group in former.items()
        for old, new in zip(group, now[name], strict=True)
        if old is not None
    }
    seen: set[int] = set()
    left: list[Any] = [model]
    while left:
        holder = left.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else None
        if items is None:
            left.append(vars(holder))
            continue
        for key, value in list(items):
            if id(value) in replacement:
                holder[key] = replacement[id(value)]
            elif isinstance(value, tuple) and any(id(each) in replacement for each in value):
                holder[key] = tuple(replacement.get(id(each), each) for each in value)
            elif isinstance(value, (dict, list)) or _may_hold(value):
                left.append(value)


def _may_hold(value: object) -> bool:
    ours = isinstance(value, torch.nn.Module) or type(value).__module__.startswith("sglang.")
    return ours and hasattr(value, "__dict__") and not isinstance(value, (type, GroupCoordinator))
