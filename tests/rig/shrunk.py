"""`python -m tests.rig.shrunk COMMAND`: fastworker with other limits, and with a clock that somebody else sets.

CHAOS_LIMITS: JSON, `{"module:NAME": value}` of what is written down as a constant. CHAOS_CLOCK: a file with the seconds by
which this machine's clock is ahead; read each time, so that it can jump.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import time
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

# What a bound means does not depend on its size: the smallest that still gets anywhere, the usual one, and between.
LIMITS: dict[str, list[Any]] = {
    "fastworker.worker.intake:PIECE": [2, 10, 100],
    "fastworker.worker.pipeline:MARKS_MAX": [2, 1_024],
    "fastworker.worker.pipeline:POSTPONED_MS_MAX": [5, 1_000],
    "fastworker.worker.pipeline:BLOCK_MS": [5, 250],
    "fastworker.worker.worker:TELL_S": [0.02, 0.5],
    "fastworker.worker.worker:MAINTAIN_S": [0.5, 10.0],
    "fastworker.stream.consumer:STEP": [1, 10],
    "fastworker.stream.consumer:WINDOW": [1, 8, 64],
    "fastworker.stream.consumer:BURST_ENTRIES": [2, 50, 1_000],
    "fastworker.stream.consumer:READ_BYTES": [5_000, 4_194_304],
    "fastworker.stream.skipped:PIECE": [2, 100, 1_000],
    "fastworker.stream.feed:CHUNK_ITEMS": [1, 20, 500],
    "fastworker.stream.slot:MARKS_MAX": [3, 10_000],
    "fastworker.monitor.readiness:MAINTAINED_S": [15.0],
}
ENVIRONMENT: dict[str, list[str]] = {
    "BATCH_SIZE": ["1", "5", "50"],
    "PARALLEL_CONSUMERS": ["1", "2"],
    "REDIS_DEAD_LETTER_MAXLEN": ["5", "10000"],
}


def drawn(seed: int) -> dict[str, str]:
    """The environment of one run."""
    r = random.Random(f"limits {seed}")
    env = {name: r.choice(values) for name, values in ENVIRONMENT.items()}
    return env | {"CHAOS_LIMITS": json.dumps({name: r.choice(values) for name, values in LIMITS.items()})}


def apply() -> None:
    for name, value in json.loads(os.environ.get("CHAOS_LIMITS", "{}")).items():
        module, constant = name.split(":")
        loaded = importlib.import_module(module)
        assert hasattr(loaded, constant), name
        setattr(loaded, constant, value)
    if "CHAOS_CLOCK" in os.environ:
        _set_clock(Path(os.environ["CHAOS_CLOCK"]))


def _set_clock(file: Path) -> None:
    real = time.time

    def ahead() -> float:
        try:
            return real() + float(file.read_text() or 0)
        except FileNotFoundError:  # no longer, perhaps at this moment
            return real()

    class Moved(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.fromtimestamp(ahead(), tz)

    time.time = ahead
    for module in ("fastworker.worker.worker", "fastworker.store.blame"):
        importlib.import_module(module).datetime = Moved  # type: ignore[attr-defined]


if __name__ == "__main__":
    apply()
    from fastworker.cli import main

    main()
