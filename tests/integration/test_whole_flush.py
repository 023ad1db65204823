"""A flush of few new rows as one call (store/sql/put_whole.sql): when it is taken, when not, and what it leaves to the caller."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from fastworker.store import routines, whole
from fastworker.store import statements as sql
from fastworker.store.flush import FEW_USERS
from fastworker.store.migrate import check, migrate
from fastworker.store.store import Store
from fastworker.table.schema import TABLES
from tests.property.feeding import batch_of, differences, lawful, settle
from tests.rig.histories import Event, cid_of, number

A, B, C = (f"did:plc:{name * 24}" for name in "abc")
POST = f"at://{B}/app.bsky.feed.post/p"


class Told(Store):
    """Remembers how each flush went."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.whole: list[bool] = []


@pytest.fixture
async def store(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Told]:
    store = await Told.connect(postgres_url, application_name="whole", pool_size=2)
    write_whole = whole.write_whole

    async def telling(writer: Any, *args: Any) -> Any:
        written = await write_whole(writer, *args)
        if writer is store.writer:
            store.whole.append(written is not None)
        return written

    monkeypatch.setattr(whole, "write_whole", telling)
    yield store
    await store.close()


def commits(*ops: tuple[str, str, dict[str, Any] | None]) -> list[Event]:
    """(repo, path, record; None deletes), in their order."""
    events: list[Event] = []
    for repo, path, record in ops:
        full = record and {"$type": path.split("/", maxsplit=1)[0], "createdAt": "2026-01-01T00:00:00Z", **record}
        action = "delete" if full is None else "create"
        op = {"action": action, "path": path, "cid": cid_of(full) if full else None, "record": full}
        events.append({"kind": "commit", "repo": repo, "bare": False, "ops": [op]})
    return number(events, bare=False)


def like(repo: str, uri: str = POST, rkey: str = "l") -> tuple[str, str, dict[str, Any]]:
    return repo, f"app.bsky.feed.like/{rkey}", {"subject": {"uri": uri, "cid": cid_of(uri)}}


def post(repo: str, rkey: str = "p", root: str | None = None) -> tuple[str, str, dict[str, Any]]:
    ref = root and {"uri": root, "cid": cid_of(root)}
    return repo, f"app.bsky.feed.post/{rkey}", {"text": "x", **({"reply": {"root": ref, "parent": ref}} if ref else {})}


def gone(repo: str, path: str) -> tuple[str, str, None]:
    return repo, path, None


async def test_new_rows_and_all_that_follows_are_one_call(store: Told, pg: asyncpg.Connection) -> None:
    """Every derived table that new rows have; then what joins two records and came in another order."""
    reply = f"at://{A}/app.bsky.feed.post/r"
    quote = {"text": "x", "embed": {"$type": "app.bsky.embed.record", "record": {"uri": POST, "cid": cid_of(POST)}}}
    generator = f"at://{C}/app.bsky.feed.generator/g"
    first = [
        post(A, "r", POST),  # its root comes later
        like(B, reply),  # by the root's author
        like(A, generator),
        (C, "app.bsky.feed.post/q", quote),
        (A, "app.bsky.feed.repost/s", {"subject": {"uri": POST, "cid": cid_of(POST)}}),
        (A, "app.bsky.graph.follow/f", {"subject": B}),
        (A, "app.bsky.graph.block/b", {"subject": C}),
    ]
    events = commits(*first, post(B))
    for piece in (events[: len(first)], events[len(first) :]):
        written = await store.write(batch_of(piece))
        assert written[:3] == (len(piece), 0, 0)
    assert store.whole == [True, True]
    assert await pg.fetchval("SELECT root_author_like_uri FROM thread_contexts WHERE post_uri = $1", reply) is not None
    assert await differences(lawful(events), pg) == "no difference"


async def test_what_overtook_it_is_looked_back_at(store: Told, pg: asyncpg.Connection, postgres_url: str) -> None:
    """The delete comes and goes while the call waits to commit; the delete cannot see the row."""
    events = commits(post(B), post(A, "a"), like(A), gone(A, "app.bsky.feed.like/l"))
    await store.write(batch_of(events[:2]))  # users, too: who makes the same ones would wait for the call
    other = await Store.connect(postgres_url, application_name="other")
    watcher = await asyncpg.connect(postgres_url)
    try:
        async with watcher.transaction():
            await watcher.execute("SELECT FROM post_aggregations WHERE post_uri = $1 FOR UPDATE", POST)
            writing = asyncio.create_task(store.write(batch_of(events[2:3])))
            async with asyncio.timeout(30):
                while not await pg.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'whole' AND wait_event_type = 'Lock'"
                ):
                    await asyncio.sleep(0.01)
            await other.write(batch_of(events[3:]))
            assert await pg.fetchval("SELECT count(*) FROM likes") == 0, "not committed, and the delete did not wait"
        assert (await writing)[:3] == (2, 1, 0), "written, and removed again"
    finally:
        await watcher.close()
        await other.close()
    assert store.whole == [True, True]
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


@pytest.mark.parametrize("whole_rows_max", [0, 200], ids=["step by step", "whole"])
async def test_a_post_that_is_locked_is_not_waited_for_but_owed(
    store: Told, pg: asyncpg.Connection, postgres_url: str, whole_rows_max: int
) -> None:
    reply = f"at://{A}/app.bsky.feed.post/r"
    gate = (B, "app.bsky.feed.threadgate/p", {"post": POST, "allow": []})
    events = commits(post(B), post(A, "r", POST), like(B, reply), gate)
    await store.write(batch_of(events[:2]))
    store.writer.whole_rows_max = whole_rows_max
    watcher = await asyncpg.connect(postgres_url)
    try:
        async with watcher.transaction():
            await watcher.execute("SELECT FROM posts WHERE uri = ANY($1) FOR UPDATE", [POST, reply])
            async with asyncio.timeout(20):
                await store.write(batch_of(events[2:3]))
                await store.write(batch_of(events[3:]))
            owed = await pg.fetch("SELECT kind, key FROM fastworker.recheck ORDER BY kind")
            assert [tuple(row) for row in owed] == [("context", reply), ("gate", POST)]
    finally:
        await watcher.close()
    assert await differences(lawful(events), pg) != "no difference"
    await settle(store)
    assert await pg.fetchval("SELECT count(*) FROM fastworker.recheck") == 0
    assert await differences(lawful(events), pg) == "no difference"


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([like(A)], id="delivered before"),
        pytest.param([like(A, rkey="k")], id="its pair is taken"),
        pytest.param([gone(A, "app.bsky.feed.like/l")], id="deleted before"),
    ],
)
async def test_nothing_is_written_unless_every_row_is_new(
    store: Told, pg: asyncpg.Connection, before: list[Any]
) -> None:
    events = commits(post(B), *before, like(A), like(C))
    count = 1 + len(before)
    if before[0] == like(A):
        events = [*events[:count], events[1], events[-1]]  # the same event once more
    await store.write(batch_of(events[:1]))
    await store.write(batch_of(events[1:count]))
    store.whole.clear()
    await store.write(batch_of(events[count:]))
    assert store.whole == [False]
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


async def test_who_must_not_be_stored_is_not(store: Told, pg: asyncpg.Connection) -> None:
    await pg.execute("INSERT INTO users (did, handle) VALUES ($1, 'a.test')", A)
    await pg.execute("INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ($1, true)", A)
    assert (await store.write(batch_of(commits(like(A), like(C)))))[:3] == (1, 0, 1)
    assert store.whole == [False]
    assert [r[0] for r in await pg.fetch("SELECT user_did FROM likes")] == [C]


async def test_only_few_and_only_new_rows_take_it(store: Told) -> None:
    did = "did:plc:" + "d" * 21
    many = [like(f"{did}{n:03}") for n in range(FEW_USERS + 1)]
    await store.write(batch_of(commits(*many)))
    assert store.whole == [False], "so many new users are committed first"
    store.whole.clear()
    await store.write(batch_of(commits(*[like(A, f"{POST}{n}", str(n)) for n in range(store.writer.copying.rows_min)])))
    await store.write(batch_of(commits(post(B), gone(A, "app.bsky.feed.like/0"))))
    await store.write(batch_of(commits((B, "app.bsky.actor.profile/self", {"displayName": "B"}))))
    assert store.whole == [False] * 3, "COPY, deletes and cold tables go step by step"


def test_routines_are_made_from_the_schema() -> None:
    """No list of columns in the files; nothing is left to fill in; each call names its arguments."""
    for routine in routines.packaged():
        assert "{{" not in routine.sql
        assert routine.name.rpartition("_")[2].isdigit(), "its name carries a version"
    put = next(one for one in routines.packaged() if one.name.startswith("put_") and "whole" not in one.name)
    for table in TABLES:
        assert (f"INSERT INTO public.{table.name} ({', '.join(table.columns)})" in put.sql) == table.hot
    for call in (sql.LOOK, sql.LOOK_BACK, sql.PUT, sql.PUT_WHOLE, sql.RECOMPUTE):
        assert re.search(r"\(\w+ => \$1", call)


async def test_routines_are_installed_again_and_again(postgres_url: str, pg: asyncpg.Connection) -> None:
    """One that is gone, and one of another build, are missed by `check` and made by `migrate`; the old ones stay."""
    assert await migrate(postgres_url) == []
    await pg.execute("DROP PROCEDURE fastworker.put_whole_6")
    await pg.execute("COMMENT ON FUNCTION fastworker.look_3 IS 'of another build'")
    assert await check(postgres_url) == [
        f"Routine fastworker.{name} is not this release's: run `fastworker migrate`."
        for name in ("look_3", "put_whole_6")
    ]
    assert await migrate(postgres_url) == ["routine look_3", "routine put_whole_6"]
    assert await check(postgres_url) == []
    assert await pg.fetchval("SELECT to_regproc('fastworker.put') IS NOT NULL"), "the release before ours calls it"
