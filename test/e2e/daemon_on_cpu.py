"""Upstream's weight cache daemon where there is no GPU: its own code, with tensors in the host's shared memory in place
of those that CUDA shares between processes.

    python daemon_on_cpu.py SOCKET <flags of sglang>
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

import torch  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402


def main(path: str, flags: list[str]) -> None:
    os.environ["SGLANG_WEIGHT_CACHE_SOCKET_TEMPLATE"] = path + "{device_uuid}"
    os.environ["SGLANG_WEIGHT_CACHE_READY_TEMPLATE"] = path + "{device_uuid}.ready"
    # By name: whoever attaches is no child of this process.
    torch.multiprocessing.set_sharing_strategy("file_system")
    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(flags)
    from sglang.srt.weight_cache import daemon

    class Platform:
        """The CPU as upstream's daemon would have it."""

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            return getattr(platform, name)

        def is_cuda_alike(self) -> bool:
            return True

        def get_device_uuid(self, _gpu_id: int) -> str:
            return ""

        def set_device(self, _device: object) -> None: ...

        def synchronize(self) -> None: ...

        def empty_cache(self) -> None: ...

    platform, daemon.current_platform = daemon.current_platform, Platform()
    # What the weights take, as the pool's size goes by it.
    reserved = iter([0, sum(file.stat().st_size for file in Path(server_args.model_path).glob("*.safetensors"))])
    torch.cuda.memory_reserved = lambda _gpu_id: next(reserved)  # type: ignore[assignment]
    daemon.cleanup_stale_daemon_files("")
    daemon.run_weight_cache_daemon(server_args, gpu_id=0, tp_rank=0, pp_rank=0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
