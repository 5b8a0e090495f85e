"""What runs only on GPUs: `./scripts/test test/gpu -m gpu`. Without them each test is skipped, for a named reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def missing(devices: int) -> str | None:
    """Why a test with so many devices cannot run."""
    import torch

    if not torch.backends.cuda.is_built():
        return "the installed PyTorch is made without CUDA"
    if (found := torch.cuda.device_count()) < devices:  # by the driver's library: it does not begin to use the driver
        return f"needs {devices} CUDA device(s), and there is {found or 'none'}"
    if importlib.util.find_spec("sgl_kernel") is None:
        return "SGLang's CUDA kernels (sgl_kernel) are not installed"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("gpu") is None:
            raise pytest.UsageError(f"{item.nodeid} does not say how many devices it needs: @pytest.mark.gpu(NUMBER)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is not None and (reason := missing(*marker.args)) is not None:
        pytest.skip(reason)
