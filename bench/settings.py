"""PostgreSQL's settings, one at a time: what each brings to a full stream on a server that is new otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from bench.end_to_end import end_to_end
from bench.report import Figures
from fastworker.commands.tune import Extent

NEW: Final = {
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "checkpoint_timeout": "5min",
    "wal_compression": "off",
    "synchronous_commit": "on",
    "huge_pages": "off",
    "track_commit_timestamp": "on",
}


class Change(NamedTuple):
    """Against a new server: its settings, and those of its tables."""

    server: dict[str, str]
    tuned: Extent | None = None


LARGE: Final = {"shared_buffers": "1GB"}
ALL: Final = {**LARGE, "max_wal_size": "8GB", "checkpoint_timeout": "15min", "wal_compression": "on"}
CHANGES: Final = {
    "a new server": Change({}),
    "shared_buffers": Change(LARGE),
    "max_wal_size": Change({"max_wal_size": "8GB"}),
    "checkpoint_timeout": Change({"checkpoint_timeout": "15min"}),
    "wal_compression": Change({"wal_compression": "on"}),
    "synchronous_commit": Change({"synchronous_commit": "off"}),
    "huge_pages": Change({**LARGE, "huge_pages": "on"}),
    "vacuum of counters": Change({}, tuned="tables"),
    "all": Change(ALL, tuned="tables"),
}
"""`huge_pages` needs `sysctl vm.nr_hugepages=600`: without them that server does not start. `all` has neither it nor
synchronous_commit, which costs something else than time."""


def has_huge_pages() -> bool:
    """As many as LARGE and the rest of a server's shared memory take."""
    found = re.search(r"^HugePages_Free: +(\d+)$", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    return found is not None and int(found[1]) >= 600


def of_change(folder: Path, name: str, *, events: int) -> Figures:
    change = CHANGES[name]
    return end_to_end(
        folder,
        form="native",
        events=events,
        settings={"FASTWORKER_DERIVE": "full", "FASTWORKER_SYNCHRONOUS_COMMIT": "keep"},
        tuned=change.tuned,
        postgres_settings={**NEW, **change.server},
    )
