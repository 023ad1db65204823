"""Hypothesis writes the history, cuts it into batches and hands them to several writers; the model says what must be.

A failing case is shrunk and printed as `History(events=[...], batches=[...])`, which is Python: `falsify(url, History(...))`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastworker.store.store import Store
from tests.loop import Loop
from tests.property.feeding import batch_of, clear, differences, lawful, settle
from tests.rig.histories import History, histories


class Bench:
    """One loop, three writers and a reader of the tables for many examples."""

    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner(loop_factory=Loop)
        self._thread = ThreadPoolExecutor(1)  # the test's own thread has a loop already
        self.stores: list[Store] = []
        self.run(self._open(url))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._thread.submit(self._runner.run, work).result(110)

    async def _open(self, url: str) -> None:
        self.connection = await asyncpg.connect(url)
        self.stores = [await Store.connect(url) for _ in range(3)]
        for store in (self.stores[0], self.stores[2]):
            store.writer.copying.rows_min = 1

    async def _close(self) -> None:
        for store in self.stores:
            await store.close()
        await self.connection.close()

    def close(self) -> None:
        self.run(self._close())
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()

    async def check(self, history: History, writers: int) -> str:
        await clear(self.connection)
        for store in self.stores:
            store.writer.known.clear()  # the tables of users and relays are empty again
            store.writer.relays.clear()
            store.writer.many_relays = False
            store.writer.copying.pause = 0

        async def deliver(n: int) -> None:
            for events in history.deliveries()[n::writers]:
                await self.stores[n].write(batch_of(events))

        async with asyncio.TaskGroup() as tasks:
            for n in range(writers):
                tasks.create_task(deliver(n))
        await settle(self.stores[0])
        return await differences(lawful(history.events), self.connection)


@pytest.fixture
def bench(postgres_url: str) -> Iterator[Bench]:
    bench = Bench(postgres_url)
    yield bench
    bench.close()


def _examples(count: int, bench: Bench) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=True,
    )
    @given(histories(max_events=16), st.integers(1, 3))
    def example(history: History, writers: int) -> None:
        told = bench.run(bench.check(history, writers))
        assert told == "no difference", told

    example()


def test_new_histories(bench: Bench) -> None:
    _examples(40, bench)


@pytest.mark.extended
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(8))
def test_two_thousand_histories(part: int, bench: Bench) -> None:
    _examples(250, bench)
