"""Two relays number the same network differently: what came by one of them is never compared by seq with the other."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from fastworker.store.store import Store
from tests.property.feeding import batch_of, clear, differences, lawful, settle
from tests.rig.histories import DIDS, Event, cid_of, fail_over, number

A, B, C = DIDS[:3]
POST, LIST, PROFILE = "app.bsky.feed.post", "app.bsky.graph.list", "app.bsky.actor.profile"


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[Store]:
    store = await Store.connect(postgres_url)
    yield store
    await store.close()


def put(path: str, **record: Any) -> Event:
    full = {"$type": path.partition("/")[0], "createdAt": "2026-01-01T00:00:00Z", **record}
    op = {"action": "create", "path": path, "cid": cid_of(full), "record": full}
    return {"kind": "commit", "repo": A, "bare": False, "ops": [op]}


def records(name: str) -> list[Event]:
    """One of a hot table, one of a cold table, and two that are written again and again."""
    return [
        put(f"{POST}/{name}", text=name),
        put(f"{POST}/same", text=name),
        put(f"{LIST}/{name}", name=name, purpose="app.bsky.graph.defs#modlist"),
        put(f"{PROFILE}/self", displayName=name),
    ]


def account(status: str | None) -> Event:
    return {"kind": "account", "did": A, "active": status is None, "status": status}


async def in_orders(store: Store, pg: asyncpg.Connection, events: list[Event], at: int) -> None:
    """As it happened, backwards, and in two halves changed over; each event alone and all of them at once."""
    half = len(events) // 2
    orders = [events, events[::-1], events[half:] + events[:half], events[at:] + events[:at]]
    for order, size in itertools.product(orders, (1, len(events))):
        await clear(pg)
        store.writer.known.clear()
        store.writer.relays.clear()
        for start in range(0, len(order), size):
            await store.write(batch_of(order[start : start + size]))
        await settle(store)
        told = await differences(lawful(events), pg)
        assert told == "no difference", f"{[e['seq'] for e in order]} by {size}: {told}"


async def test_an_account_deleted_after_the_failover(store: Store, pg: asyncpg.Connection) -> None:
    steps = [*records("one"), account("deleted")]
    await in_orders(store, pg, fail_over(number(steps, bare=False), 4), 4)
    for table in ("posts", "lists", "fastworker.profiles", "feed_items"):
        assert await pg.fetchval(f"SELECT count(*) FROM {table}") == 0, table
    assert await pg.fetchval("SELECT status FROM fastworker.accounts") == "deleted"


async def test_an_account_that_came_back_after_the_failover(store: Store, pg: asyncpg.Connection) -> None:
    steps = [*records("one"), account("deleted"), account(None), *records("two")]
    await in_orders(store, pg, fail_over(number(steps, bare=False), 5), 5)
    assert {row[0] for row in await pg.fetch("SELECT text FROM posts")} == {"two"}
    assert await pg.fetchval("SELECT count(*) FROM posts") == 2
    assert await pg.fetchval("SELECT name FROM lists") == "two"
    assert await pg.fetchval("SELECT display_name FROM users") == "two"
    assert await pg.fetchval("SELECT active FROM fastworker.accounts")


async def test_both_relays_tell_of_it(store: Store, pg: asyncpg.Connection) -> None:
    """The other relay tells the last four events again; then the account goes and comes once more."""
    steps = [account("takendown"), *records("one"), account("deleted"), account(None), *records("two")]
    steps += [account("deactivated"), account(None)]
    await in_orders(store, pg, fail_over(number(steps, bare=False), 7, again=4), 7)
    assert {row[0] for row in await pg.fetch("SELECT text FROM posts")} == {"two"}
    assert await pg.fetchval("SELECT active FROM fastworker.accounts")


def identity(did: str, handle: str) -> Event:
    return {"kind": "identity", "did": did, "handle": handle}


async def test_identities_told_by_two_relays(store: Store, pg: asyncpg.Connection) -> None:
    """The newest one is the latest, although its number is the lowest; who gives a handle up leaves it to the next."""
    steps = [identity(A, "one.test"), identity(B, "one.test"), identity(A, "two.test"), identity(C, "two.test")]
    steps += [identity(C, "one.test"), identity(A, "three.test")]
    await in_orders(store, pg, fail_over(number(steps, bare=False), 2, again=1), 2)
    shown = {row[0]: row[1] for row in await pg.fetch("SELECT did, handle FROM users")}
    assert shown == {A: "three.test", B: "one.test", C: "handle.invalid"}


async def test_a_handle_is_shown_once_in_any_order(store: Store, pg: asyncpg.Connection) -> None:
    """Of unverified claims the first one shows it, also when its host repeats it later."""
    steps = [identity(A, "alice.test"), identity(B, "bob.test"), identity(B, "alice.test"), identity(A, "alice.test")]
    events = number(steps, bare=False)
    for order in itertools.permutations(events):
        await clear(pg)
        store.writer.known.clear()
        for event in order:
            await store.write(batch_of([event]))
        shown = {row[0]: row[1] for row in await pg.fetch("SELECT did, handle FROM users")}
        assert shown == {A: "alice.test", B: "handle.invalid"}, [event["seq"] for event in order]
    assert await differences(lawful(events), pg) == "no difference"


async def test_of_claims_by_two_relays_the_earliest_shows_the_handle(store: Store, pg: asyncpg.Connection) -> None:
    """Their numbers cannot be compared, so the moment decides, whatever the relays are called."""
    events = number([identity(A, "one.test"), identity(B, "one.test")], bare=False)
    for event, relay in zip(events, ("z.test", "a.test"), strict=True):
        event["relay"] = relay
    for order in itertools.permutations(events):
        await clear(pg)
        store.writer.known.clear()
        for event in order:
            await store.write(batch_of([event]))
        shown = {row[0]: row[1] for row in await pg.fetch("SELECT did, handle FROM users")}
        assert shown == {A: "one.test", B: "handle.invalid"}, [event["relay"] for event in order]
    assert await differences(lawful(events), pg) == "no difference"


async def test_a_claim_locks_only_those_whose_handle_changes(
    store: Store, pg: asyncpg.Connection, postgres_url: str
) -> None:
    """Anybody's accounts may claim a handle: the next claim must not lock, or wait for, all who claimed it before."""
    events = number([identity(A, "one.test"), identity(B, "one.test"), identity(C, "one.test")], bare=False)
    await store.write(batch_of(events[:2]))
    another = await asyncpg.connect(postgres_url)
    try:
        async with another.transaction():
            await another.execute("SELECT FROM users WHERE did = ANY($1) FOR UPDATE", [A, B])
            await store.write(batch_of(events[2:]))
    finally:
        await another.close()
    shown = {row[0]: row[1] for row in await pg.fetch("SELECT did, handle FROM users")}
    assert shown == {A: "one.test", B: "handle.invalid", C: "handle.invalid"}


async def test_a_deletion_of_the_only_relay_goes_by_its_seq(store: Store, pg: asyncpg.Connection) -> None:
    """A repository's own clock does not matter there, nor does it afterwards to what was purged before."""
    events = [event | {"relay": "a.test"} for event in number([*records("one"), account("deleted")], bare=False)]
    for event in events[:4]:
        event["rev"] = "7" + event["rev"][1:]
    for event in events:
        await store.write(batch_of([event]))
    await settle(store)
    assert await pg.fetchval("SELECT count(*) FROM posts") == 0
    assert await differences(lawful(events), pg) == "no difference"


async def test_what_a_deletion_had_beaten_is_told(store: Store) -> None:
    events = fail_over(number([account("deleted"), account(None), *records("two")], bare=False), 1)
    for event in events:
        written = await store.write(batch_of([event]))
        assert not written.beaten
    late = fail_over(number(records("one"), bare=False), 4)
    for event in late:
        event["rev"] = "2" + event["rev"][1:]
        uri = f"at://{A}/{event['ops'][0]['path']}"
        assert (await store.write(batch_of([event]))).beaten == {uri}


async def test_what_came_without_a_rev_is_older_than_the_other_relays(store: Store, pg: asyncpg.Connection) -> None:
    """Fed by a reader that knows no rev, then by ours, then by another relay: its deletes and updates count."""
    subject = {"uri": f"at://{B}/{POST}/p", "cid": cid_of(B)}
    likes = [put(f"app.bsky.feed.like/{name}", subject=subject) for name in ("one", "two")]
    bare = [{**event, "bare": True} for event in (*records("one"), *likes)]
    gone = [f"{POST}/one", f"{LIST}/one", "app.bsky.feed.like/one", "app.bsky.feed.like/two"]
    deletes = [{**bare[0], "ops": [{"action": "delete", "path": path, "cid": None}], "bare": False} for path in gone]
    old, again = bare[0], put(f"{POST}/old", text="again")
    old = {**old, "ops": [{"action": "delete", "path": f"{POST}/old", "cid": None}]}  # a tombstone without a rev
    events = number([*bare, old, *deletes, put(f"{POST}/same", text="two"), again], bare=True)
    moved = fail_over(events, len(bare) + 1)
    for event, before in zip(moved[: len(bare) + 1], events, strict=False):
        event["rev"] = before["rev"]
        del event["relay"]
    moved.insert(len(bare) + 1, {**moved[-1], "seq": 40_000, "relay": "a.test", "ops": []})  # our reader's first
    for event in moved:
        await store.write(batch_of([event]))
        await settle(store)
    assert [row[0] for row in await pg.fetch("SELECT text FROM posts ORDER BY uri")] == ["again", "two"]
    assert await pg.fetchval("SELECT count(*) FROM lists") == await pg.fetchval("SELECT count(*) FROM likes") == 0
    assert await differences(lawful(moved), pg) == "no difference"
