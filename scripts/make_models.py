#!/usr/bin/env python3
"""Make tiny random-weight models for tests: same seed, same bytes, on every machine.

    scripts/make_models.py OUT_DIR [--kind llama moe mla lora] [--dtype float32] [--seed 0]

writes `OUT_DIR/llama-f32`, `OUT_DIR/moe-f32`, `OUT_DIR/mla-f32` and `OUT_DIR/lora` (a PEFT adapter for the llama). A
model that is already there with the same parameters is left alone. For embeddings, serve the llama with
`--is-embedding`.

The weights are scaled so that greedy output varies and depends on the whole context, and so that the
end-of-sequence token is never the most likely one: generations run to `max_new_tokens`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from make_tokenizer import MODEL_DIR, SPECIAL_TOKENS, TOKENIZER_FILES, VOCAB_SIZE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUFFIXES = {"float32": "f32", "bfloat16": "bf16"}
KINDS = ("llama", "moe", "mla", "lora")
#: part of the stamp: raise it when the same arguments make something else
REVISION = 2

HIDDEN = 128
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
POSITIONS = 32768
LORA_RANK = 8

Shapes = dict[str, tuple[int, ...]]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
}


def _llama_config() -> dict[str, Any]:
    return _COMMON | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 384,
        "mlp_bias": False,
    }


def _moe_config() -> dict[str, Any]:
    return _COMMON | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }


def _mla_config() -> dict[str, Any]:
    return _COMMON | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": HEADS,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": LAYERS,  # no expert layers: this one is about attention
        "moe_layer_freq": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        # Upstream reads yarn scaling for this architecture without asking whether it is there.
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": POSITIONS // 8,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    }


def _mlp_shapes(prefix: str, intermediate: int, names: tuple[str, str, str]) -> Shapes:
    gate, up, down = names
    return {
        f"{prefix}.{gate}.weight": (intermediate, HIDDEN),
        f"{prefix}.{up}.weight": (intermediate, HIDDEN),
        f"{prefix}.{down}.weight": (HIDDEN, intermediate),
    }


def _attention_shapes(prefix: str, config: dict[str, Any]) -> Shapes:
    if config["model_type"] != "deepseek_v2":
        return {
            f"{prefix}.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        }
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    return {
        f"{prefix}.q_proj.weight": (HEADS * (nope + rope), HIDDEN),
        f"{prefix}.kv_a_proj_with_mqa.weight": (latent + rope, HIDDEN),
        f"{prefix}.kv_a_layernorm.weight": (latent,),
        f"{prefix}.kv_b_proj.weight": (HEADS * (nope + value), latent),
        f"{prefix}.o_proj.weight": (HIDDEN, HEADS * value),
    }


def _shapes(config: dict[str, Any]) -> Shapes:
    shapes: Shapes = {
        "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB_SIZE, HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
        shapes |= _attention_shapes(f"{layer}.self_attn", config)
        if config["model_type"] == "mixtral":
            moe = f"{layer}.block_sparse_moe"
            shapes[f"{moe}.gate.weight"] = (config["num_local_experts"], HIDDEN)
            for expert in range(config["num_local_experts"]):
                shapes |= _mlp_shapes(f"{moe}.experts.{expert}", config["intermediate_size"], ("w1", "w3", "w2"))
        else:
            shapes |= _mlp_shapes(f"{layer}.mlp", config["intermediate_size"], ("gate_proj", "up_proj", "down_proj"))
    return shapes


def _gain(name: str) -> float:
    """Standard deviation times sqrt(fan in).

    Sharp attention keeps greedy output from looping. More of it, or stronger layers, would amplify the rounding
    differences between prefill and decode: here they turn 2 of a million float32 greedy tokens.
    """
    if name.endswith(("q_proj.weight", "k_proj.weight", "kv_a_proj_with_mqa.weight")):
        return 1.5
    if name == "lm_head.weight":
        return 3.0  # standard deviation of the logits
    if name == "model.embed_tokens.weight":
        return math.sqrt(HIDDEN)  # not a sum over the hidden size: entries of standard deviation 1
    return 1.0


def random_tensor(name: str, shape: tuple[int, ...], seed: int, gain: float) -> torch.Tensor:
    """A float32 tensor that depends on ``name``, ``shape``, ``seed`` and ``gain``, and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * (gain / math.sqrt(shape[-1]))


def _weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, shape in _shapes(config).items():
        tensors[name] = torch.ones(shape) if len(shape) == 1 else random_tensor(name, shape, seed, _gain(name))
    tensors["lm_head.weight"][: len(SPECIAL_TOKENS)] = 0.0
    return tensors


def _save(tensors: dict[str, torch.Tensor], dtype: str, file: Path) -> None:
    save_file({name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _make_model(out: Path, config: dict[str, Any], dtype: str, seed: int) -> None:
    _save(_weights(config, seed), dtype, out / "model.safetensors")
    _write_json(out / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})
    _write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0})
    for name in TOKENIZER_FILES:
        shutil.copyfile(MODEL_DIR / name, out / name)


def _make_adapter(out: Path, dtype: str, seed: int) -> None:
    """A LoRA adapter of the llama, strong enough to change its greedy output."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tensors = {}
    for name, shape in _shapes(_llama_config()).items():
        if name.endswith(tuple(f"{target}.weight" for target in targets)):
            rows, columns = shape
            stem = "base_model.model." + name.removesuffix(".weight")
            for part, size in (("lora_A", (LORA_RANK, columns)), ("lora_B", (rows, LORA_RANK))):
                tensors[f"{stem}.{part}.weight"] = random_tensor(f"{stem}.{part}", size, seed, 1.0)
    _save(tensors, dtype, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "llama",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    _write_json(out / "adapter_config.json", config)


def make(out_dir: Path, kind: str, dtype: str = "float32", seed: int = 0) -> Path:
    """Make one model, unless it is there already. Returns its directory."""
    out = out_dir / ("lora" if kind == "lora" else f"{kind}-{SUFFIXES[dtype]}")
    stamp = {"revision": REVISION, "kind": kind, "dtype": dtype, "seed": seed}
    stamp_file = out / "made.json"
    if stamp_file.exists() and json.loads(stamp_file.read_text()) == stamp:
        return out
    # Complete or not there at all: another process may be looking for it.
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if kind == "lora":
        _make_adapter(partial, dtype, seed)
    else:
        config = {"llama": _llama_config, "moe": _moe_config, "mla": _mla_config}[kind]()
        _make_model(partial, config, dtype, seed)
    _write_json(partial / "made.json", stamp)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["float32"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for kind in args.kind:
        for dtype in args.dtype if kind != "lora" else args.dtype[:1]:
            print(make(args.out_dir, kind, dtype, args.seed))


if __name__ == "__main__":
    main()
