"""Entry point of group ``sglang.srt.plugins``: SGLang calls :func:`register` in every process it starts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_kevlar.upstream import patches
from sglang_kevlar.upstream.contract import UpstreamMismatch

#: Set to "1" in every process of ours. Without it a `python -m sglang.launch_server` in the same environment keeps
#: stock behaviour.
ENABLE = "SGLANG_KEVLAR"


class Hook(NamedTuple):
    target: str
    function: Callable[..., Any]
    kind: HookType


def hooks() -> list[Hook]:
    """All hooks of a process of ours. Imports what they need."""
    from sglang_kevlar.worker import penalties

    return [
        Hook(
            "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch",
            penalties.after_build,
            HookType.AFTER,
        ),
        Hook(
            "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
            penalties.skip_host_count,
            HookType.AROUND,
        ),
    ]


def enabled() -> bool:
    return os.environ.get(ENABLE) == "1"


def register() -> None:
    """Register our hooks; upstream applies them when all plug-ins are loaded."""
    _prepare_cpu()
    if enabled():
        for hook in hooks():
            HookRegistry.register(hook.target, hook.function, hook.kind)
        # For processes that SGLang itself spawns; ours have done it before they imported anything of it.
        patches.install()


def verify_applied() -> None:
    """Raise UpstreamMismatch naming every hook or patch that is not in effect here. Upstream only logs a failure.

    To be called after ``sglang.srt.plugins.load_plugins()``.
    """
    missing = [hook.target for hook in hooks() if not is_applied(hook)]
    if missing:
        raise UpstreamMismatch(f"SGLang hooks that were not applied (see the log above): {', '.join(missing)}")
    patches.verify()


def is_applied(hook: Hook) -> bool:
    """Whether the hook was registered, and its target is the wrapper that the registry put there."""
    registered = any(function is hook.function for _, function, _ in HookRegistry._hooks.get(hook.target, ()))
    if not registered or hook.target not in HookRegistry._patched:
        return False
    owner_name, name = hook.target.rsplit(".", 1)
    module_name, class_name = owner_name.rsplit(".", 1)
    owner = getattr(importlib.import_module(module_name), class_name)
    return hasattr(getattr(owner, name), "__wrapped__")


def _prepare_cpu() -> None:
    """What upstream needs on plain CPU torch, also in a stock server. No-op where the platform is not active."""
    from sglang_kevlar import platform

    if platform.activate() is not None:
        # Upstream asks the platform when it imports the model runner. With more than one rank that is too late: it
        # has bound threads by then.
        from sglang_kevlar.platform.hooks import register_cpu_hooks

        register_cpu_hooks()
