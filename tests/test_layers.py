"""Who may know whom: the contracts in pyproject.toml, and what import-linter cannot express."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("nanochat", "scripts", "tasks", "rustbpe")

# A library and the only files that may import it.
CONFINED = {
    "torch.distributed": {
        "nanochat/adamw.py",
        "nanochat/checkpoint_manager.py",
        "nanochat/fullshard.py",
        "nanochat/muon.py",
        "nanochat/runtime.py",
    },
    "fastapi": {"nanochat/server.py"},
    "uvicorn": {"nanochat/server.py", "nanochat/serving/protocol.py"},
    "wandb": {"nanochat/tracking.py"},
    "huggingface_hub": {"nanochat/hub.py"},
    "requests": {"nanochat/transfer.py"},
    "pickle": {"rustbpe/formats.py"},  # reads one old file format, and refuses every class but one
}
# An attribute of a module and the only files that may read it.
CONFINED_ATTRIBUTES = {
    ("sys", "argv"): {"nanochat/configurator.py", "scripts/__init__.py"},
}
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NANOCHAT_DTYPE"}


def source_files() -> list[Path]:
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    assert len(files) > 20
    return files


def parsed_files() -> list[tuple[str, ast.Module]]:
    return [
        (path.relative_to(REPOSITORY).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
        for path in source_files()
    ]


def imported_modules(tree: ast.Module) -> set[str]:
    """Every module a file imports, `from a import b` counted as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_layers_are_kept() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "0 broken" in result.stdout


def test_every_module_has_its_place_in_the_layers() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    _, _, contract = text.partition('name = "layers"')
    layers, _, _ = contract.partition("[[tool.importlinter.contracts]]")
    placed = set(re.findall(r"nanochat\.(\w+)", layers))
    modules = {path.stem for path in (REPOSITORY / "nanochat").glob("*.py")} - {"__init__"}
    assert modules - placed == set()


@pytest.mark.parametrize("library", CONFINED)
def test_library_is_imported_only_where_it_belongs(library: str) -> None:
    found = {
        name
        for name, tree in parsed_files()
        if any(
            module == library or module.startswith(library + ".")
            for module in imported_modules(tree)
        )
    }
    assert found <= CONFINED[library]


@pytest.mark.parametrize(("module", "attribute"), CONFINED_ATTRIBUTES)
def test_process_state_is_read_in_one_place(module: str, attribute: str) -> None:
    found = {
        name
        for name, tree in parsed_files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == module
    }
    assert found == CONFINED_ATTRIBUTES[module, attribute]


def test_only_runtime_reads_the_rank() -> None:
    found = {
        name
        for name, tree in parsed_files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in RANK_VARIABLES
    }
    assert found <= {"nanochat/runtime.py"}


def test_nothing_is_evaluated() -> None:
    found = {
        (name, node.func.id)
        for name, tree in parsed_files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"eval", "exec"}
    }
    assert found <= {("nanochat/sandbox/jail.py", "exec")}


def test_every_library_that_is_imported_is_declared() -> None:
    """A missing declaration shows only on the machine of somebody else."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    distributions = {"yaml": "PyYAML"}
    imported = {
        module.partition(".")[0] for _, tree in parsed_files() for module in imported_modules(tree)
    }
    libraries = imported - set(sys.stdlib_module_names) - set(PACKAGES)
    assert "torch" in libraries
    missing = {name for name in libraries if f'"{distributions.get(name, name)}' not in text}
    assert missing == set()
