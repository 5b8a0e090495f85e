"""The calculator agrees with what the pools of real models hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_kevlar.shadow_sizing import TokenBytes, UnknownModel, main, token_bytes

LLAMA_8B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "hidden_size": 4096,
}
DEEPSEEK_V3: dict[str, Any] = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "tp", "pp", "expected"),
    [
        (LLAMA_8B, 1, 1, TokenBytes(131072, 131072)),
        (LLAMA_8B, 8, 1, TokenBytes(16384, 131072)),
        (LLAMA_8B, 16, 1, TokenBytes(16384, 262144)),  # half as many heads as ranks: each has a copy
        (LLAMA_8B, 1, 2, TokenBytes(65536, 131072)),
        (DEEPSEEK_V3, 1, 1, TokenBytes(70272, 70272)),
        (DEEPSEEK_V3, 8, 1, TokenBytes(70272, 70272)),
        ({"text_config": LLAMA_8B}, 1, 1, TokenBytes(131072, 131072)),
    ],
)
def test_bytes_of_a_token(config: dict[str, Any], tp: int, pp: int, expected: TokenBytes) -> None:
    assert token_bytes(config, 2, tp, pp) == expected


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UnknownModel, match="num_hidden_layers"):
        token_bytes({}, 2, 1, 1)


def test_report(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model-path", str(models / "llama-f32"), "--request-rate", "10", "--input-tokens", "900"])
    out = capsys.readouterr().out
    # 4 layers, keys and values of 2 heads of 32 float32; 13,000 new tokens a second
    assert "4.1 KB" not in out and "2.0 KB" in out and "26.6 MB/s" in out


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": "two"}))
    with pytest.raises(SystemExit, match="num_hidden_layers"):
        main(["--model-path", str(tmp_path)])
    with pytest.raises(SystemExit, match="No such file"):
        main(["--model-path", str(tmp_path / "none")])
