"""The report: sections in, one page with plots out, whatever is missing."""

import datetime
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat import report, report_header
from nanochat.report import Config, main
from nanochat.tracking import MetricWriter

STARTED = datetime.datetime(2026, 1, 2, 3, 0, tzinfo=datetime.timezone.utc)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder and a working directory of this test's own; returns the latter."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[datetime.datetime]:
    """The time the report believes in; set by replacing its only entry."""
    times = [STARTED]
    monkeypatch.setattr(report, "_now", lambda: times[0])
    return times


def write_run(folder: Path, num_steps: int = 30) -> str:
    writer = MetricWriter(folder / "metrics.jsonl")
    for step in range(num_steps):
        writer.write(step, loss=8.0 - step / 10, lr=1.0, grad_norm=1.0)
    writer.write(num_steps, val_bpb=1.5)
    return str(folder)


def evaluation(accuracy: float, chat_core: float) -> list[dict[str, Any]]:
    table = [
        {"task": "Choice", "accuracy": accuracy, "chance": 0.25, "problems": 200},
        {"task": "Spelling", "accuracy": accuracy / 2, "chance": 0.0, "problems": 200},
    ]
    return [{"temperature": 0.0}, {"accuracies": table, "ChatCORE metric": chat_core}]


def write_whole_run(tmp_path: Path, clock: list[datetime.datetime]) -> None:
    report.reset()
    clock[0] = STARTED + datetime.timedelta(hours=1, minutes=40)
    report.append("Tokenizer training", [{"vocab_size": 4096}])
    report.append("Tokenizer evaluation", ["| text | bytes |\n| --- | ---: |\n| news | 10 |\n"])
    report.append(
        "Base model training", [{"depth": 4}, {"run_dir": write_run(tmp_path / "base_run")}]
    )
    report.append("Base model loss", [{"val bpb": 0.91}, {"sample 0": "The capital is Paris."}])
    report.append("Base model evaluation", [{"CORE metric": 0.2131, "hellaswag": 0.1}])
    report.append("Chat evaluation base", evaluation(0.26, 0.01))
    report.append("Midtraining", [{"run_dir": write_run(tmp_path / "mid_run")}])
    report.append("Chat evaluation mid", evaluation(0.6, 0.4))
    report.append("Chat SFT", [{"run_dir": write_run(tmp_path / "sft_run")}])
    report.append("Chat evaluation sft", evaluation(0.8, 0.7))


# ---- the whole page ---------------------------------------------------------------------------


def test_sections_stand_in_reading_order_whatever_order_they_came_in(
    tmp_path: Path, clock: list[datetime.datetime]
) -> None:
    write_whole_run(tmp_path, clock)
    report.append("Tokenizer training", [{"vocab_size": 4096}])
    report.append("A further experiment", ["by hand"])
    titles = re.findall(r"^## (.*)$", report.generate().read_text(), flags=re.MULTILINE)
    assert titles == [
        "Tokenizer training",
        "Tokenizer evaluation",
        "Base model training",
        "Base model loss",
        "Base model evaluation",
        "Chat evaluation base",
        "Midtraining",
        "Chat evaluation mid",
        "Chat SFT",
        "Chat evaluation sft",
        "A further experiment",
        "Summary",
    ]


def test_scores_over_the_embedded_tasks_do_not_go_by_the_published_names() -> None:
    section = {"Task set": "embedded"}
    report.append("Base model evaluation", [{"CORE metric": 0.2131}, section])
    report.append("Chat evaluation mid", [section, *evaluation(0.6, 0.4)])
    report.append("Chat evaluation sft", [{"Task set": "public"}, *evaluation(0.8, 0.7)])
    text = report.generate().read_text()
    assert text.count("CORE metric (embedded): 0.2131") == 1
    assert "- ChatCORE metric (embedded): 0.4000\n" in text
    assert "- ChatCORE metric: 0.7000\n" in text
    table = text[text.index("| Metric") :].splitlines()
    assert table[2] == "| CORE (embedded) | 0.2131 | - | - |"
    assert table[5:7] == [
        "| ChatCORE (embedded) | - | 0.4000 | - |",
        "| ChatCORE | - | - | 0.7000 |",
    ]


def test_summary_table_and_wall_clock(tmp_path: Path, clock: list[datetime.datetime]) -> None:
    write_whole_run(tmp_path, clock)
    text = report.generate().read_text()
    assert (
        "| Metric | BASE | MID | SFT |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| CORE | 0.2131 | - | - |\n"
        "| Choice | 0.2600 | 0.6000 | 0.8000 |\n"
        "| Spelling | 0.1300 | 0.3000 | 0.4000 |\n"
        "| ChatCORE | 0.0100 | 0.4000 | 0.7000 |\n"
    ) in text
    assert "Total wall clock time: 1h40m" in text
    assert "Run started: 2026-01-02 03:00:00 UTC" in text


def test_the_clock_starts_with_the_training_where_the_data_came_from_elsewhere(
    tmp_path: Path, clock: list[datetime.datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preempted job may go on on a third machine, which changes nothing any more."""

    def at(hours: float, host: str) -> None:
        clock[0] = STARTED + datetime.timedelta(hours=hours)
        monkeypatch.setattr(report.platform, "node", lambda: host)

    at(0, "download-node")
    report.reset()
    report.append("Tokenizer training", [{"vocab_size": 4096}])
    for hours, host in ((50, "gpu-1"), (51, "gpu-2"), (52, "gpu-1")):
        at(hours, host)
        report.describe_machine()
    at(53.5, "gpu-1")
    report.append("Chat SFT", [{"depth": 4}])
    text = report.generate().read_text()
    assert "Run started: 2026-01-04 05:00" in text
    assert "Total wall clock time: 3h30m" in text


def test_reinforcement_learning_gets_a_column_but_no_wall_clock(
    tmp_path: Path, clock: list[datetime.datetime]
) -> None:
    write_whole_run(tmp_path, clock)
    clock[0] = STARTED + datetime.timedelta(hours=9)
    report.append("Chat RL", [{"source": "sft"}])
    report.append("Chat evaluation rl", [{"temperature": 0.0}, {"GSM8K": 0.11}])
    text = report.generate().read_text()
    assert "| Metric | BASE | MID | SFT | RL |" in text
    assert "| GSM8K | - | - | - | 0.1100 |" in text
    assert "Total wall clock time: 1h40m" in text


def test_links_to_plots_work_beside_both_copies(
    tmp_path: Path, folders: Path, clock: list[datetime.datetime]
) -> None:
    write_whole_run(tmp_path, clock)
    path = report.generate()
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", path.read_text())
    assert links == [
        "report_plots/base-model-training.svg",
        "report_plots/midtraining.svg",
        "report_plots/chat-sft.svg",
        "report_plots/accuracy.svg",
    ]
    for folder in (path.parent, folders):
        assert (folder / "report.md").read_text() == path.read_text()
        for link in links:
            assert ET.parse(folder / link).getroot().tag.endswith("svg")


def test_plots_say_what_they_show_and_are_the_same_every_time(
    tmp_path: Path, folders: Path, clock: list[datetime.datetime]
) -> None:
    write_whole_run(tmp_path, clock)
    report.generate()
    first = {path.name: path.read_bytes() for path in (folders / "report_plots").iterdir()}
    report.generate()
    assert {path.name: path.read_bytes() for path in (folders / "report_plots").iterdir()} == first
    training = first["base-model-training.svg"].decode()
    for label in ("Training loss", "nats per token", "bits per byte", "Learning rate", "step"):
        assert f">{label}<" in training
    accuracy = first["accuracy.svg"].decode()
    for label in ("BASE", "MID", "SFT", "chance", "Choice", "Spelling", "problems solved (%)"):
        assert f">{label}<" in accuracy


def test_reinforcement_learning_shows_reward_and_pass_at_k(tmp_path: Path, folders: Path) -> None:
    rows = [{"step": s, "loss": -0.01, "lr": 0.05, "reward": 0.4 + s / 50} for s in range(1, 11)]
    for step, first in ((0, 0.4), (10, 0.6)):
        passes = {f"pass_at_{k}": first + 0.05 * k for k in range(1, 5)}
        rows.append({"step": step, **passes})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    ordered = sorted(rows, key=lambda row: row["step"])
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered))
    report.append("Chat RL", [{"run_dir": str(run_dir)}])
    report.generate()
    plot = (folders / "report_plots/chat-rl.svg").read_text()
    for label in ("Reward in practice", "Held-out questions", "pass@4", "before", "after", "45.0"):
        assert f">{label}<" in plot
    assert "65.0" in plot
    assert "Training loss" not in plot


# ---- what may be missing ----------------------------------------------------------------------


def test_missing_sections_are_named_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    report.reset()
    report.append("Base model loss", [{"val bpb": 0.9}])
    text = report.generate().read_text()
    assert "- val bpb: 0.9000" in text
    assert "no section tokenizer-training" in caplog.text
    assert "no section midtraining" in caplog.text
    assert "chat-rl" not in caplog.text
    assert "| Metric |" not in text


def test_an_empty_report_is_still_a_page() -> None:
    text = report.generate().read_text()
    assert "# nanochat report" in text
    assert "Run started: not known" in text


def test_without_a_reset_the_clock_starts_at_the_first_section(
    clock: list[datetime.datetime],
) -> None:
    report.append("Tokenizer training", [{"vocab_size": 1}])
    clock[0] = STARTED + datetime.timedelta(minutes=61)
    report.append("Base model loss", [{"val bpb": 0.9}])
    assert "Total wall clock time: 1h1m" in report.generate().read_text()


def test_a_run_whose_metrics_are_gone_has_no_plot_but_a_section(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report.append("Midtraining", [{"run_dir": str(tmp_path / "gone"), "steps": 3}])
    text = report.generate().read_text()
    assert "- steps: 3" in text
    assert "![" not in text
    assert "no plot for Midtraining" in caplog.text


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path, folders: Path) -> None:
    MetricWriter(tmp_path / "metrics.jsonl").write(1, loss=3.0, lr=1.0)
    report.append("Midtraining", [{"run_dir": str(tmp_path)}])
    report.generate()
    assert (folders / "report_plots" / "midtraining.svg").is_file()


def test_a_loss_that_was_no_number_leaves_a_gap_not_an_error(tmp_path: Path, folders: Path) -> None:
    writer = MetricWriter(tmp_path / "metrics.jsonl")
    writer.write(1, loss=3.0, lr=1.0)
    writer.write(2, loss=float("nan"), lr=1.0)
    report.append("Midtraining", [{"run_dir": str(tmp_path)}])
    report.generate()
    assert (folders / "report_plots" / "midtraining.svg").is_file()


def test_a_working_directory_that_can_not_be_written_is_only_a_warning(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folders / "report.md").mkdir()  # a folder where the file should go
    assert report.generate().is_file()
    assert "no copy of the report" in caplog.text


def test_without_git_and_a_driver_the_header_is_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report.reset()
    text = report.generate().read_text()
    assert "- Commit: not known" in text
    assert "- GPUs: none" in text
    assert re.search(r"- Tokens \(approx\): [1-9]", text)


# ---- sections ---------------------------------------------------------------------------------


def body(data: list[Any]) -> str:
    path = report.append("Base model loss", data)
    section = report.read_sections(path.parent)["base-model-loss"]
    return report.render_section(section, None).split("\n\n", 2)[2]


def test_numbers_are_written_as_people_read_them() -> None:
    values = {
        "loss": 2.5,
        "rate": 0.00003,
        "small": 9999,
        "large": 11219763200,
        "fast": 412345.678,
        "flag": True,
        "bad": float("nan"),
        "absent": None,
        "numpy": np.float32(0.5),
        "path": Path("here"),
        "several": (1, 20000),
    }
    assert body([values]).splitlines() == [
        "- loss: 2.5000",
        "- rate: 3.00e-05",
        "- small: 9999",
        "- large: 11,219,763,200",
        "- fast: 412,345.6780",
        "- flag: True",
        "- bad: nan",
        "- numpy: 0.5000",
        "- path: here",
        "- several: 1, 20,000",
    ]


def test_strings_are_kept_and_empty_items_left_out() -> None:
    assert body(["**bold**", {}, "", {"a": 1}]) == "**bold**\n\n- a: 1"


def test_samples_are_fenced_even_when_they_hold_a_fence() -> None:
    text = body([{"sample 0": "Paris.", "answer": "one\n```\ntwo"}])
    assert "```text\nParis.\n```" in text
    assert "````text\none\n```\ntwo\n````" in text


def test_the_folder_of_a_run_is_not_printed() -> None:
    assert "secret" not in body([{"run_dir": "/secret/place", "a": 1}])


def test_a_section_is_replaced_by_a_later_one_of_its_title_which_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        report.append("Chat evaluation sft", [{"MMLU": 0.1}])
        assert caplog.messages == []
        path = report.append("Chat evaluation sft", [{"MMLU": 0.2}])
    (said,) = caplog.messages
    assert re.match("the report's section Chat evaluation sft now tells of this run and no", said)
    assert path.name == "chat-evaluation-sft.json"
    assert json.loads(path.read_text())["data"] == [{"MMLU": 0.2}]


def test_flat_results_are_the_entries_with_a_capital_letter() -> None:
    path = report.append(
        "Chat evaluation sft",
        [{"temperature": 0.5, "top_p": 0.9}, {"MMLU": 0.3, "GSM8K": 0.1, "ChatCORE metric": 0.2}],
    )
    section = report.read_sections(path.parent)["chat-evaluation-sft"]
    assert report.accuracies(section) == {
        "MMLU": report.Accuracy(0.3, 0.25),
        "GSM8K": report.Accuracy(0.1, None),
    }


# ---- the command ------------------------------------------------------------------------------


def test_reset_forgets_everything_of_the_earlier_run(
    tmp_path: Path, clock: list[datetime.datetime]
) -> None:
    write_whole_run(tmp_path, clock)
    folder = report.generate().parent
    main(Config(command="reset"))
    assert sorted(path.name for path in folder.iterdir()) == ["header.json"]


def test_the_header_describes_the_machine_that_trains(
    clock: list[datetime.datetime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data may have been fetched, and the report begun, on a machine without GPUs."""
    report.describe_machine()
    assert "Run started: not known" in report.generate().read_text()
    for machine in ("login-node", "gpu-node"):
        facts = {"Hardware": {"Host": machine}}
        monkeypatch.setattr(report_header, "describe", lambda facts=facts: facts)
        report.reset() if machine == "login-node" else report.describe_machine()
        clock[0] += datetime.timedelta(hours=1)
    text = report.generate().read_text()
    assert "- Host: gpu-node" in text
    assert "login-node" not in text
    assert "Run started: 2026-01-02 03:00" in text


def test_generate_prints_where_the_report_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(Config())
    assert capsys.readouterr().out.strip().endswith("report/report.md")


def test_the_header_describes_this_repository() -> None:
    facts = report_header.describe()
    assert set(facts) == {"Git", "Hardware", "Software", "Bloat"}
    assert facts["Software"]["torch"].startswith("2.")
