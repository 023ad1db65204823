"""One account's repository from the host that its DID document names, checked until nothing is left to believe.

The document says which host and which key. The commit must be the account's own, not from the future, signed with the
key of the document, and the tree whole. A host that commits while it exports may send pieces of two states, so what
is not whole is asked for again; a document may be old, so a wrong signature or a missing repository asks for it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from yarl import URL

from fastworker.event.proof import Flaw, SignedCommit, Unproved
from fastworker.event.repository import Repository
from fastworker.sync.hosts import HostError, HostFault, Hosts, pds_of
from fastworker.sync.keys import key_of, multikey_of
from fastworker.table.snapshot import tid_moment

TRIES_S: Final = (0.0, 2.0, 15.0)
"""Pauses before each try for a repository that was not whole."""
HELD_BYTES: Final = 4 * 1024 * 1024
"""Of a repository in memory: several are fetched at a time. Blocks of larger ones are read from the file."""
AHEAD: Final = timedelta(minutes=5)
_AGAIN: Final = frozenset((Flaw.BAD_CAR, Flaw.BAD_HASH, Flaw.MISSING_BLOCK, Flaw.BAD_TREE))
_CUT: Final = (HostFault.BAD_ANSWER,)


class Refusal(StrEnum):
    """Why an account could not be fetched. The values are names of metrics."""

    GONE = "gone"  # not found, taken down, suspended, deactivated: its rows stay as they are
    UNREACHABLE = "unreachable"
    LIMITED = "limited"
    PRIVATE = "private"
    TOO_LARGE = "too_large"
    BAD_ANSWER = "bad_answer"
    NO_SPACE = "no_space"
    NO_KEY = "no_key"
    BAD_SIGNATURE = "bad_signature"
    FUTURE_REV = "future_rev"
    BAD_CAR = "bad_car"
    STALE = "stale"  # a file older than what is stored


class NotFetched(Exception):
    """`wait_s`: how long the host will be left alone. `status`: what its host, or the directory, says of the account,
    as an #account event would."""

    def __init__(self, refusal: Refusal, why: str, wait_s: float = 0.0, status: str | None = None) -> None:
        super().__init__(f"{refusal}: {why}")
        self.refusal = refusal
        self.wait_s = wait_s
        self.status = status


_REFUSALS: Final = {
    HostFault.UNREACHABLE: Refusal.UNREACHABLE,
    HostFault.SLOW: Refusal.UNREACHABLE,
    HostFault.LIMITED: Refusal.LIMITED,
    HostFault.REFUSED: Refusal.PRIVATE,
    HostFault.TOO_LARGE: Refusal.TOO_LARGE,
    HostFault.BAD_ANSWER: Refusal.BAD_ANSWER,
    HostFault.NO_SPACE: Refusal.NO_SPACE,
}
_STATUSES: Final = {
    HostFault.TAKENDOWN: "takendown",
    HostFault.SUSPENDED: "suspended",
    HostFault.DEACTIVATED: "deactivated",
    HostFault.TOMBSTONED: "deleted",
}
_ELSEWHERE: Final = (HostFault.NOT_FOUND, HostFault.TAKENDOWN, HostFault.SUSPENDED, HostFault.DEACTIVATED)
"""What also a host says that the account has left."""


@asynccontextmanager
async def fetched(
    hosts: Hosts,
    did: str,
    folder: Path,
    *,
    document: dict[str, Any] | None = None,
    tries_s: tuple[float, ...] | None = None,
) -> AsyncIterator[Repository]:
    """An open repository, whole and signed; its file is gone afterwards. Raises NotFetched.

    `document`: of the account, where it has been asked for just now. `tries_s`: instead of TRIES_S.
    """
    path = folder / f"{did.replace(':', '_').replace('/', '_')[:100]}.car"
    try:
        with await _fetch(hosts, did, path, document, tries_s or TRIES_S) as repository:
            yield repository
    finally:
        _remove(path)


async def document_of(hosts: Hosts, did: str) -> tuple[dict[str, Any], str]:
    """The account's document, and its host as in a URL. Raises NotFetched."""
    try:
        document = await hosts.document(did)
    except HostError as error:
        raise _not_fetched(error) from error
    return document, URL(_host_of(document)).authority


def _not_fetched(error: HostError) -> NotFetched:
    return NotFetched(_REFUSALS.get(error.fault, Refusal.GONE), str(error), error.wait_s, _STATUSES.get(error.fault))


async def _fetch(
    hosts: Hosts, did: str, path: Path, document: dict[str, Any] | None, tries_s: tuple[float, ...]
) -> Repository:
    try:
        if document is None:
            document = await hosts.document(did)
        for number, pause in enumerate(tries_s, 1):
            await asyncio.sleep(pause)
            _remove(path)  # of the try before
            try:
                document = await _into(hosts, did, document, path)
                return await _checked(hosts, did, document, path)
            except (Unproved, HostError) as error:
                is_transient = error.flaw in _AGAIN if isinstance(error, Unproved) else error.fault in _CUT
                if not is_transient or number == len(tries_s):
                    raise
        raise AssertionError
    except HostError as error:
        raise _not_fetched(error) from error
    except Unproved as error:
        is_large = error.flaw in (Flaw.TOO_LARGE, Flaw.TOO_DEEP)
        refusal = Refusal.BAD_SIGNATURE if error.flaw == Flaw.BAD_SIGNATURE else Refusal.BAD_CAR
        raise NotFetched(Refusal.TOO_LARGE if is_large else refusal, str(error)) from error


async def _into(hosts: Hosts, did: str, document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The file; and the document that named the host, which is a newer one where the account has moved."""
    host = _host_of(document)
    try:
        await hosts.get_repo(host, did, path)
    except HostError as error:
        if error.fault not in _ELSEWHERE:
            raise
        newer = await hosts.document(did)
        if _host_of(newer) == host:
            raise
        await hosts.get_repo(_host_of(newer), did, path)
        return newer
    return document


async def _checked(hosts: Hosts, did: str, document: dict[str, Any], path: Path) -> Repository:
    repository = Repository(path, in_memory_max=HELD_BYTES)
    try:
        await _prove(hosts, did, document, repository.commit)
        # mutant: a repository is not walked
        repository.check()
    except BaseException:
        repository.close()
        raise
    return repository


async def _prove(hosts: Hosts, did: str, document: dict[str, Any], commit: SignedCommit) -> None:
    # mutant: the repository of another account
    if commit.did != did:
        raise NotFetched(Refusal.BAD_SIGNATURE, f"the repository of {commit.did}")
    moment = tid_moment(commit.rev)
    # mutant: a repository from the future
    if moment is None or moment > datetime.now(UTC).replace(tzinfo=None) + AHEAD:
        raise NotFetched(Refusal.FUTURE_REV, f"its revision {commit.rev} is from the future")
    if _is_signed(document, commit.signature, commit.signed):
        return
    # mutant: a rotated key is not looked up
    document = await hosts.document(did)  # the key may have been another one since
    # mutant: a repository that nobody signed
    if not _is_signed(document, commit.signature, commit.signed):
        raise NotFetched(Refusal.BAD_SIGNATURE, "not signed with the key of the DID document")


def _is_signed(document: dict[str, Any], signature: bytes, signed: bytes) -> bool:
    text = multikey_of(document)
    if text is None:
        raise NotFetched(Refusal.NO_KEY, "its DID document has no key of the account")
    try:
        key = key_of(text)
    except ValueError as error:
        raise NotFetched(Refusal.NO_KEY, str(error)) from None
    return key.is_signed(signature, signed)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _host_of(document: dict[str, Any]) -> str:
    host = pds_of(document)
    if host is None:
        raise NotFetched(Refusal.GONE, "its DID document names no host")
    return host
