"""Which collections are kept at all, where an operator has chosen some. Decided once, when a process starts.

Only what a record says is left out: deletes, `#account` and `#identity` are always taken, so that nothing outlives its
end when the choice was wider before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_is_chosen: Callable[[str], object] | None = None


def choose(patterns: Sequence[str]) -> None:
    """NSIDs, in which `*` stands for anything; none: all of them."""
    global _is_chosen  # noqa: PLW0603 - the choice of the whole process, made before its first event
    words = "|".join(re.escape(one).replace(r"\*", ".*") for one in patterns)
    _is_chosen = re.compile(words).fullmatch if patterns else None


def is_left_out(collection: str) -> bool:
    return _is_chosen is not None and not _is_chosen(collection)
