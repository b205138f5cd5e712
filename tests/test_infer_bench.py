"""infer_bench: a table, and one JSON document as the last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_model import save, scripted_model, tokens_of

from nanochat.common import UserError
from nanochat.configurator import parse
from scripts import infer_bench


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    save("base", scripted_model(tokens_of("ab")))


def measured(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[list[str], dict[str, Any]]:
    infer_bench.main(parse(infer_bench.Config, ["--device-type=cpu", *flags]))
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_line_holds_every_figure(capsys: Any, dtype: str) -> None:
    flags = (f"-d={dtype}", "--prompt-tokens=9", "--decode-tokens=5", "--batch-sizes=1,3")
    lines, document = measured(capsys, *flags)
    assert len(lines) == 3
    assert document["dtype"] == dtype
    # 320 x 320 four times, 320 x 1,280 twice, and the head.
    num_weights = 4 * 320 * 320 + 2 * 320 * 1280 + 265 * 320
    size = 4 if dtype == "float32" else 2
    assert num_weights * size <= document["weight_bytes"] <= 1.1 * num_weights * size
    assert document["cache_bytes_per_token"] == 2 * 320 * size
    assert document["ceiling_tokens_per_second"] is None
    assert [batch["batch_size"] for batch in document["batches"]] == [1, 3]
    for batch in document["batches"]:
        assert batch["ttft_seconds"] > 0
        assert batch["tpot_seconds"] > 0
        assert batch["decode_tokens_per_second"] == pytest.approx(
            batch["batch_size"] / batch["tpot_seconds"]
        )
        assert batch["cache_bytes"] == batch["batch_size"] * 14 * 2 * 320 * size
        assert batch["mbu"] is None


def test_lengths_beyond_the_context_are_shortened_with_a_notice(capsys: Any) -> None:
    lines, document = measured(capsys, "--batch-sizes=1")
    assert lines[0] == (
        "the model's context is 64 tokens: measuring prompts of 1 and answers of 63"
    )
    assert document["batches"][0]["decode_tokens"] == 63


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--batch-sizes=1,x", "--batch-sizes is '1,x'"),
        ("--batch-sizes=0", "--batch-sizes is '0'"),
        ("--prompt-tokens=0", "--prompt-tokens is 0"),
        ("-s=3", "no step 3"),
    ],
)
def test_bad_flags_are_named(flag: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        infer_bench.main(parse(infer_bench.Config, ["--device-type=cpu", flag]))
