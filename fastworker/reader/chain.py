"""The newest state of each account's repository, as the reader has seen it: what a commit must follow.

A table of fixed size: slots of 32 bytes (8 bytes of the DID, the rev as 13 characters, 11 bytes of the tree's root) in
sets of four; where a set is full the account with the oldest rev goes. A lost slot costs a detection, never a row, so
nothing is locked and nothing is synced. It lives in a mapped file, which survives the process by the page cache; a file
that another boot of the machine has left unfinished starts empty.

Slots are written when a frame is decoded, so after a crash they are ahead of the cursor: what comes again is a replay
then. A break is not: its slot is written after its repair is on the way (`settled`), or a crash would forget the break.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import time
from hashlib import blake2b
from pathlib import Path
from typing import Final
from zlib import crc32

from fastworker.event.proof import Link, Verdict

log = logging.getLogger(__name__)

IN_MEMORY_BYTES: Final = 16 * 1024 * 1024
"""Where no file can be written: half a million accounts, gone with the process."""
_HEADER: Final = mmap.PAGESIZE
_MAGIC: Final = b"fastworker chain 1"
_SLOT, _SET = 32, 128
_TAG, _REV = 8, 13
_EMPTY: Final = bytes(_TAG)
_UNKNOWN: Final = bytes(_SLOT - _TAG - _REV)
_PLC: Final = b"did:plc:"
_OK: Final = (Verdict.OK, None)
_FIRST: Final = (Verdict.FIRST, None)
_REPLAY: Final = (Verdict.REPLAY, None)
_BREAK: Final = Verdict.BREAK

Break = tuple[str, int]
"""A slot that waits for its repair."""


class Chain:
    """One process, one thread. `path` None, or not writable: in memory, of `IN_MEMORY_BYTES` at most."""

    def __init__(self, path: Path | None, size: int) -> None:
        self._file: int | None = None
        if path is not None:
            try:
                self._file, self._map = _open(path, size)
            except OSError as error:
                log.warning(
                    "The chain of commits cannot be kept in %s (%s): it is kept in memory and begins empty at each "
                    "start; FASTWORKER_HOME names another place",
                    path,
                    error.strerror or error,
                )
        else:
            log.info("No FASTWORKER_HOME: the chain of commits is kept in memory and begins empty at each start")
        if self._file is None:
            self._map = mmap.mmap(-1, _HEADER + min(size, IN_MEMORY_BYTES))
        self._sets = (len(self._map) - _HEADER) // _SET
        self._held: dict[bytes, tuple[bytes, int]] = {}
        self._breaks = 0

    def close(self) -> None:
        """Complete: what comes next may go on from here, after a boot too."""
        if self._file is not None:
            self._map.flush()
            _write_header(self._map, "complete")
            self._map.flush()
        self._map.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def follow(self, did: str, rev: str, link: Link) -> tuple[Verdict, Break | None]:
        """Whether a commit follows what is known of its account; its state is what is known from now on.

        With BREAK comes what `settled` is to be told once the repair is on the way.
        """
        tag, at = self._place(did)
        four = self._map[at : at + _SET]
        slot = four.find(tag)
        if slot % _SLOT:
            slot = _find(four, tag)
        data = link.data
        moment = rev.encode()
        state = moment + (_UNKNOWN if data is None else data[4:15])
        if slot < 0:
            if link.is_too_big:
                return Verdict.BREAK, None
            self._insert(at, four, tag + state)
            return _FIRST
        held = self._held.get(tag) if self._held else None
        known = four[slot + _TAG : slot + _SLOT] if held is None else held[0]
        # mutant: a replay moves the chain
        if moment <= known:  # with a rev before it: longer is greater
            return _REPLAY
        verdict = _verdict(known, link)
        # mutant: a break is forgotten by a crash
        if verdict is _BREAK:
            self._breaks += 1
            self._held[tag] = (state, self._breaks)
            return verdict, (did, self._breaks)
        if held is not None:
            self._held[tag] = (state, held[1])
        else:
            self._map[at + slot + _TAG : at + slot + _SLOT] = state
        return _OK if verdict is _OK[0] else (verdict, None)

    def replace(self, did: str, rev: str, data: bytes) -> None:
        """After a `#sync`: take this as the state, whatever was known before."""
        tag, at = self._place(did)
        four = self._map[at : at + _SET]
        slot = _find(four, tag)
        state = rev.encode() + data[4:15]
        if slot < 0:
            self._insert(at, four, tag + state)
        elif state[:_REV] > four[slot + _TAG : slot + _TAG + _REV] and tag not in self._held:
            self._map[at + slot + _TAG : at + slot + _SLOT] = state

    def settled(self, breaks: list[Break]) -> None:
        """The repairs of these breaks are on the stream: their accounts go on from the newest state."""
        for did, number in breaks:
            tag, at = self._place(did)
            state, newest = self._held.get(tag, (b"", 0))
            if newest != number:
                continue
            del self._held[tag]
            four = self._map[at : at + _SET]
            slot = _find(four, tag)
            if slot >= 0:
                self._map[at + slot + _TAG : at + slot + _SLOT] = state

    def forget_breaks(self) -> None:
        """The outbox was thrown away: its breaks will be found again."""
        self._held.clear()

    def release_pages(self) -> None:
        """The pages stay in the system's cache; they do not count as this process's memory until they are used."""
        if self._file is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _place(self, did: str) -> tuple[bytes, int]:
        """(tag, where its set begins). A `did:plc` is a hash itself."""
        name = did.encode()
        tag = name[8:16] if name.startswith(_PLC) else blake2b(name, digest_size=_TAG).digest()
        return tag, _HEADER + crc32(name) % self._sets * _SET

    def _insert(self, at: int, four: bytes, slot: bytes) -> None:
        place = _find(four, _EMPTY)
        if place < 0:
            place = min(range(0, _SET, _SLOT), key=lambda place: four[place + _TAG : place + _TAG + _REV])
        self._map[at + place : at + place + _SLOT] = slot


def _verdict(known: bytes, link: Link) -> Verdict:
    since, before = link.since, link.before
    if link.is_too_big:
        return _BREAK
    # mutant: since is not compared
    is_next = since is not None and since.encode() == known[:_REV]
    if before is None:
        return Verdict.LEGACY if is_next or since is None else _BREAK
    # mutant: a commit that takes since away
    if is_next or (since is None and link.is_undone):
        # mutant: prevData is not compared
        return _OK[0] if before[4:15] == known[_REV:] or known[_REV:] == _UNKNOWN else _BREAK
    return _BREAK


def _find(four: bytes, tag: bytes) -> int:
    at = four.find(tag)
    while at > 0 and at % _SLOT:
        at = four.find(tag, at + 1)
    return at


def _open(path: Path, size: int) -> tuple[int, mmap.mmap]:
    """Raises OSError, also where another process has it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = _HEADER + size // _SET * _SET
        if os.fstat(file).st_size != size or not _is_usable(os.pread(file, 256, 0)):
            os.ftruncate(file, 0)
        os.posix_fallocate(file, 0, size)  # else a full disk kills the process at a write: SIGBUS
        mapped = mmap.mmap(file, size)
    except BaseException:
        os.close(file)
        raise
    _write_header(mapped, "open")
    return file, mapped


def _is_usable(header: bytes) -> bool:
    """Closed, or of the running boot: after a power loss some pages are older than others."""
    magic, state, boot = [*header.split(b"\n"), b"", b""][:3]
    return magic == _MAGIC and (state.strip() == b"complete" or boot == _boot())


def _write_header(mapped: mmap.mmap, state: str) -> None:
    text = b"\n".join((_MAGIC, f"{state:<8}".encode(), _boot(), b""))
    mapped[: len(text)] = text


def _boot() -> bytes:
    """Another one after each boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:  # hidden from a hardened service: about when it was, then
        return b"%d" % ((time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)) // 300)
