"""What a service shows at its port, whoever it is: the figures of the status page, and where it listens."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from fastworker.commands.dlq import Letter
from fastworker.commands.status import ProcessStatus
from fastworker.errors import Unreachable
from fastworker.monitor.http import Source, ask, serve

log = logging.getLogger(__name__)


class HttpSettings(msgspec.Struct, frozen=True):
    """`port` None: no HTTP. `chosen`: the operator named the port, so that another one will not do. `names`: more names
    that the status page answers to."""

    host: str = "127.0.0.1"
    port: int | None = None
    chosen: bool = False
    names: tuple[str, ...] = ()


class Card(msgspec.Struct, frozen=True):
    """One figure. `trend`: the page draws its last minutes. `bad`: it is what an operator should look at."""

    title: str
    value: float | str | None
    unit: str = ""
    trend: bool = False
    bad: bool = False


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """/status.json."""

    version: str
    service: str
    at: float
    ready: bool
    why: list[str]
    cards: dict[str, list[Card]]  # by section
    processes: list[ProcessStatus]
    drops: dict[str, int]
    dead_letters: list[Letter] = []


async def listen(stack: AsyncExitStack, source: Source, http: HttpSettings) -> int | None:
    """The port that is served, None for none. Where nobody chose the port, another one will do."""
    if http.port is None:
        return None
    try:
        return await stack.enter_async_context(serve(source, http.host, http.port, http.names))
    except Unreachable as error:
        if http.chosen:
            raise
        log.warning("%s; taking a free one", error)
        return await stack.enter_async_context(serve(source, http.host, 0, http.names))


async def ask_health(host: str, ports: Sequence[int], path: str) -> tuple[bool, str]:
    """Whether every service that answers on these ports is well (at least one must), and what they say."""
    answers = [answer for port in ports if (answer := await ask(host, port, path)) is not None]
    if not answers:
        return False, f"nobody answers on {host}, port {' or '.join(map(str, ports))}"
    return all(well for well, _ in answers), "; ".join(words for _, words in answers)


def pss(pid: int) -> int:
    """Proportional set size in bytes; 0 when the process is gone or the kernel does not tell."""
    try:
        lines: Sequence[str] = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def own_pss() -> int:
    return pss(os.getpid())
