"""What we rely on in SGLang, checked when a process starts.

The declarations are in one module per upstream version (``v0_5_21``; ``v0_5_23`` is a difference to it). The same
declarations are judged twice: here against the installed, imported package, and by ``scripts/check_upstream.py``
against the source of any wheel. A mismatch stops the start with the name of what moved.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType, ModuleType
from typing import Any, Literal, Protocol

import msgspec

#: exact versions with a module of declarations
SUPPORTED = ("0.5.21", "0.5.23")

#: ``prepare`` resolves the flags, ``gateway`` stands for frontends of other hosts, ``cpu`` is the CPU platform. A seam
#: is checked only in processes that use it.
Role = Literal["prepare", "frontend", "gateway", "rank", "detokenizer", "cpu"]


class UpstreamMismatch(Exception):
    """The installed SGLang is not what we were made for. The message names what moved."""


class Seam(msgspec.Struct, frozen=True, kw_only=True):
    """One thing of SGLang that we import, call, subclass, replace or read."""

    #: ``package.module:Qualified.name``
    target: str
    roles: tuple[Role, ...]
    #: parameter names in order, exactly: for what we override or replace, because upstream calls it
    signature: tuple[str, ...] | None = None
    #: parameter names that must exist: for what we call
    passes: tuple[str, ...] = ()
    #: fields of a record, or attributes an object has
    fields: tuple[str, ...] = ()
    #: value of a constant; None: not compared
    equals: str | int | None = None

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        return self.target.partition(":")[2]


class Shape(msgspec.Struct, frozen=True):
    """What a source of truth knows about one name."""

    #: None: not a function, or its parameters cannot be told
    parameters: tuple[str, ...] | None = None
    #: accepts any further keyword
    open_ended: bool = False
    #: fields and attributes; None: not a class
    fields: frozenset[str] | None = None
    value: str | int | None = None


class Source(Protocol):
    """Where shapes come from: the installed package, or source files."""

    def shape(self, module: str, name: str) -> Shape:
        """Raises ``LookupError`` whose text says what is missing."""


def declarations(upstream_version: str) -> tuple[Seam, ...]:
    """The seams of one supported version."""
    return _declared(upstream_version).SEAMS


def declared_patches(upstream_version: str) -> tuple[str, ...]:
    """File names of the patches one supported version needs."""
    return _declared(upstream_version).PATCHES


def base_of(upstream_version: str) -> str | None:
    """The version that the declarations of this one are a difference to."""
    base: str | None = getattr(_declared(upstream_version), "BASE", None)
    return base


def revised(
    seams: Iterable[Seam],
    *,
    signatures: Mapping[str, str],
    fields: Mapping[str, Mapping[str, str]],
    added: Iterable[Seam] = (),
) -> tuple[Seam, ...]:
    """``seams`` with other signatures, and with fields renamed, by target. One that meets nothing is an error."""
    met: set[str] = set()
    result = []
    for seam in seams:
        renames = fields.get(seam.target, {})
        if seam.signature is not None and seam.target in signatures:
            met.add(seam.target)
            seam = msgspec.structs.replace(seam, signature=tuple(signatures[seam.target].split()))
        if changed := renames.keys() & set(seam.fields):
            met |= {f"{seam.target}.{name}" for name in changed}
            names = dict.fromkeys(renames.get(name, name) for name in seam.fields)
            seam = msgspec.structs.replace(seam, fields=tuple(names))
        result.append(seam)
    wanted = signatures.keys() | {f"{target}.{name}" for target, renames in fields.items() for name in renames}
    if idle := sorted(wanted - met):
        raise ValueError(f"differences to seams that are not declared: {', '.join(idle)}")
    return (*result, *added)


def _declared(upstream_version: str) -> ModuleType:
    return importlib.import_module(f"sglang_kevlar.upstream.v{upstream_version.replace('.', '_')}")


def installed_version() -> str:
    """Raises ``UpstreamMismatch`` when SGLang is not installed or not supported."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise UpstreamMismatch(f"SGLang is not installed (needed: {', '.join(SUPPORTED)})") from None
    if found not in SUPPORTED:
        raise UpstreamMismatch(f"SGLang {found} is installed, but this version supports {', '.join(SUPPORTED)}")
    return found


def check(role: Role) -> None:
    """Check what ``role`` uses in the installed SGLang, importing it. Raises ``UpstreamMismatch`` with all findings."""
    found = installed_version()
    problems = [
        problem for seam in declarations(found) if role in seam.roles for problem in judge(seam, InstalledSource())
    ]
    if problems:
        raise UpstreamMismatch(f"SGLang {found} does not match what we rely on:\n  " + "\n  ".join(problems))


def judge(seam: Seam, source: Source) -> Iterator[str]:
    """What of ``seam`` does not hold, as sentences that name it."""
    try:
        shape = source.shape(seam.module, seam.name)
    except LookupError as error:
        yield f"{seam.target}: {error.args[0]}"
        return
    if (seam.signature is not None or seam.passes) and shape.parameters is None:
        yield f"{seam.target}: is no longer a function"
    elif shape.parameters is not None:
        if seam.signature is not None and shape.parameters != seam.signature:
            yield f"{seam.target}: parameters are {_listed(shape.parameters)}, expected {_listed(seam.signature)}"
        missing = [name for name in seam.passes if name not in shape.parameters]
        if missing and not shape.open_ended:
            yield f"{seam.target}: takes no parameter {_listed(missing)}"
    if seam.fields:
        missing = sorted(set(seam.fields) - (shape.fields or frozenset()))
        if missing:
            yield f"{seam.target}: has no field {_listed(missing)}"
    if seam.equals is not None and shape.value != seam.equals:
        yield f"{seam.target}: is {shape.value!r}, expected {seam.equals!r}"


def _listed(names: Iterable[str]) -> str:
    return f"({', '.join(names)})"


class InstalledSource:
    """The imported package. Fields that an object only gets at run time are read from its methods' code."""

    def shape(self, module: str, name: str) -> Shape:
        try:
            value: Any = importlib.import_module(module)
        except ImportError as error:
            raise LookupError(f"module does not import ({type(error).__name__}: {error})") from error
        for part in name.split(".") if name else ():
            try:
                value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
            except AttributeError:
                raise LookupError("does not exist") from None
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if inspect.isclass(value):
            return _class_shape(value)
        if isinstance(value, FunctionType) or callable(value):
            return _function_shape(value)
        return Shape(value=value if isinstance(value, (str, int)) else None)


def _class_shape(cls: type) -> Shape:
    fields: set[str] = set()
    for base in cls.__mro__[:-1]:
        fields |= set(vars(base)) | set(getattr(base, "__annotations__", ()))
        for member in vars(base).values():
            function = getattr(member, "__func__", member)
            function = getattr(function, "fget", None) or inspect.unwrap(function)
            if isinstance(function, FunctionType):
                fields |= set(function.__code__.co_names)
    fields |= set(getattr(cls, "__struct_fields__", ()))
    call = _function_shape(cls)
    return Shape(parameters=call.parameters, open_ended=call.open_ended, fields=frozenset(fields))


def _function_shape(function: Any) -> Shape:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return Shape()
    named = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return Shape(parameters=named, open_ended=any(p.kind is p.VAR_KEYWORD for p in parameters))
