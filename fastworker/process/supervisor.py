"""The parent: forks children, watches them, replaces them, ends with an honest exit code.

No event loop, no connections, no threads: so it can fork at any time, and nothing that hangs a child hangs the parent.
Signals are data: they stay blocked and are taken one by one from the kernel's queue, in the one wait of the one loop.
What it knows of its children it reads from the board (process/board.py) and from waitpid.

| signal | means |
|---|---|
| TERM, INT | drain within the budget; the second one: now |
| HUP | replace every worker, one by one, the new one ready before the old one stops; then the others |
| TTIN, TTOU | one worker more, one fewer |
| USR1 | status to the log |
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Final, NoReturn

from fastworker.errors import ExitCode
from fastworker.log import flush_waiting
from fastworker.process.board import Heartbeats, Slot
from fastworker.process.child import AGAIN, dump_stacks_on
from fastworker.process.children import (
    BACKOFF_S,
    FAILURE_FORGOTTEN_S,
    Child,
    ChildSpec,
    Kind,
    Patience,
    backoff_s,
    how,
    own_memory_bytes,
)
from fastworker.process.systemd import Systemd
from fastworker.process.wards import Server, Wards

log = logging.getLogger(__name__)

TICK_S: Final = 0.25  # the longest wait for a signal; children are looked at this often
MEMORY_LOOK_S = 5.0
SETTLED_S: Final = 5.0  # a child that says nothing of being ready counts as ready when it has lived so long
STACKS_S: Final = 1.0  # for a stuck child to write its stacks before it is killed

_SIGNALS: Final = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGUSR1,
    signal.SIGCHLD,
}
_ORDERLY: Final = {ExitCode.DONE, ExitCode.UNREACHABLE, ExitCode.STOPPED_ITSELF, AGAIN}
"""Exit codes of a child that knew why it ended."""
_NO_START: Final = {ExitCode.USAGE, ExitCode.UNREACHABLE, ExitCode.BUG}
"""Of a first child: another one would end the same way."""
_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)  # loaded before the fork


class Supervisor:
    """`run` forks the children and returns when all of them are gone."""

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        heartbeats: Heartbeats,
        *,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        memory_max_bytes: int | None = None,
        workers_max: int = 32,
        notify_socket: str | None = None,
        told_code: ExitCode = ExitCode.DONE,
        servers: Sequence[Server] = (),
    ) -> None:
        """`told_code`: its exit code after TERM or INT. `notify_socket`: systemd's NOTIFY_SOCKET.

        `memory_max_bytes`: a child with more of its own is replaced. `servers` run already: those that end are
        started again.
        """
        self._kinds = [Kind(spec) for spec in specs]
        self._heartbeats = heartbeats
        self._patience = patience
        self._memory_max_bytes = memory_max_bytes
        self._workers_max = workers_max
        self._systemd = Systemd(notify_socket)
        self._told_code = told_code
        self._children: list[Child] = []
        self._wards = Wards(servers, time.monotonic())
        self._code: ExitCode | None = None  # set: stopping
        self._stop_deadline = 0.0
        self._to_replace: deque[Child] = deque()
        self._replacement: tuple[Child, Child] | None = None  # old and new, both alive
        self._looked_at = time.monotonic()
        self._judge_from = 0.0
        self._memory_at = 0.0
        self._mask: set[signal.Signals] = set()

    def run(self) -> ExitCode:
        self._mask = set(signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS))  # type: ignore[arg-type]
        # What is there now is shared by all children for good: the collector must not touch, and so copy, its pages.
        gc.collect()
        gc.freeze()
        try:
            while True:
                self._step()
                if self._code is not None and not self._children:
                    return self._code
                received = signal.sigtimedwait(_SIGNALS, TICK_S)
                if received is not None:
                    self.handle(received.si_signo)
        finally:
            for child in self._children:  # only after a bug of ours
                os.kill(child.pid, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def handle(self, number: int) -> None:
        """Act on one signal."""
        match number:
            case signal.SIGTERM | signal.SIGINT:
                if self._code is None:
                    log.info("Stopping: draining up to %g s (again: now)", self._patience.drain_s)
                    self._stop(self._told_code)
                else:
                    self._stop_deadline = 0.0
            case signal.SIGHUP:
                log.info("Replacing all children, one by one")
                self._to_replace.extend(sorted(self._children, key=lambda child: not child.kind.spec.is_worker))
            case signal.SIGTTIN:
                self._scale(1)
            case signal.SIGTTOU:
                self._scale(-1)
            case signal.SIGUSR1:
                for child in self._children:
                    log.info("%s", child.status())
            case _:  # SIGCHLD: it ended the wait, which is all it is for
                pass

    # --- one turn

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._looked_at > 2.0:
            # This process was stopped (a terminal, a frozen container), and the children too: give them time.
            self._judge_from = now + self._patience.tick_s
        self._looked_at = now
        flush_waiting()
        self._reap(now)
        for child in self._children:
            self._look_at(child, now)
        is_ready = self._code is None and all(child.ready_at is not None for child in self._children)
        self._systemd.alive(now, is_ready=is_ready and bool(self._children))
        if self._code is not None:
            if now >= self._stop_deadline:
                for child in self._children:
                    self._signal(child, signal.SIGKILL)
            return
        self._wards.revive(now)
        self._look_at_memory(now)
        self._replace(now)
        self._reconcile(now)

    def _reap(self, now: float) -> None:
        """Everybody who ended: in a container we are its first process, and get the orphans of all others, too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = next((child for child in self._children if child.pid == pid), None)
            if child is None:
                self._wards.lost(pid, os.waitstatus_to_exitcode(status), now)
                continue
            if child.slot.get("ready") and child.ready_at is None:
                child.ready_at = now
                child.kind.was_ready = True
            self._children.remove(child)
            code = os.waitstatus_to_exitcode(status)
            if child.kind.spec.died is not None and not child.retiring and code not in _ORDERLY:
                child.kind.spec.died(child.slot)
            child.slot.close()
            self._ended(child, code, now)

    def _ended(self, child: Child, code: int, now: float) -> None:
        """A child is gone: what its exit code asks for."""
        kind, ended = child.kind, how(code)
        if self._code is not None or child.retiring:
            log.info("%s (pid %d) %s", child.name, child.pid, ended)
            return
        if kind.spec.ends_run:
            self._stop(ExitCode(code) if code in set(ExitCode) else ExitCode.BUG)
            return
        if code == ExitCode.STOPPED_ITSELF:
            log.error("%s (pid %d) stopped itself: stopping all", child.name, child.pid)
            self._stop(ExitCode.STOPPED_ITSELF)
            return
        if self._replacement is not None and child is self._replacement[1] and child.ready_at is None:
            log.error("%s (pid %d) %s before it was ready: keeping the old ones", child.name, child.pid, ended)
            return  # _replace notices, and gives up
        if child.ready_at is None and not kind.was_ready and code in _NO_START:
            log.error("%s could not start (%s): stopping all", child.name, ended)
            self._stop(ExitCode(code))
            return
        child.slot.add(restarts=1)
        if now >= kind.start_at:  # else another one ended a moment ago: counted as the same crash
            if child.ready_at is not None and now - child.ready_at > FAILURE_FORGOTTEN_S:
                kind.failures = 0
            kind.start_at = now + backoff_s(kind.failures)
            kind.failures += 1
            self._heartbeats.crashes += 1
        delay = kind.start_at - now
        log.error("%s (pid %d) %s: starting it again in %.1f s", child.name, child.pid, ended, delay)

    def _look_at(self, child: Child, now: float) -> None:
        """Readiness, and whether it is stuck: stacks to the log, a moment later SIGKILL."""
        if child.kill_at is not None:
            if now >= child.kill_at:
                self._signal(child, signal.SIGKILL)
            return
        figures = child.slot
        is_there = figures.get("pid") == child.pid
        is_ready = figures.get("ready") or (not child.kind.spec.is_worker and now - child.started > SETTLED_S)
        if is_there and child.ready_at is None and is_ready:
            child.ready_at = now
            child.kind.was_ready = True
            log.info("%s (pid %d) is ready after %.1f s", child.name, child.pid, now - child.started)
        if now < self._judge_from:
            return
        why = child.why_stuck(now, self._patience)
        if why is not None:
            log.error("%s (pid %d) %s: killing it; its stacks follow", child.name, child.pid, why)
            self._signal(child, signal.SIGUSR2)
            child.kill_at = now + STACKS_S

    def _look_at_memory(self, now: float) -> None:
        if self._memory_max_bytes is None or now < self._memory_at + MEMORY_LOOK_S:
            return
        self._memory_at = now
        for child in self._children:
            is_queued = child in self._to_replace or (self._replacement is not None and child in self._replacement)
            is_young = child.ready_at is None or now - child.ready_at < self._patience.recycle_s
            if child.retiring or is_queued or is_young:
                continue
            used = own_memory_bytes(child.pid)
            if used > self._memory_max_bytes:
                log.warning("%s (pid %d) uses %d MB of its own: replacing it", child.name, child.pid, used >> 20)
                child.is_too_large = True
                self._to_replace.append(child)

    def _replace(self, now: float) -> None:
        """One step of a rolling restart: the new worker is ready before the old one is told to stop."""
        if self._replacement is not None:
            old, new = self._replacement
            if new not in self._children:
                self._replacement = None
                self._to_replace.clear()
            elif old not in self._children:  # it died meanwhile, perhaps just when the new one was ready
                self._replacement = None
            elif new.ready_at is not None:
                self._retire_replaced(old, now)
                self._replacement = None
            return
        if not self._to_replace or now < self._to_replace[0].kind.start_at:
            return
        child = self._to_replace.popleft()
        if child not in self._children or child.retiring:
            return
        if child.kind.spec.is_worker:
            successor = self._fork(child.kind, now, child.label)
            if successor is not None:
                self._replacement = (child, successor)
            else:
                self._to_replace.appendleft(child)  # no process can be forked now: it goes on, and is replaced later
        else:
            self._retire_replaced(child, now)

    def _retire_replaced(self, child: Child, now: float) -> None:
        child.slot.add(**{"restarts" if child.is_too_large else "replaced": 1})
        self._retire(child, now)

    def _reconcile(self, now: float) -> None:
        """As many children of each kind as are wanted."""
        missing = 0
        for kind in self._kinds:
            living = [child for child in self._children if child.kind is kind]
            at_work = [child for child in living if not child.retiring]
            spare = 1 if self._replacement is not None and self._replacement[0].kind is kind else 0
            for child in at_work[kind.wanted + spare :]:
                self._retire(child, now)
            # What exists only once is not started before the old one is gone.
            present = at_work if kind.spec.is_worker else living
            if now >= kind.start_at:
                for _ in range(kind.wanted - len(present)):
                    if self._fork(kind, now) is None:
                        break
            missing += max(0, kind.wanted - sum(one.kind is kind and not one.retiring for one in self._children))
        self._heartbeats.missing = missing

    # --- acts

    def _fork(self, kind: Kind, now: float, label: int | None = None) -> Child | None:
        taken = {child.slot.number for child in self._children}
        free = [slot for slot in self._heartbeats if slot.number not in taken]
        if not free:
            log.error("No room for another %s", kind.spec.name)
            kind.start_at = now + BACKOFF_S[1]
            return None
        slot = kind.slot_of(free)
        if label is None:
            labels = {child.label for child in self._children if child.kind is kind and not child.retiring}
            label = next(n for n in range(len(labels) + 1) if n not in labels)
        slot.close()
        parent = os.getpid()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()  # or both would write it
        try:
            pid = os.fork()
        except OSError as error:  # a limit of processes or memory: those that live work on
            kind.start_at = now + backoff_s(kind.refused)
            kind.refused += 1
            wait_s, name = kind.start_at - now, kind.spec.name
            log.error("No process for another %s: %s; trying again in %.1f s", name, error.strerror, wait_s)  # noqa: TRY400
            return None
        if pid == 0:
            _live(parent, self._mask, kind, label, slot)
        kind.refused = 0
        child = Child(kind, label, slot, pid, now)
        self._children.append(child)
        return child

    def _retire(self, child: Child, now: float) -> None:
        """Tell it to drain and stop; it is killed when its budget is over."""
        child.retiring = True
        self._signal(child, signal.SIGTERM)
        if child.kill_at is None:
            child.kill_at = now + self._patience.drain_s

    def _stop(self, code: ExitCode) -> None:
        self._code = code
        now = time.monotonic()
        self._stop_deadline = now + self._patience.drain_s
        self._systemd.tell("STOPPING=1")
        for child in self._children:
            self._retire(child, now)

    def _scale(self, by: int) -> None:
        for kind in self._kinds:
            if kind.spec.is_worker:
                wanted = min(max(kind.wanted + by, 1), self._workers_max)
                log.info("%d %s processes%s", wanted, kind.spec.name, "" if wanted != kind.wanted else ", as before")
                kind.wanted = wanted
                kind.start_at = 0.0

    def _signal(self, child: Child, number: signal.Signals) -> None:
        os.kill(child.pid, number)  # never another's: a child that ended keeps its pid until we reap it


def _live(parent: int, mask: set[signal.Signals], kind: Kind, label: int, slot: Slot) -> NoReturn:
    """The forked side of a fork, from its first line to its last."""
    code: int = ExitCode.BUG
    try:
        _become_child(parent, mask)
        slot.open(kind.name(label))
        code = kind.spec.target(slot)
    except BaseException:
        log.critical("Unexpected error", exc_info=True)
    finally:
        with contextlib.suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
        os._exit(code)


def _become_child(parent: int, mask: set[signal.Signals]) -> None:
    """What a fork must change before anything else runs in it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked to be told
        os._exit(AGAIN)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask - _SIGNALS)
    dump_stacks_on(signal.SIGUSR2)
