#!/usr/bin/env python3
"""Train the tokenizer of the demo and test models, and write its files.

    scripts/make_tokenizer.py [OUT_DIR]

A byte-level BPE of 2,048 tokens over Python's standard library, ChatML special tokens and Qwen-style chat template
(tools as `--tool-call-parser qwen25` reads them, `<think>` as `--reasoning-parser qwen3` reads it). The result is
committed in `python/sglang_kevlar/demo/model`, so that every machine has the same token ids whatever its Python.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from stdlib_corpus import documented_names, source_files

VOCAB_SIZE = 2048
MAX_POSITIONS = 32768
MODEL_DIR = Path(__file__).resolve().parents[1] / "python/sglang_kevlar/demo/model"
TEMPLATE = Path(__file__).resolve().with_name("chat_template.jinja")

#: ids 0-2; never part of decoded text
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
#: ids 3-6; single tokens, but text to the parsers, as in Qwen3
MARKUP_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def _corpus() -> Iterator[str]:
    # Prose twice as often as code: the demo answers in docstrings.
    for _ in range(2):
        for item in documented_names():
            yield item.text
    for _, source in source_files():
        yield source[:4000]


def make_tokenizer(out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into ``out``."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[
            *(AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS),
            *(AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS),
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    out.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    for added in content["added_tokens"]:
        added["special"] = added["content"] in SPECIAL_TOKENS
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (out / "chat_template.jinja").write_text(TEMPLATE.read_text("utf-8"), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", nargs="?", type=Path, default=MODEL_DIR)
    make_tokenizer(parser.parse_args().out_dir)


if __name__ == "__main__":
    main()
