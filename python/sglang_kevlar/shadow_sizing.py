"""What a shadow costs: ``python -m sglang_kevlar.shadow_sizing --model-path M [--request-rate 4 ...]``.

Reads the model's ``config.json`` and nothing else. Per worker group, and per rank of it: KV bytes of a token, the
bandwidth that the stream of new KV takes, and the host memory that holds the running requests' contexts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: bytes of an element, by the values of --kv-cache-dtype
ELEMENT_BYTES = {"auto": 2, "bfloat16": 2, "bf16": 2, "float16": 2, "float32": 4, "fp8_e5m2": 1, "fp8_e4m3": 1}


class UnknownModel(ValueError):
    """The configuration does not say what its KV looks like; the message names what is missing."""


@dataclass(frozen=True)
class TokenBytes:
    """KV of one token over all layers."""

    #: what one rank sends and keeps; of MLA, the first of a pipeline stage for all its tensor-parallel ranks
    rank: int
    #: over all that send
    group: int


def token_bytes(config: dict[str, Any], element: int, tp_size: int, pp_size: int) -> TokenBytes:
    """Raises UnknownModel."""
    config = config.get("text_config", config)
    layers = _need(config, "num_hidden_layers")
    stage = math.ceil(layers / pp_size)
    if config.get("kv_lora_rank"):
        # MLA: one latent vector for all heads, the same on every tensor-parallel rank.
        width = config["kv_lora_rank"] + _need(config, "qk_rope_head_dim")
        return TokenBytes(stage * width * element, layers * width * element)
    heads = config.get("num_key_value_heads") or _need(config, "num_attention_heads")
    head_dim = config.get("head_dim") or _need(config, "hidden_size") // _need(config, "num_attention_heads")
    # With fewer heads than ranks each rank has a copy of one.
    of_rank = 2 * max(1, heads // tp_size) * head_dim * element
    return TokenBytes(stage * of_rank, layers * of_rank * tp_size)


def _need(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value <= 0:
        raise UnknownModel(f"config.json has no usable {name!r}")
    return value


def report(args: argparse.Namespace, config: dict[str, Any]) -> str:
    element = ELEMENT_BYTES[args.kv_cache_dtype]
    if args.kv_cache_dtype == "auto" and config.get("torch_dtype", config.get("dtype")) == "float32":
        element = 4
    size = token_bytes(config, element, args.tp_size, args.pp_size)
    new_tokens = args.request_rate * (args.input_tokens + args.output_tokens)
    # On average a running request is half way through its output.
    context = args.input_tokens + args.output_tokens / 2
    running = args.request_rate * args.output_tokens / args.tokens_per_second
    lines = [
        ("KV of one token", size.group, size.rank, "B"),
        ("one context", size.group * (args.input_tokens + args.output_tokens), 0.0, "B"),
        ("stream to the shadow", size.group * new_tokens, size.rank * new_tokens, "B/s"),
        (f"contexts of the {running:.0f} running requests", size.group * context * running, 0.0, "B"),
    ]
    rows = [f"{'':42}{'worker group':>16}{'each rank':>16}"]
    for name, group, rank, unit in lines:
        rank = rank or group * size.rank / size.group
        rows.append(f"{name:42}{_human(group, unit):>16}{_human(rank, unit):>16}")
    need = size.rank * context * running / 2**30
    rows += [
        "",
        f"--shadow-memory is for each rank: at least {max(0.1, need):.1f} (GiB) for the running requests; what is more "
        "keeps",
        "prefixes of finished ones. Prefixes that requests share are sent and kept once, and make all of this less.",
    ]
    return "\n".join(rows)


def _human(value: float, unit: str) -> str:
    for prefix in ("", "K", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            return f"{value:,.{0 if not prefix else 1}f} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang_kevlar.shadow_sizing", description=__doc__.split("\n\n")[1])
    parser.add_argument("--model-path", type=Path, required=True, help="directory with a config.json, or that file")
    parser.add_argument("--tp-size", "--tp", type=_positive_int, default=1)
    parser.add_argument("--pp-size", "--pp", type=_positive_int, default=1)
    parser.add_argument("--kv-cache-dtype", choices=ELEMENT_BYTES, default="auto")
    parser.add_argument("--request-rate", type=_positive, default=4.0, metavar="R", help="requests/s of one group")
    parser.add_argument("--input-tokens", type=_positive, default=2000, metavar="N", help="mean; shared prefixes off")
    parser.add_argument("--output-tokens", type=_positive, default=400, metavar="N", help="mean")
    parser.add_argument("--tokens-per-second", type=_positive, default=40, metavar="N", help="of one stream")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    path = args.model_path / "config.json" if args.model_path.is_dir() else args.model_path
    try:
        config = json.loads(path.read_text())
        print(report(args, config))
    except (OSError, ValueError) as error:
        sys.exit(f"shadow_sizing: {path}: {error}")


if __name__ == "__main__":
    main()
