"""A table for people, one JSON line for machines."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.jsonl"


def commit() -> str:
    found = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure over the runs; what is no number as the first run has it."""
    return {
        name: statistics.median(run[name] for run in runs) if isinstance(value, int | float) else value
        for name, value in runs[0].items()
    }


def tell(name: str, what: dict[str, Any], figures: dict[str, Any], *, runs: int = 1) -> None:
    """Print a block and append it to results.jsonl."""
    print(f"\n{name}  " + "  ".join(f"{key}={value}" for key, value in what.items()) + f"  (median of {runs})")
    for key, value in figures.items():
        shown = f"{value:,.0f}" if isinstance(value, int | float) and abs(value) >= 100 else value
        shown = f"{value:,.2f}" if isinstance(value, float) and abs(value) < 100 else shown
        print(f"  {key:<34} {shown}")
    line = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "host": {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
        "bench": name,
        **what,
        "runs": runs,
        "figures": figures,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
