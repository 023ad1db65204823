"""What a reader is told and what it tells."""

from __future__ import annotations

import os
import time
from typing import Literal

import msgspec
import orjson

from fastworker.errors import Reason
from fastworker.redact import redact
from fastworker.stream.feed import ABANDONED_MS, OURS
from fastworker.stream.keys import CURSOR, GROUP, STREAM
from fastworker.stream.limits import DEAD_LETTERS_MAX, STREAM_LEN_MAX


class ReaderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the reader needs to know; defaults are those of the environment variables."""

    relay_urls: tuple[str, ...] = ("wss://bsky.network",)
    redis_url: str = "redis://localhost:6379"
    stream_key: str = STREAM
    cursor_key: str = CURSOR
    group: str = GROUP
    """The workers' group: until it exists nothing is trimmed."""
    max_stream_len: int = STREAM_LEN_MAX
    stream_bytes_max: int | None = None
    stream_format: Literal["json", "native", "frame"] = "json"
    ignore_groups: tuple[str, ...] = ()
    dead_letter_maxlen: int = DEAD_LETTERS_MAX
    keep_s: float = 0.0
    """Seconds that finished entries stay on the stream, for `worker --reapply`."""
    silence_floor_s: float = 30.0
    """No silence shorter than this ends a connection."""
    abandoned_ms: int = ABANDONED_MS
    partitions: int = 1
    """Of the stream, by account; more than one only in forms that old workers do not read."""


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
    """Whole frames, by reason. The drops of single ops travel with their entry and are counted by the worker."""


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
        elif value is None:
            figures[name] = ""
        else:
            figures[name] = int(value) if isinstance(value, bool) else value
    return figures
