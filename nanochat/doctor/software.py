"""Checks of Python, packages, torch and devices."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import sys

from nanochat.doctor.finding import REPOSITORY, Finding, Recipe

OLDEST_PYTHON = (3, 10)
VOCABULARY, CONTEXT = 65_536, 2048  # of the recipe


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    """Is Python new enough."""
    text = ".".join(map(str, version))
    if version >= OLDEST_PYTHON:
        return Finding("python", "ok", f"{text} ({sys.executable})")
    return Finding(
        "python",
        "FAIL",
        f"{text} is too old",
        "load a module with Python 3.10 or newer (modules= in .env.local), then run: "
        "bash scripts/setup_environment.sh",
    )


def check_packages() -> Finding:
    """Is every declared package installed, and can it be imported."""
    names = declared_packages()
    if not names:
        return Finding(
            "packages", "FAIL", "nanochat is not installed here", "run: pip install -e ."
        )
    modules = importlib.metadata.packages_distributions()
    broken = []
    for name in names:
        wanted = _canonical(name)
        found = [m for m, owners in modules.items() if wanted in map(_canonical, owners)]
        # Packages share folders of tests or hooks; the one named like the package counts.
        best = min(found, key=lambda m: (_canonical(m) != wanted, m.startswith("_")), default=name)
        try:
            importlib.import_module(best.replace("-", "_"))
        except ImportError as error:
            broken.append(f"{name} ({error})")
    if broken:
        return Finding(
            "packages",
            "FAIL",
            f"cannot be imported: {', '.join(broken)}",
            "install into this environment: pip install -e . "
            "(another environment may be meant: see which python)",
        )
    return Finding("packages", "ok", f"all {len(names)} can be imported")


def declared_packages() -> list[str]:
    """What the project declares that it imports: in its checkout, else as it was installed."""
    project = REPOSITORY / "pyproject.toml"
    if project.is_file():
        text = project.read_text(encoding="utf-8")
        _, _, listed = text.partition("\ndependencies = [")
        return re.findall(r'^\s*"([\w.-]+)', listed.partition("\n]")[0], re.MULTILINE)
    try:
        required = importlib.metadata.requires("nanochat") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_core() -> Finding:
    """Is the compiled tokenizer there."""
    import rustbpe

    if rustbpe.has_core():
        return Finding("tokenizer core", "ok", "compiled")
    return Finding(
        "tokenizer core",
        "note",
        "not compiled, the slow one is used",
        "with cargo on the PATH run: pip install -e . (see rustbpe/README.md)",
    )


def check_torch(has_driver: bool | None = None) -> Finding:
    """Is this torch built for the devices of the machine."""
    import torch

    driver = has_driver if has_driver is not None else shutil.which("nvidia-smi") is not None
    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
        return Finding("torch", "ok", f"{build}, {count} GPUs: {names}")
    if torch.version.cuda is None and driver:
        return Finding(
            "torch",
            "FAIL",
            f"{build} is a build without CUDA, but there is a GPU driver",
            "install one with: bash scripts/setup_environment.sh",
        )
    if driver:
        return Finding(
            "torch",
            "FAIL",
            f"{build} finds no GPU, though there is a driver",
            "run nvidia-smi: a GPU must be requested (srun --gres=gpu:1), and its driver be new "
            f"enough for CUDA {torch.version.cuda}",
        )
    return Finding("torch", "note", f"{build}, no GPU here: the CPU is used")


def check_dtype() -> Finding:
    """In which type the forward pass computes here."""
    from nanochat import runtime

    with runtime.start("") as rt:
        name = str(rt.compute_dtype).removeprefix("torch.")
        return Finding("compute dtype", "ok", f"{name} on {rt.device}")


def check_gpu_memory(recipe: Recipe) -> Finding:
    """Does a training step of the recipe fit on each device."""
    import torch

    from nanochat.gpt import GPT
    from nanochat.memory import estimate_memory, format_bytes
    from nanochat.scaling import model_config

    if not torch.cuda.is_available():
        return Finding("GPU memory", "note", "no GPU to measure")
    config = model_config(recipe.depth, vocab_size=VOCABULARY, sequence_len=CONTEXT)
    with torch.device("meta"):
        model = GPT(config)
    gpus = torch.cuda.device_count()
    available = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
    rows = recipe.device_batch_size
    while True:
        parts = estimate_memory(model, rows=rows, compute_dtype=torch.bfloat16, world_size=gpus)
        needed = int(1.2 * sum(parts.values()))
        if needed <= available or rows == 1:
            break
        rows //= 2
    detail = f"d{recipe.depth} needs about {format_bytes(needed)} with {rows} rows"
    detail += f", each device has {format_bytes(available)}"
    if needed > available:
        return Finding("GPU memory", "FAIL", detail, "train a smaller --depth")
    if rows < recipe.device_batch_size:
        advice = f"pass --device-batch-size={rows}: {recipe.device_batch_size} rows do not fit"
        return Finding("GPU memory", "FAIL", detail, advice)
    return Finding("GPU memory", "ok", detail)
