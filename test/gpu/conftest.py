"""What runs only on GPUs: `./scripts/test test/gpu -m gpu`. Without them each test is skipped, for a named reason."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from on_devices import ENVIRONMENT, NO_ASSERTIONS

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
    os.environ.update(ENVIRONMENT)
    if marker is not None and (reason := missing(*marker.args)) is not None:
        pytest.skip(reason)


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a group of two ranks: on two devices, or on the only one. There NCCL takes them for two hosts, so that
    its kernels wait for each other as ever, and what they say goes through sockets."""
    import torch

    if torch.cuda.device_count() > 1:
        return ["--tp-size", "2"]
    monkeypatch.setenv(*NO_ASSERTIONS)
    paths = [str(HERE / "as_two_hosts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("NCCL_NET", "Socket")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    return ["--tp-size", "2", "--gpu-id-step", "0"]
