"""`fastworker status`: what an operator asks first, from Redis alone, so that it works while everything else does not.

The workers' own figures come from what their monitors wrote there. `collect` reads, `render` shows; the JSON form is
`Status` itself and stable: members are added, never renamed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastworker import __version__
from fastworker.config import Config
from fastworker.edge.redis_admin import STATUS_STALE_S, RedisAdmin, age_s, open_redis
from fastworker.errors import ExitCode, StreamUnavailable
from fastworker.metrics import OUTCOMES

RATE_WINDOW_S = 0.5
WATCH_S = 1.0


class ProcessStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a worker. Ages in seconds, memory in bytes (PSS), `entries_per_s` over the last seconds."""

    name: str
    pid: int
    state: str
    ready: bool
    consumers: str = ""
    entries: int = 0
    entries_per_s: float = 0.0
    flushes: int = 0
    flush_ms: float = 0.0
    rows: int = 0
    oldest_unflushed_s: float = 0.0
    progress_age_s: float = 0.0
    memory_bytes: int | None = None
    restarts: int = 0
    error: str = ""
    error_age_s: float | None = None


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One supervisor with its processes, as its monitor wrote it; `at` is Unix time."""

    owner: str
    at: float
    version: str
    ready: bool
    why: list[str]
    connections_max: int
    connections_open: int = 0
    stream_full_s: float | None = None
    processes: list[ProcessStatus]
    http: str = ""


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    consumers: int
    lag_entries: int
    lag_is_exact: bool
    pending_entries: int
    last_delivered_id: str
    holds_stream: bool = False


class ReaderStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`running`: the lease is held. `cursor_age_s`: since the reader last wrote its figures (None: never)."""

    running: bool
    connected: bool
    url: str
    cursor: str | None
    frame_age_s: float | None
    reconnects: int
    gaps: int
    waits_for_room: bool
    error: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `status --json`. Ages and lags in seconds, sizes in bytes; None: not known."""

    at: float
    version: str
    redis_version: str
    redis_memory_bytes: int
    redis_maxmemory_bytes: int
    stream_key: str
    stream_entries: int
    stream_entries_max: int
    stream_bytes: int | None
    held_by: str | None
    group: str
    lag_entries: int
    lag_is_exact: bool
    lag_seconds: float
    pending_entries: int
    oldest_pending_seconds: float
    dead_letters: int
    appended_per_s: float | None
    finished_per_s: float | None
    ledger: dict[str, int]
    drops: dict[str, int]
    unaccounted_entries: int | None
    events: dict[str, int]
    groups: list[GroupStatus]
    reader: ReaderStatus
    workers: list[WorkerStatus]


class Reading(msgspec.Struct, frozen=True):
    """What two readings are compared by, for rates."""

    at: float
    added: int | None
    finished: int

    def per_s(self, before: Reading | None) -> tuple[float | None, float | None]:
        """Appended and finished per second since `before`."""
        if before is None or self.at <= before.at:
            return None, None
        seconds = self.at - before.at
        added = None
        if self.added is not None and before.added is not None:
            added = max(0.0, (self.added - before.added) / seconds)
        return added, max(0.0, (self.finished - before.finished) / seconds)


def _holder(groups: list[GroupStatus], unfinished: dict[str, str | None], ignored: tuple[str, ...]) -> str | None:
    """The group with the oldest unfinished entry: trimming waits for it."""
    waiting = [(age_s(unfinished[g.name]), g.name) for g in groups if unfinished[g.name] and g.name not in ignored]
    return max(waiting)[1] if waiting else None


async def collect(admin: RedisAdmin, config: Config, before: Reading | None = None) -> tuple[Status, Reading]:
    """Everything, and the reading to hand in next time so that rates are over the time between."""
    server = await admin.server()
    stream = await admin.stream(measure=True)
    ledger = await admin.ledger()
    outcomes = {outcome: ledger.get(outcome, 0) for outcome in OUTCOMES}
    drops = {name.removeprefix("drop:"): count for name, count in ledger.items() if name.startswith("drop:")}
    reading = Reading(time.monotonic(), stream.entries_added if stream else None, sum(outcomes.values()))
    appended_per_s, finished_per_s = reading.per_s(before)

    found = {group.name: group for group in stream.groups} if stream else {}
    groups = [
        GroupStatus(
            name=group.name,
            consumers=group.consumers,
            lag_entries=group.lag,
            lag_is_exact=group.lag_is_exact,
            pending_entries=group.pending,
            last_delivered_id=group.last_delivered_id,
        )
        for group in found.values()
    ]
    holder = _holder(groups, {name: group.unfinished_id for name, group in found.items()}, config.ignore_groups)
    groups = [msgspec.structs.replace(group, holds_stream=group.name == holder) for group in groups]
    ours = found.get(config.group)
    unaccounted = None
    if ours is not None and ours.entries_read is not None:
        unaccounted = ours.entries_read - ours.pending - sum(outcomes.values())

    return Status(
        at=time.time(),
        version=__version__,
        redis_version=f"{server.product} {server.version}",
        redis_memory_bytes=server.used_memory_bytes,
        redis_maxmemory_bytes=server.maxmemory_bytes,
        stream_key=config.stream_key,
        stream_entries=stream.length if stream else 0,
        stream_entries_max=config.max_stream_len,
        stream_bytes=stream.bytes if stream else None,
        held_by=holder,
        group=config.group,
        lag_entries=ours.lag if ours else (stream.length if stream else 0),
        lag_is_exact=ours.lag_is_exact if ours else True,
        lag_seconds=age_s(ours.unfinished_id if ours else (stream.first_id if stream else None), server.time_ms),
        pending_entries=ours.pending if ours else 0,
        oldest_pending_seconds=age_s(ours.oldest_pending_id if ours else None, server.time_ms),
        dead_letters=await admin.dead_letters(),
        appended_per_s=appended_per_s,
        finished_per_s=finished_per_s,
        ledger=outcomes,
        drops=drops,
        unaccounted_entries=unaccounted,
        events=await admin.event_counts(),
        groups=groups,
        reader=await _reader(admin, config),
        workers=await _workers(admin),
    ), reading


async def _reader(admin: RedisAdmin, config: Config) -> ReaderStatus:
    told, stats = await admin.reader_status(), await admin.reader_stats()
    running = await admin.reader_is_leased()
    frame_at = stats.get("last_frame_at", "")
    return ReaderStatus(
        running=running,
        connected=bool(told.get("connected")),
        url=str(told.get("url", "")),
        cursor=await admin.cursor(config.cursor_key),
        frame_age_s=max(0.0, time.time() - float(frame_at)) if frame_at and running else None,
        reconnects=int(stats.get("reconnects", 0)),
        gaps=await admin.gaps(),
        waits_for_room=running and stats.get("full") == "1",
        error=stats.get("last_error", "") if running and not told.get("connected") else "",
    )


async def _workers(admin: RedisAdmin) -> list[WorkerStatus]:
    workers = []
    for text in (await admin.statuses()).values():
        try:
            worker = msgspec.json.decode(text, type=WorkerStatus)
        except msgspec.MsgspecError:
            continue  # of another release: it says what it can through the ledger
        if time.time() - worker.at <= STATUS_STALE_S:
            workers.append(worker)
    return sorted(workers, key=lambda worker: worker.owner)


# --- for people, in 80 columns


def render(status: Status) -> RenderableType:
    parts: list[RenderableType] = [_overview(status)]
    if status.workers:
        parts.append(_processes(status))
    else:
        parts.append(Text("No fastworker worker reported within the last seconds.", style="yellow"))
    if len(status.groups) > 1:
        parts.append(_groups(status))
    if drops := [f"{name} {count:,}" for name, count in sorted(status.drops.items()) if count]:
        parts.append(Text("Drops: " + ", ".join(drops)))
    errors = [f"{process.name}: {process.error}" for worker in status.workers for process in worker.processes]
    parts += [Text(line, style="red") for line in errors if not line.endswith(": ")]
    if status.reader.error:
        parts.append(Text(f"reader: {status.reader.error}", style="red"))
    return Group(*parts)


def _overview(status: Status) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    reader = status.reader
    if reader.connected:
        age = "" if reader.frame_age_s is None else f", last frame {_seconds(reader.frame_age_s)} ago"
        table.add_row("reader", f"connected to {reader.url.partition('/xrpc/')[0]}{age}")
    else:
        table.add_row("reader", Text("not connected" if reader.running else "not running", style="yellow"))
    cursor = f"cursor {reader.cursor or 'none'}, {reader.reconnects} reconnects, {reader.gaps} gaps"
    table.add_row("", cursor + (", WAITS FOR ROOM" if reader.waits_for_room else ""))
    share = 100 * status.stream_entries / status.stream_entries_max
    size = "" if status.stream_bytes is None else f", {_bytes(status.stream_bytes)}"
    table.add_row("stream", f"{status.stream_entries:,} entries ({share:.0f} % of the limit){size}")
    if status.held_by is not None and status.held_by != status.group:
        table.add_row("", Text(f"held back by group {status.held_by}", style="yellow"))
    about = "" if status.lag_is_exact else "about "
    table.add_row("lag", f"{about}{status.lag_entries:,} entries, {_seconds(status.lag_seconds)}")
    table.add_row("pending", f"{status.pending_entries:,} entries, oldest {_seconds(status.oldest_pending_seconds)}")
    table.add_row("rate", f"{_rate(status.appended_per_s)} in, {_rate(status.finished_per_s)} out")
    ledger = status.ledger
    table.add_row(
        "finished",
        f"{ledger['committed']:,} committed, {ledger['nothing_to_store']:,} nothing to store, "
        f"{ledger['set_aside']:,} set aside",
    )
    if status.unaccounted_entries is None:
        balance = Text("ledger not comparable on this server")
    elif status.unaccounted_entries == 0:
        balance = Text("ledger balances", style="green")
    else:
        balance = Text(f"{status.unaccounted_entries:+,} entries were acked by others", style="yellow")
    table.add_row("", balance)
    table.add_row("dead letters", Text(f"{status.dead_letters:,}", style="red" if status.dead_letters else ""))
    limit = f" of {_bytes(status.redis_maxmemory_bytes)}" if status.redis_maxmemory_bytes else ""
    table.add_row("redis", f"{status.redis_version}, {_bytes(status.redis_memory_bytes)}{limit}")
    return table


def _processes(status: Status) -> RenderableType:
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    for name in ("process", "state"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in ("events/s", "entries", "flush ms", "oldest", "memory", "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in status.workers:
        style = "" if worker.ready else "yellow"
        why = "" if worker.ready else f" ({'; '.join(worker.why)})"
        parts = f"at most {worker.connections_max} connections"
        table.add_row(Text(worker.owner, style="bold"), Text(("ready" if worker.ready else "not ready"), style=style))
        for process in worker.processes:
            table.add_row(
                f" {process.name}",
                process.state,
                f"{process.entries_per_s:,.0f}",
                f"{process.entries:,}",
                f"{process.flush_ms:,.0f}",
                _seconds(process.oldest_unflushed_s),
                "" if process.memory_bytes is None else _bytes(process.memory_bytes),
                str(process.restarts),
            )
        table.caption = f"{parts}{why}"
        table.caption_justify = "left"
    return table


def _groups(status: Status) -> RenderableType:
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    table.add_column("group", no_wrap=True, overflow="ellipsis")
    for name in ("consumers", "lag", "pending"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in status.groups:
        table.add_row(group.name, str(group.consumers), f"{group.lag_entries:,}", f"{group.pending_entries:,}")
    return table


def _rate(per_s: float | None) -> str:
    return "unknown" if per_s is None else f"{per_s:,.0f}/s"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GB"


async def show_status(config: Config, *, as_json: bool, watch: bool) -> ExitCode:
    """Print once, or until interrupted. A Redis that goes away under the live view is shown there, not an end."""
    async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-status") as admin:
        status, reading = await collect(admin, config)
        if not watch:
            await asyncio.sleep(RATE_WINDOW_S)
            status, _ = await collect(admin, config, reading)
            _print(status, as_json=as_json)
            return ExitCode.DONE
        console = Console()
        if as_json or not console.is_terminal:
            while True:
                await asyncio.sleep(WATCH_S)
                status, reading = await collect(admin, config, reading)
                _print(status, as_json=as_json)
        with Live(render(status), console=console, auto_refresh=False, screen=True) as live:
            while True:
                await asyncio.sleep(WATCH_S)
                try:
                    status, reading = await collect(admin, config, reading)
                except StreamUnavailable as error:
                    live.update(Text(str(error), style="red"), refresh=True)
                else:
                    live.update(render(status), refresh=True)


def _print(status: Status, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(to_json(status).decode() + "\n")
        sys.stdout.flush()
    else:
        Console(soft_wrap=False).print(render(status))


def to_json(value: Any) -> bytes:
    return msgspec.json.encode(value)
