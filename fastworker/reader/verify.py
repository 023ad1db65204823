"""What becomes of commits that prove themselves, or do not. The level says how much is asked of them.

chain    the commit follows the newest state that is known of its account, and is not from the future
signed   and its account signed it
full     and its ops are what happened between the two trees

Nothing waits here and nothing is held back per account: the tables do not depend on order. What is lost, or only
claimed, queues a repair of its account on the way to the stream. A commit that another key has signed is set aside in
Redis until the account's key has been asked for again. docs/proofs.md has the verdicts and what each costs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import orjson

from fastworker.config import Config
from fastworker.errors import Reason
from fastworker.event import Commit, Drop, Sync
from fastworker.event.proof import Link, Verdict, read_link, read_sync
from fastworker.reader.chain import Break, Chain
from fastworker.reader.prove import KeysOf, Proof, prove
from fastworker.reader.prover import Provers
from fastworker.reader.stats import ReaderStats
from fastworker.redact import redact
from fastworker.stream.chunk import Chunk
from fastworker.table.snapshot import tid_of

log = logging.getLogger(__name__)

AHEAD: Final = timedelta(minutes=5)
TELL_S: Final = 60.0
ASIDE_MAX: Final = 1_000
"""Commits that wait for a key; beyond, they are dropped, and their accounts' repairs queued."""

_PASSING: Final = frozenset((Verdict.OK, Verdict.FIRST, Verdict.REPLAY, Verdict.LEGACY, Verdict.UNVERIFIED))

_BREAK: Final = Verdict.BREAK

Deliver = Callable[[Chunk, Commit, bytes | None], None]
"""Puts a commit into a chunk: with its frame, or None where it is not all that the frame says."""


class Verifier:
    """`keys` None: only the chain is looked at. `provers`: who proves; without them it is done here, at once."""

    def __init__(
        self,
        chain: Chain,
        keys: KeysOf | None,
        stats: ReaderStats,
        deliver: Deliver,
        *,
        full: bool,
        provers: Provers | None = None,
    ) -> None:
        self.chain = chain
        self._provers = provers
        self._proving: dict[int, asyncio.Task[list[Proof]]] = {}  # by id of the chunk
        self.keys = keys
        self.aside = 0  # commits set aside
        self._stats = stats
        self._deliver = deliver
        self._full = full
        self._latest = ""  # the newest revision that is not from the future
        self._told_at = float("-inf")

    def put(self, chunk: Chunk, commit: Commit, payload: Mapping[str, Any], data: bytes) -> None:
        """A commit on its way to the stream."""
        assert commit.rev is not None
        link = read_link(payload, commit.repo, commit.rev)
        key = None if self.keys is None else self.keys.key(commit.repo)
        if self._provers is not None:
            chunk.hold((commit, link, key, data), len(data))
            return
        self.judge(chunk, commit, link, None if key is None else prove(payload, key, full=self._full), data)

    def begin(self, chunk: Chunk) -> None:
        """Have the commits of a chunk proved that is full."""
        asked = [(key, data) for _, (_, _, key, data) in chunk.held if key is not None]
        if self._provers is not None and asked:
            self._proving[id(chunk)] = asyncio.create_task(self._provers.prove(asked))

    async def finish(self, chunk: Chunk) -> None:
        """Judge the commits of a chunk, in order, once they are proved."""
        if id(chunk) not in self._proving:
            self.begin(chunk)
        task = self._proving.get(id(chunk))
        proofs = iter([] if task is None else await task)
        self._proving.pop(id(chunk), None)
        for place, (commit, link, key, data) in chunk.held:
            part = Chunk()
            self.judge(part, commit, link, None if key is None else next(proofs), data)
            chunk.fill(place, part, len(data))
        chunk.held.clear()

    async def stop(self) -> None:
        """Nobody waits for what is being proved."""
        for task in self._proving.values():
            task.cancel()
        await asyncio.gather(*self._proving.values(), return_exceptions=True)
        self._proving.clear()

    def sync(self, event: Sync, payload: Mapping[str, Any]) -> None:
        """Its repair is queued in any case; the next commit follows this state."""
        root = read_sync(payload, event.did, event.rev or "")
        if root is not None and event.rev is not None and not self._is_future(event.rev):
            self.chain.replace(event.did, event.rev, root)

    def judge(self, chunk: Chunk, commit: Commit, link: Link, proof: Proof | None, data: bytes) -> None:
        rev = commit.rev
        assert rev is not None
        broke: Break | None = None
        # mutant: commits from the future
        if rev > self._latest and self._is_future(rev):
            verdict = Verdict.FUTURE_REV
        # mutant: commits that the account did not sign
        elif proof is not None and not proof.is_signed and not proof.is_bad_commit:
            verdict = Verdict.BAD_SIGNATURE
        # mutant: a bad commit is none
        elif (link.data is None or (proof is not None and proof.is_bad_commit)) and not link.is_too_big:
            verdict = Verdict.BAD_COMMIT
        else:
            before = None if proof is None else proof.before
            # mutant: ops without prevData are not undone
            if before is not None:
                link = Link(link.since, before, link.data, link.is_too_big, is_undone=True)
            verdict, broke = self.chain.follow(commit.repo, rev, link)
            if before is not None and verdict is Verdict.OK:
                verdict = Verdict.LEGACY
            if verdict is not _BREAK:
                if proof is not None and proof.proved is not None:
                    verdict = Verdict.INVERSION
                # mutant: nobody is unverified
                elif proof is None and self.keys is not None:
                    verdict = Verdict.UNVERIFIED
        if verdict in _PASSING:
            self._stats.verdicts[verdict] += 1
            self._deliver(chunk, commit, data)
            return
        if broke is not None:
            chunk.breaks.append(broke)
        self._unusual(chunk, verdict, commit, proof, data)

    def _is_future(self, rev: str) -> bool:
        if rev > self._latest:
            self._latest = tid_of(datetime.now(UTC).replace(tzinfo=None) + AHEAD)
        return rev > self._latest

    def _unusual(self, chunk: Chunk, verdict: Verdict, commit: Commit, proof: Proof | None, data: bytes) -> None:
        if verdict is Verdict.BAD_SIGNATURE and self.aside < ASIDE_MAX:
            self.aside += 1
            chunk.unverified(commit.repo, data, commit.relay or "")
        elif verdict is Verdict.BAD_SIGNATURE or verdict is Verdict.FUTURE_REV:
            self.refuse(chunk, verdict, commit)
        else:
            self._stats.verdicts[verdict] += 1
            self._repair(chunk, verdict, commit)
            # mutant: ops that nothing proves
            if proof is not None and proof.proved is not None:
                self._deliver(chunk, only_proved(commit, proof.proved), None)
            else:
                self._deliver(chunk, commit, data)

    def refuse(self, chunk: Chunk, verdict: Verdict, commit: Commit) -> None:
        """Nothing of it is stored; the account's repair is queued."""
        self._stats.verdicts[verdict] += 1
        self._stats.drops[Reason.BAD_SIGNATURE if verdict is Verdict.BAD_SIGNATURE else Reason.FUTURE_REV] += 1
        self._repair(chunk, verdict, commit)
        now = time.monotonic()
        if now - self._told_at < TELL_S:
            return
        self._told_at = now
        if verdict is Verdict.BAD_SIGNATURE:
            log.error("A commit of %s is not signed by the account and is dropped; its repair is queued", commit.repo)
        else:
            log.error(
                "A commit of %s is from the future (revision %s) and is dropped; its repair is queued. If these are "
                "many, is this machine's clock behind?",
                commit.repo,
                commit.rev,
            )

    def _repair(self, chunk: Chunk, verdict: Verdict, commit: Commit) -> None:
        told = {"rev": commit.rev, "seq": commit.seq, "relay": commit.relay, "time": commit.time, "reason": verdict}
        chunk.repair(commit.repo, orjson.dumps(told))


def state_file(settings: Config, what: str) -> Path | None:
    """Of this stream's reader, in FASTWORKER_HOME; None where that is not set."""
    if settings.home is None:
        return None
    stream = f"{redact(settings.redis_url)} {settings.stream_key}"
    return Path(settings.home).expanduser() / f"{what}-{blake2b(stream.encode(), digest_size=6).hexdigest()}"


def only_proved(commit: Commit, proved: frozenset[str]) -> Commit:
    """The others become drops."""
    ops, drops = [], list(commit.drops)
    for op in commit.ops:
        if f"{op.collection}/{op.rkey}" in proved:
            ops.append(op)
        else:
            drops.append(Drop(Reason.UNPROVED_OP, op.collection, f"{op.collection}/{op.rkey}"[:200]))
    return Commit(commit.seq, commit.repo, commit.rev, commit.time, ops, drops, commit.relay)
