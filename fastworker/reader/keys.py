"""Signing keys of accounts, as the reader needs them: at hand, or asked for beside the stream, never in its path.

What is not known is asked of the DID directory (or the host of a `did:web`), at its own pace (sync/hosts.py), and kept
in memory and in a file, for the next process. After an #identity a key may be another one: it is asked for again, and
used until then, since a signature that it verifies is right.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec

from fastworker.event.syntax import is_did
from fastworker.sync.hosts import HostError, HostFault, Hosts
from fastworker.sync.keys import multikey_of

log = logging.getLogger(__name__)

HELD_MAX: Final = 200_000
WANTED_MAX: Final = 20_000
ASKED_AT_ONCE: Final = 8
AGAIN_S: Final = 3_600.0
"""A key that did not verify is asked for once in so long."""
LATER_S: Final = 1.0
_NONE: Final = (HostFault.NOT_FOUND, HostFault.TOMBSTONED, HostFault.REFUSED, HostFault.BAD_ANSWER)
"""Answers by which the account has no key."""


class _Held(msgspec.Struct):
    multikey: str
    asked_at: float  # monotonic; -inf: by another process


class KeyRing:
    """`path` None: what is asked for is forgotten with the process."""

    def __init__(self, hosts: Hosts, path: Path | None) -> None:
        self._hosts = hosts
        self._path = path
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the newest that were used, last
        self._wanted: dict[str, None] = {}
        self._news = asyncio.Event()
        self._lines = 0  # of the file
        if path is not None:
            self._load(path)

    @property
    def held(self) -> int:
        return len(self._held)

    def key(self, did: str) -> str | None:
        """The multikey, empty where the document has none; None: not known yet, and asked for."""
        held = self._held.get(did)
        if held is None:
            self._want(did)
            return None
        self._held.move_to_end(did)
        return held.multikey

    def newest(self, did: str) -> str | None:
        """The same, if it was asked for within the hour; else it is asked for now, and None."""
        held = self._held.get(did)
        # mutant: a key that does not verify is never asked for again
        if held is None or held.asked_at < time.monotonic() - AGAIN_S:
            self._want(did)
            return None
        return held.multikey

    def changed(self, did: str) -> None:
        """An #identity: the document is another one, perhaps with another key."""
        if did in self._held:
            self._want(did)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(ASKED_AT_ONCE):
                tasks.create_task(self._ask_all())

    def _want(self, did: str) -> None:
        if len(self._wanted) < WANTED_MAX:
            self._wanted[did] = None
            self._news.set()

    async def _ask_all(self) -> None:
        while True:
            if not self._wanted:
                self._news.clear()
                await self._news.wait()
                continue
            did = next(iter(self._wanted))
            del self._wanted[did]
            try:
                multikey = multikey_of(await self._hosts.document(did)) or ""
            except HostError as error:
                if error.fault not in _NONE:
                    log.debug("The key of %s is not known: %s", did, error)
                    await asyncio.sleep(LATER_S)
                    continue  # it is wanted again when it is needed again
                multikey = ""
            self._put(did, multikey, time.monotonic())
            self._keep(did, multikey)

    def _put(self, did: str, multikey: str, asked_at: float) -> None:
        self._held[did] = _Held(multikey, asked_at)
        self._held.move_to_end(did)
        if len(self._held) > HELD_MAX:
            self._held.popitem(last=False)

    def _load(self, path: Path) -> None:
        try:
            lines = path.read_text("ascii").splitlines()
        except (OSError, UnicodeError):
            lines = []
        for line in lines:
            did, _, multikey = line.partition(" ")
            if is_did(did) and len(multikey) < 100:  # else it was torn or is foreign
                self._put(did, multikey, float("-inf"))
        self._lines = len(lines)

    def _keep(self, did: str, multikey: str) -> None:
        if self._path is None:
            return
        try:
            if self._lines > 2 * HELD_MAX:
                whole = "".join(f"{one} {held.multikey}\n" for one, held in self._held.items())
                beside = self._path.with_suffix(".new")
                beside.write_text(whole, "ascii")
                beside.replace(self._path)
                self._lines = len(self._held)
            else:
                with self._path.open("a", encoding="ascii") as file:
                    file.write(f"{did} {multikey}\n")
                self._lines += 1
        except (OSError, UnicodeError) as error:
            log.warning("Keys are not kept in %s: %s", self._path, error)
            self._path = None
