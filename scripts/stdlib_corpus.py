"""The text that every machine with Python has: the standard library. Tokenizer and demo model learn from it."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: tests, tables and what is not part of the library proper
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "encodings",
            "pydoc_data", "idle_test", "ensurepip", "turtledemo"}  # fmt: skip


class Documented(NamedTuple):
    """A documented name of the library, such as ``heapq.merge``, and what its docstring says."""

    name: str
    kind: str  # "module", "class" or "function"
    arguments: list[str]
    text: str


def source_files() -> Iterator[tuple[str, str]]:
    """``(dotted module name, source)`` of every module, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield module, path.read_text("utf-8", "replace")


def documented_names() -> Iterator[Documented]:
    """Modules, public classes, functions and methods that have a docstring, in a fixed order."""
    for module, source in source_files():
        tree = ast.parse(source)
        if text := ast.get_docstring(tree):
            yield Documented(module, "module", [], text)
        yield from _members(module, tree)


def _members(prefix: str, parent: ast.Module | ast.ClassDef) -> Iterator[Documented]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        is_class = isinstance(node, ast.ClassDef)
        if text := ast.get_docstring(node):
            arguments = [] if is_class else [a.arg for a in node.args.args if a.arg not in ("self", "cls")]
            yield Documented(name, "class" if is_class else "function", arguments, text)
        if is_class:
            yield from _members(name, node)
