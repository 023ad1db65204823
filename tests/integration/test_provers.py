"""Prover processes that end or stop in the middle: every question gets its own answer all the same."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fastworker.reader import prover
from fastworker.reader.prove import Proof
from fastworker.reader.prover import Asked, Provers
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.repo import LiveClock, Repo, tid

DID = "did:plc:" + "a" * 24
WHOLE, UNSIGNED = Proof(is_signed=True), Proof(is_signed=False)


def questions(number: int) -> tuple[list[Asked], list[Proof]]:
    """Some with the account's key, some with another's, and what is to be said of each."""
    repo = Repo(DID, LiveClock(), key=SigningKey("its own"))
    keys = [(SigningKey("its own").multikey, WHOLE), (SigningKey("a stranger").multikey, UNSIGNED)]
    asked, expected = [], []
    for place in range(number):
        path = f"app.bsky.feed.like/{tid(1_780_000_000_000_000 + place)}"
        multikey, proof = keys[(place * place + place // 3) % 2]
        asked.append((multikey, repo.commit([("create", path, {"$type": "app.bsky.feed.like"})]).data))
        expected.append(proof)
    return asked, expected


def children() -> list[int]:
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(one) for one in found if b"reader.prover" in Path(f"/proc/{one}/cmdline").read_bytes()]


async def heard(act: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Nothing is left for the event loop to complain about."""
    unhandled: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: unhandled.append(told["message"]))
    async with asyncio.timeout(60):
        await act()
    gc.collect()
    await asyncio.sleep(0)
    assert unhandled == []


@pytest.mark.parametrize("wait_s", [0.0, 0.001, 0.01, 0.1])
async def test_one_is_killed_while_many_ask(wait_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also whoever asks between its end and the next one's start."""
    monkeypatch.setattr(prover, "PIECE", 3)
    monkeypatch.setattr(prover, "TRIES", 50)
    asked, expected = questions(300)

    async def act() -> None:
        async with Provers(1, full=True) as provers:
            assert await provers.prove(asked[:3]) == expected[:3]
            asking = []
            for start in range(0, 300, 30):
                asking.append(asyncio.create_task(provers.prove(asked[start : start + 30])))
                await asyncio.sleep(wait_s)
                if start % 90 == 0:
                    for process in children():
                        os.kill(process, signal.SIGKILL)
            assert [one for answer in await asyncio.gather(*asking) for one in answer] == expected
        assert children() == []

    await heard(act)


async def test_one_that_stops_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, expected = questions(9)

    async def act() -> None:
        async with Provers(1, full=False) as provers:
            assert await provers.prove(asked) == expected
            (stopped,) = children()
            os.kill(stopped, signal.SIGSTOP)
            monkeypatch.setattr(prover, "ANSWER_S", 2.0)
            assert await provers.prove(asked) == expected
            assert stopped not in children()

    await heard(act)


async def test_one_that_never_starts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    asked, _ = questions(3)

    async def act() -> None:
        async with Provers(1, full=False) as provers:
            with pytest.raises(ConnectionError):
                await provers.prove(asked)

    await heard(act)


async def test_who_asked_goes_away() -> None:
    """The reader stops while a chunk is proved: its provers end, and nothing is left behind."""
    asked, _ = questions(200)

    async def act() -> None:
        async with Provers(2, full=True) as provers:
            await provers.prove(asked[:1])
            asking = asyncio.create_task(provers.prove(asked))
            await asyncio.sleep(0.02)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(20):
            while children():  # one that was just being started ends when it finds its socket closed
                await asyncio.sleep(0.02)

    await heard(act)
