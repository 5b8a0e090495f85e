#!/usr/bin/env python3
"""Pack what `test/gpu` needs for a machine with a GPU that reaches no package index: one archive.

    python scripts/pack_for_gpu.py [--python 3.12] [--torch 2.11] [--there NAME...]      makes build/gpu.tar.xz
    there:  tar -xf build/gpu.tar.xz -C /tmp
            export PYTHONPATH=$PWD/python:/tmp/site SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
            export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python        # with another PyTorch than upstream pins
            python3 -m pytest test/gpu -m gpu

That machine has PyTorch with CUDA, which brings Triton and NCCL, of its own, and nvcc for what SGLang compiles when it
starts. What only other attention kernels than Triton's, other GPUs or other models need is left out: 50 MB, not 500.
"""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
#: of the pins for a CPU, what belongs to the PyTorch that is there
OF_TORCH = [
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "setuptools",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "filelock",
]
#: PyTorch -> the release of SGLang's kernels that is built for it (upstream pins that for its own PyTorch)
KERNELS = {"2.11": "0.4.5", "2.13": "0.4.7"}
#: imported where there is CUDA, whatever is used of them
CUDA_PINS = ["flashinfer_python==0.6.18", "nvidia-ml-py", "ninja"]
TESTS = ["pytest", "pytest-timeout", "pluggy", "iniconfig", "hypothesis", "sortedcontainers"]
LEFT_OUT = [
    "sgl_kernel/flash_ops*",
    "sgl_kernel/flashmla_ops*",
    "sgl_kernel/infllm_ops*",
    "sgl_kernel/sm100/*",
    "sglang/multimodal_gen/*",
    "sglang/srt/rust_extensions/_*.so",
    "flashinfer/data/cutlass/*",
    "flashinfer/data/csrc/*",
    "*/tests/*",
]
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def pins(kernels: str, there: list[str]) -> list[str]:
    """What is carried: the versions that the tests run with on a CPU, and beside them what CUDA needs."""
    lines = [
        line.strip()
        for name in ("requirements-cpu.txt", "requirements-cpu-nodeps.txt")
        for line in (ROOT / "scripts" / name).read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    wanted = [*lines, f"sglang-kernel=={kernels}", *CUDA_PINS, *TESTS]
    return [line for line in wanted if line.partition("==")[0] not in (*OF_TORCH, *there)]


def download(wanted: list[str], python: str, into: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(into)]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *wanted], check=True)


def own_metadata(into: Path) -> None:
    """Of this package: SGLang finds its plugins by it. The code is that of the working tree there."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(into), str(ROOT)]
    subprocess.run(command, check=True)


def contents(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Where in a folder of packages each file of it belongs."""
    own = wheel.name.startswith("sglang_kevlar-")
    with zipfile.ZipFile(wheel) as opened:
        for entry in opened.infolist():
            name = entry.filename
            if entry.is_dir():
                continue
            parts = PurePosixPath(name).parts
            if parts[0].endswith(".data"):
                if parts[1] not in ("purelib", "platlib"):
                    continue
                name = "/".join(parts[2:])
            metadata = PurePosixPath(name).parts[0].endswith(".dist-info")
            if (own and not metadata) or any(fnmatch.fnmatch(name, each) for each in LEFT_OUT):
                continue
            yield name, opened.read(entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, default=ROOT / "build" / "gpu.tar.xz")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--torch", choices=sorted(KERNELS), default="2.11", help="of that machine")
    parser.add_argument("--there", nargs="+", default=[], metavar="NAME", help="packages that machine has, too")
    args = parser.parse_args()
    args.archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder) / "wheels"
        download(pins(KERNELS[args.torch], args.there), args.python, wheels)
        own_metadata(wheels)
        site = Path(folder) / "site"
        for wheel in sorted(wheels.glob("*.whl")):
            for name, data in contents(wheel):
                path = site / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        with tarfile.open(args.archive, "w:xz") as archive:
            archive.add(site, "site")
    print(f"{args.archive}: {args.archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
