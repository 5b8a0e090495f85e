"""Every flag of the supported SGLang versions is refused by name, served with a remark, or passed through.

``python -m sglang_kevlar.support_matrix --update docs/limits.md`` writes its table; ``--markdown`` prints it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_kevlar.support_table import REFUSED, REFUSED_ENVIRONMENT, REMARKS
from sglang_kevlar.upstream.contract import SUPPORTED, base_of, installed_version

#: fields whose option is not their name
_OPTIONS = {"ep_join_mode": "--elastic-ep-join-mode", "ep_join_rank_offset": "--elastic-ep-join-rank-offset"}
_OFF = ("", "0", "false", "no", "off")


@cache
def fields_of(version: str) -> frozenset[str]:
    """Names of all ServerArgs fields of ``version``, from our own list, which may be a difference to another's."""
    name = f"flags_{version.replace('.', '_')}.txt"
    lines = resources.files("sglang_kevlar.upstream").joinpath(name).read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    if (base := base_of(version)) is None:
        return frozenset(names)
    added, removed = ({name[1:] for name in names if name[0] == sign} for sign in "+-")
    return (fields_of(base) - removed) | added


def known_fields() -> frozenset[str]:
    """Those of the installed version."""
    return fields_of(installed_version())


#: what a group on several hosts joins with, in the values of one that is on one host
OF_NODES: dict[str, Any] = {"nnodes": 1, "node_rank": 0, "dist_init_addr": None}


def option(field: str) -> str:
    """The command-line spelling of a ServerArgs field."""
    return _OPTIONS.get(field, "--" + field.replace("_", "-"))


def unknown(fields: Iterable[str]) -> list[str]:
    """A message for each field that the matrix does not know, which means SGLang is not the version we know."""
    return [f"unknown flag {option(name)}: not in the support matrix" for name in fields if name not in known_fields()]


def refusals(value_of: Callable[[str], Any], environment: Mapping[str, str]) -> list[str]:
    """A message for each flag and environment variable that is not served. ``value_of``: ServerArgs field to value."""
    found = []
    for row in REFUSED:
        if row.field not in known_fields():
            continue
        value = value_of(row.field)
        if row.applies(value):
            shown = option(row.field) if value is True else f"{option(row.field)} {value}"
            found.append(f"{shown}: {row.reason}")
    for name, reason in REFUSED_ENVIRONMENT.items():
        if environment.get(name, "").lower() not in _OFF:
            found.append(f"{name} in the environment: {reason}")
    return found


def model_refusals(model_config: Any) -> list[str]:
    """The same for what only the model's config tells (upstream's ModelConfig)."""
    if model_config.is_multimodal:
        names = ", ".join(model_config.hf_config.architectures or ())
        reason = next(row.reason for row in REFUSED if row.field == "enable_multimodal")
        return [f"--model-path {model_config.model_path}: {names} is multimodal: {reason}"]
    return []


def markdown() -> str:
    """The generated part of ``docs/limits.md``."""
    lines = ["| Refused | When | Why |", "| --- | --- | --- |"]
    lines += [f"| {_named(row.field)} | {row.when} | {_sentence(row.reason)} |" for row in REFUSED]
    lines += [f"| `{name}` (environment) | set | {_sentence(why)} |" for name, why in REFUSED_ENVIRONMENT.items()]
    lines += ["", "| Served | Remark |", "| --- | --- |"]
    lines += [f"| {_named(field)} | {remark} |" for field, remark in sorted(REMARKS.items())]
    named = {row.field for row in REFUSED} | REMARKS.keys()
    rests = " and ".join(f"{len(fields_of(version) - named)} of SGLang {version}" for version in SUPPORTED)
    lines += ["", f"The other arguments ({rests}) pass through with their meaning."]
    return "\n".join(lines) + "\n"


def _named(field: str) -> str:
    """As it is shown in the tables: with the versions that have it, if that is not all of them."""
    having = [version for version in SUPPORTED if field in fields_of(version)]
    return f"`{option(field)}`" + ("" if len(having) == len(SUPPORTED) else f" ({', '.join(having)})")


#: the generated part of docs/limits.md stands between these
BEGIN, END = "<!-- generated: flags -->", "<!-- end of generated -->"


def in_document(text: str) -> str:
    """``text`` of docs/limits.md with its generated part made anew."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {BEGIN} ... {END} in the document")
    return f"{before}{BEGIN}\n{markdown()}{END}{after}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def main(argv: Sequence[str]) -> int:
    match list(argv):
        case ["--markdown"]:
            print(markdown(), end="")
        case ["--update", document]:
            path = Path(document)
            path.write_text(in_document(path.read_text()))
        case _:
            raise SystemExit("usage: python -m sglang_kevlar.support_matrix --markdown | --update docs/limits.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
