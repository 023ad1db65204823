"""Which frames are believed, by their seqs, and from where on a relay is asked again. Pure: no I/O, no clock."""

from __future__ import annotations

from enum import Enum
from typing import Final

SEQ_JUMP: Final = 10_000_000
"""Relays number events one by one, with small holes: this is hours of the whole network. A frame that jumps so far is
believed when the next one goes on from there (or the relay said OutdatedCursor before); else it is malformed."""
MALFORMED_IN_A_ROW: Final = 50


class Jump(Enum):
    """What becomes of frames where a seq jumps."""

    BELIEVED = 1  # this frame is believed: the relay, or this reader, has said that something is missing
    DOUBTED = 2  # this frame waits for the next one
    MALFORMED = 3  # the frame that waited is malformed; this one is believed
    BOTH_WRONG = 4  # the frame that waited is malformed; this one waits
    GAP = 5  # both are believed: this frame goes on where the one that waited left off


class Gate:
    """Judges jumps and malformed frames of one relay after the other.

    One absurd seq must not make everything after it a duplicate. The doubted frame waits for the next one; until then
    the cursor stays before it, so that a connection that ends meanwhile loses nothing.

    `skip`: the next connection begins so many seqs further, because of a frame too large to receive. With `low` it
    still came, with `high` it did not. Between them lie frames that are good.
    """

    def __init__(self) -> None:
        self.doubted: tuple[int, bytes] | None = None  # seq and bytes of a frame that jumped too far
        self.skip = self._low = self._high = 0
        self._malformed = 0  # in a row
        self._malformed_limit = MALFORMED_IN_A_ROW

    def jump(self, seq: int, last: int, data: bytes, *, is_announced: bool) -> tuple[Jump, tuple[int, bytes]]:
        """For a seq beyond SEQ_JUMP, and for the one after it: the verdict, and the frame that waited."""
        if self.doubted is None:
            if is_announced:
                return Jump.BELIEVED, (seq, data)
            self.doubted = (seq, data)
            return Jump.DOUBTED, self.doubted
        waited, self.doubted = self.doubted, None
        if seq > waited[0]:
            return Jump.GAP, waited
        if seq - last > SEQ_JUMP:
            self.doubted = (seq, data)
            return Jump.BOTH_WRONG, waited
        return Jump.MALFORMED, waited

    def malformed(self) -> None:
        self._malformed += 1

    def good(self) -> None:
        self._malformed = 0

    def passed(self) -> None:
        """A frame with a seq was believed."""
        self._malformed_limit = MALFORMED_IN_A_ROW

    def gives_up(self) -> bool:
        """Too many malformed ones in a row. The same ones will come again: next time bear with more of them, or we
        would never get past."""
        if self._malformed < self._malformed_limit:
            return False
        self._malformed, self._malformed_limit = 0, self._malformed_limit * 2
        return True

    def no_skip(self) -> None:
        self.skip = self._low = self._high = 0

    def pass_over(self) -> None:
        """A frame too large to receive came: begin further on, and find out how far without losing what is good."""
        self._low = self.skip
        if self._high <= self._low:  # it did come further on as well: this relay contradicts itself
            self._high = 0
        self.skip = max((self._low + self._high) // 2, self._low + 1) if self._high else max(1, self.skip * 2)

    def is_too_far(self) -> bool:
        """Whether frames that are good may lie before where we began; if so, begin nearer."""
        if self.skip - self._low <= 1:
            return False
        self._high = self.skip
        self.skip = (self._low + self._high) // 2
        return True
