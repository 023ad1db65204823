"""Which partitions a process reads: its share of them, and beside it one that lags behind.

Pure: a look at the members in, what to do out. All members see the same and reckon alike, so that each ends with its
share; while they do not agree, a partition has two readers or, for a moment, none. Two cost speed, never rows: the
consumer group gives each entry to one of them, and the state law holds for any two writers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from fastworker.stream.members import Look

HELP_FROM: Final = 2_000
"""Entries that wait in a partition before a process whose own wait for nothing helps to read it."""
HELP_UNTIL: Final = HELP_FROM // 4


class Share(NamedTuple):
    """`keep`: ours; `take`: to be asked for; `give`: too many; `help`: somebody else's."""

    keep: Sequence[int] = ()
    take: Sequence[int] = ()
    give: Sequence[int] = ()
    help: int | None = None


def share_of(me: str, look: Look, helped: int | None = None) -> Share:
    """What the process `me` should read; `helped`: the partition that it helps with now."""
    wanted, rank = look.wanted, look.members.index(me)
    each, rest = divmod(len(wanted), len(look.members))
    room = each + (rank < rest)
    mine = [n for n in wanted if look.owners.get(n) == me]
    idle = [n for n, owner in look.owners.items() if owner == me and n not in mine]
    free = [n for n in wanted if n not in look.owners]
    start = rank * each + min(rank, rest)  # members that come at the same time do not all ask for the same ones
    free = [n for n in free if n >= start] + [n for n in free if n < start]
    keep = mine[:room]
    return Share(
        keep=keep,
        take=free[: max(0, room - len(keep))],
        give=sorted(mine[room:] + idle),
        help=_help(look, keep, [n for n in wanted if n not in mine], helped, room=room, rank=rank),
    )


def _help(
    look: Look, mine: Sequence[int], others: Sequence[int], helped: int | None, *, room: int, rank: int
) -> int | None:
    """The partition that waits most, if our own do not; for who has none of his own any, so that all have readers."""
    if not others:
        return None
    own = sum(look.waiting[n] for n in mine)
    if helped is not None and helped in others and own < HELP_FROM and look.waiting[helped] >= HELP_UNTIL:
        return helped
    most = max(others, key=lambda n: look.waiting[n])
    if look.waiting[most] >= HELP_FROM and own < HELP_UNTIL:
        return most
    if room == 0:
        return helped if helped in others else others[rank % len(others)]
    return None
