"""What a reader tells."""

from __future__ import annotations

import os
import time

import msgspec
import orjson

from fastworker.errors import Reason
from fastworker.event.proof import Verdict
from fastworker.redact import redact
from fastworker.stream.feed import OURS


class ReaderStats(msgspec.Struct):
    """What the reader did since it started, and how it is; written by the reader only."""

    started_at: float = msgspec.field(default_factory=time.time)
    standby: bool = True
    """Another reader is at work, or Redis cannot be reached: this one waits."""
    connected: bool = False
    relay: str = ""
    last_seq: int | None = None
    """The cursor: the newest seq that is on the stream (or had nothing to store)."""
    last_frame_at: float | None = None
    """Unix time, to about a second."""
    last_event_at: float | None = None
    """Unix time, by the relay's clock, of the newest event: how old the cursor is."""
    last_error: str = ""
    frames: int = 0
    bytes: int = 0
    entries: int = 0
    """Entries that are on the stream."""
    commits: int = 0
    identities: int = 0
    accounts: int = 0
    syncs: int = 0
    duplicates: int = 0
    """Frames at or below the cursor: an inclusive replay brings at least one."""
    empty: int = 0
    """Commits without any op."""
    set_aside: int = 0
    reconnects: int = 0
    gaps: int = 0
    waits_full: int = 0
    """Times that the stream was full."""
    full: bool = False
    held_by: str = ""
    """The group that keeps the stream's oldest entries."""
    trimmed: int = 0
    outbox_items: int = 0
    mean_gap_s: float | None = None
    behind_s: float = 0.0
    """Since when the relay sent only what lies behind the cursor; 0 when it does not."""
    silent_s: float = 0.0
    silent: bool = False
    """No frame for long against the relay's own rate, though connected; a quiet relay is not silent.

    A new connection does not end it, only data do."""
    drops: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(map(str, Reason), 0))
    """Whole frames, by reason, and ops that FASTWORKER_COLLECTIONS and FASTWORKER_ACCOUNTS leave out here. The other
    drops of single ops travel with their entry and are counted by the worker."""
    verdicts: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(map(str, Verdict), 0))
    """Commits by what their proofs say."""
    unverified: int = 0
    """Commits that wait for a key."""


def status_json(stats: ReaderStats, url: str) -> bytes:
    """The key that the predecessor's dashboard reads."""
    seq = stats.last_seq
    return orjson.dumps(
        {
            "connected": stats.connected,
            "url": redact(url),
            "currentCursor": None if seq is None else str(seq),
            "reader": OURS,  # this key outlives us by ten seconds, and `check` must know whose it is
        }
    )


def figures(stats: ReaderStats) -> dict[str, str | int | float]:
    """As they are left in Redis, one field each."""
    figures: dict[str, str | int | float] = {"at": int(time.time() * 1000), "pid": os.getpid()}
    for name, value in msgspec.structs.asdict(stats).items():
        if name == "drops":
            figures.update({f"drop:{reason}": count for reason, count in value.items()})
        elif name == "verdicts":
            figures.update({f"verdict:{verdict}": count for verdict, count in value.items()})
        elif value is None:
            figures[name] = ""
        else:
            figures[name] = int(value) if isinstance(value, bool) else value
    return figures
