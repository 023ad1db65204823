"""Whether a worker is well: every rule that /readyz, `fastworker health` and `fastworker status` go by, in one place.

`Watch` keeps what rules about time need; `readiness` is pure: facts in, reasons out. No reason: connected, fresh,
progressing, and nothing that needs a person.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from fastworker.monitor.facts import debts_of
from fastworker.process.board import Snapshot, State

FRESH_S: Final = 6.0
"""A loop turns, a server answers and a waiting frame is appended within this time."""
PROGRESS_S: Final = 8.0
"""Some entry is finished within this time, while any wait."""
START_S: Final = 20.0
"""A worker process is at work so soon after its fork; as many processes as are wanted are there."""
HELD_S: Final = 60.0
"""What a process has read is settled within this time."""
PENDING_S: Final = 120.0
"""What any consumer of the group has is settled, or taken over from the dead and settled, within this time."""
BEHIND_S: Final = 300.0
"""An oldest unfinished entry of more than this age gets younger within a minute: a backlog is worked off."""
MAINTAINED_S: Final = 60.0
"""What committed transactions owe (joined rows, purges, second looks, pruning) is looked after within this time."""
OWED_S: Final = 60.0
"""What committed transactions owe, counters and joined rows, is paid within this time: a second is usual."""
CRASHES_MAX: Final = 2
CRASHES_WINDOW_S: Final = 180.0
ASIDE_MIN: Final = 10
ASIDE_SHARE: Final = 0.01
"""Of the entries of the last minute: above both, a person should look. Bad bytes of the network are far below."""
WINDOW_S: Final = 60.0


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One child. Ages in seconds; None: never, or nothing to be old."""

    name: str
    is_worker: bool = True
    ready: bool = True
    started_s: float = 0.0
    turned_s: float = 0.0
    state: State = State.RUNNING
    error: str = ""
    store_s: float = 0.0  # since PostgreSQL answered
    judged_by_answer: bool = True  # an answer is expected: the process is idle, or its latest attempt failed
    has_bad_news: bool = False  # an attempt failed since PostgreSQL answered
    held_s: float | None = None
    maintained_s: float | None = None
    maintain_error: str = ""
    locked: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    processes: Sequence[Process] = ()
    missing: int = 0
    missing_s: float = 0.0
    redis_s: float = 0.0
    redis_error: str = ""
    reader: Sequence[str] = ()
    """What is wrong with the reader that is one of our processes."""
    standstill_s: float | None = None
    """Since an entry was finished or work came; None while there is no work."""
    pending_id: str | None = None
    pending_s: float = 0.0
    behind_s: float = 0.0
    behind_before_s: float | None = None
    """A minute ago; None: not known yet."""
    crashes: int = 0
    finished: int = 0
    set_aside: int = 0
    clocks: str = ""
    owed: int = 0
    owed_s: float = 0.0
    """Since the oldest debt was owed, of those that are not put back; 0: none."""


def readiness(facts: Facts) -> list[str]:
    """Reasons, a sentence each; empty: it is well."""
    why = [reason for one in facts.processes for reason in of_process(one)]
    if not any(one.ready for one in facts.processes if one.is_worker):
        why.append("no worker process is ready")
    if facts.missing and facts.missing_s > START_S:
        why.append(f"{facts.missing} processes are missing for {facts.missing_s:.0f} s: the log says why")
    if facts.crashes > CRASHES_MAX:
        why.append(f"processes ended by themselves {facts.crashes} times within {CRASHES_WINDOW_S:.0f} s")
    if facts.redis_s > FRESH_S:
        why.append(f"Redis was not read for {facts.redis_s:.0f} s: {facts.redis_error or 'no answer yet'}")
    else:
        why += facts.reader
    if facts.standstill_s is not None and facts.standstill_s > PROGRESS_S:
        why.append(f"entries wait, but none was finished for {facts.standstill_s:.0f} s")
    if facts.pending_id is not None and facts.pending_s > PENDING_S:
        why.append(f"the entry {facts.pending_id} is not settled for {facts.pending_s:.0f} s")
    before = facts.behind_before_s
    # mutant: behind, and nobody knows whether it catches up
    if facts.behind_s > BEHIND_S and (before is None or facts.behind_s >= before):
        so = (
            "gets no younger"
            if before is not None
            else f"whether it gets younger is known {WINDOW_S / 2:.0f} s after a start"
        )
        why.append(f"the oldest unfinished entry is {facts.behind_s:.0f} s old, and {so}")
    if facts.set_aside >= ASIDE_MIN and facts.set_aside > ASIDE_SHARE * facts.finished:
        why.append(f"{facts.set_aside} of the last {facts.finished} entries were set aside: see `fastworker dlq list`")
    if facts.clocks:
        why.append(facts.clocks)
    # mutant: debts that are never paid are not noticed
    if facts.owed_s > OWED_S:
        why.append(
            f"{facts.owed} counters and joined rows are owed, the oldest for {facts.owed_s:.0f} s: "
            "they are behind their records (docs/troubleshooting.md)"
        )
    return why


def of_process(one: Process) -> list[str]:
    if one.turned_s > FRESH_S:
        return [f"{one.name}: its loop has not turned for {one.turned_s:.0f} s"]
    if not one.is_worker:
        return []
    if not one.ready:
        return [f"{one.name} is not ready after {one.started_s:.0f} s: {one.error}"] if one.started_s > START_S else []
    servers = {State.WAITING_FOR_STORE: "PostgreSQL", State.WAITING_FOR_STREAM: "Redis"}
    if (server := servers.get(one.state)) is not None:
        return [f"{one.name} waits for {server}: {one.error or 'no error yet'}"]
    if one.state == State.RUNNING and one.judged_by_answer and one.store_s > FRESH_S:
        return [f"{one.name}: PostgreSQL has not answered for {one.store_s:.0f} s: {one.error or 'no error yet'}"]
    why = []
    if one.held_s is not None and one.held_s > HELD_S:
        why.append(f"{one.name} has held an entry for {one.held_s:.0f} s{one.locked and ': ' + one.locked}")
    if one.maintained_s is not None and one.maintained_s > MAINTAINED_S:
        said = one.maintain_error or "no error yet"
        why.append(f"{one.name}: nothing that is owed was looked after for {one.maintained_s:.0f} s: {said}")
    return why


def postgres_away(one: Process) -> str | None:
    """What says that PostgreSQL is away, where a process that is well itself waits for it."""
    if not (one.is_worker and one.ready) or one.turned_s > FRESH_S or one.error.startswith("StreamUnavailable"):
        return None
    is_silent = one.state == State.RUNNING and one.has_bad_news and one.store_s > FRESH_S
    return (one.error or "it does not answer") if is_silent or one.state == State.WAITING_FOR_STORE else None


def process_of(snapshot: Snapshot, now: int) -> Process:
    gauges = snapshot.gauges

    def age(at_ms: int) -> float:
        return max(0, now - at_ms) / 1000

    return Process(
        name=snapshot.name,
        is_worker=snapshot.name.startswith("worker"),
        ready=bool(gauges.ready),
        started_s=age(gauges.started_ms),
        turned_s=age(gauges.tick_ms),
        state=State(gauges.state),
        error=snapshot.error,
        store_s=age(gauges.store_ms) if gauges.store_ms else 0.0,
        judged_by_answer=not gauges.held or gauges.error_ms > gauges.store_ms,
        has_bad_news=gauges.error_ms > gauges.store_ms,
        held_s=age(gauges.oldest_ms) if gauges.oldest_ms else None,
        maintained_s=age(gauges.maintained_ms) if gauges.maintained_ms else None,
        maintain_error=snapshot.maintain_error,
        locked=snapshot.locked,
    )


class Refused:
    """A worker waits for a Redis that answers others: it may not run some command."""

    def __init__(self) -> None:
        self._since: float | None = None

    def look(self, processes: Sequence[Process], now: float) -> str:
        """What it says, once it has waited for long enough."""
        for one in processes:
            waits = one.is_worker and one.ready and one.state == State.WAITING_FOR_STREAM
            if waits and one.error.startswith("StreamUnavailable"):
                self._since = now if self._since is None else self._since
                return one.error if now - self._since > FRESH_S else ""
        self._since = None
        return ""


class Watch:
    """What rules about time need: since when something is so. `look` once a reading."""

    def __init__(self) -> None:
        self._crashes: deque[float] = deque()
        self._crashes_seen = 0
        self._missing_since: float | None = None
        self._work_since: float | None = None
        self._finished = 0
        self._finished_at = 0.0
        self._pending: tuple[str | None, float] = (None, 0.0)
        self._past: deque[tuple[float, float, int, int]] = deque()  # time, behind, finished, set aside

    def look(
        self,
        now: float,
        snapshots: Sequence[Snapshot],
        *,
        missing: int = 0,
        crashes: int = 0,
        is_work: bool = False,
        pending_id: str | None = None,
        behind_s: float = 0.0,
    ) -> None:
        """`now`: of a clock that never goes back. `crashes`: ever."""
        self._crashes.extend([now] * min(crashes - self._crashes_seen, CRASHES_MAX + 1))
        self._crashes_seen = crashes
        while self._crashes and now - self._crashes[0] > CRASHES_WINDOW_S:
            self._crashes.popleft()
        self._missing_since = (self._missing_since if self._missing_since is not None else now) if missing else None
        self._work_since = (self._work_since if self._work_since is not None else now) if is_work else None
        finished = sum(one.acked for one in snapshots)
        if finished != self._finished or not self._past:
            self._finished, self._finished_at = finished, now
        if pending_id != self._pending[0]:
            self._pending = pending_id, now
        set_aside = sum(one.counters.set_aside for one in snapshots)
        self._past.append((now, behind_s, finished, set_aside))
        while now - self._past[0][0] > WINDOW_S and len(self._past) > 1:
            self._past.popleft()

    def facts(self, now: float, snapshots: Sequence[Snapshot], clock_ms: int, missing: int = 0) -> Facts:
        """Without what Redis and the reader say."""
        debts = debts_of(snapshots, clock_ms)
        facts = Facts(
            owed=debts.owed if debts else 0,
            owed_s=debts.oldest_s if debts else 0.0,
            processes=[process_of(one, clock_ms) for one in snapshots if one.gauges.state != State.FREE],
            missing=missing,
            missing_s=now - self._missing_since if self._missing_since is not None else 0.0,
            crashes=len(self._crashes),
            clocks=next((one.clocks for one in snapshots if one.gauges.state != State.FREE and one.clocks), ""),
        )
        if not self._past:
            return facts
        first, last = self._past[0], self._past[-1]
        is_old = last[0] - first[0] > WINDOW_S / 2
        return msgspec.structs.replace(
            facts,
            standstill_s=now - max(self._work_since, self._finished_at) if self._work_since is not None else None,
            pending_id=self._pending[0],
            pending_s=now - self._pending[1],
            behind_s=last[1],
            behind_before_s=first[1] if is_old else None,
            finished=last[2] - first[2],
            set_aside=last[3] - first[3],
        )
