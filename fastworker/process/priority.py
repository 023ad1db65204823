"""Who gets the CPU first where there is not enough for all."""

from __future__ import annotations

import os
from typing import Final

NICE: Final = 10
"""Linux gives a process of this niceness about a tenth of what it gives one of 0, while both want it, and all of it
while nobody else does."""


def give_way() -> None:
    """This process works beside live events, which go first. What was nicer already stays so."""
    os.nice(max(0, NICE - os.nice(0)))
