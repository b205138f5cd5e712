"""What the report says about code, machine and software. Nothing here fails for want of a tool."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from nanochat import hardware

BLOAT = "Bloat"
GIT_SECONDS = 5
MESSAGE_CHARS = 80
CODE_ENDINGS = frozenset({".py", ".rs", ".sh", ".slurm", ".toml", ".html", ".md"})
CHARS_PER_TOKEN = 4  # the usual rule of thumb for English and code
PACKAGES = ("torch", "numpy", "pyarrow", "safetensors")


def describe(root: Path | None = None) -> dict[str, dict[str, str]]:
    """Facts by heading, ready to print. root: the repository (default: the one of this code)."""
    root = root or Path(__file__).resolve().parents[1]
    return {
        "Git": git_facts(root),
        "Hardware": {k: v for k, v in hardware.describe_machine().items() if k != "Python"},
        "Software": software_facts(),
        BLOAT: code_size(root),
    }


def git_facts(root: Path) -> dict[str, str]:
    """Branch, commit, whether files differ from it, and the first line of its message."""
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if commit is None:
        return {"Commit": "not known (no git, or not a clone)"}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "Branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD") or "not known",
        "Commit": commit + (" (with changes that are not committed)" if changed else ""),
        "Message": (_git(root, "log", "-1", "--format=%s") or "")[:MESSAGE_CHARS],
    }


def software_facts() -> dict[str, str]:
    """Versions of Python and of the packages that decide about results."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def code_size(root: Path) -> dict[str, str]:
    """How much a reader, or a language model, would have to take in."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in _code_files(root)]
    num_chars = sum(map(len, texts))
    size = {
        "Characters": f"{num_chars:,}",
        "Lines": f"{sum(text.count(chr(10)) for text in texts):,}",
        "Files": f"{len(texts):,}",
        "Tokens (approx)": f"{num_chars // CHARS_PER_TOKEN:,}",
    }
    lock = root / "uv.lock"
    if lock.is_file():
        size["Dependencies (uv.lock lines)"] = f"{len(lock.read_text().splitlines()):,}"
    return size


def _code_files(root: Path) -> list[Path]:
    """Text files of the repository; without git those of the package itself."""
    tracked = _git(root, "ls-files")
    paths = (
        [root / name for name in tracked.splitlines()]
        if tracked
        else list((root / "nanochat").rglob("*"))
    )
    return [path for path in paths if path.suffix in CODE_ENDINGS and path.is_file()]


def _git(root: Path, *arguments: str) -> str | None:
    command: Sequence[str] = ("git", "-C", str(root), *arguments)
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
