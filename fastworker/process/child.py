"""The life of one child process: its loop, its signals, its pulse. What it does is a parameter.

A child stops when it is told to (SIGTERM, also sent by the kernel when the parent dies) or when it notices that its
parent is gone. SIGINT is the parent's business: a terminal sends it to the whole group.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from fastworker.errors import ExitCode, FastworkerError
from fastworker.log import descriptor, flush_waiting
from fastworker.process.board import Slot, State, now_ms

log = logging.getLogger(__name__)

Main = Callable[[Slot, asyncio.Event], Awaitable[None]]
"""What a child does until `stopping` is set; it returns when it has drained. It sets `ready` in its slot."""

TICK_S = 0.5
STUCK_S = 60.0
"""A loop that does not turn for so long ends the process with its stacks on standard error. The parent's watchdog is
faster; this one is for children that have no parent any more."""
LEFT_S = 20.0
"""Longest life after the order to stop. The parent's budget is shorter; this is for children without a parent."""
GC_THRESHOLD = 100_000  # allocations: rows are tuples of texts, which are never part of a cycle
AGAIN = 75  # exit code: nothing is wrong here, start me again (EX_TEMPFAIL)


class StartAgain(Exception):
    """Raised by a child that must begin anew, such as one that lost its lease: replaced after a backoff."""


def run_child(slot: Slot, main: Main) -> int:
    """Run `main` to its end in a fresh loop; the exit code. Call it after the fork, in the child only."""
    gc.set_threshold(GC_THRESHOLD, 20, 50)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_live(slot, main))
    except BaseException as error:  # noqa: BLE001 - the last line of a process: every error becomes an exit code
        return _verdict(slot, error)
    return ExitCode.DONE


async def _live(slot: Slot, main: Main) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _beat(slot)  # now: `main` may hang before the pulse had a turn
    pulse = asyncio.create_task(_pulse(slot, stopping), name="pulse")
    try:
        await main(slot, stopping)
    finally:
        pulse.cancel()
        faulthandler.cancel_dump_traceback_later()


def _beat(slot: Slot) -> None:
    slot.set(tick_ms=now_ms())
    faulthandler.dump_traceback_later(STUCK_S, exit=True, file=descriptor())


async def _pulse(slot: Slot, stopping: asyncio.Event) -> None:
    parent = os.getppid()
    told_ms = 0
    while True:
        _beat(slot)
        flush_waiting()
        if os.getppid() != parent and not stopping.is_set():
            log.error("The supervisor is gone: stopping")
            stopping.set()
        if stopping.is_set():
            slot.set(state=State.DRAINING)
            told_ms = told_ms or now_ms()
            if now_ms() - told_ms > LEFT_S * 1000:
                log.error("Not drained after %g s: giving up", LEFT_S)
                os._exit(AGAIN)
        await asyncio.sleep(TICK_S)


def dump_stacks_on(number: signal.Signals) -> None:
    """On this signal print the stacks of all threads, also while the loop hangs; if it runs, those of all tasks too."""
    signal.signal(number, lambda _number, _frame: log_tasks())
    faulthandler.register(number, file=descriptor(), all_threads=True, chain=True)


def log_tasks() -> None:
    """Each task with the whole chain of its awaits: asyncio's own print shows the first of them only."""
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return  # no loop runs
    lines = []
    for task in tasks:
        lines.append(f"Task {task.get_name()}:")
        awaited: Any = task.get_coro()
        while awaited is not None:
            frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
            if frame is not None:
                lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
            awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    log.error("What its tasks wait for:", extra={"lines": lines})


def _verdict(slot: Slot, error: BaseException) -> int:
    """The exit code that says whose fault it was; what is not ours to explain gets a traceback."""
    cause = _first_cause(error)
    slot.failed(cause)
    if isinstance(cause, FastworkerError):
        log.error("%s", cause)
        return cause.exit_code
    if isinstance(cause, StartAgain):
        log.warning("%s", cause)
        return AGAIN
    log.critical("Unexpected error", exc_info=error)
    return ExitCode.BUG


def _first_cause(error: BaseException) -> BaseException:
    """Of a group, one of ours if there is one, else the first: siblings are cancelled for its sake."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [_first_cause(one) for one in error.exceptions]
    return next((one for one in causes if isinstance(one, FastworkerError | StartAgain)), causes[0])
