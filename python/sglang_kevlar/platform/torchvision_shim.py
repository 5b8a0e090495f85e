"""Lets the torchvision of PyPI (a CUDA build) be imported with a CPU build of torch.

Upstream imports torchvision at many places, through transformers. Its compiled operators link against CUDA
libraries and do not load on CPU torch, and the import then fails because fake kernels are registered for two
operators that do not exist. Declaring their schemas is enough: nobody calls them here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
#: torch forgets the operators when their library object is collected
_library: object | None = None


def install() -> None:
    """Declare what torchvision misses. Call it before the first import of torchvision, transformers or sglang.

    Idempotent. Does nothing on a torch with CUDA or ROCm, without torchvision, or when the operators load
    (a torchvision built for this torch).
    """
    global _library
    if _watch in sys.meta_path:
        sys.meta_path.remove(_watch)
    if _library is not None or "torchvision" in sys.modules:
        return
    import torch

    if torch.version.cuda or torch.version.hip:
        return
    # Finds the package without running it.
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).with_name("_C.so")):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _library = library


def _loads(path: Path) -> bool:
    import torch

    try:
        # torchvision's own load of the same file is then a no-op.
        torch.ops.load_library(str(path))
    except OSError:
        return False
    return True


class _Watch:
    """A finder that finds nothing: asked for torchvision, it installs the shim first."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> None:
        if fullname == "torchvision":
            install()


_watch = _Watch()


def install_on_import() -> None:
    """Do so when torchvision is imported, if it ever is: for a ``.pth`` file, which every Python starts with."""
    if "torchvision" not in sys.modules and _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)  # type: ignore[arg-type]
