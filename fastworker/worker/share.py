"""Which partitions a process reads: its share of them, and beside it one that lags behind.

Pure: a look at the members in, what to do out. All members see the same and reckon alike, so that each ends with its
share; while they do not agree, a partition has two readers or, for a moment, none. Two cost speed, never rows: the
consumer group gives each entry to one of them, and the state law holds for any two writers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from fastworker.stream.limits import STREAM_LEN_MAX
from fastworker.stream.members import Look

HELP_FROM: Final = 25
"""So small a part of the stream's limit waits in one partition before a process that has nothing to do helps to read
it: two readers of one partition wait for each other's rows, so a short backlog is left to its owner."""
HELP_UNTIL: Final = 4
"""Of that, until it leaves again."""


class Share(NamedTuple):
    """`keep`: ours; `take`: to be asked for; `give`: too many; `help`: somebody else's."""

    keep: Sequence[int] = ()
    take: Sequence[int] = ()
    give: Sequence[int] = ()
    help: int | None = None


def share_of(me: str, look: Look, helped: int | None = None, *, max_stream_len: int = STREAM_LEN_MAX) -> Share:
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
        help=_help(
            look,
            keep,
            [n for n in wanted if n not in mine],
            helped,
            rank if room == 0 else None,
            max_stream_len // HELP_FROM,
        ),
    )


def _help(
    look: Look, mine: Sequence[int], others: Sequence[int], helped: int | None, idle: int | None, begin: int
) -> int | None:
    """The partition that waits most, if our own do not. `idle`: our rank, if we have none of our own: then any, so that
    all have readers. `begin`: entries that wait before somebody helps."""
    if not others:
        return None
    own, end = sum(look.waiting[n] for n in mine), begin // HELP_UNTIL
    if helped is not None and helped in others and own < begin and look.waiting[helped] >= end:
        return helped
    most = max(others, key=lambda n: look.waiting[n])
    if look.waiting[most] >= begin and own < end:
        return most
    if idle is not None:
        return helped if helped in others else others[idle % len(others)]
    return None
