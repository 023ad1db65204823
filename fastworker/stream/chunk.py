"""What the reader puts on the stream at once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

_ENTRY: Final = b"entry"
_LENGTH: Final = struct.Struct("<I")  # before each count and each string


class Chunk:
    """What one run of the append script puts down, in the order of the frames, and the seq after it.

    `seq` None: nothing in it moves the cursor. `entries` counts what goes on the stream. `breaks` is the reader's:
    what may be written down once the repairs in here are on the way; so is `held`: places that are filled in later.
    """

    __slots__ = ("_pieces", "breaks", "bytes", "entries", "held", "items", "seq")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.items = 0
        self.entries = 0
        self.bytes = 0
        self.seq: int | None = None
        self.breaks: list[tuple[str, int]] = []
        self.held: list[tuple[int, Any]] = []

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    def entry(self, fields: Sequence[tuple[bytes, bytes]], partition: int = 0) -> None:
        self._add(b"%d" % partition if partition else _ENTRY, [part for field in fields for part in field])
        self.entries += 1

    def dead_letter(self, fields: Sequence[tuple[bytes, bytes]]) -> None:
        self._add(b"dead letter", [part for field in fields for part in field])

    def repair(self, did: str, text: bytes) -> None:
        self._add(b"repair", [did.encode(), text])

    def unverified(self, did: str, frame: bytes, relay: str) -> None:
        """A frame that waits for the account's newest key."""
        self._add(b"unverified", [b"did", did.encode(), b"frame", frame, b"relay", relay.encode()])

    def judged(self, entry_id: str) -> None:
        """Remove a frame that waited: it has been judged."""
        self._add(b"judged", [entry_id.encode()])

    def gap(self, text: bytes) -> None:
        self._add(b"gap", [text])

    def hold(self, what: Any, size: int) -> None:
        """A place for what is not known yet. It counts as one item of so many bytes."""
        self.held.append((len(self._pieces), what))
        self._pieces.append(b"")
        self.items += 1
        self.bytes += size

    def fill(self, place: int, part: Chunk, size: int) -> None:
        """What has become of it."""
        self._pieces[place] = part.body
        self.items += part.items - 1
        self.bytes += part.bytes - size
        self.entries += part.entries
        self.breaks += part.breaks

    def _add(self, what: bytes, parts: list[bytes]) -> None:
        pieces = self._pieces
        pieces.append((len(parts) + 1).to_bytes(4, "little"))
        for part in (what, *parts):
            length = len(part)
            self.bytes += length
            pieces.append(length.to_bytes(4, "little"))
            pieces.append(part)
        self.items += 1


def by_partition(body: bytes) -> dict[int, tuple[bytes, int]]:
    """The items of each partition, as its own append takes them, and how many entries; the first has what is none."""
    found: dict[int, list[bytes]] = {}
    others, at, length_at = 0, 0, _LENGTH.unpack_from
    while at < len(body):
        start, (count,) = at, length_at(body, at)
        begin = at = at + 4
        what = body[begin + 4 : begin + 4 + length_at(body, begin)[0]]
        for _ in range(count):
            at += 4 + length_at(body, at)[0]
        if what.isdigit():
            item = body[start:begin] + _LENGTH.pack(len(_ENTRY)) + _ENTRY + body[begin + 4 + len(what) : at]
            found.setdefault(int(what), []).append(item)
        else:
            others += what != _ENTRY
            found.setdefault(0, []).append(body[start:at])
    return {number: (b"".join(items), len(items) - (0 if number else others)) for number, items in found.items()}
