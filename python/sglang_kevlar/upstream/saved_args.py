"""SGLang's resolved ServerArgs on disk: written once by ``launcher.prepare``, loaded by every process.

Upstream hands the record to its children through multiprocessing's spawn, which also carries the environment and
``sys.path``. Both matter: resolution decides by environment variables (deterministic inference, NCCL), and a model
with remote code puts its modules on the path. So both are written beside the record.

Same host, same user, a private directory: this is the one place where a pickle is read.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

#: Set by upstream per process or by us per group, never inherited from the preparation.
_NOT_INHERITED = frozenset({"PROMETHEUS_MULTIPROC_DIR"})


class Surroundings(msgspec.Struct, frozen=True):
    """What else a process needs to be like the one that resolved the arguments."""

    #: variables set or changed by resolution; None: removed
    environment: dict[str, str | None]
    #: entries that resolution appended to ``sys.path``
    search_path: list[str]


def _surroundings_file(path: str) -> Path:
    return Path(f"{path}.env")


def changes_since(environment: Mapping[str, str], search_path: Sequence[str]) -> Surroundings:
    """How this process differs from how it was when the two arguments were copied."""
    now = dict(os.environ)
    changed = {
        name: now.get(name)
        for name in sorted(now.keys() | environment.keys())
        if now.get(name) != environment.get(name) and name not in _NOT_INHERITED
    }
    return Surroundings(changed, [entry for entry in sys.path if entry not in search_path])


def save(path: str, server_args: ServerArgs, surroundings: Surroundings) -> None:
    """Write both files, readable by this user only."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(server_args)
    for file, data in ((_surroundings_file(path), msgspec.json.encode(surroundings)), (Path(path), buffer.getvalue())):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)


def load(path: str) -> ServerArgs:
    """The resolved record. Sets the environment first: call it before anything imports sglang."""
    surroundings = msgspec.json.decode(_surroundings_file(path).read_bytes(), type=Surroundings)
    for name, value in surroundings.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path += [entry for entry in surroundings.search_path if entry not in sys.path]
    with open(path, "rb") as file:
        return pickle.load(file)
