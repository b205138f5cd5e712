"""The report: each command adds a section as JSON; report.md and its plots are a rendering.

    report.append("Midtraining", [settings, {"Validation bpb": 0.91, "run_dir": str(run_dir)}])

python -m nanochat.report reset      a new run starts: forget old sections, note machine and code
python -m nanochat.report generate   write report.md and report_plots/, here and in the base folder

What a section's data may hold (strings are Markdown, dictionaries become lists):
- "run_dir": the folder of a training run, whose metrics.jsonl is plotted;
- "plot": a finished plot (SVG), which is shown as it is;
- "CORE metric": in "Base model evaluation", the first row of the summary;
- "Task set": whose tasks a score is of; "embedded" is shown beside CORE and ChatCORE;
- "Items a task", beside a CORE of no more than so many: shown beside it as well;
- accuracies, in "Chat evaluation <stage>": either "accuracies": a list of {"task", "accuracy",
  "chance", ...} (shown as a table), or entries whose key begins with a capital letter;
- "ChatCORE metric": there as well, the last row of the summary.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat import configurator, report_header
from nanochat.common import UserError, atomic_write_text, read_json, report_dir, write_json

logger = logging.getLogger(__name__)

# Sections in reading order; the optional ones are not missed when they are absent.
SECTIONS = (
    "tokenizer-training",
    "tokenizer-evaluation",
    "base-model-training",
    "base-model-loss",
    "base-model-evaluation",
    "chat-evaluation-base",
    "midtraining",
    "chat-evaluation-mid",
    "chat-sft",
    "chat-evaluation-sft",
    "chat-rl",
    "chat-evaluation-rl",
)
OPTIONAL = frozenset({"chat-evaluation-base", "chat-rl", "chat-evaluation-rl"})
EVALUATED_STAGES = ("base", "mid", "sft", "rl")
HEADER_FILE = "header.json"
REPORT_FILE = "report.md"
# The same name beside both copies of report.md, so that one relative link works for both.
PLOTS_FOLDER = "report_plots"
CORE, CHAT_CORE = "CORE metric", "ChatCORE metric"
TASK_SET = "Task set"
ITEMS_A_TASK = "Items a task"
# Chance of guessing for results that do not bring their own (four answers each).
KNOWN_CHANCE = {"ARC-Easy": 0.25, "ARC-Challenge": 0.25, "MMLU": 0.25}


@dataclass(frozen=True)
class Section:
    """What one command reported."""

    title: str
    time: datetime.datetime
    data: list[Any]

    def value(self, key: str) -> Any:
        """The last value given under a key; None when there is none."""
        found = [item[key] for item in self.data if isinstance(item, dict) and key in item]
        return found[-1] if found else None

    def score_name(self, name: str) -> str:
        """What a score of this section is shown as."""
        return score_name(name, self.value(TASK_SET), self.value(ITEMS_A_TASK))


@dataclass(frozen=True)
class Accuracy:
    """The share of a task's problems that were solved, and by guessing (None = not known)."""

    accuracy: float
    chance: float | None


def score_name(name: str, task_set: str | None, items_a_task: int | None = None) -> str:
    """A score's name: the plain one, under which others publish, only for all their items."""
    notes = ["embedded"] if task_set == "embedded" else []
    if items_a_task:
        notes.append(f"{items_a_task} a task")
    return f"{name} ({', '.join(notes)})" if notes else name


def slug(title: str) -> str:
    """The file name of a section without its ending: lower case, dashes for the rest."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def append(
    section: str, data: Sequence[str | Mapping[str, Any]], *, is_update: bool = False
) -> Path:
    """Write a section, over an earlier one of that title; to be called by the main rank only.

    is_update: the data holds what is still true of the earlier one, so nothing is lost.
    """
    items = [dict(item) if isinstance(item, Mapping) else item for item in data if item]
    path = report_dir() / f"{slug(section)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not is_update:
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
        logger.info(
            "the report's section %s now tells of this run and no longer of that of %s; "
            "python -m nanochat.report generate shows it",
            *(section, _clock(written)),
        )
    write_json(path, {"section": section, "time": _now().isoformat(), "data": _plain(items)})
    return path


def stored(section: str) -> list[Any]:
    """What a section holds now; nothing when it is not there or cannot be read."""
    try:
        return list(read_json(report_dir() / f"{slug(section)}.json")["data"])
    except (OSError, UserError, KeyError, TypeError):
        return []


log = append  # the name that older documents use


def reset() -> None:
    """Forget the sections of an earlier run; describe this machine and code; start the clock."""
    folder = report_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.json"), folder / REPORT_FILE]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / PLOTS_FOLDER, ignore_errors=True)
    write_json(folder / HEADER_FILE, _new_header())
    logger.info("the report starts anew in %s", folder)


def describe_machine() -> None:
    """Let the header tell of this machine and code; the data may have been fetched elsewhere.

    Then the clock starts here, once: neither the time between fetching and training nor the way
    of a job from node to node sets it again.
    """
    path = report_dir() / HEADER_FILE
    if not path.exists():
        return
    before, now = read_json(path), _new_header()
    is_first_move = before.get("host", now["host"]) != now["host"] and not before.get("has_moved")
    if not is_first_move:
        now |= {key: before[key] for key in ("started", "has_moved") if key in before}
    write_json(path, now | ({"has_moved": True} if is_first_move else {}))


def _new_header() -> dict[str, Any]:
    return {
        "started": _now().isoformat(),
        "host": platform.node(),
        "facts": report_header.describe(),
    }


def generate() -> Path:
    """Write report.md and its plots into the report folder and the working directory."""
    folder = report_dir()
    folder.mkdir(parents=True, exist_ok=True)
    sections = read_sections(folder)
    for name in SECTIONS:
        if name not in sections and name not in OPTIONAL:
            logger.warning("the report has no section %s: that stage has not run", name)
    facts, started = _read_header(folder, sections)
    shutil.rmtree(folder / PLOTS_FOLDER, ignore_errors=True)
    images = _draw(folder / PLOTS_FOLDER, sections)
    parts = ["# nanochat report", render_facts(facts, started)]
    parts += [render_section(section, images.get(name)) for name, section in sections.items()]
    parts.append(render_summary(sections, facts, started, images.get("summary")))
    path = folder / REPORT_FILE
    atomic_write_text(path, "\n\n".join(parts) + "\n")
    _copy_here(folder)
    return path


# ---- reading ----------------------------------------------------------------------------------


def read_sections(folder: Path) -> dict[str, Section]:
    """The sections of a report folder by slug: the known ones in their order, then others."""
    names = [path.stem for path in folder.glob("*.json") if path.name != HEADER_FILE]
    others = sorted(set(names) - set(SECTIONS))
    sections = {}
    for name in [*(name for name in SECTIONS if name in names), *others]:
        stored = read_json(folder / f"{name}.json")
        time = datetime.datetime.fromisoformat(stored["time"])
        sections[name] = Section(stored["section"], time, stored["data"])
    return sections


def accuracies(section: Section) -> dict[str, Accuracy]:
    """The results of a chat evaluation by task, ChatCORE not among them."""
    table = section.value("accuracies")
    if table is not None:
        return {row["task"]: Accuracy(row["accuracy"], row.get("chance")) for row in table}
    return {
        key: Accuracy(value, KNOWN_CHANCE.get(key))
        for item in section.data
        if isinstance(item, dict)
        for key, value in item.items()
        if key[:1].isupper() and isinstance(value, float) and key != CHAT_CORE
    }


def _read_header(
    folder: Path, sections: Mapping[str, Section]
) -> tuple[dict[str, dict[str, str]], datetime.datetime | None]:
    path = folder / HEADER_FILE
    if path.exists():
        header = read_json(path)
        return header["facts"], datetime.datetime.fromisoformat(header["started"])
    logger.warning(
        "%s is not there (python -m nanochat.report reset writes it when a run starts); "
        "the clock starts at the first section",
        path,
    )
    times = [section.time for section in sections.values()]
    return report_header.describe(), min(times, default=None)


# ---- rendering --------------------------------------------------------------------------------


def render_facts(facts: Mapping[str, Mapping[str, str]], started: datetime.datetime | None) -> str:
    """The first part: where and with which code this was run."""
    lines = [f"Generated: {_clock(_now())}"]
    for title, group in facts.items():
        lines += ["", f"### {title}", "", *(f"- {key}: {value}" for key, value in group.items())]
    lines += ["", f"Run started: {_clock(started) if started else 'not known'}"]
    return "\n".join(lines)


def render_section(section: Section, image: str | None) -> str:
    """Title, time, then strings as they are, dictionaries as lists, and the plot."""
    parts = [f"## {section.title}", f"Time: {_clock(section.time)}"]
    for item in section.data:
        if isinstance(item, str):
            text = item.strip("\n")
        else:
            scores = {key: section.score_name(key) for key in (CORE, CHAT_CORE)}
            named = {scores.get(key, key): value for key, value in item.items()}
            text = "\n".join(_list_lines(named))
        if text:
            parts.append(text)
    if image is not None:
        parts.append(f"![What was measured while training: {section.title}]({image})")
    return "\n\n".join(parts)


def render_summary(
    sections: Mapping[str, Section],
    facts: Mapping[str, Mapping[str, str]],
    started: datetime.datetime | None,
    image: str | None,
) -> str:
    """Size of the code, one row a metric with one column a stage, and the wall clock."""
    parts = ["## Summary"]
    bloat = facts.get(report_header.BLOAT, {})
    if bloat:
        parts.append("\n".join(f"- {key}: {value}" for key, value in bloat.items()))
    table = summary_table(sections)
    if table:
        parts.append(table)
    if image is not None:
        parts.append(f"![Accuracy of each task at each stage]({image})")
    times = [section.time for name, section in sections.items() if not name.endswith("-rl")]
    if started is not None and times:
        parts.append(f"Total wall clock time: {_hours(max(times) - started)}")
    return "\n\n".join(parts)


def summary_table(sections: Mapping[str, Section]) -> str:
    """Metric | BASE | MID | SFT, and RL where it ran; CORE first, ChatCORE last; "" if empty."""
    columns: dict[str, dict[str, float]] = {}
    for stage in EVALUATED_STAGES:
        section = sections.get(f"chat-evaluation-{stage}")
        column = {task: r.accuracy for task, r in accuracies(section).items()} if section else {}
        if section and section.value(CHAT_CORE) is not None:
            column[section.score_name("ChatCORE")] = section.value(CHAT_CORE)
        columns[stage] = column
    base = sections.get("base-model-evaluation")
    if base and base.value(CORE) is not None:
        columns["base"] = {base.score_name("CORE"): base.value(CORE)} | columns["base"]
    if not columns["rl"]:
        del columns["rl"]
    metrics = dict.fromkeys(metric for column in columns.values() for metric in column)
    if not metrics:
        return ""
    places = {"CORE": 0, "ChatCORE": 2}
    ordered = sorted(metrics, key=lambda metric: places.get(metric.split(" (")[0], 1))
    lines = ["| Metric | " + " | ".join(stage.upper() for stage in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for metric in ordered:
        cells = (format_value(column.get(metric)) for column in columns.values())
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """Floats with 4 decimals, whole numbers from 10,000 with separators, nothing as "-"."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(format_value, value)) if isinstance(value, list) else str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if value and abs(value) < 1e-3:  # four decimals would leave nothing of a learning rate
        return f"{value:.2e}"
    return f"{value:,.4f}"


def _list_lines(item: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in item.items():
        if key in ("run_dir", "plot") or value is None:
            continue
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            lines += ["", *_table_lines(value), ""]
        elif isinstance(value, dict):
            lines += [f"- {key}:", *(f"  - {k}: {format_value(v)}" for k, v in value.items())]
        elif isinstance(value, str) and ("\n" in value or key.lower().startswith("sample")):
            lines += [f"- {key}:", "", *_fenced(value), ""]
        else:
            lines.append(f"- {key}: {format_value(value)}")
    return lines


def _table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |"]
    numeric = {c: all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns}
    lines.append("|" + "".join(" ---: |" if numeric[c] else " --- |" for c in columns))
    for row in rows:
        lines.append("| " + " | ".join(format_value(row.get(c)) for c in columns) + " |")
    return lines


def _fenced(text: str) -> list[str]:
    """A block that shows text as it is, whatever backticks the model wrote."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", *text.strip("\n").splitlines(), fence]


# ---- plots ------------------------------------------------------------------------------------


def _draw(folder: Path, sections: Mapping[str, Section]) -> dict[str, str]:
    """Draw what the sections offer; returns links relative to report.md by section."""
    # Here, because matplotlib takes half a second that `append` should not cost every command.
    from nanochat import report_plots

    images = {}
    for name, section in sections.items():
        run_dir, plot = section.value("run_dir"), section.value("plot")
        if plot is not None and Path(plot).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plot, folder / f"{name}.svg")
            images[name] = f"{PLOTS_FOLDER}/{name}.svg"
        elif plot is not None:
            logger.warning("no plot for %s: %s is not there", section.title, plot)
        if run_dir is None:
            continue
        metrics = Path(run_dir) / "metrics.jsonl"
        if metrics.is_file() and report_plots.draw_training(metrics, folder / f"{name}.svg"):
            images[name] = f"{PLOTS_FOLDER}/{name}.svg"
        else:
            logger.warning("no plot for %s: nothing to read in %s", section.title, metrics)
    results = {
        stage.upper(): accuracies(sections[f"chat-evaluation-{stage}"])
        for stage in EVALUATED_STAGES
        if f"chat-evaluation-{stage}" in sections
    }
    if any(results.values()):
        shares = {
            stage: {task: result.accuracy for task, result in column.items()}
            for stage, column in results.items()
        }
        chances = {
            task: result.chance
            for column in results.values()
            for task, result in column.items()
            if result.chance
        }
        report_plots.draw_accuracies(shares, chances, folder / "accuracy.svg")
        images["summary"] = f"{PLOTS_FOLDER}/accuracy.svg"
    return images


def _copy_here(folder: Path) -> None:
    here = Path.cwd()
    if here.resolve() == folder.resolve():
        return
    try:
        shutil.copyfile(folder / REPORT_FILE, here / REPORT_FILE)
        shutil.rmtree(here / PLOTS_FOLDER, ignore_errors=True)
        if (folder / PLOTS_FOLDER).is_dir():
            shutil.copytree(folder / PLOTS_FOLDER, here / PLOTS_FOLDER)
    except OSError as error:
        logger.warning("no copy of the report in %s: %s", here, error)


# ---- small things -----------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """The same value in what JSON knows: paths as text, NaN as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):  # numpy's float64 is one
        return float(value) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return value.item() if hasattr(value, "item") else os.fspath(value)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)


def _clock(time: datetime.datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _hours(duration: datetime.timedelta) -> str:
    minutes = max(0, round(duration.total_seconds() / 60))
    return f"{minutes // 60}h{minutes % 60}m"


@dataclass(frozen=True)
class Config:
    """Start a report anew, or write report.md of what was reported so far."""

    command: Annotated[Literal["generate", "reset"], tyro.conf.Positional] = "generate"
    """generate or reset."""


def main(config: Config) -> None:
    """Run the command and print where the report lies."""
    if config.command == "reset":
        reset()
    else:
        print(generate())


if __name__ == "__main__":
    configurator.run(main, Config)
