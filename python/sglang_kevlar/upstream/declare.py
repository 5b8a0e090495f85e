"""How the modules of a version say what they rely on, and in which processes."""

from __future__ import annotations

from sglang_kevlar.upstream.contract import Role, Seam

PREPARE: tuple[Role, ...] = ("prepare",)
FRONTEND: tuple[Role, ...] = ("frontend",)
GATEWAY: tuple[Role, ...] = ("gateway",)
#: both speak to groups
SPEAKERS: tuple[Role, ...] = ("frontend", "gateway")
RANK: tuple[Role, ...] = ("rank",)
DETOKENIZER: tuple[Role, ...] = ("detokenizer",)
SERVING: tuple[Role, ...] = ("frontend", "rank", "detokenizer")
ALL: tuple[Role, ...] = ("prepare", "frontend", "rank", "detokenizer")
CPU: tuple[Role, ...] = ("cpu",)


def seam(
    target: str,
    roles: tuple[Role, ...],
    *,
    signature: str | None = None,
    passes: str = "",
    fields: str = "",
    equals: str | int | None = None,
) -> Seam:
    """``signature`` where upstream calls what we overrode or replaced, ``passes`` where we call, ``fields`` what we
    read or set on an object. An empty name is the module itself."""
    return Seam(
        target="sglang." + target,
        roles=roles,
        signature=None if signature is None else tuple(signature.split()),
        passes=tuple(passes.split()),
        fields=tuple(fields.split()),
        equals=equals,
    )


def methods(cls: str, roles: tuple[Role, ...], **signatures: str) -> tuple[Seam, ...]:
    """Methods that we override: upstream calls them with these parameters."""
    return tuple(seam(f"{cls}.{name}", roles, signature=f"self {names}") for name, names in signatures.items())
