#!/usr/bin/env python3
"""Train the demo model of `scripts/serve`: a Llama of 1.2 million parameters that speaks the language of docstrings.

    OMP_NUM_THREADS=1 nice -n 10 scripts/train_demo_model.py --minutes 24

made the committed weights on a busy core: 430 steps (1.8 million tokens, 6.5 minutes of CPU time), loss on docstrings
it had not seen 7.6 -> 4.23 nats a token. On an idle core 7 minutes do the same.

It learns from Python's standard library: docstrings, source, and conversations made of them (with a `<think>` block
and tool calls as the chat template spells them). It is not useful; it is trained, so that its next-token
distributions have no artificial near-ties, unlike those of `scripts/make_models.py`. Run `scripts/make_tokenizer.py`
first when the tokenizer is to change too.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from make_tokenizer import MAX_POSITIONS, MODEL_DIR, VOCAB_SIZE
from sglang_kevlar.platform import torchvision_shim
from stdlib_corpus import Documented, documented_names, source_files

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
#: tokens of a step; most steps see short rows, which are cheaper, the last ones long rows
TOKENS = 4096
SHORT, LONG = 256, 1024
LONG_FROM = 0.85
LEARNING_RATE = 3e-3
WARMUP = 0.05
#: share of the text kept out of training, to measure the loss on
HELD_OUT = 0.02

_QUESTIONS = ["What does {name} do?", "Explain {name}.", "What is {name}?", "Tell me about the {kind} {name}."]
_SMALL_TALK = [
    (("Hello", "Hi", "Hello!", "Good morning"), "Hello. Ask me about a name of Python's standard library."),
    (
        ("Who are you?", "What are you?"),
        "I am a tiny demo model that has read Python's standard library.",
    ),
    (("Thanks", "Thank you"), "You are welcome."),
]


class Corpus:
    """Endless training text, in a random order that depends on the seed alone."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._items = [item for item in documented_names() if len(item.text) > 20]
        self._sources = [source for _, source in source_files() if len(source) > 500]
        self._random.shuffle(self._items)
        held_out = int(len(self._items) * HELD_OUT)
        self._held_out, self._items = self._items[:held_out], self._items[held_out:]

    def batches(self) -> Iterator[torch.Tensor]:
        """Token ids, (TOKENS,), documents packed one behind another."""
        pending: list[int] = []
        while True:
            while len(pending) < TOKENS:
                pending += [*self._tokenizer.encode(self._document()), 0]
            yield torch.tensor(pending[:TOKENS])
            pending = pending[TOKENS:]

    def held_out(self) -> torch.Tensor:
        """Token ids, (rows, SHORT), at most 64 rows."""
        ids = [i for item in self._held_out for i in [*self._tokenizer.encode(_page(item)), 0]]
        rows = min(len(ids) // SHORT, 64)
        return torch.tensor(ids[: rows * SHORT]).view(rows, SHORT)

    def _document(self) -> str:
        choice = self._random.random()
        if choice < 0.45:
            return _page(self._random.choice(self._items))
        if choice < 0.55:
            source = self._random.choice(self._sources)
            start = self._random.randrange(len(source))
            return source[start : start + 1500]
        return self._conversation()

    def _conversation(self) -> str:
        messages: list[dict[str, Any]] = []
        tools = None
        kind = self._random.random()
        if kind < 0.08:
            questions, answer = self._random.choice(_SMALL_TALK)
            messages += _turn(self._random.choice(questions), f"{_thought('this is small talk')}{answer}")
        elif kind < 0.25:
            tools = self._tools()
            messages += self._tool_turn(self._random.choice(tools)["function"])
        else:
            for _ in range(self._random.choice((1, 1, 2))):
                messages += self._question_turn(self._random.choice(self._items))
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))

    def _question_turn(self, item: Documented) -> list[dict[str, Any]]:
        question = self._random.choice(_QUESTIONS).format(name=item.name, kind=item.kind)
        # The empty block is what the template writes when the client asks for no thinking.
        thought = _thought(f"{item.name} is a {item.kind}") if self._random.random() < 0.7 else _thought("")
        return _turn(question, thought + _summary(item.text))

    def _tools(self) -> list[dict[str, Any]]:
        functions = [item for item in self._random.sample(self._items, 12) if item.arguments]
        return [
            {
                "type": "function",
                "function": {
                    "name": item.name.rpartition(".")[2],
                    "description": _summary(item.text).partition("\n")[0],
                    "parameters": {
                        "type": "object",
                        "properties": {name: {"type": "string"} for name in item.arguments[:3]},
                    },
                },
            }
            for item in functions[: self._random.randint(1, 2)]
        ] or self._tools()

    def _tool_turn(self, function: dict[str, Any]) -> list[dict[str, Any]]:
        words = [*self._random.choice(self._items).text.split(), "one", "two", "three"]
        values = {name: _plain(self._random.choice(words)) for name in function["parameters"]["properties"]}
        given = ", ".join(f"{name} {value}" for name, value in values.items())
        call = json.dumps({"name": function["name"], "arguments": values})
        thought = _thought(f"{function['name']} is a function") if self._random.random() < 0.7 else _thought("")
        return _turn(f"Call {function['name']} with {given}.", f"{thought}<tool_call>\n{call}\n</tool_call>")


def _plain(word: str) -> str:
    return "".join(c for c in word if c.isalnum())[:12] or "x"


def _page(item: Documented) -> str:
    return f"{item.name}({', '.join(item.arguments)})\n\n{item.text[:2500]}\n"


def _summary(text: str) -> str:
    """The first paragraphs, up to about 500 characters."""
    summary = ""
    for paragraph in text.split("\n\n"):
        if summary and len(summary) + len(paragraph) > 500:
            break
        summary += ("\n\n" if summary else "") + paragraph.strip("\n")
    return summary[:1200]


def _thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


def _turn(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth. ``progress`` runs from 0 to 1."""
    if progress < WARMUP:
        return LEARNING_RATE * (0.02 + progress / WARMUP)
    rest = (progress - WARMUP) / (1 - WARMUP)
    return LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, rest))))


@torch.no_grad()
def _loss(model: Any, rows: torch.Tensor) -> float:
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    return sum(losses) / len(losses)


def train(minutes: float, seed: int) -> tuple[Any, float]:
    """Returns the trained model and its loss per token on docstrings it has not seen."""
    torchvision_shim.install()
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    corpus = Corpus(AutoTokenizer.from_pretrained(MODEL_DIR), seed)
    model = LlamaForCausalLM(LlamaConfig(**(CONFIG | {"dtype": "float32", "torch_dtype": "float32"})))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    held_out = corpus.held_out()
    started = time.monotonic()
    for step, batch in enumerate(corpus.batches()):
        progress = (time.monotonic() - started) / (60 * minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = _rate(progress)
        rows = batch.view(-1, SHORT if progress < LONG_FROM else LONG)
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.3f} {progress:.0%} {time.process_time():.0f} CPU-s", flush=True)
    return model, _loss(model, held_out)


def save(model: Any, out: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (bfloat16) into ``out``."""
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    generation = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0}
    for name, content in (("config.json", CONFIG), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out-dir", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    model, loss = train(args.minutes, args.seed)
    print(f"held-out loss {loss:.3f}")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    save(model, args.out_dir)


if __name__ == "__main__":
    main()
