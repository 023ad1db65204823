"""What a service shows at its port, whoever it is: the figures of the status page, and where it listens."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

import msgspec

from fastworker.config import Config
from fastworker.errors import ConfigError, Unreachable
from fastworker.monitor.facts import ProcessStatus
from fastworker.monitor.health import note_of
from fastworker.monitor.http import Source, port_is_taken, serve
from fastworker.monitor.rates import Written
from fastworker.stream.letters import Letter

log = logging.getLogger(__name__)


STALE_S: Final = 6.0
EXPLAINED: Final = {
    "finished": "Entries finished per second, over the last five seconds, by this worker's processes.",
    "appended": "Entries that the reader put on the stream per second, over the last five seconds.",
    "lag": "Entries on the stream that no consumer of the group was given yet.",
    "oldest unfinished": "Age of the oldest entry that the group has not finished. Red above a minute.",
    "latency, median": "Half of the last minute's entries took no longer, from their append to the ack.",
    "latency, 99 %": "99 of 100 of the last minute's entries took no longer, from their append to the ack.",
    "in work": "Entries that a consumer of the group has and did not acknowledge yet.",
    "dead letters": "Entries that could not be stored and were set aside. `fastworker dlq list` says why.",
    "stream": "Entries on the stream, and its limit. Red above four fifths; when it is full, the reader waits.",
    "stream is full in": "At the growth of the last minute. Red below an hour.",
    "stream memory": "Memory of the stream in Redis, sampled every five seconds.",
    "PostgreSQL connections": "Connections at work now, and DB_POOL_SIZE: the most there may be.",
    "not accounted for": "Entries delivered, in no outcome and not pending. Not 0: somebody else acknowledges.",
    "committed": "Entries whose rows are in PostgreSQL.",
    "nothing to store": "Entries without anything that belongs into a table.",
    "set aside": "Entries that went to the dead letters.",
    "trimmed while pending": "Entries that somebody removed from the stream before they were finished. They are lost.",
    "relay": "Where the reader reads. Red while it is not connected.",
    "cursor": "The newest seq that is on the stream: the reader goes on after it.",
    "cursor's age": "How far the reader is behind: age of the newest event, by the relay's clock.",
    "last frame": "Time since the relay sent anything. Red when that is long for this relay.",
    "frames": "Messages received since the reader started.",
    "received": "Bytes of these messages.",
    "entries appended": "Entries put on the stream since the reader started.",
    "waiting to be appended": "Entries received and not on the stream yet. Red while the stream is full.",
    "reconnects": "Connections that ended without being asked to.",
    "gaps": "Stretches that the relay did not give us. `LRANGE fastworker:gaps 0 -1` says which.",
    "truth": "Of the least true table, the share of rows that agree with the repositories, by the last day's samples.",
    "sampled": "Random accounts that were compared with their repositories in the last day.",
    "gaps open": "Gaps whose accounts are not all repaired yet. They close by themselves.",
    "repairs waiting": "Accounts that wait to be made equal to their repositories, or are being made so.",
    "oldest repair": "Since the oldest of them was asked for. Red above an hour.",
    "mended": "Rows that repairs found missing, different or too many in the last day.",
    "repairs given up": "`fastworker backfill --status` and `fastworker.repos` say why.",
    "history done": "Of the accounts that backfills ever asked for, those at their end. See docs/history.md.",
    "accounts open": "Accounts that wait to be fetched, or are being fetched.",
    "history": "Records of fetched repositories, compared and written, over the last five minutes.",
    "history is done in": "At the rate of the last five minutes.",
    "hosts that hold back": "Hosts that asked for a pause, or failed: the longest, by name.",
    "accounts given up": "Accounts that could not be fetched. `fastworker.repos.error` says why.",
    "told": "How old the reader's figures are. Red: it has stopped telling, so the others are wrong.",
    "Events": "Entries per second that came in and that were finished.",
    "Not finished": "Entries not delivered yet, and in work.",
    "Oldest unfinished": "Age of the oldest entry that the group has not finished, at its worst.",
    "Latency": "From the append of an entry to its ack: from the median to 99 %, at its worst.",
    "Stream": "Entries on the stream. The dashed line is the limit.",
    "Frames": "Messages received and entries appended per second.",
    "Outbox": "Entries received and not on the stream yet, at its worst.",
    "Cursor's age": "How far the reader is behind, at its worst.",
}
"""What each figure and chart means, by its title."""


class HttpSettings(msgspec.Struct, frozen=True):
    """`port` None: no HTTP. `chosen`: the operator named the port, so that another one will not do. `names`: more names
    that the status page answers to."""

    host: str
    port: int | None
    chosen: bool
    names: tuple[str, ...]


def http_of(config: Config, default: int) -> HttpSettings:
    """Of a service that is at port `default` unless the operator says otherwise."""
    port = default if config.http_port is None else config.http_port
    return HttpSettings(
        host=config.http_host,
        port=None if isinstance(port, str) else port,
        chosen=config.http_port is not None,
        names=config.http_hosts,
    )


class Card(msgspec.Struct, frozen=True):
    """One figure. `bad`: it is what an operator should look at. EXPLAINED says what it means, by its title."""

    title: str
    value: float | str | None
    unit: str = ""
    bad: bool = False


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """Series of /history.json in one picture: lines, a band from the first to the second, a limit."""

    title: str
    unit: str
    lines: tuple[str, ...] = ()
    band: tuple[str, str] | None = None
    limit: float | None = None


class Wait(msgspec.Struct, frozen=True):
    """What is not done, and since when: its oldest part, in seconds; None where nobody knows."""

    what: str
    count: int
    oldest_s: float | None
    bad: bool = False


class Worker(msgspec.Struct, frozen=True):
    """A worker on the same stream, this one or another host's, by what it told within the last seconds."""

    owner: str
    version: str
    ready: bool
    entries_per_s: float
    processes: int
    told_s: float


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """/status.json. `age_s`: how old the figures are; older than `stale_s` they are not to be believed."""

    version: str
    service: str
    at: float
    uptime_s: float
    age_s: float
    stale_s: float = STALE_S
    ready: bool
    why: list[str]
    cards: dict[str, list[Card]]  # by section
    charts: tuple[Chart, ...]
    waits: list[Wait] = []
    processes: list[ProcessStatus]
    workers: list[Worker] = []
    written: list[Written] = []
    drops: dict[str, int]
    dead_letters: list[Letter] = []
    explained: dict[str, str] = msgspec.field(default_factory=lambda: EXPLAINED)


def settle_port(http: HttpSettings) -> HttpSettings:
    """Choose the port that will be served. Before anything is forked, so that all processes name the same one.

    Raises Unreachable where the operator chose one that is taken, ConfigError where there is no such address.
    """
    if http.port is None:
        return http
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    for port in (http.port, 0):
        try:
            with socket.create_server((http.host, port), family=family) as probe:
                found: int = probe.getsockname()[1]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"Cannot listen on {http.host} port {port}: {error.strerror or error}") from error
            if http.chosen:
                raise port_is_taken(http.host, port) from error
            continue
        break
    if found != http.port != 0:
        _fell_back(http, found)
    return msgspec.structs.replace(http, port=found, chosen=http.chosen and http.port != 0)


def _fell_back(http: HttpSettings, port: int) -> None:
    """The default port is taken: log it, and leave a note for `fastworker health` of this machine and user."""
    log.warning("Port %d of %s is in use: this service is at port %d", http.port, http.host, port)
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(note_of(http.port or 0), flags, 0o600)
        with open(fd, "w", encoding="ascii") as note:  # noqa: PTH123 - a descriptor
            note.write(f"{port} {os.getpid()}")


async def listen(stack: AsyncExitStack, source: Source, http: HttpSettings) -> int | None:
    """The port that is served, None for none. Where nobody chose the port, another one will do."""
    if http.port is None:
        return None
    try:
        return await stack.enter_async_context(serve(source, http.host, http.port, http.names))
    except Unreachable as error:
        if http.chosen:
            raise
        log.debug("%s", error)
        found = await stack.enter_async_context(serve(source, http.host, 0, http.names))
        _fell_back(http, found)
        return found


def pss(pid: int) -> int:
    """Proportional set size in bytes; 0 when the process is gone or the kernel does not tell."""
    try:
        lines: Sequence[str] = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def own_pss() -> int:
    return pss(os.getpid())
