"""Snapshots of repositories beside events: lost ones, late ones, in every order. The model says what must be.

Histories settle any account at any moment; races hold a flush, or the settle, at every step. A snapshot counts, for
every path of its repository, as one operation of version (R, S0); what is older and comes later stays away by a floor.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastworker.crashpoint import Step
from fastworker.event.repository import TreeRecord
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.simulator.cbor import cid_bytes, encode
from fastworker.store.store import Store
from fastworker.store.stored import Stored, open_stored
from fastworker.sync.settle import Settle, Settled
from fastworker.table.snapshot import Snapshot
from tests.property.feeding import batch_of, clear, settle
from tests.property.test_histories import Bench
from tests.property.test_interleavings import FORMS, Died, Held, Scene
from tests.rig.histories import Event, History, Record, cid_of, entry_ms, histories, tid
from tests.runs import in_turns

TAKEN_AT = datetime(2026, 2, 1)  # noqa: DTZ001 - naive UTC, as in the tables
LONG_AGO = "2023-01-01T00:00:00.000Z"
"""Before every moment by which a record's date is judged: event and snapshot say the same then."""


class Whole:
    """A repository, as `Settle` wants it: the records in the order of their keys."""

    bad_paths = 0

    def __init__(self, records: dict[str, Record]) -> None:
        self._records = records
        self.size = 0 if len(records) % 2 else 1 << 30  # alone, or with others

    def records(self) -> Iterator[TreeRecord]:
        for path in sorted(self._records, key=str.encode):
            collection, rkey = path.split("/")
            one = self._records[path]
            yield TreeRecord(collection, rkey, cid_bytes(one["cid"]), encode(one["record"]))


def repository(events: Iterable[Event], did: str) -> dict[str, Record]:
    """What the account's host holds after these events."""
    held: dict[str, Record] = {}
    for event in events:
        if event["kind"] == "commit" and event["repo"] == did:
            for op in event["ops"]:
                if op["action"] == "delete":
                    held.pop(op["path"], None)
                else:
                    held[op["path"]] = {"cid": op["cid"], "record": op["record"]}
    return held


def snapshot_of(events: list[Event], did: str, seq: int) -> Event | None:
    """Of all these events; what happened up to `seq` had happened before it was asked for. None: no repository yet."""
    last = max((event["seq"] for event in events if event["kind"] == "commit" and event["repo"] == did), default=None)
    if last is None:
        return None
    told = {"kind": "snapshot", "did": did, "rev": tid(last), "seq": seq, "time": TAKEN_AT.isoformat()}
    return {**told, "records": repository(events, did)}


async def settle_one(stored: Stored, store: Store, event: Event) -> Settled:
    snapshot = Snapshot(event["did"], event["rev"], event["seq"], TAKEN_AT)
    whole: Any = Whole(event["records"])
    return await Settle(stored, store).settle(whole, snapshot, floor=True)


def expected(events: Iterable[Event], snapshots: Iterable[Event]) -> compare.Tables:
    model = Model()
    for event in events:
        model.apply(event, entry_ms(event))
    for event in snapshots:
        model.apply(event)
    return comparable(model.tables())


def comparable(tables: compare.Tables) -> compare.Tables:
    """Without the version of a row, which may be its event's or the snapshot's, and without users of whom nothing but
    their name is known: of two ops on one record only the one that is written names somebody."""
    return {
        table: [
            {name: value for name, value in row.items() if not name.startswith("commit_")}
            for row in rows
            if table != "users" or row["handle"] != "handle.invalid" or row["profile_record"] is not None
        ]
        for table, rows in tables.items()
    }


async def differences(tables: compare.Tables, connection: asyncpg.Connection) -> str:
    return compare.report(compare.diff(tables, comparable(await compare.dump(connection))))


async def settle_noted(pg: asyncpg.Connection, stored: Stored, store: Store, snapshots: list[Event]) -> None:
    """Whoever asked for another settle gets one."""
    for row in await pg.fetch("DELETE FROM fastworker.repos WHERE state = 'waiting' RETURNING did"):
        newest = max((one for one in snapshots if one["did"] == row[0]), key=lambda one: (one["rev"], one["seq"]))
        await settle_one(stored, store, newest)


# Histories --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Repaired:
    """A history of which the events `lost` never come. `snapshots`: (account, events before it, of these before its S0,
    after how many batches it is settled)."""

    history: History
    lost: frozenset[int]
    snapshots: tuple[tuple[int, int, int, int], ...]

    def taken(self) -> list[tuple[int, Event]]:
        events = self.history.events
        dids = sorted({event.get("repo") or event["did"] for event in events})
        found = []
        for which, until, before, when in self.snapshots:
            did = dids[which % len(dids)]
            until %= len(events) + 1  # noqa: PLW2901
            has_bare = any(e["kind"] == "commit" and e["rev"] is None for e in events)
            asked = until if has_bare else min(until, before % (len(events) + 1))
            # Deleted while it was fetched, it is settled once more (docs/invariants.md): not a matter of one snapshot.
            if any(event["kind"] == "account" and event["did"] == did for event in events[asked:until]):
                asked = until
            seq = events[asked - 1]["seq"] if asked else 0
            if (one := snapshot_of(events[:until], did, seq)) is not None:
                found.append((when, one))
        return found

    def delivered(self) -> list[list[Event]]:
        return [[self.history.events[n] for n in batch if n not in self.lost] for batch in self.history.batches]


@st.composite
def repaired(draw: st.DrawFn) -> Repaired:
    history = draw(histories(max_events=14).filter(lambda one: all("relay" not in event for event in one.events)))
    for event in history.events:
        for op in event.get("ops", ()):
            if op["action"] != "delete":
                op["record"] = {**_encodable(op["record"]), "createdAt": LONG_AGO}
                op["cid"] = cid_of(op["record"])
    lost = draw(st.frozensets(st.integers(0, len(history.events) - 1), max_size=6))
    number = st.integers(0, 40)
    snapshots = draw(st.lists(st.tuples(number, number, number, st.integers(0, 6)), min_size=1, max_size=3))
    return Repaired(history, lost, tuple(snapshots))


def _encodable(record: Record) -> Record:
    """Without what no host can have encoded."""
    return {
        name: value
        for name, value in record.items()
        if value != 2**63 and not (isinstance(value, str) and "\ud800" in value) and not isinstance(value, float)
    }


class Settling(Bench):
    async def _open(self, url: str) -> None:
        await super()._open(url)
        self.settler = await Store.connect(url)
        self.stack = contextlib.AsyncExitStack()
        self.stored = await self.stack.enter_async_context(open_stored(url))

    async def _close(self) -> None:
        await self.settler.close()
        await self.stack.aclose()
        await super()._close()

    async def check_repaired(self, case: Repaired, writers: int) -> str:
        await clear(self.connection)
        for store in (*self.stores, self.settler):
            store.writer.forget()
            store.writer.many_relays = False
            store.writer.copying.pause = 0
        taken = case.taken()
        count = 0

        async def deliver(n: int) -> None:
            nonlocal count
            for events in case.delivered()[n::writers]:
                if events:
                    await self.stores[n].write(batch_of(events))
                count += 1

        async def mend() -> None:
            for when, event in taken:
                while count < min(when, len(case.history.batches)):
                    await asyncio.sleep(0)
                await settle_one(self.stored, self.settler, event)

        async with asyncio.TaskGroup() as tasks:
            for n in range(writers):
                tasks.create_task(deliver(n))
            tasks.create_task(mend())
        snapshots = [event for _, event in taken]
        await settle(self.stores[0])
        await settle_noted(self.connection, self.stored, self.settler, snapshots)
        await settle(self.stores[0])
        events = [event for batch in case.delivered() for event in batch]
        return await differences(expected(events, snapshots), self.connection)


@pytest.fixture
def bench(postgres_url: str) -> Iterator[Settling]:
    bench = Settling(postgres_url)
    yield bench
    bench.close()


def _examples(count: int, bench: Settling) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=True,
    )
    @given(repaired(), st.integers(1, 3))
    def example(case: Repaired, writers: int) -> None:
        told = bench.run(bench.check_repaired(case, writers))
        assert told == "no difference", told

    example()


def test_lost_events_and_settles_anywhere(bench: Settling) -> None:
    _examples(30, bench)


@pytest.mark.extended
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(10))
def test_two_thousand_lost_events_and_settles(part: int, bench: Settling) -> None:
    _examples(200, bench)


# Races --------------------------------------------------------------------------------------------------------------------

Parts = tuple[list[Event], list[Event], str]
"""Events that are there before, those of the flush beside which the account is settled, and the account."""


def a_lost_delete(s: Scene) -> Parts:
    """The post is there, its delete is lost, and what came between is late."""
    base = [s.post(s.a)]
    late = [s.post(s.a, action="update", text="late")]
    s.delete(s.a, "app.bsky.feed.post/p")
    return base, late, s.a


def a_late_create_of_what_is_held(s: Scene) -> Parts:
    return [], [s.post(s.a), s.like(s.a, s.uri(s.b))], s.a


def a_late_create_of_what_is_absent(s: Scene) -> Parts:
    late = [s.post(s.a), s.like(s.a, s.uri(s.b))]
    s.delete(s.a, "app.bsky.feed.post/p")
    s.delete(s.a, "app.bsky.feed.like/l")
    return [], late, s.a


def a_late_delete_of_what_is_held_again(s: Scene) -> Parts:
    base = [s.post(s.a)]
    late = [s.delete(s.a, "app.bsky.feed.post/p")]
    s.post(s.a)
    return base, late, s.a


def a_late_update_of_what_is_as_before(s: Scene) -> Parts:
    base = [s.post(s.a)]
    late = [s.post(s.a, action="update", text="other")]
    s.post(s.a, action="update")
    return base, late, s.a


def a_late_cold_record(s: Scene) -> Parts:
    late = [s.item(s.a, "i", "one", s.b)]
    s.delete(s.a, "app.bsky.graph.listitem/i")
    return [], late, s.a


def a_late_profile(s: Scene) -> Parts:
    path = "app.bsky.actor.profile/self"
    base = [s.put(s.a, path, {"displayName": "one"})]
    late = [s.put(s.a, path, {"displayName": "two"}, "update")]
    s.put(s.a, path, {"displayName": "three"}, "update")
    return base, late, s.a


def a_late_twin(s: Scene) -> Parts:
    base = [s.like(s.a, s.uri(s.b), "l1")]
    late = [s.like(s.a, s.uri(s.b), "l0")]
    s.delete(s.a, "app.bsky.feed.like/l0")
    s.like(s.a, s.uri(s.b), "l2")
    return base, late, s.a


def a_deletion_before(s: Scene) -> Parts:
    """Of the account, which came back with what it had."""
    base = [s.post(s.a), s.like(s.a, s.uri(s.b))]
    return base, [s.account(s.a, "deleted")], s.a


def a_newer_event(s: Scene) -> Parts:
    s.post(s.a)
    return [], [s.post(s.a, action="update", text="new"), s.post(s.a, "p2")], s.a


Race = Any
RACES: tuple[Race, ...] = (
    a_lost_delete,
    a_late_create_of_what_is_held,
    a_late_create_of_what_is_absent,
    a_late_delete_of_what_is_held_again,
    a_late_update_of_what_is_as_before,
    a_late_cold_record,
    a_late_profile,
    a_late_twin,
    a_deletion_before,
    a_newer_event,
)
FLUSH = (
    Step.LOOKED,
    Step.AFTER_TOMBSTONE_COMMIT,
    Step.ROWS_WRITTEN,
    Step.BEFORE_MAIN_COMMIT,
    Step.AFTER_MAIN_COMMIT,
    Step.AFTER_LOOK_BACK,
)
SETTLE = (Step.FLOOR_COMMITTED, *FLUSH)
PATIENCE = 40
"""Looks, each 5 ms apart, by which the settle waits for the flush, or is at its end."""


class Beside:
    """A flush and a settle, and who reads what they did."""

    def __init__(self, url: str, flush: Held, settler: Held, stored: Stored, pg: asyncpg.Connection) -> None:
        self.url, self.flush, self.settler, self.stored, self.pg = url, flush, settler, stored, pg
        self.events: list[Event] = []
        self.snapshots: list[Event] = []

    async def case(self, number: int, race: Race) -> tuple[list[Event], Event]:
        """What the flush writes, and the snapshot; the rest of the case is in the tables."""
        s = Scene(number)
        base, late, did = race(s)
        for event in s.events:
            for op in event.get("ops", ()):
                if op["action"] != "delete":
                    op["record"]["createdAt"] = LONG_AGO
                    op["cid"] = cid_of(op["record"])
        known = [event for event in s.events if race is not a_newer_event or event not in late]
        snapshot = snapshot_of(known, did, known[-1]["seq"])
        assert snapshot is not None
        if base:
            await self.flush.store.write(batch_of(base))
        self.events += [*base, *late]
        self.snapshots.append(snapshot)
        return late, snapshot

    async def settle(self, snapshot: Event) -> Settled:
        return await settle_one(self.stored, self.settler.store, snapshot)

    async def told(self) -> str:
        self.flush.hold(None)
        self.settler.hold(None)
        await settle(self.flush.store)
        await settle_noted(self.pg, self.stored, self.settler.store, self.snapshots)
        while await self.flush.store.maintain(owed_age_s=0, dead_commit=timedelta()):
            pass
        return await differences(expected(self.events, self.snapshots), self.pg)


@pytest.fixture
async def beside(postgres_url: str, pg: asyncpg.Connection) -> Any:
    flush, settler = [Held(await Store.connect(postgres_url, application_name=f"writer-{n}")) for n in range(2)]
    async with open_stored(postgres_url) as stored:
        yield Beside(postgres_url, flush, settler, stored, pg)
    for one in (flush, settler):
        await one.store.close()


def _form(held: Held, form: str) -> None:
    held.hold(None)
    writer = held.store.writer
    writer.copying.rows_min, writer.whole_rows_max = FORMS[form]
    writer.copying.pause = 0


@pytest.mark.parametrize(("race", "form"), in_turns(RACES, list(FORMS), lambda race: race.__name__))
async def test_an_account_is_settled_while_a_flush_is_held(race: Race, form: str, beside: Beside) -> None:
    """The flush stands at each of its steps until the settle is at its end, or waits for it."""
    for number, place in enumerate(FLUSH):
        _form(beside.flush, form)
        late, snapshot = await beside.case(number, race)
        beside.flush.hold(place)
        flushing = asyncio.create_task(beside.flush.store.write(batch_of(late)))
        async with asyncio.timeout(60):
            while not (flushing.done() or beside.flush.reached.is_set()):
                await asyncio.sleep(0.001)
        settling = asyncio.create_task(beside.settle(snapshot))
        for _ in range(PATIENCE):
            if settling.done():
                break
            await asyncio.sleep(0.005)
        beside.flush.go.set()
        async with asyncio.timeout(60):
            await asyncio.gather(flushing, settling)
    assert await beside.told() == "no difference"


@pytest.mark.parametrize(("race", "form"), in_turns(RACES, list(FORMS), lambda race: race.__name__))
async def test_a_flush_comes_while_a_settle_is_held(race: Race, form: str, beside: Beside) -> None:
    for number, place in enumerate(SETTLE):
        _form(beside.flush, form)
        late, snapshot = await beside.case(number, race)
        beside.settler.hold(place)
        settling = asyncio.create_task(beside.settle(snapshot))
        async with asyncio.timeout(60):
            while not (settling.done() or beside.settler.reached.is_set()):
                await asyncio.sleep(0.001)
        flushing = asyncio.create_task(beside.flush.store.write(batch_of(late)))
        for _ in range(PATIENCE):
            if flushing.done():
                break
            await asyncio.sleep(0.005)
        beside.settler.go.set()
        async with asyncio.timeout(60):
            await asyncio.gather(flushing, settling)
    assert await beside.told() == "no difference"


@pytest.mark.parametrize("race", RACES, ids=lambda race: race.__name__)
async def test_a_settle_dies_and_another_comes(race: Race, beside: Beside) -> None:
    """At each step: after the floor, in the middle of the write, before it looked back."""
    for number, place in enumerate(SETTLE):
        late, snapshot = await beside.case(number, race)
        beside.settler.dies_at = place
        with contextlib.suppress(Died):
            await beside.settle(snapshot)
        beside.settler.dies_at = None
        await beside.flush.store.write(batch_of(late))
        await beside.settle(snapshot)
    assert await beside.told() == "no difference"


@pytest.mark.parametrize("race", RACES, ids=lambda race: race.__name__)
async def test_a_flush_dies_and_its_entries_come_again(race: Race, beside: Beside) -> None:
    """It died at each of its steps; the account is settled, and then its entries are delivered to another."""
    for number, place in enumerate(FLUSH):
        _form(beside.flush, "arrays")
        late, snapshot = await beside.case(number, race)
        beside.flush.dies_at = place
        with contextlib.suppress(Died):
            await beside.flush.store.write(batch_of(late))
        beside.flush.dies_at = None
        await beside.settle(snapshot)
        await beside.flush.store.write(batch_of(late))
    assert await beside.told() == "no difference"


@pytest.mark.parametrize("place", SETTLE)
async def test_an_older_settle_meets_a_newer_one(place: Step, beside: Beside, postgres_url: str) -> None:
    s = Scene(0)
    base = [s.post(s.a), s.post(s.a, "p2"), s.like(s.a, s.uri(s.b))]
    s.post(s.a, "p3")
    older = snapshot_of(s.events, s.a, s.events[-1]["seq"])
    s.delete(s.a, "app.bsky.feed.post/p3")
    s.delete(s.a, "app.bsky.feed.post/p2")
    newer = snapshot_of(s.events, s.a, s.events[-1]["seq"])
    assert older is not None
    assert newer is not None
    await beside.flush.store.write(batch_of(base))
    beside.settler.hold(place)
    first = asyncio.create_task(beside.settle(older))
    async with asyncio.timeout(60):
        while not (first.done() or beside.settler.reached.is_set()):
            await asyncio.sleep(0.001)
    async with open_stored(postgres_url) as stored:
        second = asyncio.create_task(settle_one(stored, beside.flush.store, newer))
        for _ in range(PATIENCE):
            if second.done():
                break
            await asyncio.sleep(0.005)
        beside.settler.go.set()
        async with asyncio.timeout(60):
            await asyncio.gather(first, second)
    beside.events += base
    beside.snapshots += [older, newer]
    assert await beside.told() == "no difference"
