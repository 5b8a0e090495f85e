"""Upstream's launch sequence with the worker groups in place of child processes."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from sglang.srt.entrypoints.engine import Engine, SchedulerInitResult, init_tokenizer_manager
from sglang.srt.server_args import PortArgs, ServerArgs

from sglang_kevlar.frontend.startup import wait_for_first_group
from sglang_kevlar.frontend.tokenizer_manager import KevlarTokenizerManager
from sglang_kevlar.protocol.launch import LaunchPlan, Paths, instance_id


class GroupsEngine(Engine):  # type: ignore[misc]
    """Starts nothing: schedulers and detokenizers are the group supervisors' children, already on their way."""

    plan: ClassVar[LaunchPlan]
    paths: ClassVar[Paths]

    @classmethod
    def launch(cls, server_args: ServerArgs, plan: LaunchPlan, paths: Paths) -> tuple[Any, ...]:
        """``(tokenizer manager, template manager, port args, scheduler init result, watchdog)``."""
        cls.plan, cls.paths = plan, paths
        return cls._launch_subprocesses(server_args)[:5]

    @classmethod
    def _launch_subprocesses(cls, server_args: ServerArgs, **_: Any) -> tuple[Any, ...]:
        manager_class = functools.partial(KevlarTokenizerManager, plan=cls.plan, paths=cls.paths)
        with _already_checked():
            return super()._launch_subprocesses(
                server_args,
                init_tokenizer_manager_func=functools.partial(
                    init_tokenizer_manager, TokenizerManagerClass=manager_class
                ),
                run_scheduler_process_func=_never,
                run_detokenizer_process_func=_never,
                port_args=_port_args(cls.plan, cls.paths),
            )

    @classmethod
    def _launch_scheduler_processes(
        cls, server_args: ServerArgs, port_args: PortArgs, run_scheduler_process_func: Callable[..., None], **_: Any
    ) -> tuple[SchedulerInitResult, list[Any]]:
        infos: list[dict[str, Any]] = []

        def wait_for_ready() -> None:
            infos.append(wait_for_first_group(cls.plan, cls.paths))

        return SchedulerInitResult(scheduler_infos=infos, wait_for_ready=wait_for_ready), []

    @classmethod
    def _launch_detokenizer_subprocesses(
        cls, server_args: ServerArgs, port_args: PortArgs, run_detokenizer_process_func: Callable[..., None]
    ) -> tuple[list[Any], list[str]]:
        # No processes: upstream's watchdog, which ends the server with them, has nothing to watch.
        return [], []

    def _serialize_tensors_per_rank(self, tensors: Any, load_format: str | None) -> list[bytes]:
        """CPU tensors by value: upstream's handles to them can be opened once, and only by our own children."""
        named = tensors.items() if isinstance(tensors, dict) else tensors
        if load_format == "flattened_bucket" or not all(_is_on_cpu(tensor) for _, tensor in named):
            return list(super()._serialize_tensors_per_rank(tensors, load_format))
        return [pickle.dumps(tensors, pickle.HIGHEST_PROTOCOL)] * type(self).plan.tp_size


def _is_on_cpu(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"


@contextlib.contextmanager
def _already_checked() -> Iterator[None]:
    """`launcher.prepare` has checked this record. A second check refuses what the first made of --lora-paths."""
    check = ServerArgs.check_server_args
    ServerArgs.check_server_args = lambda self: None
    try:
        yield
    finally:
        ServerArgs.check_server_args = check


def _never(*_: Any) -> None:
    raise AssertionError("the frontend starts no scheduler and no detokenizer")


def _port_args(plan: LaunchPlan, paths: Paths) -> PortArgs:
    """Names upstream wants to exist; only the offline Engine binds one of them (rpc)."""
    unused = f"ipc://{paths.run_dir}/unused"
    return PortArgs(
        tokenizer_ipc_name=unused,
        scheduler_input_ipc_name=unused,
        detokenizer_ipc_name=unused,
        nccl_port=0,
        rpc_ipc_name=f"ipc://{paths.run_dir}/rpc",
        metrics_ipc_name=unused,
        tokenizer_worker_ipc_name=None,
        decoupled_spec_ipc_config=None,
        instance_id=instance_id(plan.launch_id, 0, 0),
    )
