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
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Protocol

import msgspec

from fastworker.errors import ExitCode, Unreachable
from fastworker.log import flush_waiting
from fastworker.process.board import Heartbeats, Slot, State, now_ms
from fastworker.process.child import AGAIN, dump_stacks_on

log = logging.getLogger(__name__)

TICK_S: Final = 0.25  # the longest wait for a signal; children are looked at this often
MEMORY_LOOK_S: Final = 5.0
FAILURE_FORGOTTEN_S: Final = 60.0  # a child that was at work for so long crashes for a new reason
BACKOFF_S: Final = (0.5, 30.0)  # first and longest wait before a crashed child is started again
SETTLED_S: Final = 5.0  # a child that says nothing of being ready counts as ready when it has lived so long
STACKS_S: Final = 1.0  # for a stuck child to write its stacks before it is killed
WATCHDOG_S: Final = 1.0

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
_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)  # loaded before the fork


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


class Server(Protocol):
    """A process that somebody else started for us, and that must not stay away (edge/embedded.py)."""

    what: ClassVar[str]

    @property
    def pid(self) -> int | None: ...
    def lost(self, code: int) -> None: ...
    def revive(self) -> None: ...


class _Ward:
    """What the parent remembers of a server."""

    def __init__(self, server: Server, now: float) -> None:
        self.server = server
        self.pid = server.pid
        self.started = now
        self.failures = 0
        self.start_at = 0.0


class Patience(msgspec.Struct, frozen=True):
    """How long the parent waits before it acts, in seconds."""

    drain_s: float = 8.0  # from SIGTERM to SIGKILL: the children's own budget and their closing
    tick_s: float = 10.0  # for a loop to turn
    progress_s: float = 150.0  # for a worker to get on: above the longest bound of one attempt (worker/flush.py)
    start_s: float = 60.0  # for a child to be ready
    recycle_s: float = 60.0  # between two replacements of one child for its memory


class _Kind:
    """What the parent remembers of a spec over the lives of its children."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.wanted = 1 if spec.count is None else spec.count
        self.was_ready = False  # any of them, ever: before that a failure is a failure to start
        self.failures = 0
        self.start_at = 0.0
        self.refused = 0  # forks in a row
        self.slots: set[int] = set()  # numbers of those that its children had

    def name(self, label: int) -> str:
        return f"{self.spec.name}-{label}" if self.spec.is_worker else self.spec.name


class _Child:
    """The parent's view of one process."""

    def __init__(self, kind: _Kind, label: int, slot: Slot, pid: int, now: float) -> None:
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
        self._kinds = [_Kind(spec) for spec in specs]
        self._heartbeats = heartbeats
        self._patience = patience
        self._memory_max_bytes = memory_max_bytes
        self._workers_max = workers_max
        self._notify_socket = notify_socket
        self._told_code = told_code
        self._children: list[_Child] = []
        self._wards = [_Ward(server, time.monotonic()) for server in servers]
        self._code: ExitCode | None = None  # set: stopping
        self._stop_deadline = 0.0
        self._to_replace: deque[_Child] = deque()
        self._replacement: tuple[_Child, _Child] | None = None  # old and new, both alive
        self._looked_at = time.monotonic()
        self._judge_from = 0.0
        self._memory_at = 0.0
        self._notified_at = 0.0
        self._said_ready = False
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
                self._log_status()
            case _:  # SIGCHLD: it ended the wait, which is all it is for
                pass

    # --- one turn

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._looked_at > 2.0:
            # We stood still (a stopped terminal, a frozen container): so did the children, and need a moment.
            self._judge_from = now + self._patience.tick_s
        self._looked_at = now
        flush_waiting()
        self._reap(now)
        for child in self._children:
            self._look_at(child, now)
        self._tell_systemd(now)
        if self._code is not None:
            if now >= self._stop_deadline:
                for child in self._children:
                    self._signal(child, signal.SIGKILL)
            return
        self._revive(now)
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
                self._lost(pid, os.waitstatus_to_exitcode(status), now)
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

    def _lost(self, pid: int, code: int, now: float) -> None:
        """A server, or an orphan that is nobody's."""
        for ward in self._wards:
            if ward.pid == pid:
                ward.pid = None
                ward.server.lost(code)
                if now - ward.started > FAILURE_FORGOTTEN_S:
                    ward.failures = 0
                ward.start_at = now + _backoff(ward.failures)
                ward.failures += 1
                wait_s = ward.start_at - now
                log.error("%s (pid %d) %s: starting it again in %.1f s", ward.server.what, pid, _how(code), wait_s)

    def _revive(self, now: float) -> None:
        for ward in self._wards:
            if ward.pid is not None or now < ward.start_at:
                continue
            try:
                ward.server.revive()
            except (OSError, subprocess.SubprocessError, Unreachable) as error:
                ward.start_at = now + _backoff(ward.failures)
                ward.failures += 1
                log.warning("%s does not start yet: %s", ward.server.what, error)
            else:
                ward.pid, ward.started = ward.server.pid, now
                log.info("%s (pid %d) was started again", ward.server.what, ward.pid)

    def _ended(self, child: _Child, code: int, now: float) -> None:
        """A child is gone: what its exit code asks for."""
        kind, how = child.kind, _how(code)
        if self._code is not None or child.retiring:
            log.info("%s (pid %d) %s", child.name, child.pid, how)
            return
        if kind.spec.ends_run:
            self._stop(ExitCode(code) if code in set(ExitCode) else ExitCode.BUG)
            return
        if code == ExitCode.STOPPED_ITSELF:
            log.error("%s (pid %d) stopped itself: stopping all", child.name, child.pid)
            self._stop(ExitCode.STOPPED_ITSELF)
            return
        if self._replacement is not None and child is self._replacement[1] and child.ready_at is None:
            log.error("%s (pid %d) %s before it was ready: keeping the old ones", child.name, child.pid, how)
            return  # _replace gives up
        if (
            child.ready_at is None
            and not kind.was_ready
            and code in (ExitCode.USAGE, ExitCode.UNREACHABLE, ExitCode.BUG)
        ):
            log.error("%s could not start (%s): stopping all", child.name, how)
            self._stop(ExitCode(code))
            return
        child.slot.add(restarts=1)
        if now >= kind.start_at:  # else another one ended a moment ago: one event, however many it took
            if child.ready_at is not None and now - child.ready_at > FAILURE_FORGOTTEN_S:
                kind.failures = 0
            kind.start_at = now + _backoff(kind.failures)
            kind.failures += 1
            self._heartbeats.crashes += 1
        delay = kind.start_at - now
        log.error("%s (pid %d) %s: starting it again in %.1f s", child.name, child.pid, how, delay)

    def _look_at(self, child: _Child, now: float) -> None:
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
        clock, patience, why = now_ms(), self._patience, None
        if child.ready_at is None and not child.retiring and now - child.started > patience.start_s:
            why = f"is not ready after {patience.start_s:g} s"
        elif is_there and clock - figures.get("tick_ms") > patience.tick_s * 1000:
            why = f"has not turned its loop for {patience.tick_s:g} s"
        elif (
            child.ready_at is not None
            and child.kind.spec.is_worker
            and clock - figures.get("progress_ms") > patience.progress_s * 1000
        ):
            why = f"has made no progress for {patience.progress_s:g} s"
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
            elif new.ready_at is not None:
                self._retire_replaced(old, now)
                self._replacement = None
            elif old not in self._children:
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
                self._to_replace.appendleft(child)  # it works on; later
        else:
            self._retire_replaced(child, now)

    def _retire_replaced(self, child: _Child, now: float) -> None:
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

    def _fork(self, kind: _Kind, now: float, label: int | None = None) -> _Child | None:
        taken = {child.slot.number for child in self._children}
        free = [slot for slot in self._heartbeats if slot.number not in taken]
        if not free:
            log.error("No room for another %s", kind.spec.name)
            kind.start_at = now + BACKOFF_S[1]
            return None
        # A slot's counters go on over the lives of its children: so it should stay with one kind of them.
        slot = min(free, key=lambda slot: (slot.number not in kind.slots, slot.get("starts") > 0, slot.number))
        kind.slots.add(slot.number)
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
            kind.start_at = now + _backoff(kind.refused)
            kind.refused += 1
            wait_s, name = kind.start_at - now, kind.spec.name
            log.error("No process for another %s: %s; trying again in %.1f s", name, error.strerror, wait_s)  # noqa: TRY400
            return None
        if pid:
            kind.refused = 0
            child = _Child(kind, label, slot, pid, now)
            self._children.append(child)
            return child
        code: int = ExitCode.BUG
        try:
            _become_child(parent, self._mask)
            self._children = []
            slot.open(kind.name(label))
            code = kind.spec.target(slot)
        except BaseException:
            log.critical("Unexpected error", exc_info=True)
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()
                sys.stdout.flush()
            os._exit(code)

    def _retire(self, child: _Child, now: float) -> None:
        """Tell it to drain and stop, and see to it that it does."""
        child.retiring = True
        self._signal(child, signal.SIGTERM)
        if child.kill_at is None:
            child.kill_at = now + self._patience.drain_s

    def _stop(self, code: ExitCode) -> None:
        self._code = code
        now = time.monotonic()
        self._stop_deadline = now + self._patience.drain_s
        self._sd_notify("STOPPING=1")
        for child in self._children:
            self._retire(child, now)

    def _scale(self, by: int) -> None:
        for kind in self._kinds:
            if kind.spec.is_worker:
                wanted = min(max(kind.wanted + by, 1), self._workers_max)
                log.info("%d %s processes%s", wanted, kind.spec.name, "" if wanted != kind.wanted else ", as before")
                kind.wanted = wanted
                kind.start_at = 0.0

    def _signal(self, child: _Child, number: signal.Signals) -> None:
        os.kill(child.pid, number)  # never another's: a child that ended keeps its pid until we reap it

    # --- telling

    def _log_status(self) -> None:
        for child in self._children:
            look = child.slot.snapshot()
            figures, now = look.gauges, now_ms()
            log.info(
                "%s pid %d %s: %d events/sec, %d held, oldest %.1f s, progress %.1f s ago, %d MB%s",
                child.name,
                child.pid,
                State(figures.state).name.lower(),
                figures.acked_per_second,
                figures.held,
                (now - figures.oldest_ms) / 1000 if figures.oldest_ms else 0.0,
                (now - figures.progress_ms) / 1000,
                own_memory_bytes(child.pid) >> 20,
                f", last error: {look.error}" if look.error else "",
            )

    def _tell_systemd(self, now: float) -> None:
        if self._notify_socket is None:
            return
        is_ready = self._code is None and all(child.ready_at is not None for child in self._children)
        if not self._said_ready and self._children and is_ready:
            self._said_ready = True
            self._sd_notify("READY=1")
        if now - self._notified_at >= WATCHDOG_S:
            self._notified_at = now
            self._sd_notify("WATCHDOG=1")

    def _sd_notify(self, message: str) -> None:
        """One datagram, no connection kept: the parent holds no sockets."""
        if self._notify_socket is None:
            return
        address = "\0" + self._notify_socket[1:] if self._notify_socket.startswith("@") else self._notify_socket
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(message.encode(), address)


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


def _backoff(failures: int) -> float:
    return min(BACKOFF_S[1], BACKOFF_S[0] * 2.0 ** min(failures, 20))


def own_memory_bytes(pid: int) -> int:
    """Resident anonymous memory: what the process does not share with the file cache. 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return "ended" if code == 0 else f"ended with exit code {code}"
