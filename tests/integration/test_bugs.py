"""Bugs of the systems before us (docs/bugs.md) that no other test shows to be absent."""

from __future__ import annotations

import contextlib
import itertools
import string
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from fastworker.errors import StoreUnavailable, Unreachable
from fastworker.event import Sync
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.store.admin import _connection
from fastworker.store.schema_admin import open_schema
from fastworker.store.store import Store
from fastworker.table.batch import Batch
from tests.property.feeding import batch_of, settle
from tests.rig.histories import DIDS, Event, cid_of, entry_ms, number, random_history

POST = f"at://{DIDS[1]}/app.bsky.feed.post/p"


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[Store]:
    store = await Store.connect(postgres_url)
    yield store
    await store.close()


def commits(*ops: tuple[str, str, dict[str, Any] | None]) -> list[Event]:
    """Of the first account: (collection, rkey, record or None for a delete)."""
    made = []
    for collection, rkey, record in ops:
        op: dict[str, Any] = {"action": "delete", "path": f"{collection}/{rkey}", "cid": None}
        if record is not None:
            full = {"$type": collection, "createdAt": "2026-01-01T00:00:00Z", **record}
            op |= {"action": "create", "cid": cid_of(full), "record": full}
        made.append({"kind": "commit", "repo": DIDS[0], "bare": False, "ops": [op]})
    return number(made, bare=False)


async def test_viewer_states_keep_what_is_not_ours(store: Store, pg: asyncpg.Connection) -> None:
    """T8, T9, U10: a like resets nothing, an unlike deletes nothing of the API's."""
    await pg.execute(
        "INSERT INTO post_viewer_states (post_uri, viewer_did, thread_muted, pinned) VALUES ($1, $2, true, true)",
        POST,
        DIDS[0],
    )
    about = {"subject": {"uri": POST, "cid": cid_of(POST)}}
    events = commits(
        ("app.bsky.feed.like", "l", about),
        ("app.bsky.bookmark", "b", about),
        ("app.bsky.feed.repost", "r", about),
        ("app.bsky.feed.like", "l", None),
        ("app.bsky.feed.repost", "r", None),
        ("app.bsky.bookmark", "b", None),
    )
    uri = f"at://{DIDS[0]}/app.bsky.feed"
    states = [
        (f"{uri}.like/l", None, False),
        (f"{uri}.like/l", None, True),
        (f"{uri}.like/l", f"{uri}.repost/r", True),
        (None, f"{uri}.repost/r", True),
        (None, None, True),
        (None, None, False),
    ]
    for event, state in zip(events, states, strict=True):
        await store.write(batch_of([event]))
        found = await pg.fetchrow("SELECT * FROM post_viewer_states")
        assert found is not None
        assert (found["like_uri"], found["repost_uri"], found["bookmarked"]) == state
        assert (found["thread_muted"], found["pinned"]) == (True, True)


def _words(number_of: int, letters: str, length: int) -> str:
    """Distinct words."""
    return " ".join(map("".join, itertools.islice(itertools.product(letters, repeat=length), number_of)))


LONG_TEXTS = {
    "words": _words(150_000, string.ascii_lowercase, 5),
    "growing": _words(200_000, "\u0130\u023a\u0410\u0411\u0412\u0413", 7),
    "addresses": " ".join(f"a.{number}.co/b" for number in range(100_000)),
}


@pytest.mark.parametrize("name", LONG_TEXTS)
async def test_a_text_too_long_to_be_searched_costs_no_record(store: Store, pg: asyncpg.Connection, name: str) -> None:
    """The trigger of public.users makes a tsvector of names and description, which holds 1 MB."""
    profile = {"displayName": "\u023a " * 300, "description": LONG_TEXTS[name]}
    await store.write(batch_of(commits(("app.bsky.actor.profile", "self", profile))))
    found = await pg.fetchrow("SELECT display_name, description, pg_column_size(search_vector) AS size FROM users")
    assert found is not None
    assert found["display_name"] == profile["displayName"][:255]
    assert LONG_TEXTS[name].startswith(found["description"])
    assert found["description"]


async def test_nothing_is_kept_of_who_forbids_it(store: Store, pg: asyncpg.Connection) -> None:
    """T40, W15, U18: in no collection, not even in derived tables."""
    events = random_history(5, 1_500).events
    dids = sorted({event["repo"] for event in events if event["kind"] == "commit"})
    forbidden = dids[0]
    await pg.execute("INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid')", forbidden)
    await pg.execute("INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ($1, true)", forbidden)
    model = Model(forbidden=frozenset({forbidden}))
    for event in events:
        model.apply(event, entry_ms(event))
    for start in range(0, len(events), 100):
        await store.write(batch_of(events[start : start + 100]))
    await settle(store)
    found = await compare.dump(pg)
    (theirs,) = [row for row in found["users"] if row["did"] == forbidden]
    assert (theirs["handle"], theirs["profile_record"]) == ("handle.invalid", None)  # of the API's own row
    found["users"].remove(theirs)
    assert compare.report(compare.diff(model.tables(), found)) == "no difference"
    assert len(found["posts"]) > 10
    assert not [row for row in found["posts"] if row["author_did"] == forbidden]
    assert sum(event.get("repo") == forbidden for event in events) > 100


async def test_no_handle_is_kept_of_who_forbids_it(store: Store, pg: asyncpg.Connection) -> None:
    """An #identity event of theirs is no reason to store anything either."""
    await pg.execute("INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid')", DIDS[0])
    await pg.execute("INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ($1, true)", DIDS[0])
    claims: list[Event] = [
        {"kind": "identity", "did": did, "handle": f"{name}.test"} for did, name in zip(DIDS[:2], "ab", strict=True)
    ]
    await store.write(batch_of(number(claims, bare=False)))
    assert [row["did"] for row in await pg.fetch("SELECT did FROM fastworker.claims")] == [DIDS[1]]
    assert [row["did"] for row in await pg.fetch("SELECT did FROM fastworker.identities")] == [DIDS[1]]
    assert await pg.fetchval("SELECT handle FROM users WHERE did = $1", DIDS[0]) == "handle.invalid"


async def test_a_sync_is_remembered(store: Store, pg: asyncpg.Connection) -> None:
    """R13: a repository whose state was replaced is written down, the newest time of it."""
    for seq, rev in ((8, "3kbbbbbbbbb22"), (7, "3kaaaaaaaaa22")):
        batch = Batch()
        batch.put_sync(Sync(seq, DIDS[0], rev, None))
        await store.write(batch)
    assert [tuple(row) for row in await pg.fetch("SELECT did, rev, seq FROM fastworker.repairs")] == [
        (DIDS[0], "3kbbbbbbbbb22", 8)
    ]


async def test_an_older_record_after_the_account_is_gone(store: Store, pg: asyncpg.Connection) -> None:
    """The deletion is settled, all its rows are removed; what is delivered late from before it stays out."""
    late = commits(
        ("app.bsky.feed.post", "p", {"text": "x"}),
        ("app.bsky.feed.like", "l", {"subject": {"uri": POST, "cid": cid_of(POST)}}),
        ("app.bsky.graph.list", "i", {"name": "x", "purpose": "app.bsky.graph.defs#modlist"}),
    )
    deletion: Event = {"kind": "account", "did": DIDS[0], "active": False, "status": "deleted"}
    (deletion,) = number([deletion], bare=False)
    deletion["seq"] += 50
    await store.write(batch_of([deletion]))
    await settle(store)
    assert await pg.fetchval("SELECT count(*) FROM fastworker.accounts WHERE purged_at IS NOT NULL") == 1
    for event in late:
        await store.write(batch_of([event]))
    await settle(store)
    for table in ("posts", "likes", "lists", "feed_items", "post_aggregations"):
        assert await pg.fetchval(f"SELECT count(*) FROM {table}") == 0, table
    newer = number([{"kind": "commit", "repo": DIDS[0], "bare": False, "ops": late[0]["ops"]}], bare=False)
    newer[0]["seq"] += 60
    await store.write(batch_of(newer))
    assert await pg.fetchval("SELECT count(*) FROM posts") == 1


class _Watched:
    """A connection that notes what it is asked to write."""

    def __init__(self, connection: Any, seen: list[tuple[str, Any]]) -> None:
        self._connection = connection
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._connection, name)
        if name not in ("execute", "fetch", "fetchrow"):
            return member

        def call(statement: str, *arguments: Any) -> Any:
            self._seen.append((statement, arguments))
            return member(statement, *arguments)

        return call


async def test_every_statement_takes_its_keys_sorted(postgres_url: str) -> None:
    """W24, T4: writers that lock in one order do not meet head on."""
    seen: list[tuple[str, Any]] = []

    class Watched(Store):
        @contextlib.asynccontextmanager
        async def connection(self) -> AsyncIterator[Any]:
            async with super().connection() as connection:
                yield _Watched(connection, seen)

    history = list(random_history(3, 1_200).deliveries())
    once_more = [[event for events in history for event in events][:60]]
    for batches in (history, once_more):  # a process that does not know its users yet, twice
        store = await Watched.connect(postgres_url)
        try:
            for events in batches:
                await store.write(batch_of(events))
            await settle(store)
        finally:
            await store.close()
    # The first arguments of what is no plain statement are new users.
    users = ("WITH early", "CALL fastworker.put_whole", "SELECT * FROM fastworker.first")
    writing = ("INSERT", "UPDATE", "DELETE", *users)
    written = [(s, a[0]) for s, a in seen if s.startswith(writing) and a and len(a[0] or ()) > 1]
    assert any(statement.startswith(users) for statement, _ in written)
    assert len({statement for statement, _ in written}) > 30
    for statement, keys in written:
        if not isinstance(keys, str):
            firsts = [key[0] if isinstance(key, tuple) else key for key in keys]
            assert firsts == sorted(firsts), statement


async def test_a_connection_that_the_driver_lost_count_of_is_replaced(store: Store) -> None:
    """A backend terminated at the very moment of its use: the next attempt has another connection."""
    async with store.connection() as connection:
        backend = connection.get_server_pid()
    with pytest.raises(StoreUnavailable, match="another operation"):
        async with store.connection():
            raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")
    async with store.connection() as connection:
        assert connection.get_server_pid() != backend
        assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("connection", [open_schema, lambda url: _connection(url, "test")])
async def test_a_connection_that_ends_under_a_command_is_called_that(connection: Any, postgres_url: str) -> None:
    with pytest.raises(Unreachable, match="ended while it was used"):
        async with connection(postgres_url):
            raise asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")
