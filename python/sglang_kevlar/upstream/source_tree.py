"""The contract's view of SGLang source that is not imported: a wheel, or a checkout, of any version."""

from __future__ import annotations

import ast
from functools import cached_property
from pathlib import Path

from sglang_kevlar.upstream.contract import Shape

_Function = ast.FunctionDef | ast.AsyncFunctionDef
#: re-exports of re-exports; a cycle ends here
_MAX_HOPS = 8


class SourceTree:
    """``root`` contains ``sglang/``. Answers as ``contract.InstalledSource`` does, by reading only."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, ast.Module | None] = {}
        self._attributes_of: dict[tuple[str, str], frozenset[str]] = {}

    def shape(self, module: str, name: str) -> Shape:
        if self._tree(module) is None:
            raise LookupError("module does not exist")
        if not name:
            return Shape()
        if (module, name) == ("sglang.srt.server_args", "ServerArgs"):
            return Shape(fields=self.server_args_fields | self._attributes(module, "ServerArgs"))
        owner, _, member = name.rpartition(".")
        node = self._member(module, owner, member) if owner else self._top_level(module, member)
        if node is None:
            raise LookupError("does not exist")
        where, definition = node
        if isinstance(definition, ast.ClassDef):
            return self._class_shape(where, definition)
        if isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return _function_shape(definition)
        return Shape(value=_constant(definition))

    @cached_property
    def server_args_fields(self) -> frozenset[str]:
        """ServerArgs is assembled at run time from the annotations of the classes in ``arg_groups/fields``."""
        names: set[str] = set()
        for file in sorted((self._root / "sglang/srt/arg_groups/fields").glob("*.py")):
            tree = self._tree(f"sglang.srt.arg_groups.fields.{file.stem}") or ast.Module([], [])
            for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
                for node in cls.body:
                    if (
                        isinstance(node, ast.AnnAssign)
                        and isinstance(node.target, ast.Name)
                        and "ClassVar" not in (text := ast.unparse(node.annotation))
                        # `Derived` values belong to a namespace, but are not fields of the record.
                        and "Derived(" not in text
                        and "Derived(" not in (ast.unparse(node.value) if node.value else "")
                    ):
                        names.add(node.target.id)
        return frozenset(names)

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._modules:
            base = self._root / module.replace(".", "/")
            files = [file for file in (base.with_name(base.name + ".py"), base / "__init__.py") if file.is_file()]
            self._modules[module] = ast.parse(files[0].read_bytes()) if files else None
        return self._modules[module]

    def _top_level(self, module: str, name: str, hops: int = 0) -> tuple[str, ast.stmt] | None:
        """Definition of ``name`` and the module it is in, through imports and conditional blocks."""
        tree = self._tree(module)
        if tree is None or hops > _MAX_HOPS:
            return None
        imported: tuple[str, ast.stmt] | None = None
        for node in _statements(tree.body):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return module, node
            if isinstance(node, ast.Import) and any((a.asname or a.name.partition(".")[0]) == name for a in node.names):
                return module, node
            if isinstance(node, ast.ImportFrom) and imported is None:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        imported = self._top_level(self._absolute(module, node), alias.name, hops + 1)
                    elif alias.name == "*":
                        imported = self._top_level(self._absolute(module, node), name, hops + 1)
        return imported

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = (self._root / module.replace(".", "/") / "__init__.py").is_file()
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _member(self, module: str, owner: str, name: str) -> tuple[str, ast.stmt] | None:
        for where, cls in self._with_bases(module, owner):
            for node in _statements(cls.body):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                    return where, node
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                    return where, node
        return None

    def _with_bases(self, module: str, name: str, hops: int = 0) -> list[tuple[str, ast.ClassDef]]:
        if hops > _MAX_HOPS or (found := self._top_level(module, name)) is None:
            return []
        where, cls = found
        if not isinstance(cls, ast.ClassDef):
            return []
        chain = [(where, cls)]
        for base in cls.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                chain += self._with_bases(where, base.id, hops + 1)
        return chain

    def _attributes(self, module: str, name: str) -> frozenset[str]:
        """Members of the class and its bases, and whatever their methods touch on an object."""
        key = (module, name)
        if key not in self._attributes_of:
            names: set[str] = set()
            for _, cls in self._with_bases(module, name):
                names |= _members(cls)
            self._attributes_of[key] = frozenset(names)
        return self._attributes_of[key]

    def _class_shape(self, module: str, cls: ast.ClassDef) -> Shape:
        fields = self._attributes(module, cls.name)
        constructor = self._member(module, cls.name, "__init__")
        if constructor is not None and isinstance(constructor[1], _Function):
            call = _function_shape(constructor[1])
            return Shape(parameters=(call.parameters or ())[1:], open_ended=call.open_ended, fields=fields)
        # A record: its annotated fields are its parameters.
        parameters = tuple(
            node.target.id
            for _, base in reversed(self._with_bases(module, cls.name))
            for node in base.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        )
        return Shape(parameters=parameters, fields=fields)


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """``body`` with what stands inside ``if`` and ``try`` blocks."""
    flat: list[ast.stmt] = []
    for node in body:
        flat.append(node)
        if isinstance(node, ast.If):
            flat += _statements(node.body) + _statements(node.orelse)
        elif isinstance(node, ast.Try):
            flat += _statements(node.body) + _statements(node.orelse)
            for handler in node.handlers:
                flat += _statements(handler.body)
    return flat


def _members(cls: ast.ClassDef) -> set[str]:
    names: set[str] = set()
    for node in _statements(cls.body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
            names |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= _targets(node)
    return names


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _function_shape(node: _Function) -> Shape:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        return Shape()
    return Shape(parameters=tuple(names), open_ended=arguments.kwarg is not None)


def _constant(node: ast.stmt) -> str | int | None:
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, (str, int)) else None
