"""A table for people, one JSON line for machines, and at the end what was aimed at."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.servers import VERSIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.jsonl"
PACKAGES = ("asyncpg", "uvloop", "redis", "hiredis", "libipld", "msgspec", "orjson", "aiohttp")

Figures = dict[str, Any]


def commit() -> str:
    found = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def host() -> dict[str, Any]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split(maxsplit=2)[1]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_mb": int(memory) // 1024,
    }


def versions() -> dict[str, str]:
    """Python's, the packages' and those of the servers that were started so far."""
    return {
        "python": platform.python_version(),
        **VERSIONS,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def medians(runs: Sequence[Figures]) -> Figures:
    """Of each figure over the runs; what is no number as the first run has it."""
    return {
        name: statistics.median(run[name] for run in runs) if isinstance(value, int | float) else value
        for name, value in runs[0].items()
    }


def shown(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:,.2f}"
    return str(value)


class Report:
    """`mix` says what was fed; `told` is what this invocation has measured."""

    def __init__(self, mix: dict[str, Any], results: Path = RESULTS) -> None:
        self.mix = mix
        self.results = results
        self.told: list[tuple[str, dict[str, Any], Figures]] = []

    def measure(self, name: str, what: dict[str, Any], runs: int, work: Callable[[], Figures]) -> Figures:
        """Run `work` so often and tell the medians. Returns them."""
        found = self.run(name, what, runs, work)
        figures = medians(found)
        self.tell(name, what, figures, runs=found)
        return figures

    def run(self, name: str, what: dict[str, Any], runs: int, work: Callable[[], Figures]) -> list[Figures]:
        """Run `work` so often, and say so."""
        found = []
        for n in range(runs):
            words = " ".join(f"{key}={value}" for key, value in what.items())
            print(f"... {name} {words}: run {n + 1} of {runs}", file=sys.stderr, flush=True)
            found.append(work())
        return found

    def tell(
        self, name: str, what: dict[str, Any], figures: Figures, *, runs: Sequence[Figures] = (), text: str = ""
    ) -> None:
        """Print a block (or `text`) and append the figures to results.jsonl."""
        self.told.append((name, what, figures))
        head = f"\n{name}  " + "  ".join(f"{key}={value}" for key, value in what.items())
        if len(runs) > 1:
            first = next(iter(figures))
            each = [run[first] for run in runs]
            head += f"  (median of {len(runs)}; {first} {shown(min(each))} to {shown(max(each))})"
        print(head)
        print(text or "\n".join(f"  {key:<42} {shown(value)}" for key, value in figures.items()), flush=True)
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "host": host(),
            "versions": versions(),
            "mix": self.mix,
            "bench": name,
            "what": what,
            "runs": max(1, len(runs)),
            "figures": figures,
        }
        if len(runs) > 1:
            line["each"] = list(runs)
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
