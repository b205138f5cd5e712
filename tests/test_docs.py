"""The documents: links lead somewhere, commands exist and understand their flags."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from nanochat import configurator

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]
    if path.name != "report.md"  # written by a run, ignored by git
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
# Fenced blocks of shell, and code spans that start like a command.
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
SPAN = re.compile(r"`((?:python -m|bash) [^`]+)`")
OUR_MODULES = ("nanochat.", "scripts.")


def commands_of(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(BLOCK.findall(text)).splitlines()
    lines = [line.split(" && ")[-1].strip() for line in blocks]
    return [line for line in lines + SPAN.findall(text) if line.startswith(("python -m", "bash"))]


def all_commands() -> list[tuple[str, str]]:
    found = [(page.name, command) for page in PAGES for command in commands_of(page)]
    return sorted(set(found))


def test_there_are_pages_and_commands() -> None:
    assert len(PAGES) >= 5
    assert len(all_commands()) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [
        target
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if not target.startswith(("http://", "https://", "mailto:"))
    ]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_commands_are_understood(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "bash":
        assert (REPOSITORY / words[1]).is_file()
        return
    module, arguments = words[2], words[3:]
    if not module.startswith(OUR_MODULES):
        return
    config_type = importlib.import_module(module).Config
    if "--help" not in arguments:
        assert configurator.parse(config_type, arguments) is not None
