"""Checks of folders, disks and caches."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nanochat.common import UserError, base_dir
from nanochat.doctor.finding import Finding, output_of

SMALL_HOME_BYTES = 50e9  # quotas of home folders are usually smaller, those of scratch larger
RUN_BYTES = 60e9  # 26 GB of data, checkpoints of four stages of d20, an environment
RUN_FILES = 100_000  # nearly all of them are the environment's; one with everything has 75,000
# What `lfs quota` prints of bytes (in KiB) and of files: used, soft limit, hard limit, grace. A
# limit of 0 is none; * marks one that is exceeded, brackets what a server could not confirm.
_LUSTRE_QUOTA = re.compile(
    r"(?<!\S)" + r"\s+".join([r"\[?(\d+)\]?\*?", r"(\d+)", r"(\d+)", r"\S+"] * 2)
)
CACHES = {
    "HF_HOME": "~/.cache/huggingface",
    "TORCH_HOME": "~/.cache/torch",
    "TORCHINDUCTOR_CACHE_DIR": None,  # in the temporary folder
    "TRITON_CACHE_DIR": "~/.triton",
    "PIP_CACHE_DIR": "~/.cache/pip",
    "UV_CACHE_DIR": "~/.cache/uv",
    "WANDB_DIR": None,  # in the working folder
}


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


def check_disk(scratch: Path | None = None) -> Finding:
    """Is there room for data and checkpoints; quotas are asked where the tool for it is there.

    scratch: the root of what jobs write, where the settings name one.
    """
    free = shutil.disk_usage(base_dir()).free
    detail = f"{free / 1e9:,.0f} GB free in {base_dir()}"
    quota = output_of("quota", "-s")
    if quota and "*" in quota:  # how `quota` marks a limit that is exceeded
        advice = "see quota -s, and delete what is not needed or ask for more"
        return Finding("disk", "FAIL", "a disk quota is exceeded", advice)
    for folder in dict.fromkeys([base_dir(), scratch or base_dir()]):
        narrow = _narrow_lustre_quota(folder)
        if narrow is not None:
            return narrow
    if free < RUN_BYTES:
        return Finding(
            "disk",
            "note" if free > RUN_BYTES / 10 else "FAIL",
            detail,
            f"the speedrun writes about {RUN_BYTES / 1e9:.0f} GB: free space, or set "
            "NANOCHAT_BASE_DIR to a larger disk",
        )
    return Finding("disk", "ok", detail)


def _narrow_lustre_quota(folder: Path) -> Finding | None:
    """What the user's quota on a Lustre file system leaves, None if enough or not on one."""
    said = _LUSTRE_QUOTA.search(
        output_of("lfs", "quota", "-u", str(os.getuid()), str(folder)) or ""
    )
    if said is None:
        return None
    kib, soft_kib, hard_kib, files, soft_files, hard_files = map(int, said.groups())
    rooms = [
        (_room(kib, soft_kib, hard_kib) * 1024, RUN_BYTES, 1e9, "GB"),
        (_room(files, soft_files, hard_files), RUN_FILES, 1, "files"),
    ]
    room, wanted, unit, name = min(rooms, key=lambda entry: entry[0] / entry[1])
    if room >= wanted:
        return None
    return Finding(
        "disk",
        "note" if room > wanted / 10 else "FAIL",
        f"your quota in {folder} leaves {max(room, 0) / unit:,.0f} {name}",
        f"a speedrun writes about {wanted / unit:,.0f} {name}: see lfs quota -u $USER {folder}, "
        "and delete what is not needed or ask for more",
    )


def _room(used: int, soft: int, hard: int) -> float:
    """What may be added; the soft limit counts because it becomes the hard one within days."""
    return min((limit for limit in (soft, hard) if limit), default=math.inf) - used


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
    return bool(output_of("quota", "-s"))
