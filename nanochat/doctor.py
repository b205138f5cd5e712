"""The machine a run is meant for, examined before it costs anything.

Every check is a function that returns a Finding; a failing one says what to do. Nothing here is
needed by a run, and nothing is changed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat.common import UserError, base_dir

State = Literal["ok", "note", "FAIL"]

REPOSITORY = Path(__file__).parents[1]
OLDEST_PYTHON = (3, 10)
SMALL_HOME_BYTES = 50e9  # quotas of home folders are usually smaller, those of scratch larger
RUN_BYTES = 60e9  # 26 GB of data, checkpoints of four stages of d20, an environment
VOCABULARY, CONTEXT = 65_536, 2048  # of the recipe
# Share of a GPU's peak that training reaches; a cautious figure, for an estimate of hours.
UTILISATION = 0.35
CACHES = {
    "HF_HOME": "~/.cache/huggingface",
    "TORCH_HOME": "~/.cache/torch",
    "TORCHINDUCTOR_CACHE_DIR": None,  # in the temporary folder
    "TRITON_CACHE_DIR": "~/.triton",
    "PIP_CACHE_DIR": "~/.cache/pip",
    "UV_CACHE_DIR": "~/.cache/uv",
    "WANDB_DIR": None,  # in the working folder
}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: State
    detail: str
    advice: str = ""
    """What to do; of a failing check always said."""

    def line(self) -> str:
        """The finding for people."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.state:<4}  {self.name:<16}  {self.detail}{advice}"


Check = Callable[[], Finding]


@dataclass(frozen=True)
class Recipe:
    """The run that the machine is examined for."""

    depth: int
    device_batch_size: int


def examine(recipe: Recipe, extra: Sequence[Check] = ()) -> int:
    """Print one line a check; 1 when one fails."""
    settings = read_settings()
    checks: list[Check] = [
        check_python,
        check_packages,
        check_core,
        check_torch,
        check_dtype,
        lambda: check_gpu_memory(recipe),
        check_folders,
        check_disk,
        check_caches,
        lambda: check_slurm(settings),
        lambda: check_email(settings),
        lambda: check_time(recipe, settings),
        *extra,
    ]
    failed = 0
    for check in checks:
        finding = check()
        print(finding.line(), flush=True)
        failed += finding.state == "FAIL"
    print(f"{failed} of {len(checks)} checks failed" if failed else "this machine is fit for a run")
    return 1 if failed else 0


# ---- software ---------------------------------------------------------------------------------


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


# ---- places -----------------------------------------------------------------------------------


def check_folders() -> Finding:
    """Can the base and the temporary folder be written."""
    try:
        folders = [base_dir(), Path(tempfile.gettempdir())]
    except UserError as error:
        return Finding("folders", "FAIL", str(error), "set NANOCHAT_BASE_DIR")
    for folder in folders:
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                file.write(b"\0" * 1_000_000)  # more than a quota that is used up lets through
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return Finding(
                "folders",
                "FAIL",
                f"{folder} cannot be written ({error.strerror})",
                "free space there, or set NANOCHAT_BASE_DIR and TMPDIR to folders on scratch",
            )
    return Finding("folders", "ok", f"{' and '.join(map(str, folders))} can be written")


def check_disk() -> Finding:
    """Is there room for data and checkpoints; quotas are asked where the tool for it is there."""
    free = shutil.disk_usage(base_dir()).free
    detail = f"{free / 1e9:,.0f} GB free in {base_dir()}"
    quota = _output("quota", "-s")
    if quota and "*" in quota:  # how `quota` marks a limit that is exceeded
        advice = "see quota -s, and delete what is not needed or ask for more"
        return Finding("disk", "FAIL", "a disk quota is exceeded", advice)
    if free < RUN_BYTES:
        return Finding(
            "disk",
            "note" if free > RUN_BYTES / 10 else "FAIL",
            detail,
            f"the speedrun writes about {RUN_BYTES / 1e9:.0f} GB: free space, or set "
            "NANOCHAT_BASE_DIR to a larger disk",
        )
    return Finding("disk", "ok", detail)


def check_caches(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Finding:
    """Do caches of many gigabytes lie in a home that is small."""
    home = home or Path.home()
    if shutil.disk_usage(home).total > 20 * SMALL_HOME_BYTES and not _has_quota():
        return Finding("caches", "ok", f"{home} is on a large disk")
    inside = []
    for variable, default in CACHES.items():
        place = environment.get(variable) or default
        if place is not None and Path(place).expanduser().is_relative_to(home):
            inside.append(variable)
    if not inside:
        return Finding("caches", "ok", "none of them is in the home folder")
    return Finding(
        "caches",
        "FAIL" if shutil.disk_usage(home).free < SMALL_HOME_BYTES else "note",
        f"in {home}: {', '.join(inside)}",
        "set scratch_root in .env.local, and run source scripts/setup_environment.sh, which puts "
        "them on scratch",
    )


def _has_quota() -> bool:
    return bool(_output("quota", "-s"))


# ---- the cluster ------------------------------------------------------------------------------


def read_settings(repository: Path = REPOSITORY) -> dict[str, str]:
    """The cluster's settings as the job scripts read them; empty outside a checkout.

    The shell's reader is asked, so that there is only one.
    """
    program = (
        "source scripts/cluster.sh; read_settings; echo mail=$(mail_address); "
        'for key in "${!SETTINGS[@]}"; do echo "$key=${SETTINGS[$key]}"; done'
    )
    if not (repository / "scripts/cluster.sh").is_file():
        return {}
    text = _output("bash", "-c", program, cwd=repository) or ""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def _job_settings(settings: Mapping[str, str], repository: Path = REPOSITORY) -> dict[str, str]:
    """What the job will ask SLURM for: the lines of the job script, then the settings."""
    script = repository / "scripts/speedrun.slurm"
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    return asked | dict(settings)


def check_slurm(settings: Mapping[str, str]) -> Finding:
    """Does the cluster have the partition that the job asks for."""
    partitions = _output("sinfo", "--noheader", "--format=%R %l")
    if partitions is None:
        return Finding("slurm", "note", "no SLURM here")
    known = dict(line.split(None, 1) for line in partitions.splitlines() if " " in line)
    wanted = _job_settings(settings).get("partition", "")
    if wanted and wanted not in known:
        return Finding(
            "slurm",
            "FAIL",
            f"there is no partition {wanted!r}",
            f"set partition in .env.local to one of {', '.join(sorted(known))}",
        )
    return Finding("slurm", "ok", f"partition {wanted or 'by default'}")


def check_email(settings: Mapping[str, str]) -> Finding:
    """Does SLURM learn where to write to."""
    if shutil.which("sbatch") is None:
        return Finding("email", "note", "no SLURM here")
    if settings.get("mail"):
        return Finding("email", "ok", settings["mail"])
    return Finding(
        "email",
        "note",
        "no address, so no mail when a job begins, ends or fails",
        "cp .env.local.example .env.local and set email in it",
    )


def check_time(recipe: Recipe, settings: Mapping[str, str]) -> Finding:
    """Is the time limit of the job long enough, and if not, how many jobs it takes."""
    limit = parse_time(_job_settings(settings).get("time", ""))
    hours = estimated_hours(recipe)
    if limit is None or hours is None:
        return Finding("time limit", "note", "no limit or no known GPU to compare")
    detail = f"{limit:g} h, and d{recipe.depth} needs about {hours:.1f} h on this machine's GPUs"
    if hours <= limit:
        return Finding("time limit", "ok", detail)
    return Finding(
        "time limit",
        "note",
        detail,
        "the job saves before its limit and queues itself again, about "
        f"{int(hours / limit) + 1} times",
    )


def estimated_hours(recipe: Recipe) -> float | None:
    """Hours of pretraining on the GPUs of this machine; None without a GPU we know."""
    import torch

    from nanochat.gpt import GPT
    from nanochat.hardware import find_device
    from nanochat.scaling import model_config

    if not torch.cuda.is_available():
        return None
    device = find_device(torch.cuda.get_device_name(0))
    if device is None:
        return None
    with torch.device("meta"):
        model = GPT(model_config(recipe.depth, vocab_size=VOCABULARY, sequence_len=CONTEXT))
    tokens = 20 * model.count_parameters()["total"]
    flops = tokens * model.estimate_flops()
    return flops / (device.peak_flops * UTILISATION * torch.cuda.device_count()) / 3600


def parse_time(text: str) -> float | None:
    """SLURM's ways to write a limit, in hours: 90, 90:00, 12:00:00, 1-12, 1-12:00, 1-12:00:00."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *rest = (int(part) if part else None for part in match.groups())
    first, second, third = rest[0] or 0, rest[1], rest[2]
    if days is not None:
        return days * 24 + first + (second or 0) / 60 + (third or 0) / 3600
    if third is not None:
        return first + (second or 0) / 60 + third / 3600
    return first / 60 + (second or 0) / 3600


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, None when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout if result.returncode == 0 else None
