"""Counters that a flush owes because another one is paying: nobody waits, nothing is lost, nothing is paid twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from fastworker.commands.verify import VerifyOptions, verify
from fastworker.crashpoint import Step
from fastworker.errors import ExitCode
from fastworker.process.board import Heartbeats
from fastworker.store import statements as sql
from fastworker.store.blame import RowLocked
from fastworker.store.flush import USERS_AT_ONCE
from fastworker.store.joined import recompute
from fastworker.store.rules import DEFAULTS
from fastworker.store.store import Store
from fastworker.worker import worker
from tests.integration.test_whole_flush import POST, A, B, C, commits, gone, like, post
from tests.property.feeding import batch_of, differences, lawful, settle

FORMS = {"copy": (1, 0), "arrays": (200, 0), "whole": (200, 200)}
REPLY = f"at://{A}/app.bsky.feed.post/r"
LIKE = f"at://{A}/app.bsky.feed.like/l"


@pytest.fixture(params=FORMS)
async def store(postgres_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    store = await Store.connect(postgres_url, pool_size=2)
    store.writer.copying.rows_min, store.writer.whole_rows_max = FORMS[request.param]
    yield store
    await store.close()


@contextlib.asynccontextmanager
async def paying(url: str) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Somebody pays the counters of every bucket, and does not come to an end."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({sql.COUNTERS}, b) FROM generate_series(0, 7) AS b")
            yield connection
    finally:
        await connection.close()


async def owed(pg: asyncpg.Connection[Any]) -> int:
    count: int = await pg.fetchval("SELECT coalesce(sum(d.like_count), 0) FROM fastworker.debts, unnest(deltas) AS d")
    return count


async def likes(pg: asyncpg.Connection[Any], uri: str = POST) -> int | None:
    count: int | None = await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", uri)
    return count


async def drift(url: str, capsys: pytest.CaptureFixture[str]) -> ExitCode:
    code = await verify(url, DEFAULTS, VerifyOptions(only=("post_aggregations",)))
    capsys.readouterr()
    return code


async def test_a_quiet_stream_owes_nothing(store: Store, pg: asyncpg.Connection[Any]) -> None:
    """The counter is there with the commit, before anything is paid."""
    seen = []

    async def look(step: Step) -> None:
        if step is Step.AFTER_MAIN_COMMIT:
            seen.append((await likes(pg), await owed(pg)))

    await store.write(batch_of(commits(post(B))))
    store.writer.on_step = look
    await store.write(batch_of(commits(like(A))))
    assert seen == [(1, 0)]


async def test_a_flush_does_not_wait_for_who_is_paying(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    events = commits(post(B), like(A), like(C), gone(A, "app.bsky.feed.like/l"))
    await store.write(batch_of(events[:1]))
    async with paying(postgres_url), asyncio.timeout(20):
        await store.write(batch_of(events[1:3]))
        assert (await likes(pg), await owed(pg)) == (0, 2)
        await store.write(batch_of(events[3:]))
        assert (await likes(pg), await owed(pg)) == (0, 1)
        assert await store.pay() == 0, "it is left to who is paying"
    assert await store.pay() > 0
    assert (await likes(pg), await owed(pg)) == (1, 0)
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


async def test_a_counter_that_a_stranger_has_locked(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    """An older debt for it stays, debts for others are paid without a wait, and what touches it is not written."""
    other = f"at://{B}/app.bsky.feed.post/other"
    events = commits(post(B), like(A), like(C), gone(A, "app.bsky.feed.like/l"))
    await store.write(batch_of(events[:1]))
    async with paying(postgres_url):
        await store.write(batch_of(events[1:2]))
    await pg.execute(
        "INSERT INTO fastworker.debts (bucket, deltas) "
        "SELECT fastworker.bucket($1), ARRAY[($1, 3, 0, 0, 0, 0), ($2, 4, 0, 0, 0, 0)]::fastworker.post_aggregations_row[]",
        POST, other,
    )  # fmt: skip
    async with pg.transaction():
        await pg.execute("UPDATE post_aggregations SET like_count = like_count WHERE post_uri = $1", POST)
        async with asyncio.timeout(4):
            await store.pay()
        assert (await owed(pg), await likes(pg, other)) == (4, 4)
        async with paying(postgres_url):
            with pytest.raises(RowLocked) as caught:
                await store.write(batch_of(events[2:3]))
        assert caught.value.row.key == POST
        assert await pg.fetchval("SELECT count(*) FROM likes") == 1
    await store.write(batch_of(events[2:3]))
    assert (await likes(pg), await owed(pg)) == (5, 0)


async def test_what_is_owed_is_paid_after_the_commit(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    """Whoever was paying has ended by then: it is there when the flush ends."""
    await store.write(batch_of(commits(post(B))))
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(paying(postgres_url))

        async def let_go(step: Step) -> None:
            if step is Step.AFTER_MAIN_COMMIT and not store.writer.whole_rows_max:
                assert await owed(pg) == 1
                await stack.aclose()

        store.writer.on_step = let_go
        await store.write(batch_of(commits(like(A))))
        if store.writer.whole_rows_max:  # nobody can be held inside of a call
            await stack.aclose()
            await store.pay()
        assert (await likes(pg), await owed(pg)) == (1, 0)


async def test_who_comes_next_does_not_overtake_a_debt(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    """A like is owed, its removal would find no count to take it from: it is owed as well, and the sum is right."""
    events = commits(post(B), like(A), gone(A, "app.bsky.feed.like/l"))
    await store.write(batch_of(events[:1]))
    async with paying(postgres_url):
        await store.write(batch_of(events[1:2]))
    assert await owed(pg) == 1
    balance = []

    async def look(step: Step) -> None:
        if step is Step.AFTER_MAIN_COMMIT:
            balance.append((await likes(pg), await owed(pg)))

    store.writer.on_step = look
    await store.write(batch_of(events[2:]))
    assert balance[0] == (0, 0)
    store.writer.on_step = None
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


async def test_a_debt_is_no_drift_and_is_paid_once(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    events = commits(post(B), like(A), like(C, f"at://{A}/app.bsky.feed.post/none"))
    async with paying(postgres_url):
        await store.write(batch_of(events))
        assert await likes(pg) is None, "not even its row is there"
        assert await drift(postgres_url, capsys) is ExitCode.DONE
    await asyncio.gather(*(store.pay() for _ in range(2)))
    assert await likes(pg) == 1
    assert await store.pay() == 0
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"
    await pg.execute("UPDATE post_aggregations SET like_count = 7")
    assert await drift(postgres_url, capsys) is ExitCode.NO, "what is not owed is drift"


@pytest.mark.parametrize("is_paid_first", [True, False])
async def test_a_recount_and_debts(
    store: Store,
    pg: asyncpg.Connection[Any],
    postgres_url: str,
    capsys: pytest.CaptureFixture[str],
    is_paid_first: bool,
) -> None:
    """A like that nobody of ours versioned is recounted while others' likes are owed: as a debt, or beside them."""
    events = commits(post(B), like(A), like(C))
    await store.write(batch_of(events[:1]))
    await pg.execute(
        "INSERT INTO likes (uri, user_did, post_uri, created_at) VALUES ($1, $2, $3, now())", LIKE, A, POST
    )
    await pg.execute("UPDATE post_aggregations SET like_count = 5 WHERE post_uri = $1", POST)
    async with paying(postgres_url):
        await store.write(batch_of(events[1:2]))
        assert await likes(pg) == 5
        assert await drift(postgres_url, capsys) is ExitCode.DONE, "it is counted anew when it is paid"
        if is_paid_first:
            await store.write(batch_of(events[2:]))
        else:
            await pg.execute("DELETE FROM fastworker.debts")
            await store.write(batch_of(events[2:]))
            await pg.execute(sql.RECOUNT, [POST], True, True)
            assert await likes(pg) == 1, "the other one is owed, and added when it is paid"
    await settle(store)
    assert await likes(pg) == 2
    assert await differences(lawful(events), pg) == "no difference"


async def test_an_aggregate_is_removed_after_it_is_paid(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    subject = f"at://{B}/app.bsky.feed.post/none"
    events = commits(like(A, subject), gone(A, "app.bsky.feed.like/l"))
    await store.write(batch_of(events[:1]))
    assert await likes(pg, subject) == 1
    async with paying(postgres_url), asyncio.timeout(20):
        await store.write(batch_of(events[1:]))
        assert await pg.fetch("SELECT kind, key FROM fastworker.recheck") == [("aggregate", subject)], (
            "later, not never"
        )
    async with store.connection() as db:
        keys = {("aggregate", subject): datetime.now(UTC)}
        await recompute(store.writer, db, keys, set(), wait=False)
    assert await likes(pg, subject) is None
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


async def test_the_count_of_a_service_follows_what_is_paid(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    generator = f"at://{C}/app.bsky.feed.generator/g"
    record = (C, "app.bsky.feed.generator/g", {"did": "did:web:feeds.example", "displayName": "Feed"})
    events = commits(record, like(A, generator), like(B, generator))
    await store.write(batch_of(events[:2]))
    async with paying(postgres_url), asyncio.timeout(20):
        await store.write(batch_of(events[2:]))
        assert await pg.fetchval("SELECT like_count FROM feed_generators") == 1
    await settle(store)
    assert await pg.fetchval("SELECT like_count FROM feed_generators") == 2
    assert await differences(lawful(events), pg) == "no difference"


async def test_users_are_made_without_waiting_and_are_durable(postgres_url: str, pg: asyncpg.Connection[Any]) -> None:
    """Their commit waits for no disk. A flush that writes nothing afterwards ends with one that does."""
    store = await Store.connect(postgres_url)
    store.writer.whole_rows_max = 0
    told: list[str] = []
    try:
        events = commits(post(B), *(like(f"did:plc:{'d' * 21}{n:03}") for n in range(60)))
        async with store.connection() as db:
            db.add_query_logger(lambda record: told.append(record.query))
        await store.write(batch_of(events))
        assert sql.USERS_FIRST in told
        assert sql.DURABLE not in told, "the rows are"
        await pg.execute("DELETE FROM users WHERE did LIKE 'did:plc:ddd%'")
        store.writer.forget()
        told.clear()
        await store.write(batch_of(events))
        assert await pg.fetchval("SELECT count(*) FROM users WHERE did LIKE 'did:plc:ddd%'") == 60
        assert told.index(sql.USERS_FIRST) < told.index(sql.DURABLE)
    finally:
        await store.close()


async def test_new_users_are_made_piece_by_piece(postgres_url: str, pg: asyncpg.Connection[Any]) -> None:
    """Who makes the same users waits for one piece of them: those before it are there."""
    dids = [f"did:plc:{'d' * 21}{n:03}" for n in range(2 * USERS_AT_ONCE + 1)]
    store, other = await Store.connect(postgres_url), await asyncpg.connect(postgres_url)
    writing = None
    try:
        held = other.transaction()
        await held.start()
        await other.execute(sql.USERS, dids[-1:])
        writing = asyncio.create_task(store.write(batch_of(commits(*map(like, dids)))))
        there = 0
        while there < 2 * USERS_AT_ONCE and not writing.done():
            await asyncio.sleep(0.01)
            there = await pg.fetchval("SELECT count(*) FROM users")
        assert there == 2 * USERS_AT_ONCE
        assert not writing.done()
        await held.rollback()
        await writing
        assert await pg.fetchval("SELECT count(*) FROM users") == len(dids)
    finally:
        await other.close()
        if writing is not None:
            await asyncio.wait([writing])
        await store.close()


async def test_nobody_waits_for_the_users_of_another_flush(postgres_url: str, pg: asyncpg.Connection[Any]) -> None:
    stores = [await Store.connect(postgres_url) for _ in range(2)]
    go, reached = asyncio.Event(), asyncio.Event()

    async def hold(step: Step) -> None:
        if step is Step.ROWS_WRITTEN:
            reached.set()
            await go.wait()

    dids = [f"did:plc:{'d' * 21}{n:03}" for n in range(60)]
    try:
        for store in stores:
            store.writer.whole_rows_max = 0
        stores[0].writer.on_step = hold
        writing = asyncio.create_task(stores[0].write(batch_of(commits(*(like(did) for did in dids)))))
        await reached.wait()
        async with asyncio.timeout(20):
            await stores[1].write(
                batch_of(commits(*(like(did, f"at://{C}/app.bsky.feed.post/o", "m") for did in dids)))
            )
        go.set()
        await writing
        assert await pg.fetchval("SELECT count(*) FROM users") == 60
    finally:
        go.set()
        for store in stores:
            await store.close()


async def test_removals_of_one_key_do_not_wait_for_each_other(postgres_url: str, pg: asyncpg.Connection[Any]) -> None:
    """Two flushes take away likes of one post: what they owe is the same, and noted apart. A killed one's is not lost."""
    stores = [await Store.connect(postgres_url) for _ in range(2)]
    go, reached = asyncio.Event(), asyncio.Event()
    events = commits(like(A), like(C), gone(A, "app.bsky.feed.like/l"), gone(C, "app.bsky.feed.like/l"))

    async def hold(step: Step) -> None:
        if step is Step.BEFORE_MAIN_COMMIT:
            reached.set()
            await go.wait()
        elif step is Step.AFTER_MAIN_COMMIT:
            raise RuntimeError("killed")

    try:
        await stores[0].write(batch_of(events[:2]))
        stores[0].writer.on_step = hold
        stores[0].writer.whole_rows_max = 0  # nobody can be held inside of a call
        writing = asyncio.create_task(stores[0].write(batch_of(events[2:3])))
        await reached.wait()
        async with asyncio.timeout(20):
            await stores[1].write(batch_of(events[3:]))
        go.set()
        with pytest.raises(RuntimeError, match="killed"):
            await writing
        assert await pg.fetchval("SELECT count(*) FROM fastworker.notes") == 1
        await settle(stores[1])
        assert await pg.fetchval("SELECT count(*) FROM fastworker.notes") == 0
        assert await differences(lawful(events), pg) == "no difference"
    finally:
        go.set()
        for store in stores:
            await store.close()


@contextlib.asynccontextmanager
async def refusing(pg: asyncpg.Connection[Any], table: str, key: str, code: str = "P0001") -> AsyncIterator[None]:
    """Rows with this key cannot be written. 57014: as if it took too long."""
    await pg.execute(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"RAISE EXCEPTION 'not this one' USING ERRCODE = '{code}'; END $$; "
        f"CREATE TRIGGER no BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW "
        f"WHEN (NEW.post_uri = '{key}') EXECUTE FUNCTION no()"
    )
    yield
    await pg.execute(
        "DROP FUNCTION no CASCADE; UPDATE fastworker.debts SET not_before = now(); "
        "UPDATE fastworker.recheck SET not_before = now()"
    )


async def test_a_counter_that_is_refused_is_put_back_alone(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reason is told, other counters are paid and written at once, and what it gets meanwhile is added to it."""
    others = [f"at://{B}/app.bsky.feed.post/o{n}" for n in range(5)]
    events = commits(
        post(B),
        *(like(A, uri, f"o{n}") for n, uri in enumerate(others)),
        *(like(A), like(C), like(C, others[0], "x"), gone(A, "app.bsky.feed.like/l"), like(B, others[1], "y")),
    )
    await store.write(batch_of(events[:1]))
    async with refusing(pg, "post_aggregations", POST):
        async with paying(postgres_url):
            await store.write(batch_of(events[1:7]))
        assert (await store.pay() > 0, await store.pay()) == (True, 0)
        assert [await likes(pg, uri) for uri in (POST, *others)] == [0, 1, 1, 1, 1, 1]
        debts = await store.debts()
        assert debts[:3] == (1, 0.0, 1)
        assert (POST in debts.error, "not this one" in debts.error) == (True, True)

        async with paying(postgres_url):
            await store.write(batch_of(events[7:9]))
        assert await store.pay() > 0
        assert (await likes(pg, others[0]), await owed(pg)) == (2, 2)
        await store.write(batch_of(events[9:10]))
        await store.pay()
        [left] = await pg.fetch("SELECT (deltas[1]).like_count, attempts FROM fastworker.debts")
        assert tuple(left) == (1, 1), "it has its own time to be tried again"
        assert await drift(postgres_url, capsys) is ExitCode.DONE

        seen = []

        async def look(step: Step) -> None:
            if step is Step.AFTER_MAIN_COMMIT:
                seen.append(await likes(pg, others[1]))

        store.writer.on_step = look
        await store.write(batch_of(events[10:]))
        assert seen == [2], "with the commit, as if nothing were owed"
        await pg.execute("UPDATE fastworker.debts SET not_before = now()")
        await store.pay()
        assert await pg.fetchval("SELECT attempts FROM fastworker.debts WHERE not_before > now()") == 2
    await store.pay()
    assert await likes(pg) == 1
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


async def test_a_counter_that_is_not_ready_in_time_is_put_back_alone(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    """With those that were tried beside it: after a timeout nothing else is tried. Then each is tried alone."""
    bucket = await pg.fetchval("SELECT fastworker.bucket($1)", POST)
    others = [uri for n in range(2_000) if await pg.fetchval(
        "SELECT fastworker.bucket($1) = $2", uri := f"at://{B}/app.bsky.feed.post/o{n}", bucket)][:3]  # fmt: skip
    events = commits(post(B), like(A), *(like(A, uri, f"o{n}") for n, uri in enumerate(others)))
    await store.write(batch_of(events[:1]))
    async with refusing(pg, "post_aggregations", POST, "57014"):
        async with paying(postgres_url):
            await store.write(batch_of(events[1:]))
        await store.pay()
        assert (await store.debts())[:3] == (len(events) - 1, 0.0, len(events) - 1)
        await pg.execute("UPDATE fastworker.debts SET not_before = now()")
        await store.pay()
        assert [await likes(pg, uri) for uri in (POST, *others)] == [0, 1, 1, 1]
        debts = await store.debts()
        assert (debts[:3], POST in debts.error, "57014" in debts.error) == ((1, 0.0, 1), True, True)
    await store.pay()
    assert await differences(lawful(events), pg) == "no difference"


@pytest.mark.parametrize("code", ["P0001", "57014"])
async def test_a_joined_row_that_is_refused_is_put_back_alone(
    store: Store, pg: asyncpg.Connection[Any], code: str
) -> None:
    """Not even its flush fails: what follows from it is owed."""
    events = commits(post(B), *(post(A, f"r{n}", POST) for n in range(4)))
    bad = f"at://{A}/app.bsky.feed.post/r2"
    await store.write(batch_of(events[:1]))
    async with refusing(pg, "thread_contexts", bad, code):
        await store.write(batch_of(events[1:]))
        await store.pay()
        found = await pg.fetch("SELECT post_uri FROM thread_contexts ORDER BY 1")
        assert [row["post_uri"][-2:] for row in found] == ["r0", "r1", "r3"]
        debts = await store.debts()
        assert debts[:3] == (1, 0.0, 1)
        assert (bad in debts.error, "not this one" in debts.error) == (True, True)
    await store.pay()
    await settle(store)
    assert (await store.debts()).owed == 0
    assert await differences(lawful(events), pg) == "no difference"


async def test_what_another_leaves_is_paid_by_a_tick_and_told(
    store: Store, pg: asyncpg.Connection[Any], postgres_url: str
) -> None:
    """A counter and a joined row, both owed while others hold them. No flush comes after them."""
    slot = Heartbeats(1)[0]
    slot.open("worker-0")
    await store.write(batch_of(commits(post(B), post(A, "r", POST))))
    await pg.execute("DELETE FROM thread_contexts")
    async with paying(postgres_url):
        await store.write(batch_of(commits(like(A))))
    ticking = asyncio.create_task(worker._pay(slot, store))
    try:
        async with asyncio.timeout(20):
            async with paying(postgres_url) as other:
                await other.execute("SELECT FROM posts FOR UPDATE")
                await store.write(batch_of(commits(like(C))))
                await pg.execute("INSERT INTO fastworker.recheck (kind, key) VALUES ('context', $1)", REPLY)
                slot.add(flushes=1)
                while slot.get("debts") < 2:
                    await asyncio.sleep(0.01)
            while slot.get("debts"):
                await asyncio.sleep(0.01)
    finally:
        ticking.cancel()
    assert await likes(pg) == 2
    assert await pg.fetchval("SELECT count(*) FROM thread_contexts") == 1
