"""Commits that another key has signed wait in Redis (`fastworker:unverified`) until their account's key was asked for.

Then each is judged again, on the way to the stream like any other; or it is dropped, and its account's repair queued.
It leaves `fastworker:unverified` in the same script, so it is neither lost nor done twice.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from fastworker.errors import InvalidEvent, StreamUnavailable
from fastworker.event import Commit
from fastworker.event.frame import open_frame, read_frame
from fastworker.event.proof import Verdict, read_link
from fastworker.reader.outbox import Outbox
from fastworker.reader.prove import prove
from fastworker.reader.verify import Verifier
from fastworker.stream.feed import Feed

LOOK_S: Final = 0.5
PIECE: Final = 100


class Newest(Protocol):
    def newest(self, did: str) -> str | None:
        """The multikey, if it was asked for lately; else it is asked for now, and None."""


async def judge_aside(feed: Feed, outbox: Outbox, verifier: Verifier, keys: Newest, *, full: bool) -> None:
    """Until it is cancelled."""
    waiting: dict[str, str] = {}  # entry id -> DID
    last = "0-0"
    while True:
        try:
            while found := await feed.unverified(last, PIECE):
                waiting |= found
                last = found[-1][0]
            verifier.aside = len(waiting)
            for entry_id, did in list(waiting.items()):
                multikey = keys.newest(did)
                if multikey is None:
                    continue
                held = await feed.unverified_frame(entry_id)
                del waiting[entry_id]
                if held is not None:
                    _judge(outbox, verifier, multikey, *held, full=full)
                    outbox.filling.judged(entry_id)
                    await outbox.put()
        except StreamUnavailable:
            pass  # as the appender says
        await asyncio.sleep(LOOK_S)


def _judge(outbox: Outbox, verifier: Verifier, multikey: str, data: bytes, relay: str, *, full: bool) -> None:
    try:
        header, payload = open_frame(data)
        commit = read_frame(header, payload, relay or None)
    except InvalidEvent:
        return
    if not isinstance(commit, Commit) or commit.rev is None:
        return
    proof = prove(payload, multikey, full=full)
    if proof.is_signed:
        verifier.judge(outbox.filling, commit, read_link(payload, commit.repo, commit.rev), proof, data)
    else:
        verifier.refuse(outbox.filling, Verdict.BAD_SIGNATURE, commit)
