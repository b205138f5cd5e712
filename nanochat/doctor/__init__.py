"""The machine a run is meant for, examined before it costs anything.

Every check is a function that returns a Finding; a failing one says what to do. Nothing here is
needed by a run, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.doctor import cluster, places, software
from nanochat.doctor.finding import Check, Finding, Recipe

__all__ = ["Check", "Finding", "Recipe", "examine"]


def examine(recipe: Recipe, extra: Sequence[Check] = ()) -> int:
    """Print one line a check; 1 when one fails."""
    settings = cluster.read_settings()
    checks: list[Check] = [
        software.check_python,
        software.check_packages,
        software.check_core,
        software.check_torch,
        software.check_dtype,
        lambda: software.check_gpu_memory(recipe),
        places.check_folders,
        lambda: places.check_disk(cluster.scratch_root(settings)),
        places.check_caches,
        cluster.check_settings,
        lambda: cluster.check_slurm(settings),
        lambda: cluster.check_email(settings),
        lambda: cluster.check_time(recipe, settings),
        *extra,
    ]
    failed = 0
    for check in checks:
        finding = check()
        print(finding.line(), flush=True)
        failed += finding.state == "FAIL"
    print(f"{failed} of {len(checks)} checks failed" if failed else "this machine is fit for a run")
    return 1 if failed else 0
