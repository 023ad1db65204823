"""What a service shows at its port, whoever it is: the figures of the status page, and where it listens."""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import msgspec

from fastworker.edge.expose import Source, ask, port_is_taken, serve
from fastworker.errors import ConfigError, Unreachable
from fastworker.run.dlq import Letter
from fastworker.run.status import ProcessStatus

log = logging.getLogger(__name__)


class HttpSettings(msgspec.Struct, frozen=True):
    """`port` None: no HTTP. `chosen`: the operator named the port, so that another one will not do."""

    host: str = "127.0.0.1"
    port: int | None = None
    chosen: bool = False


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


def settle_port(http: HttpSettings) -> HttpSettings:
    """Before anything is forked: with the port that will be served, so that all say the same one.

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
    return HttpSettings(http.host, found, chosen=http.chosen and http.port != 0)


def _fell_back(http: HttpSettings, port: int) -> None:
    """The default is taken: tell the log, and `fastworker health` of this machine and user."""
    log.warning("Port %d of %s is in use: this service is at port %d", http.port, http.host, port)
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(_note(http.port or 0), flags, 0o600)
        with open(fd, "w", encoding="ascii") as note:  # noqa: PTH123 - a descriptor
            note.write(f"{port} {os.getpid()}")


def _note(default: int) -> Path:
    return Path(tempfile.gettempdir()) / f"fastworker-{os.getuid()}-http-{default}"


def real_port(default: int) -> int:
    """Where the service is that found its default taken, while it lives; else the default."""
    with suppress(OSError, ValueError):
        fd = os.open(_note(default), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, encoding="ascii") as note:  # noqa: PTH123 - a descriptor
            port, pid = map(int, note.read(40).split())
            if os.fstat(fd).st_uid == os.getuid() and Path(f"/proc/{pid}").exists():
                return port
    return default


async def listen(stack: AsyncExitStack, source: Source, http: HttpSettings) -> int | None:
    """The port that is served, None for none. Where nobody chose the port, another one will do."""
    if http.port is None:
        return None
    try:
        return await stack.enter_async_context(serve(source, http.host, http.port))
    except Unreachable as error:
        if http.chosen:
            raise
        log.debug("%s", error)
        found = await stack.enter_async_context(serve(source, http.host, 0))
        _fell_back(http, found)
        return found


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
