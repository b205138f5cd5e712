"""Checks of a SLURM cluster: settings, partition, mail address, time limit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from nanochat.doctor.finding import REPOSITORY, Finding, Recipe, output_of
from nanochat.doctor.software import CONTEXT, VOCABULARY

# Share of a GPU's peak that training reaches; a cautious figure, for an estimate of hours.
UTILISATION = 0.35


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
    text = output_of("bash", "-c", program, cwd=repository) or ""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def scratch_root(settings: Mapping[str, str]) -> Path | None:
    """Where jobs write, as scripts/cluster.sh finds it; None when neither setting nor site says."""
    root = settings.get("scratch_root") or os.environ.get("SCRATCH")
    return Path(root) if root else None


def check_settings(repository: Path = REPOSITORY) -> Finding:
    """Can .env.local be read as it is meant."""
    if not (repository / ".env.local").is_file():
        return Finding("settings", "note", "no .env.local, so the job scripts' own values")
    program = ("bash", "-c", "source scripts/cluster.sh; read_settings")
    result = subprocess.run(program, cwd=repository, capture_output=True, text=True, timeout=20)
    said = "; ".join(line.partition(": ")[2] for line in result.stderr.splitlines())
    if result.returncode:
        return Finding("settings", "FAIL", said, "mend the lines in .env.local")
    return Finding("settings", "note" if said else "ok", said or str(repository / ".env.local"))


def _job_settings(settings: Mapping[str, str], repository: Path = REPOSITORY) -> dict[str, str]:
    """What the job will ask SLURM for: the lines of the job script, then the settings."""
    script = repository / "scripts/speedrun.slurm"
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    return asked | dict(settings)


def check_slurm(settings: Mapping[str, str]) -> Finding:
    """Does the cluster have the partition that the job asks for."""
    partitions = output_of("sinfo", "--noheader", "--format=%R %l")
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
