"""Two directories have one digest when they hold the same model, wherever they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sglang_kevlar.cluster.fingerprint import of_directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"a": 1}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    return directory


def test_a_copy_is_the_same_and_notes_do_not_count(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("mine")
    (copy / "training.log").write_text("mine")
    assert of_directory(str(copy)) == of_directory(str(model))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d / "config.json").write_text('{"a": 2}'),
        lambda d: (d / "tokenizer.json").write_text("[]"),
        lambda d: (d / "chat_template.jinja").write_text("x"),
        lambda d: (d / "model.safetensors").rename(d / "other.safetensors"),
        lambda d: (d / "model.safetensors").write_bytes(bytes(range(256)) * 4095),
        lambda d: (d / "model.safetensors").write_bytes(bytes(255) + bytes(range(1, 256)) * 4096 + bytes(4097)),
    ],
)
def test_what_makes_it_another_model_is_seen(model: Path, change) -> None:
    before = of_directory(str(model))
    change(model)
    assert of_directory(str(model)) != before


def test_weights_far_behind_the_header_are_sampled(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    weights = directory / "model.safetensors"
    weights.write_bytes(bytes(8 << 20))
    before = of_directory(str(directory))
    with weights.open("r+b") as file:
        file.seek(4 << 20)
        file.write(b"\1" * (1 << 20))
    assert of_directory(str(directory)) != before


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        of_directory(str(tmp_path / "none"))
