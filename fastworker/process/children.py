"""Kinds of children and what the parent remembers of each; when one is stuck, and how long to wait after a failure."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from fastworker.process.board import Slot, State, now_ms

FAILURE_FORGOTTEN_S: Final = 60.0  # a child that was at work for so long crashes for a new reason
BACKOFF_S = (0.5, 30.0)  # first and longest wait before a crashed child is started again


class ChildSpec(msgspec.Struct, frozen=True):
    """A kind of child. `target` runs in the forked process and returns its exit code (see process/child.py).

    `count` None: exactly one, such as the monitor, which owns a port: it is stopped before it is started anew.
    A number: workers, which may be more or fewer for a while, and whose progress is judged.
    `ends_run`: when it ends, everything ends, with its exit code.
    `died`: called in the parent, before the slot is closed, when one ended that nobody asked to and that had no reason.
    """

    name: str
    target: Callable[[Slot], int]
    count: int | None = None
    ends_run: bool = False
    died: Callable[[Slot], None] | None = None

    @property
    def is_worker(self) -> bool:
        return self.count is not None


class Patience(msgspec.Struct, frozen=True):
    """How long the parent waits before it acts, in seconds."""

    drain_s: float = 8.0  # from SIGTERM to SIGKILL: the children's own budget and their closing
    tick_s: float = 10.0  # for a loop to turn
    progress_s: float = 150.0  # for a worker to get on: above the longest bound of one attempt (worker/flush.py)
    start_s: float = 60.0  # for a child to be ready
    recycle_s: float = 60.0  # between two replacements of one child for its memory


class Kind:
    """What the parent remembers of a spec over the lives of its children."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.wanted = 1 if spec.count is None else spec.count
        self.was_ready = False  # any of them, ever: before that a failure is a failure to start
        self.failures = 0
        self.start_at = 0.0
        self.refused = 0  # forks in a row
        self.slots: set[int] = set()  # numbers of those that its children had

    def slot_of(self, free: Sequence[Slot]) -> Slot:
        """A slot's counters go on over the lives of its children: so it should stay with one kind of them."""
        slot = min(free, key=lambda slot: (slot.number not in self.slots, slot.get("starts") > 0, slot.number))
        self.slots.add(slot.number)
        return slot

    def name(self, label: int) -> str:
        return f"{self.spec.name}-{label}" if self.spec.is_worker else self.spec.name


class Child:
    """The parent's view of one process."""

    def __init__(self, kind: Kind, label: int, slot: Slot, pid: int, now: float) -> None:
        self.kind = kind
        self.label = label  # of its kind; a replacement has that of the one it replaces
        self.slot = slot
        self.pid = pid
        self.started = now
        self.ready_at: float | None = None
        self.retiring = False  # told to stop: its end is no failure
        self.kill_at: float | None = None
        self.is_too_large = False

    @property
    def name(self) -> str:
        return self.kind.name(self.label)

    def why_stuck(self, now: float, patience: Patience) -> str | None:
        """Why it must be killed; None: it gets on."""
        figures, clock = self.slot, now_ms()
        if self.ready_at is None and not self.retiring and now - self.started > patience.start_s:
            return f"is not ready after {patience.start_s:g} s"
        if figures.get("pid") == self.pid and clock - figures.get("tick_ms") > patience.tick_s * 1000:
            return f"has not turned its loop for {patience.tick_s:g} s"
        is_judged = self.ready_at is not None and self.kind.spec.is_worker
        if is_judged and clock - figures.get("progress_ms") > patience.progress_s * 1000:
            return f"has made no progress for {patience.progress_s:g} s"
        return None

    def status(self) -> str:
        """One line of facts."""
        look = self.slot.snapshot()
        figures, now = look.gauges, now_ms()
        oldest_s = (now - figures.oldest_ms) / 1000 if figures.oldest_ms else 0.0
        return (
            f"{self.name} pid {self.pid} {State(figures.state).name.lower()}: {figures.acked_per_second} events/sec, "
            f"{figures.held} held, oldest {oldest_s:.1f} s, progress {(now - figures.progress_ms) / 1000:.1f} s ago, "
            f"{own_memory_bytes(self.pid) >> 20} MB" + (f", last error: {look.error}" if look.error else "")
        )


def backoff_s(failures: int) -> float:
    return min(BACKOFF_S[1], BACKOFF_S[0] * 2.0 ** min(failures, 20))


def own_memory_bytes(pid: int) -> int:
    """Resident anonymous memory: what the process does not share with the file cache. 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return "ended" if code == 0 else f"ended with exit code {code}"
