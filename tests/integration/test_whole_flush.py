"""A small flush in one call or two (store/whole.py): when it is taken, when not, and what it leaves to the caller."""

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
from fastworker.table.batch import Progress
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


def commits(*ops: tuple[str, str, dict[str, Any] | None] | Event) -> list[Event]:
    """(repo, path, record; None deletes), or another event, in their order."""
    events: list[Event] = []
    for one in ops:
        if isinstance(one, dict):
            events.append(one)
            continue
        repo, path, record = one
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


async def test_a_record_that_two_calls_put_in_two_places(
    store: Told, pg: asyncpg.Connection, postgres_url: str
) -> None:
    """Its older form becomes a twin, its newer one a row with another pair: neither call sees the other before its commit."""
    other_post = f"at://{B}/app.bsky.feed.post/o"
    events = commits(post(B), post(B, "o"), like(A), like(A, POST, "r"), like(A, other_post, "r"))
    await store.write(batch_of(events[:3]))
    other = await Store.connect(postgres_url, application_name="other")
    watcher = await asyncpg.connect(postgres_url)
    twin = batch_of(events[3:4])
    twin.progress = Progress("s", "c", 1, "1-0")  # stored last before the commit, and held there
    try:
        held = watcher.transaction()
        await held.start()
        await watcher.execute("INSERT INTO fastworker.progress (stream, consumer, entry_id) VALUES ('s', 'c', '0-1')")
        writing = asyncio.create_task(store.write(twin))
        async with asyncio.timeout(30):
            while not await pg.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'whole' AND wait_event_type = 'Lock'"
            ):
                await asyncio.sleep(0.01)
        await other.write(batch_of(events[4:]))
        await held.rollback()
        await writing
    finally:
        await watcher.close()
        await other.close()
    assert store.whole == [True, True]
    assert await pg.fetchval("SELECT count(*) FROM fastworker.twins") == 0
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


async def test_step_by_step_is_every_flush(store: Told) -> None:
    """Also one without rows, which has fewer than any limit: races hold a writer between its steps."""
    store.writer.whole_rows_max = 0
    await store.write(batch_of(commits(identity(A, "a.test"))))
    await store.write(batch_of(commits(like(A))))
    assert store.whole == [False, False]


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
    ("before", "whole"),
    [
        pytest.param([like(A)], True, id="delivered before"),
        pytest.param([like(A, rkey="k")], True, id="its pair is taken"),
        pytest.param([gone(A, "app.bsky.feed.like/l")], False, id="deleted before"),
    ],
)
async def test_nothing_is_written_unless_every_row_is_new(
    store: Told, pg: asyncpg.Connection, before: list[Any], whole: bool
) -> None:
    events = commits(post(B), *before, like(A), like(C))
    count = 1 + len(before)
    if before[0] == like(A):
        events = [*events[:count], events[1], events[-1]]  # the same event once more
    await store.write(batch_of(events[:1]))
    await store.write(batch_of(events[1:count]))
    store.whole.clear()
    await store.write(batch_of(events[count:]))
    assert store.whole == [whole]
    await settle(store)
    assert await differences(lawful(events), pg) == "no difference"


async def test_who_must_not_be_stored_is_not(store: Told, pg: asyncpg.Connection) -> None:
    await pg.execute("INSERT INTO users (did, handle) VALUES ($1, 'a.test')", A)
    await pg.execute("INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ($1, true)", A)
    assert (await store.write(batch_of(commits(like(A), like(C)))))[:3] == (1, 0, 1)
    assert store.whole == [False]
    assert [r[0] for r in await pg.fetch("SELECT user_did FROM likes")] == [C]


async def test_only_few_rows_and_few_new_users_take_it(store: Told) -> None:
    did = "did:plc:" + "d" * 21
    many = [like(f"{did}{n:03}") for n in range(FEW_USERS + 1)]
    await store.write(batch_of(commits(*many)))
    assert store.whole == [False], "so many new users are committed first"
    await store.write(batch_of(commits(*[like(A, f"{POST}{n}", str(n)) for n in range(store.writer.copying.rows_min)])))
    assert store.whole == [False] * 2, "COPY"


# Round trips ---------------------------------------------------------------------------------------------------


def quote(repo: str, uri: str, rkey: str = "q", action: str = "create") -> tuple[str, str, dict[str, Any]]:
    embed = {"$type": "app.bsky.embed.record", "record": {"uri": uri, "cid": cid_of(uri)}}
    return repo, f"app.bsky.feed.post/{rkey}", {"text": action, "embed": embed}


def item(repo: str, rkey: str = "i", name: str = "one") -> tuple[str, str, dict[str, Any]]:
    record = {"list": f"at://{repo}/app.bsky.graph.list/{name}", "subject": C}
    return repo, f"app.bsky.graph.listitem/{rkey}", record


def repost(repo: str, rkey: str = "s") -> tuple[str, str, dict[str, Any]]:
    return repo, f"app.bsky.feed.repost/{rkey}", {"subject": {"uri": POST, "cid": cid_of(POST)}}


def account(did: str, status: str | None) -> Event:
    return {"kind": "account", "did": did, "active": status is None, "status": status}


def identity(did: str, handle: str) -> Event:
    return {"kind": "identity", "did": did, "handle": handle}


PROFILE = (A, "app.bsky.actor.profile/self", {"displayName": "one"})
GENERATOR = (C, "app.bsky.feed.generator/g", {"did": "did:web:feeds.example", "displayName": "Feed"})
LABELER: tuple[str, str, dict[str, Any]] = (C, "app.bsky.labeler.service/self", {"policies": {"labelValues": []}})
GATE = (B, "app.bsky.feed.threadgate/p", {"post": POST, "allow": []})
POSTGATE = (B, "app.bsky.feed.postgate/p", {"post": POST, "embeddingRules": []})
REPLY = f"at://{A}/app.bsky.feed.post/r"
PATHS = ("app.bsky.feed.like/l", "app.bsky.feed.repost/s", "app.bsky.graph.follow/f", "app.bsky.graph.block/b")
STORED = [
    post(B),
    post(A, "r", POST),
    like(B, REPLY),
    like(A),
    repost(A),
    (A, "app.bsky.graph.follow/f", {"subject": B}),
    (A, "app.bsky.graph.block/b", {"subject": C}),
    quote(C, POST),
]
COLD = [PROFILE, item(A), GENERATOR, LABELER, GATE, POSTGATE, (B, "com.example.note/n", {"text": "x"})]
SMALL: dict[str, tuple[list[Any], list[Any], int]] = {
    "new rows": ([post(B)], [like(A), post(A, "r", POST)], 1),
    "deletes of hot rows": (STORED, [gone(A, path) for path in PATHS], 2),
    "a delete of a post with all that follows": (STORED, [gone(B, "app.bsky.feed.post/p"), gone(A, PATHS[0])], 2),
    "a delete of what is not known": ([], [gone(A, "app.bsky.feed.like/x"), like(C)], 2),
    "a like that is taken back and given again": (STORED, [gone(A, PATHS[0]), like(A, POST, "l2")], 2),
    "two likes of one post": ([post(B)], [like(A, POST, "l1"), like(A, POST, "l3")], 2),
    "a second like": ([post(B), like(A, POST, "l2")], [like(A, POST, "l1"), like(A, POST, "l3")], 2),
    "the second like comes first": ([post(B), like(A, POST, "l1")], [like(A, POST, "l2")], 3),
    "the next like in turn": ([post(B), like(A, POST, "l1"), like(A, POST, "l2")], [gone(A, PATHS[0] + "1")], 2),
    "a second repost": ([post(B), repost(A, "s2")], [repost(A, "s1"), gone(C, PATHS[0])], 2),
    "a second list item": ([item(A)], [item(A, "h"), item(A, "j")], 2),
    "an update of a post": (STORED, [quote(C, REPLY, action="update")], 3),
    "delivered again": (STORED, STORED[3:5], 3),
    "records of cold tables": ([post(B)], [*COLD, like(A)], 2),
    "updates of cold records": ([post(B), *COLD], [(r, p, {**v, "description": "2"}) for r, p, v in COLD], 2),
    "deletes of cold records": ([post(B), *COLD], [gone(r, p) for r, p, _ in COLD], 2),
    "a delete of a cold record that is not known": ([], [gone(A, "app.bsky.actor.profile/self")], 2),
    "accounts": ([post(B)], [account(A, "takendown"), account(B, None), like(C)], 2),
    "identities": ([post(B)], [identity(A, "a.test"), identity(B, "b.test"), like(C)], 2),
    "nothing but identities": ([], [identity(A, "a.test")], 1),
}


@pytest.mark.parametrize("kind", SMALL)
async def test_a_small_flush_takes_three_round_trips_at_most(
    kind: str, store: Told, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, most = SMALL[kind]
    events = commits(*before, *after)
    if kind == "delivered again":
        events[len(before) :] = events[3:5]
    warm = commits(post(C, "w"), gone(C, "app.bsky.feed.post/w"))  # the driver asks for types once
    await store.write(batch_of(warm))
    if before:
        await store.write(batch_of(events[: len(before)]))
    trips: list[str] = []
    of_driver = {name: getattr(asyncpg.Connection, name) for name in ("execute", "_execute")}

    async def execute(self: Any, query: str, *args: Any, **options: Any) -> Any:
        trips.extend([] if args else [query])  # with arguments it is counted below
        return await of_driver["execute"](self, query, *args, **options)

    async def _execute(self: Any, query: str, *args: Any, **options: Any) -> Any:
        trips.append(query)
        return await of_driver["_execute"](self, query, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "execute", execute)
        patch.setattr(asyncpg.Connection, "_execute", _execute)
        await store.write(batch_of(events[len(before) :]))
    assert len(trips) == most <= 3, trips
    await settle(store)
    assert await differences(lawful([*warm, *events]), pg) == "no difference"


def test_routines_are_made_from_the_schema() -> None:
    """No list of columns in the files; nothing is left to fill in; each call names its arguments."""
    for routine in routines.packaged():
        assert "{{" not in routine.sql
        assert routine.name.rpartition("_")[2].isdigit(), "its name carries a version"
    put = next(one for one in routines.packaged() if one.name.startswith("put_") and "whole" not in one.name)
    for table in TABLES:
        assert (f"INSERT INTO public.{table.name} ({', '.join(table.columns)})" in put.sql) == table.hot
    for call in (sql.LOOK, sql.LOOK_BACK, sql.FIRST, sql.PUT, sql.PUT_WHOLE, sql.RECOMPUTE):
        assert re.search(r"\(\w+ => \$1", call)


async def test_routines_are_installed_again_and_again(postgres_url: str, pg: asyncpg.Connection) -> None:
    """One that is gone, and one of another build, are missed by `check` and made by `migrate`; the old ones stay."""
    assert await migrate(postgres_url) == []
    await pg.execute("DROP PROCEDURE fastworker.put_whole_9")
    await pg.execute("COMMENT ON FUNCTION fastworker.look_3 IS 'of another build'")
    assert await check(postgres_url) == [
        f"Routine fastworker.{name} is not this release's: run `fastworker migrate`."
        for name in ("look_3", "put_whole_9")
    ]
    assert await migrate(postgres_url) == ["routine look_3", "routine put_whole_9"]
    assert await check(postgres_url) == []
    assert await pg.fetchval("SELECT to_regproc('fastworker.put') IS NOT NULL"), "the release before ours calls it"
