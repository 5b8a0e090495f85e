"""The models of tests and demo: same bytes for the same seed, and fit for what the tests ask of them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "python/sglang_kevlar/demo/model"
KINDS = ("llama", "moe", "mla")
TEXTS = [
    "Return a new list containing all items from the iterable in ascending order.\n",
    "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # tabs,   spaces\r\n",
    "Übergröße, 日本語, emoji 👩‍🚀, combining e\u0301, null \0.",
]


def make(out: Path, *flags: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts/make_models.py"), str(out), *flags], check=True, timeout=120)


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models")
    make(out, "--dtype", "float32", "bfloat16")
    return out


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def test_same_seed_gives_same_bytes_and_another_seed_does_not(models: Path, tmp_path: Path) -> None:
    make(tmp_path / "same", "--kind", "llama", "lora")
    make(tmp_path / "other", "--kind", "llama", "lora", "--seed", "1")
    for name in ("llama-f32", "lora"):
        assert digests(tmp_path / "same" / name) == digests(models / name)
    weights = "model.safetensors"
    assert digests(tmp_path / "other/llama-f32")[weights] != digests(models / "llama-f32")[weights]


def test_a_model_is_made_again_only_when_its_parameters_change(tmp_path: Path) -> None:
    weights = tmp_path / "llama-f32/model.safetensors"
    make(tmp_path, "--kind", "llama")
    first = weights.stat()
    make(tmp_path, "--kind", "llama")
    assert weights.stat().st_mtime_ns == first.st_mtime_ns
    make(tmp_path, "--kind", "llama", "--seed", "1")
    assert weights.stat().st_mtime_ns != first.st_mtime_ns
    assert json.loads((tmp_path / "llama-f32/made.json").read_text())["seed"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama-f32"]


def test_bfloat16_is_the_float32_model_rounded(models: Path) -> None:
    exact, rounded = (load_file(models / f"llama-{dtype}/model.safetensors") for dtype in ("f32", "bf16"))
    assert all(torch.equal(tensor.to(torch.bfloat16), rounded[name]) for name, tensor in exact.items())


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_long_varied_and_depends_on_the_prompt(models: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / f"{kind}-f32")
    assert model.config.max_position_embeddings >= 16384
    prompts = torch.tensor([[300, 400, 500, 600], [301, 400, 500, 600]])
    outputs = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=150, do_sample=False, pad_token_id=0
    )[:, 4:]
    for tokens in outputs.tolist():
        assert len(tokens) == 150
        assert not {0, 1, 2} & set(tokens)
        trigrams = set(zip(tokens, tokens[1:], tokens[2:], strict=False))
        assert len(trigrams) > 100
    assert outputs[0].tolist() != outputs[1].tolist()


def test_lora_adapter_fits_the_llama(models: Path) -> None:
    base = load_file(models / "llama-f32/model.safetensors")
    config = json.loads((models / "lora/adapter_config.json").read_text())
    with safe_open(models / "lora/adapter_model.safetensors", "pt") as adapter:
        names = set(adapter.keys())
        assert len(names) == 2 * len(config["target_modules"]) * 4
        for name in names:
            target, part, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            rows, columns = base[f"{target}.weight"].shape
            expected = [config["r"], columns] if part == "lora_A" else [rows, config["r"]]
            assert adapter.get_slice(name).get_shape() == expected
            assert adapter.get_tensor(name).abs().max() > 0


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) == 2048


def test_special_tokens_are_hidden_and_markup_is_not(tokenizer: Any) -> None:
    text = "<|im_start|><think>a</think><tool_call>b</tool_call><|im_end|><|endoftext|>"
    ids = tokenizer.encode(text)
    assert len(ids) == 9
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><tool_call>b</tool_call>"
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2


def test_template_renders_roles_and_thinking_switch(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    render = tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == expected
    assert render(messages, tokenize=False, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    without = render(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert without == expected + "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("arguments", [{"path": "a", "mode": 3}, '{"path": "a", "mode": 3}'])
def test_rendered_tool_call_is_what_upstreams_parser_reads(tokenizer: Any, arguments: Any) -> None:
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.qwen25_detector import Qwen25Detector

    tool = {"type": "function", "function": {"name": "open", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "open", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Open a."},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "opened"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert '"name": "open"' in text.partition("<|im_start|>user")[0]
    assert "<tool_response>\nopened\n</tool_response>" in text
    answer = text.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
    calls = Qwen25Detector().detect_and_parse(answer, [Tool(**tool)]).calls
    assert [(c.name, json.loads(c.parameters)) for c in calls] == [("open", {"path": "a", "mode": 3})] * 2


def test_demo_model_is_small_and_knows_the_language_of_docstrings(tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 5_000_000
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    assert model.config.max_position_embeddings >= 16384
    text = "Return the name of the file. If the optional argument is not given, the default is None."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 5.0  # a uniform guess costs 7.6
