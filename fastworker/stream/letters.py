"""Dead letters as an operator reads them, one line of facts each, also the predecessor's; and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from fastworker.stream.client import translating
from fastworker.stream.ids import id_ms, id_order
from fastworker.stream.partitions import partition_of
from fastworker.stream.parts import Fields, Parts, entries_of, text_of
from fastworker.stream.scripts import script


class Letter(msgspec.Struct, frozen=True):
    """One line of `dlq list`, also its JSON."""

    id: str
    reason: str
    form: str
    type: str
    seq: str
    orig_id: str
    deliveries: str
    consumer: str
    set_aside_at: str
    bytes: int
    error: str


def _text(letter: Fields, name: bytes) -> str:
    return letter.get(name, b"").decode("utf-8", "replace")


def reason_of(letter: Fields) -> str:
    """`deliveries` for the predecessor's letters: it gave up after too many, and says nothing more."""
    return _text(letter, b"reason") or "deliveries"


def line_of(letter_id: str, letter: Fields) -> Letter:
    return Letter(
        id=letter_id,
        reason=reason_of(letter),
        form=_text(letter, b"form") or "json",
        type=_text(letter, b"type"),
        seq=_text(letter, b"seq"),
        orig_id=_text(letter, b"origId"),
        deliveries=_text(letter, b"deliveries"),
        consumer=_text(letter, b"consumer"),
        set_aside_at=_moment(letter.get(b"setAsideAt", b"")) or _moment(str(id_ms(letter_id)).encode()),
        bytes=len(letter.get(b"data", b"")),
        error=_text(letter, b"error"),
    )


def _moment(ms: bytes) -> str:
    """Empty for what is no time."""
    try:
        return datetime.fromtimestamp(int(ms) / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return ""


class DeadLetters:
    """Of all partitions. All methods raise StreamUnavailable while Redis cannot serve."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def count(self) -> int:
        total = 0
        for first, *_ in await self._parts.slots():
            async with translating(first.redis):
                total += int(await first.redis.xlen(first.keys.dead_letters))
        return total

    async def page(self, *, after: str | None = None, count: int = 100) -> list[tuple[str, Fields]]:
        """Dead letters in the order they were written, those beyond `after`."""
        start = "-" if after is None else f"({after}"
        found: list[tuple[str, Fields]] = []
        for first, *_ in await self._parts.slots():
            async with translating(first.redis):
                found += await entries_of(first.redis, first.keys.dead_letters, start, count)
        found.sort(key=lambda one: id_order(one[0]))
        # Those of several slots may have the same id: all of them, or what is beyond it would begin behind one.
        return [one for one in found if id_order(one[0]) <= id_order(found[:count][-1][0])]

    async def newest(self, count: int) -> list[tuple[str, Fields]]:
        found: list[tuple[str, Fields]] = []
        for first, *_ in await self._parts.slots():
            async with translating(first.redis):
                answer = await first.redis.xrevrange(first.keys.dead_letters, count=count)
            found += [(text_of(letter_id), fields) for letter_id, fields in cast("list[tuple[bytes, Fields]]", answer)]
        return sorted(found, key=lambda one: id_order(one[0]), reverse=True)[:count]

    async def one(self, letter_id: str) -> Fields | None:
        for first, *_ in await self._parts.slots():
            async with translating(first.redis):
                if found := await entries_of(first.redis, first.keys.dead_letters, letter_id, 1, letter_id):
                    return found[0][1]
        return None

    async def retry(self, letter_id: str, fields: Fields, did: str = "") -> bool:
        """Move a letter to the stream as an entry of these fields; False when it was gone already.

        `did`: whose it is, which says in which partition it belongs. On a Cluster it stays where the letter is.
        """
        args: list[Any] = [letter_id]
        for name, value in fields.items():
            args += [name, value]
        partition = partition_of(did, (await self._parts.layout()).written)
        for slot in await self._parts.slots():
            part = slot[partition] if len(slot) > partition else slot[0]
            async with translating(part.redis):
                retry = part.redis.register_script(script("retry"))
                if await retry(keys=[part.keys.dead_letters, part.key], args=args):
                    return True
        return False

    async def purge(self, letter_ids: Sequence[str]) -> int:
        total = 0
        for first, *_ in await self._parts.slots() if letter_ids else ():
            async with translating(first.redis):
                total += int(await first.redis.xdel(first.keys.dead_letters, *letter_ids))
        return total
