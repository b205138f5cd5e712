"""infer_bench: a table, and one JSON document as the last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_model import save, scripted_model, tokens_of

from nanochat import kernels, scheduler
from nanochat.common import UserError
from nanochat.configurator import parse
from scripts import infer_bench


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    save("base", scripted_model(tokens_of("ab")))
    monkeypatch.setattr(infer_bench, "BANDWIDTH_BYTES", 1 << 20)


def measured(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[list[str], dict[str, Any]]:
    infer_bench.main(parse(infer_bench.Config, ["--device-type=cpu", *flags]))
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_line_holds_every_figure(capsys: Any, dtype: str) -> None:
    flags = (f"-d={dtype}", "--prompt-tokens=9", "--decode-tokens=5", "--batch-sizes=1,3")
    lines, document = measured(capsys, *flags)
    assert len(lines) == 5
    assert document["dtype"] == dtype
    # 320 x 320 four times, 320 x 1,280 twice, and the head.
    num_weights = 4 * 320 * 320 + 2 * 320 * 1280 + 265 * 320
    size = 4 if dtype == "float32" else 2
    assert num_weights * size <= document["weight_bytes"] <= 1.1 * num_weights * size
    # The plain decoder keeps the token's id, too.
    token_bytes = 2 * 320 * size + 8 * (document["decoder"] == "PlainDecoder")
    assert document["cache_bytes_per_token"] == token_bytes
    bandwidth = document["device"]["memory_bandwidth"]
    assert bandwidth > 0
    assert document["device"]["bandwidth_source"] == "measured"
    assert document["ceiling_tokens_per_second"] == bandwidth / document["weight_bytes"]
    assert [batch["batch_size"] for batch in document["batches"]] == [1, 3]
    for batch in document["batches"]:
        assert batch["ttft_seconds"] > 0
        assert batch["tpot_seconds"] > 0
        assert batch["decode_tokens_per_second"] == pytest.approx(
            batch["batch_size"] / batch["tpot_seconds"]
        )
        assert batch["cache_bytes"] == batch["batch_size"] * 14 * token_bytes
        assert batch["mbu"] == pytest.approx(batch["bytes_per_second"] / bandwidth)
        assert batch["mfu"] is batch["prefill_mfu"] is None


def test_people_are_shown_the_bounds_and_every_column(capsys: Any) -> None:
    flags = ("-d=float32", "--prompt-tokens=9", "--decode-tokens=5", "--batch-sizes=3")
    lines, document = measured(capsys, *flags)
    assert lines[0] == (
        f"weights: {document['weight_bytes']:,} bytes; "
        f"keys and values: {document['cache_bytes_per_token']:,} bytes a token"
    )
    ceiling, bandwidth = (
        document["ceiling_tokens_per_second"],
        document["device"]["memory_bandwidth"],
    )
    assert lines[1] == (
        f"ceiling of one answer: {ceiling:,.0f} tok/s, which read the weights at "
        f"{bandwidth / 1e9:,.1f} GB/s (measured)"
    )
    (batch,) = document["batches"]
    shown = dict(zip(infer_bench.COLUMNS, lines[3].split(), strict=True))
    assert shown["batch"] == "3"
    assert shown["pre tok/s"] == f"{batch['prefill_tokens_per_second']:.2f}"
    assert shown["pre mfu"] == shown["mfu"] == "-"
    assert shown["ttft ms"] == f"{batch['ttft_seconds'] * 1e3:.2f}"
    assert shown["mbu"] == f"{batch['mbu']:.2f}"


def test_a_model_that_ends_early_is_measured_to_the_full_length(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever it is asked, its first token ends the answer.
    model = scripted_model([])
    model.lm_head.weight.data[tokens_of("<|assistant_end|>")] = 1.0
    model.transformer.wte.weight.data.fill_(1.0)
    save("sft", model)
    steps: list[int] = []
    run = infer_bench._run

    def counted(*arguments: Any) -> tuple[float, list[float]]:
        first, seconds = run(*arguments)
        steps.append(len(seconds))
        return first, seconds

    monkeypatch.setattr(infer_bench, "_run", counted)
    flags = ("-i=sft", "--prompt-tokens=9", "--decode-tokens=5", "--batch-sizes=3")
    _, document = measured(capsys, *flags)
    assert document["batches"][0]["tpot_seconds"] > 0
    assert steps == [4, 4]


def test_many_long_prompts_are_read_before_the_first_answer_ends(capsys: Any) -> None:
    flags = ("--prompt-tokens=60", "--decode-tokens=3", "--batch-sizes=40")
    _, document = measured(capsys, *flags)
    assert document["batches"][0]["tpot_seconds"] > 0


def test_a_batch_that_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "affordable_tokens", lambda *_: 30)
    flags = ("--prompt-tokens=9", "--decode-tokens=5", "--batch-sizes=1,3")
    # Found while it is measured: what was free before may be gone.
    with pytest.raises(UserError, match=r"a batch of 3 needs more .* 30 tokens .* leave it out"):
        infer_bench.main(parse(infer_bench.Config, ["--device-type=cpu", *flags]))


def test_a_batch_that_memory_will_not_hold_is_refused_before_any_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(infer_bench, "affordable_tokens", lambda *_: 30)
    monkeypatch.setattr(infer_bench, "measure", None)
    flags = ("--prompt-tokens=9", "--decode-tokens=5", "--batch-sizes=1,3")
    reason = (
        r"a batch of 3 .* \(42 tokens, 0\.0 GB\) than the 30 tokens \(0\.0 GB\) .* leave it out"
    )
    with pytest.raises(UserError, match=reason):
        infer_bench.main(parse(infer_bench.Config, ["--device-type=cpu", *flags]))


@pytest.mark.skipif(kernels.load() is None, reason="no compiled decoder")
def test_int8_weights_are_measured(capsys: Any) -> None:
    flags = ("-d=int8", "--prompt-tokens=9", "--decode-tokens=5", "--batch-sizes=1")
    _, document = measured(capsys, *flags)
    assert (document["dtype"], document["decoder"]) == ("int8", "CompiledDecoder")
    num_weights = 4 * 320 * 320 + 2 * 320 * 1280 + 265 * 320
    # A scale for each output beside the 8 bits of each weight.
    assert num_weights <= document["weight_bytes"] <= 1.1 * num_weights
    assert document["batches"][0]["tpot_seconds"] > 0


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
        ("-d=x", "'x'; use one of bfloat16, float16, float32, int8"),
    ],
)
def test_bad_flags_are_named(flag: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        infer_bench.main(parse(infer_bench.Config, ["--device-type=cpu", flag]))
