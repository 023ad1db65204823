"""How much may go wrong: when a worker stops for too many dead letters, and how many an account may have."""

from __future__ import annotations

import mmap
from collections import Counter

from fastworker.errors import StoppedItself

REFUSING_ACCOUNTS_MAX = 10_000


class DeadLetterLimit:
    """Stops the worker when too much is set aside: a bad release must not empty the stream into the dead letters.

    Entries are counted when they are settled, once. The counts are shared by all processes that are forked after it was
    made; two that count in the same instant may lose a count, which changes nothing.
    """

    def __init__(self, *, run_max: int = 500, ratio_max: float = 0.5, window: int = 4_000) -> None:
        """More than `run_max` in a row, or `ratio_max` and more of about the last `window` entries. Guesses: far
        above what hostile accounts get past the reader, far below what an operator would want to repair."""
        self._run_max = run_max
        self._ratio_max = ratio_max
        self._window = window
        self._counts = memoryview(mmap.mmap(-1, 3 * 8)).cast("q")  # in a row, good, bad

    def good(self, count: int = 1) -> None:
        self._counts[0] = 0
        self._counts[1] += count
        self._fade()

    def bad(self, why: object, count: int = 1, *, in_a_row: int | None = None) -> None:
        """Call before setting entries aside; raises StoppedItself, and they stay pending.

        `in_a_row`: the longest row of them, where others are between them.
        """
        counts = self._counts
        counts[0] = counts[0] + count if in_a_row is None else in_a_row
        # mutant: dead letters not counted
        counts[2] += count
        run, seen = counts[0], counts[1] + counts[2]
        if run > self._run_max or (seen >= self._window and counts[2] >= self._ratio_max * seen):
            raise StoppedItself(
                f"Too many entries cannot be stored: {run} in a row, {counts[2]} of the last {seen}. They stay "
                f"pending (FASTWORKER_DEAD_LETTERS_IN_A_ROW lets more pass). The last one: {why}"
            )
        self._fade()

    def _fade(self) -> None:
        """Forget half of a full window: old entries fade out."""
        counts = self._counts
        while counts[1] + counts[2] >= 2 * self._window:
            counts[1] //= 2
            counts[2] //= 2


class Refusals:
    """How often each account's content was refused by this process: a few are letters, the others are kept by name.

    So nobody can fill the dead letters. None of it counts against their limit: accounts cost nothing, and a control
    record of ours has shown that the database takes rows (store/blame.py).
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, did: str) -> int:
        """Count one more; how many there are now."""
        if len(self._counts) >= REFUSING_ACCOUNTS_MAX:
            self._counts.clear()
        # mutant: letters of one account not counted
        self._counts[did] += 1
        return self._counts[did]
