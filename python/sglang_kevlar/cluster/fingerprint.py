"""Which model lies in a directory: a digest over what makes it that model, and not over all of its bytes.

Of files that are small everything counts; of weights their names, sizes, headers (names, types, shapes and places of
tensors) and samples of their bytes. Two models that differ in a fine-tuning differ in nearly every sample.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

#: everything of these counts
_WHOLE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".yaml")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
#: what does not change answers, and is often edited
_IGNORED = ("README.md", ".gitattributes")
#: larger ones are sampled
_WHOLE_BYTES = 64 << 20
_HEADER_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def of_directory(path: str) -> str:
    """Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(path).iterdir()):
        if file.name in _IGNORED or not file.is_file() or file.suffix not in (*_WHOLE, *_WEIGHTS):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as opened:
            if file.suffix in _WHOLE and size <= _WHOLE_BYTES:
                digest.update(opened.read())
            else:
                _sample(opened.fileno(), size, digest)
    return digest.hexdigest()


def _sample(descriptor: int, size: int, digest: hashlib.blake2b) -> None:
    # Of safetensors the header is longer with many tensors; what is behind this is in no header we know.
    digest.update(os.pread(descriptor, min(size, _HEADER_BYTES), 0))
    for sample in range(_SAMPLES):
        digest.update(os.pread(descriptor, _SAMPLE_BYTES, sample * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1)))
