"""Servers that somebody else started for us (edge/embedded.py): those that end are started again."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from typing import ClassVar, Protocol

from fastworker.errors import Unreachable
from fastworker.process.children import FAILURE_FORGOTTEN_S, backoff_s, how

log = logging.getLogger(__name__)


class Server(Protocol):
    """A process that somebody else started for us, and that must not stay away (edge/embedded.py)."""

    what: ClassVar[str]

    @property
    def pid(self) -> int | None: ...
    def lost(self, code: int) -> None: ...
    def revive(self) -> None: ...


class _Ward:
    """What the parent remembers of a server."""

    def __init__(self, server: Server, now: float) -> None:
        self.server = server
        self.pid = server.pid
        self.started = now
        self.failures = 0
        self.start_at = 0.0


class Wards:
    def __init__(self, servers: Sequence[Server], now: float) -> None:
        self._wards = [_Ward(server, now) for server in servers]

    def lost(self, pid: int, code: int, now: float) -> None:
        """A server, or an orphan that is nobody's."""
        for ward in self._wards:
            if ward.pid == pid:
                ward.pid = None
                ward.server.lost(code)
                if now - ward.started > FAILURE_FORGOTTEN_S:
                    ward.failures = 0
                ward.start_at = now + backoff_s(ward.failures)
                ward.failures += 1
                wait_s = ward.start_at - now
                log.error("%s (pid %d) %s: starting it again in %.1f s", ward.server.what, pid, how(code), wait_s)

    def revive(self, now: float) -> None:
        for ward in self._wards:
            if ward.pid is not None or now < ward.start_at:
                continue
            try:
                ward.server.revive()
            except (OSError, subprocess.SubprocessError, Unreachable) as error:
                ward.start_at = now + backoff_s(ward.failures)
                ward.failures += 1
                log.warning("%s does not start yet: %s", ward.server.what, error)
            else:
                ward.pid, ward.started = ward.server.pid, now
                log.info("%s (pid %d) was started again", ward.server.what, ward.pid)
