"""SGLang that does not notice a dead worker: integrated failover for the real engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sglang_kevlar.engine import Engine

__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazily: the launcher imports this package and must not import torch.
    if name == "Engine":
        from sglang_kevlar.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
