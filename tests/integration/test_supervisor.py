"""The supervisor as an operator meets it: a real process, real signals, its log and its exit code.

Run as a program, this file is the process under test: `python test_supervisor.py SCENARIO`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastworker.crashpoint import Step, arm, crashpoint
from fastworker.errors import ExitCode, StoppedItself, Unreachable
from fastworker.log import setup_logging
from fastworker.process import child as child_module
from fastworker.process import supervisor as supervisor_module
from fastworker.process.board import Heartbeats, Slot, now_ms
from fastworker.process.child import run_child
from fastworker.process.children import ChildSpec, Patience
from fastworker.process.supervisor import Supervisor

# --- the process under test


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece: the children share the pipe


async def healthy(slot: Slot, stopping: asyncio.Event) -> None:
    slot.set(ready=1)
    say(f"up {slot.number} {os.getpid()} starts {slot.get('starts')}")
    while not stopping.is_set():
        slot.set(progress_ms=now_ms())
        await asyncio.sleep(0.05)
    say(f"drained {slot.number} {os.getpid()}")


async def unreachable(slot: Slot, stopping: asyncio.Event) -> None:
    raise Unreachable("PostgreSQL cannot be reached")


async def later_unreachable(slot: Slot, stopping: asyncio.Event) -> None:
    if slot.get("starts") > 1:
        raise Unreachable("gone meanwhile")
    await healthy(slot, stopping)


async def limit_reached(slot: Slot, stopping: asyncio.Event) -> None:
    slot.set(ready=1)
    if slot.number == 0:
        raise StoppedItself("too much is rejected")
    await healthy(slot, stopping)


async def buggy_later(slot: Slot, stopping: asyncio.Event) -> None:
    if slot.get("starts") == 1:
        slot.set(ready=1)
        await asyncio.sleep(0.3)
        raise ZeroDivisionError("a bug")
    await healthy(slot, stopping)


async def deaf_loop(slot: Slot, stopping: asyncio.Event) -> None:
    slot.set(ready=1)
    if slot.get("starts") == 1:
        say(f"up {slot.number} {os.getpid()} starts 1")
        time.sleep(3600)  # noqa: ASYNC251 - the loop must hang
    await healthy(slot, stopping)


async def idle_hands(slot: Slot, stopping: asyncio.Event) -> None:
    if slot.get("starts") > 1:
        await healthy(slot, stopping)
        return
    slot.set(ready=1)
    await waits_for_nothing(stopping)


async def waits_for_nothing(stopping: asyncio.Event) -> None:
    await stopping.wait()


async def never_ready_again(slot: Slot, stopping: asyncio.Event) -> None:
    if slot.number == 0:
        await healthy(slot, stopping)
    else:
        await stopping.wait()


async def will_not_drain(slot: Slot, stopping: asyncio.Event) -> None:
    slot.set(ready=1)
    say(f"up {slot.number} {os.getpid()} starts 1")
    await stopping.wait()
    say("told to stop")
    await asyncio.sleep(60)


async def heir(slot: Slot, stopping: asyncio.Event) -> None:
    """Ready, and its predecessor dead, at the same moment."""
    first = Path(os.environ["FIRST"])
    if first.exists():
        predecessor = int(first.read_text())
        slot.set(ready=1)
        os.kill(predecessor, signal.SIGKILL)
    first.write_text(str(os.getpid()))
    await healthy(slot, stopping)


async def fat(slot: Slot, stopping: asyncio.Event) -> None:
    ballast: list[bytes] = []
    growing = asyncio.create_task(grow(ballast)) if slot.get("starts") == 1 and slot.number == 0 else None
    await healthy(slot, stopping)
    if growing is not None:
        growing.cancel()


async def grow(ballast: list[bytes]) -> None:
    for _ in range(50):
        ballast.append(b"x" * (4 << 20))
        await asyncio.sleep(0.02)


async def brief(slot: Slot, stopping: asyncio.Event) -> None:
    slot.set(ready=1)
    await asyncio.sleep(0.2)


async def leaves_an_orphan(slot: Slot, stopping: asyncio.Event) -> None:
    if slot.get("starts") == 1:
        if os.fork() == 0:
            time.sleep(0.3)  # noqa: ASYNC251 - outlives its parent, and is nobody's but the first process's
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    await healthy(slot, stopping)


def child(main: Callable[..., Any]) -> Callable[[Slot], int]:
    return lambda slot: run_child(slot, main)


def dies(slot: Slot) -> int:
    arm("in_recheck:2" if slot.get("starts") == 1 else None)
    crashpoint(Step.IN_RECHECK)
    crashpoint(Step.IN_RECHECK)
    return run_child(slot, healthy)


SCENARIOS = {
    name: [ChildSpec(name="worker", target=child(main), count=count)]
    for name, main, count in [
        ("healthy", healthy, 2),
        ("unreachable", unreachable, 2),
        ("later_unreachable", later_unreachable, 1),
        ("limit_reached", limit_reached, 2),
        ("buggy_later", buggy_later, 1),
        ("deaf_loop", deaf_loop, 1),
        ("stopped", healthy, 2),
        ("idle_hands", idle_hands, 1),
        ("never_ready_again", never_ready_again, 1),
        ("will_not_drain", will_not_drain, 1),
        ("may_drain_for_long", will_not_drain, 1),
        ("fat", fat, 1),
        ("heir", heir, 1),
        ("leaves_an_orphan", leaves_an_orphan, 1),
        ("orphaned_deaf", deaf_loop, 1),
        ("orphaned_busy", will_not_drain, 1),
    ]
}
SCENARIOS["no_fork"] = [ChildSpec(name="worker", target=child(healthy), count=2)]
SCENARIOS["seven"] = [ChildSpec(name="worker", target=child(healthy), count=7)]
SCENARIOS["dies"] = [ChildSpec(name="worker", target=dies, count=1)]
SCENARIOS["family"] = [
    ChildSpec(name="worker", target=child(healthy), count=1),
    ChildSpec(name="monitor", target=child(healthy)),
]
SCENARIOS["fat_monitor"] = [
    ChildSpec(name="monitor", target=child(fat)),
    ChildSpec(name="worker", target=child(healthy), count=1),
]
SCENARIOS["demo"] = [
    ChildSpec(name="worker", target=child(healthy), count=1),
    ChildSpec(name="display", target=child(brief), ends_run=True),
]

# Short only where its end is what the test waits for: a loaded machine lets a healthy child stand still for a second.
PATIENCE = {
    "deaf_loop": {"tick_s": 2.0},
    "stopped": {"tick_s": 2.0},
    "idle_hands": {"progress_s": 4.0},
    "never_ready_again": {"start_s": 2.0},
    "will_not_drain": {"drain_s": 2.0},
}


def unless_forbidden(fork: Callable[[], int]) -> Callable[[], int]:
    """As a container's limit of processes says no, while the file is there."""

    def refused() -> int:
        if Path(os.environ["FORBIDDEN"]).exists():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    return refused


def main() -> int:
    setup_logging("INFO", "human")
    supervisor_module.MEMORY_LOOK_S = 0.5
    if sys.argv[1].startswith("orphaned"):
        child_module.STUCK_S = child_module.LEFT_S = 1.0
    if sys.argv[1] == "no_fork":
        os.fork = unless_forbidden(os.fork)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: gets orphans, as the first process of a container does
    return Supervisor(
        SCENARIOS[sys.argv[1]],
        Heartbeats(8),
        patience=Patience(
            **{"drain_s": 60.0, "tick_s": 30.0, "progress_s": 60.0, "start_s": 60.0, "recycle_s": 1.0}
            | PATIENCE.get(sys.argv[1], {})
        ),
        memory_max_bytes=150 << 20,
        workers_max=3,
        notify_socket=sys.argv[2] if len(sys.argv) > 2 else None,
    ).run()


# --- the tests

ROOT = Path(__file__).parents[2]


class Run:
    """A running scenario: what it prints, line by line, and how it ends."""

    def __init__(self, scenario: str, *args: str, stderr: int = subprocess.STDOUT) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, scenario, *args],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            bufsize=1,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path) + os.pathsep + str(ROOT)},
            cwd=ROOT,
            start_new_session=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.seen: list[str] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def line(self, pattern: str, seconds: float = 30.0) -> re.Match[str]:
        """The next line that matches."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                pytest.fail(f"no line like {pattern!r} in:\n" + "\n".join(self.seen))
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found

    def ups(self, count: int) -> list[int]:
        """The pids of the next children at work."""
        return [int(self.line(r"^up \d+ (\d+)")[1]) for _ in range(count)]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 30.0) -> int:
        code = self.process.wait(timeout=seconds)
        self.thread.join(timeout=30)
        while not self.lines.empty():
            if (line := self.lines.get()) is not None:
                self.seen.append(line)
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.seen)


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(scenario: str, *args: str, **options: int) -> Run:
        runs.append(Run(scenario, *args, **options))
        return runs[-1]

    yield begin
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)  # children that a failed test left, too
        run.process.wait()
        run.thread.join(timeout=5)
        assert run.process.stdout is not None
        run.process.stdout.close()


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """The dead that nobody waited for, too."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(fact: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains_and_exits_0(start: Any, number: Any) -> None:
    run = start("healthy")
    pids = run.ups(2)
    run.send(number)
    assert run.end() == 0
    assert {int(pid) for pid in re.findall(r"^drained \d+ (\d+)", run.text, re.MULTILINE)} == set(pids)
    assert not any(alive(pid) for pid in pids)


def test_a_fork_that_is_refused_costs_no_healthy_child(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = tmp_path / "forbidden"
    monkeypatch.setenv("FORBIDDEN", str(forbidden))
    run = start("no_fork")
    first, second = run.ups(2)
    forbidden.touch()
    os.kill(first, signal.SIGKILL)
    run.line("No process for another worker: Resource temporarily unavailable; trying again in 0.5 s")
    run.line("No process for another worker: .* again in 1.0 s")
    run.send(signal.SIGHUP)  # a replacement has to wait, too
    run.line("No process for another worker")
    assert alive(second)
    forbidden.unlink()
    run.ups(2)  # the dead one anew, and a new one for the other
    run.send(signal.SIGTERM)
    assert run.end() == 0


def test_many_deaths_at_once_are_one_crash(start: Any) -> None:
    run = start("seven")
    pids = run.ups(7)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    run.ups(7)
    run.send(signal.SIGTERM)
    assert run.end() == 0
    delays = [float(one) for one in re.findall(r"starting it again in ([0-9.]+) s", run.text)]
    assert len(delays) == 5, "the log holds repeats back"
    assert max(delays) == 0.5


def test_replaced_twice_keeps_labels_and_is_no_crash(start: Any) -> None:
    run = start("healthy")
    pids = run.ups(2)
    for _ in range(2):
        run.send(signal.SIGHUP)
        pids = run.ups(2)
        until(lambda: not set(children_of(run.process.pid)) - set(pids))  # noqa: B023
    run.send(signal.SIGTERM)
    assert run.end() == 0
    names = set(re.findall(r"(worker-\d+) \(pid", run.text))
    assert names == {"worker-0", "worker-1"}


def test_who_dies_when_its_successor_is_ready_is_not_told_to_stop(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRST", str(tmp_path / "first"))
    run = start("heir")
    run.ups(1)
    for _ in range(3):
        run.send(signal.SIGHUP)
        [pid] = run.ups(1)
        until(lambda: children_of(run.process.pid) == [pid])  # noqa: B023
    run.send(signal.SIGTERM)
    assert run.end() == 0


def full_pipe() -> tuple[int, int]:
    """A pipe that takes nothing more; whoever inherits it sees a blocking one."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 65_536)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    return reading, writing


def full_socket() -> tuple[int, int]:
    """As systemd's journal, when it does not read."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            writing.send(b"x")
    writing.setblocking(True)
    return reading.detach(), writing.detach()


@pytest.mark.parametrize("make", [full_pipe, full_socket])
def test_standard_error_that_nobody_reads_stops_nobody(start: Any, make: Any) -> None:
    reading, writing = make()
    run = start("deaf_loop", stderr=writing)  # the watchdog writes stacks, too
    [pid] = run.ups(1)
    [second] = run.ups(1)
    os.kill(second, signal.SIGKILL)
    [third] = run.ups(1)
    assert len({pid, second, third}) == 3
    assert os.get_blocking(writing), "the flag is everybody's"
    threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 65_536), b"")], daemon=True).start()
    run.send(signal.SIGTERM)
    assert run.end() == 0
    os.close(writing)


def test_standard_error_that_takes_nothing_stops_nobody(start: Any) -> None:
    with Path("/dev/full").open("wb") as full:
        run = start("healthy", stderr=full.fileno())
        os.kill(run.ups(2)[0], signal.SIGKILL)
        run.ups(1)
    run.send(signal.SIGTERM)
    assert run.end() == 0


def test_the_second_signal_means_now(start: Any) -> None:
    run = start("may_drain_for_long")
    [pid] = run.ups(1)
    run.send(signal.SIGTERM)
    run.line("told to stop")
    run.send(signal.SIGTERM)
    assert run.end(15) == 0  # the budget is 60 s, and the child's own patience 20 s
    assert not alive(pid)


def test_the_budget_ends_a_drain(start: Any) -> None:
    run = start("will_not_drain")
    [pid] = run.ups(1)
    run.send(signal.SIGTERM)
    assert run.end(15) == 0  # the child itself would give up after 20 s
    assert not alive(pid)


def test_a_start_that_fails_is_not_repeated(start: Any) -> None:
    run = start("unreachable")
    assert run.end() == ExitCode.UNREACHABLE
    assert "PostgreSQL cannot be reached" in run.text
    assert "Traceback" not in run.text
    assert "again" not in run.text


def test_what_fails_after_it_was_ready_once_is_tried_again(start: Any) -> None:
    run = start("later_unreachable")
    [pid] = run.ups(1)
    os.kill(pid, signal.SIGKILL)
    run.line("was killed by SIGKILL: starting it again")
    run.line("exit code 3: starting it again in 1.0 s")
    run.send(signal.SIGTERM)
    assert run.end() == 0


def test_who_stops_itself_stops_all(start: Any) -> None:
    run = start("limit_reached")
    assert run.end() == ExitCode.STOPPED_ITSELF
    assert "too much is rejected" in run.text


def test_a_bug_is_shown_and_the_child_replaced(start: Any) -> None:
    run = start("buggy_later")
    run.line("ZeroDivisionError: a bug")
    run.line("exit code 70: starting it again in 0.5 s")
    run.line("^up 0 .* starts 2")


def test_a_crash_point_kills_as_a_pulled_plug(start: Any) -> None:
    run = start("dies")
    run.line("was killed by SIGKILL: starting it again")
    run.line("^up 0 .* starts 2")


def test_a_hanging_loop_has_its_stacks_dumped_and_is_replaced(start: Any) -> None:
    run = start("deaf_loop")
    run.line("has not turned its loop for 2 s")
    run.line("in deaf_loop")
    run.line("was killed by SIGKILL")
    run.line("^up 0 .* starts 2")


def test_a_stopped_child_is_replaced(start: Any) -> None:
    run = start("stopped")
    pid, _ = run.ups(2)
    os.kill(pid, signal.SIGSTOP)
    run.line(f"pid {pid}.*has not turned its loop")
    [new] = run.ups(1)
    assert new != pid
    assert not alive(pid)


def test_no_progress_is_noticed_although_the_loop_turns(start: Any) -> None:
    run = start("idle_hands")
    run.line("has made no progress for 4 s")
    run.line("Current thread|Thread 0x")
    run.line("What its tasks wait for")
    run.line("in waits_for_nothing$")  # the innermost await, which the thread's own stack does not show
    run.line("^up 0 .* starts 2")


def test_hup_replaces_with_no_gap(start: Any) -> None:
    run = start("healthy")
    old = set(run.ups(2))
    run.send(signal.SIGHUP)
    new: set[int] = set()
    gone: set[int] = set()
    while len(gone) < 2:
        # what the parent says of it: a new one's own "up" comes after it said that it is ready, perhaps too late
        found = run.line(r"worker-\d+ \(pid (\d+)\) is ready|^drained \d+ (\d+)")
        (new if found[1] else gone).add(int(found[1] or found[2]))
        new -= old
        assert len(new) >= len(gone)  # a new one is ready before an old one ends
    assert gone == old
    until(lambda: not any(map(alive, old)))
    assert len(new) == 2
    assert all(map(alive, new))


def test_hup_keeps_the_old_when_the_new_does_not_start(start: Any) -> None:
    run = start("never_ready_again")
    [pid] = run.ups(1)
    run.send(signal.SIGHUP)
    run.line("keeping the old ones")
    assert alive(pid)


def test_hup_stops_what_exists_once_before_starting_it_anew(start: Any) -> None:
    run = start("family")
    run.line("monitor .* is ready")
    run.send(signal.SIGHUP)
    run.line("^drained 1 ")
    run.line("^up 1 .* starts 2")


def test_more_and_fewer(start: Any) -> None:
    run = start("healthy")
    pids = run.ups(2)
    run.send(signal.SIGTTIN)
    [third] = run.ups(1)
    run.send(signal.SIGTTIN)
    run.line("3 worker processes, as before")
    run.send(signal.SIGTTOU)
    run.line(rf"^drained \d+ {third}")
    assert all(map(alive, pids))


def test_status_to_the_log(start: Any) -> None:
    run = start("healthy")
    run.ups(2)
    run.send(signal.SIGUSR1)
    assert "events/sec" in run.line(r"worker-0 pid \d+ .* held")[0]


def test_no_orphan_survives_the_supervisor(start: Any) -> None:
    run = start("healthy")
    pids = run.ups(2)
    run.send(signal.SIGKILL)
    until(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("scenario", ["orphaned_deaf", "orphaned_busy"])
def test_no_orphan_survives_though_it_hangs(start: Any, scenario: Any) -> None:
    """Its loop does not turn, or it turns and nothing is ever drained: then the child's own clocks end it."""
    run = start(scenario)
    [pid] = run.ups(1)
    run.send(signal.SIGKILL)
    until(lambda: not alive(pid), 15)


def test_no_zombie_is_left_not_even_of_others(start: Any) -> None:
    run = start("leaves_an_orphan")
    [pid] = run.ups(1)
    until(lambda: children_of(run.process.pid) == [pid])
    for _ in range(3):
        os.kill(pid, signal.SIGKILL)
        [pid] = run.ups(1)
        assert children_of(run.process.pid) == [pid]


def test_a_fat_monitor_is_replaced(start: Any) -> None:
    run = start("fat_monitor")
    pid = run.line(r"monitor \(pid (\d+)\) uses .* MB of its own: replacing it")[1]
    run.line(rf"^drained 0 {pid}")
    run.line(r"^up 0 .* starts 2")


def test_a_fat_worker_is_replaced(start: Any) -> None:
    run = start("fat")
    [pid] = run.ups(1)
    run.line(r"MB of its own: replacing it")
    run.line(r"worker-0 .* is ready")
    run.line(rf"^drained 0 {pid}")


def test_a_child_that_ends_the_run(start: Any) -> None:
    run = start("demo")
    assert run.end() == 0


def test_systemd_is_told(start: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.settimeout(30)
        run = start("will_not_drain", path)
        told = [receiver.recv(100)]
        while not {b"READY=1", b"WATCHDOG=1"} <= set(told):
            told.append(receiver.recv(100))
        run.send(signal.SIGTERM)
        while b"STOPPING=1" not in told:
            told.append(receiver.recv(100))
        while told[-1] != b"WATCHDOG=1":  # a drain that takes its time is no hang
            told.append(receiver.recv(100))
        assert told.count(b"READY=1") == told.count(b"STOPPING=1") == 1
    assert run.end() == 0


if __name__ == "__main__":
    sys.exit(main())
