"""PostgreSQL in every bad state: the worker waits, says why, and goes on by itself; nothing is lost or set aside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import asyncpg
import pytest
from yarl import URL

from fastworker.crashpoint import Step
from fastworker.edge.embedded import EmbeddedPostgres, free_port
from fastworker.errors import RowRejected, StoreUnavailable, Unreachable
from fastworker.event import Account, Action, Commit, Op
from fastworker.process.board import State
from fastworker.store.admin import past
from fastworker.store.blame import RowLocked, TooSlow
from fastworker.store.migrate import migrate
from fastworker.store.rules import Rules
from fastworker.store.schema_admin import open_schema
from fastworker.store.session import SESSION, Time, borrow
from fastworker.store.store import Store
from fastworker.stream.client import connect
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit
from tests import replies
from tests.e2e.house import House
from tests.rig.proxy import Proxy
from tests.runs import usually
from tests.servers import PostgresUnderTest

POST = "at://did:plc:aaaaaaaaaaaaaaaaaaaaaaaa/app.bsky.feed.post/3kaaaaaaaaa2a"
CID = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"
ROLE = "writer"
PgAct = Callable[[asyncpg.Connection], Awaitable[Any]]


def like(number: int) -> dict[str, str]:
    did, rkey = f"did:plc:{number:024d}".replace("0", "a").replace("1", "b"), f"3k{number:011d}"
    data = (
        f'{{"repo":"{did}","rev":null,"time":null,"ops":[{{"action":"create","path":"app.bsky.feed.like/{rkey}",'
        f'"cid":"{CID}","record":{{"$type":"app.bsky.feed.like","subject":{{"uri":"{POST}","cid":"{CID}"}},'
        '"createdAt":"2024-01-01T00:00:00.000Z"}}]}'
    )
    return {"type": "commit", "data": data, "seq": str(number)}


def unlike(number: int) -> dict[str, str]:
    entry = like(number)
    data = json.loads(entry["data"])
    [op] = data["ops"]
    return entry | {"data": json.dumps(data | {"ops": [{"action": "delete", "path": op["path"]}]}), "seq": "999"}


@pytest.fixture
async def role(pg: asyncpg.Connection) -> AsyncIterator[str]:
    """A role that is no superuser, so that limits and rights count."""
    await pg.execute(f"DROP ROLE IF EXISTS {ROLE}")
    await pg.execute(f"CREATE ROLE {ROLE} LOGIN")
    await pg.execute(f"GRANT USAGE ON SCHEMA public, fastworker TO {ROLE}")
    for what in ("TABLES", "SEQUENCES"):
        await pg.execute(f"GRANT ALL ON ALL {what} IN SCHEMA public, fastworker TO {ROLE}")
    yield ROLE
    await pg.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")
    await pg.execute(f"DROP OWNED BY {ROLE}")
    await pg.execute(f"DROP ROLE {ROLE}")


@pytest.fixture
async def house(redis_url: str, postgres_url: str, role: str) -> AsyncIterator[House]:
    client = connect(redis_url)
    yield House(client, redis_url, postgres_url.replace("postgres@", f"{role}@"))
    await client.aclose()


async def terminate(pg: asyncpg.Connection) -> None:
    await pg.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fastworker' "
                     "AND datname = current_database()")  # fmt: skip


def statement(*texts: str, cut: bool = False) -> PgAct:
    async def act(pg: asyncpg.Connection) -> None:
        for text in texts:
            await pg.execute(text.replace("CURRENT_DATABASE", await pg.fetchval("SELECT current_database()")))
        if cut:
            await terminate(pg)

    return act


def raised(sqlstate: str) -> tuple[PgAct, PgAct]:
    """Every insert of a like fails so, as far as the client can tell."""
    return (
        statement(
            "CREATE FUNCTION boom() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'boom' USING ERRCODE = '{sqlstate}'; END $$",
            "CREATE TRIGGER boom BEFORE INSERT ON likes FOR EACH ROW EXECUTE FUNCTION boom()",
        ),
        statement("DROP FUNCTION boom CASCADE"),
    )


FAULTS: dict[str, tuple[PgAct, PgAct, str]] = {
    "disk full": (*raised("53100"), "53100"),
    "out of memory": (*raised("53200"), "53200"),
    "statement timeout": (*raised("57014"), "57014"),
    "lock timeout": (*raised("55P03"), "55P03"),
    "deadlock": (*raised("40P01"), "boom"),
    "serialisation failure": (*raised("40001"), "boom"),
    "I/O error": (*raised("58030"), "58030"),
    "an internal error": (*raised("XX000"), "XX000"),
    "corrupted index": (*raised("XX002"), "XX002"),
    "too many connections": (
        statement(f"ALTER ROLE {ROLE} CONNECTION LIMIT 0", cut=True),
        statement(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1"),
        "53300",
    ),
    # Not terminated at the end: a connection that led to what is a replica now must be left by us.
    "read-only": (
        statement("ALTER DATABASE CURRENT_DATABASE SET default_transaction_read_only = on", cut=True),
        statement("ALTER DATABASE CURRENT_DATABASE RESET default_transaction_read_only"),
        "25006",
    ),
    "no login": (statement(f"ALTER ROLE {ROLE} NOLOGIN", cut=True), statement(f"ALTER ROLE {ROLE} LOGIN"), "28000"),
    "missing table": (
        statement("ALTER TABLE likes RENAME TO mislaid"),
        statement("ALTER TABLE mislaid RENAME TO likes"),
        "42P01",
    ),
    "missing column": (
        statement("ALTER TABLE likes RENAME COLUMN via TO mislaid"),
        statement("ALTER TABLE likes RENAME COLUMN mislaid TO via"),
        "42703",
    ),
    "a column of the API's": (
        statement(
            "ALTER TABLE likes ADD COLUMN mood text NOT NULL DEFAULT ''", "ALTER TABLE likes ALTER mood DROP DEFAULT"
        ),
        statement("ALTER TABLE likes DROP COLUMN mood"),
        "23502",
    ),
    "used-up ids": (
        statement("SELECT setval('notifications_id_seq', 2147483647)"),
        statement("ALTER SEQUENCE notifications_id_seq AS bigint", "ALTER TABLE notifications ALTER id TYPE bigint"),
        "2200H",
    ),
    "missing right": (
        statement(f"REVOKE INSERT ON likes FROM {ROLE}"),
        statement(f"GRANT INSERT ON likes TO {ROLE}"),
        "42501",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_bad_state_is_waited_out(house: House, pg: asyncpg.Connection, name: str) -> None:
    fault, mend, told = FAULTS[name]
    async with house.worker():
        await house.redis.xadd("firehose:events", replies.to_add(like(1)))
        async with asyncio.timeout(60):
            await house.settled()
        await fault(pg)
        for number in range(2, 60):
            await house.redis.xadd("firehose:events", replies.to_add(like(number)))
        async with asyncio.timeout(60):
            while told not in house.slot.snapshot().error or house.slot.get("state") != State.WAITING_FOR_STORE:
                await asyncio.sleep(0.01)
        assert await house.pending() > 0
        await mend(pg)
        async with asyncio.timeout(60):
            await house.settled()
    assert await house.ledger() == {"committed": 59}
    assert await house.letters() == []
    assert await pg.fetchval("SELECT count(*) FROM likes") == 59
    assert await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", POST) == 59


FULL: dict[str, dict[str, Any]] = {
    "app.bsky.feed.post": {
        "text": "hello",
        "langs": ["en"],
        "reply": {"root": {"uri": POST, "cid": CID}, "parent": {"uri": POST, "cid": CID}},
    },
    "app.bsky.feed.like": {"subject": {"uri": POST, "cid": CID}},
    "app.bsky.graph.list": {"name": "a", "purpose": "app.bsky.graph.defs#modlist"},
    "app.bsky.actor.profile": {"displayName": "a"},
}


def records(kind: str, count: int = 1, *, first: int = 1, action: Action = "create", **members: Any) -> Batch:
    made = Batch()
    for number in range(first, first + count):
        did, rkey = f"did:plc:{number:024d}".replace("0", "a").replace("1", "b"), f"3k{number:011d}"
        rkey = "self" if kind.endswith("profile") else rkey
        record = {"$type": kind, "createdAt": "2024-01-01T00:00:00.000Z", **FULL[kind], **members}
        op = Op(action, kind, rkey, CID, record=None if action == "delete" else record)
        made.put(
            map_commit(
                Commit(number + (0 if action == "create" else 10_000), did, None, None, [op], []), 1_700_000_000_000
            )
        )
    return made


# What nobody of ours made, and what the sentence that waits must say: (the kind of record, statements, words).
STATES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "a NOT NULL column": (
        "app.bsky.feed.post",
        ("ALTER TABLE posts ADD COLUMN mood text NOT NULL DEFAULT ''", "ALTER TABLE posts ALTER mood DROP DEFAULT"),
        "ALTER TABLE posts ALTER COLUMN mood SET DEFAULT",
    ),
    "a column of ours that may not be null": (
        "app.bsky.feed.post",
        ("ALTER TABLE posts ALTER embed SET NOT NULL",),
        "ALTER TABLE posts ALTER COLUMN embed",
    ),
    "a CHECK": (
        "app.bsky.feed.post",
        ("ALTER TABLE posts ADD CONSTRAINT wordy CHECK (length(text) > 1000) NOT VALID",),
        "ALTER TABLE posts DROP CONSTRAINT wordy",
    ),
    "a CHECK of a derived table": (
        "app.bsky.feed.like",
        ("ALTER TABLE notifications ADD CONSTRAINT few CHECK (reason <> 'like') NOT VALID",),
        "DROP CONSTRAINT few",
    ),
    "a foreign key": (
        "app.bsky.feed.like",
        ("ALTER TABLE likes ADD CONSTRAINT known FOREIGN KEY (post_uri) REFERENCES posts (uri) NOT VALID",),
        "DROP CONSTRAINT known",
    ),
    "a foreign key that is looked at late": (
        "app.bsky.feed.like",
        (
            (
                "ALTER TABLE likes ADD CONSTRAINT known FOREIGN KEY (post_uri) REFERENCES posts (uri) "
                "DEFERRABLE INITIALLY DEFERRED"
            ),
        ),
        "DROP CONSTRAINT known",
    ),
    "an exclusion": (
        "app.bsky.graph.list",
        ("ALTER TABLE lists ADD CONSTRAINT one EXCLUDE USING btree (purpose WITH =)",),
        "DROP CONSTRAINT one",
    ),
    "a unique index": (
        "app.bsky.feed.like",
        ("CREATE UNIQUE INDEX one_like ON likes (post_uri)",),
        "one_like",
    ),
    "a unique handle": (
        "app.bsky.feed.post",
        ("CREATE UNIQUE INDEX one_handle ON users (handle)",),
        "one_handle",
    ),
    "a narrow column": (
        "app.bsky.feed.post",
        ("ALTER TABLE posts ALTER text TYPE varchar(3)",),
        "character varying\\(3\\).*fastworker check",
    ),
    "another type": (
        "app.bsky.feed.post",
        ("ALTER TABLE posts ALTER langs TYPE text[] USING NULL",),
        "langs.*fastworker check",
    ),
    "a domain": (
        "app.bsky.graph.list",
        (
            "CREATE DOMAIN kind AS text CHECK (VALUE = 'kind')",
            "ALTER TABLE lists ALTER purpose TYPE kind USING 'kind'",
        ),
        "kind_check",
    ),
    "no partition": (
        "app.bsky.feed.like",
        (
            "ALTER TABLE likes RENAME TO likes_old",
            "CREATE TABLE likes (LIKE likes_old INCLUDING DEFAULTS) PARTITION BY RANGE (created_at)",
        ),
        "partition of likes",
    ),
    "no unique index of ours": (
        "app.bsky.feed.post",
        ("ALTER TABLE feed_items DROP CONSTRAINT feed_items_pkey",),
        "42P10.*fastworker check",
    ),
    "a trigger that refuses": (
        "app.bsky.feed.post",
        (
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
            "CREATE TRIGGER no BEFORE INSERT ON posts FOR EACH ROW EXECUTE FUNCTION no()",
        ),
        "no\\(\\)",
    ),
    "a trigger that says nothing": (
        "app.bsky.graph.list",
        (
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
            "CREATE TRIGGER no BEFORE INSERT ON lists FOR EACH ROW EXECUTE FUNCTION no()",
        ),
        "lists: a trigger or a rule",
    ),
    "a trigger that says nothing of what is copied": (
        "app.bsky.feed.like",
        (
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
            "CREATE TRIGGER no BEFORE INSERT ON likes FOR EACH ROW EXECUTE FUNCTION no()",
        ),
        "likes: a trigger or a rule",
    ),
    "a trigger with an error in it": (
        "app.bsky.feed.post",
        (
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SELEC'; END $$",
            "CREATE TRIGGER no BEFORE INSERT ON posts FOR EACH ROW EXECUTE FUNCTION no()",
        ),
        "no\\(\\)",
    ),
    "a trigger against deletes": (
        "app.bsky.feed.post",
        (
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
            "CREATE TRIGGER no BEFORE DELETE ON posts FOR EACH ROW EXECUTE FUNCTION no()",
        ),
        "no\\(\\)",
    ),
    "a trigger of users": (
        "app.bsky.actor.profile",
        (
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
            "CREATE TRIGGER no BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION no()",
        ),
        "no\\(\\)",
    ),
}


@pytest.mark.parametrize("name", usually(STATES, *(STATES.keys() - {"a unique index"})))  # half a minute: row by row
async def test_what_the_database_refuses_of_everybody_is_no_rows_fault(
    postgres_url: str, pg: asyncpg.Connection, name: str
) -> None:
    """Told at the first attempt, also of a large batch, with a sentence that names what is in the way."""
    kind, faults, words = STATES[name]
    count = 5 if "of ours" in name else 600  # rows that go by COPY ask for no index and no type of ours
    store = await Store.connect(postgres_url)
    try:
        made = records(kind, count)
        if "index of ours" in name:  # nor do rows that are new
            await store.write(made)
            made = records(kind, count, action="update", text="edited")
        for fault in faults:
            await pg.execute(fault)
        if "delete" in name:
            await store.write(made)
            made = records(kind, count, action="delete")
        with pytest.raises(StoreUnavailable, match=words):
            await store.write(made)
    finally:
        await store.close()
    if "delete" not in name:
        assert not await pg.fetchval("SELECT count(*) FROM users WHERE did LIKE '%control%'")
        assert not await pg.fetchval(
            "SELECT count(*) FROM posts WHERE text = 'edited' OR NOT $1", "index of ours" in name
        )


KEEPS = [f"{how} {act}" for how in ("trigger", "rule") for act in ("UPDATE", "DELETE")]


@pytest.mark.parametrize("name", usually(KEEPS, "trigger DELETE"))
async def test_rows_that_a_trigger_keeps_as_they_are_are_not_taken_for_changed(
    postgres_url: str, pg: asyncpg.Connection, name: str
) -> None:
    """Without an error: what was deleted would stay, and be acknowledged."""
    how, act = name.split()
    store = await Store.connect(postgres_url)
    action: Action = "update" if act == "UPDATE" else "delete"
    kinds = "app.bsky.feed.post", "app.bsky.feed.like"
    try:
        for kind in kinds:
            await store.write(records(kind, 300))
        await pg.execute("CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$")
        for table in ("posts", "likes"):
            await pg.execute(
                f"CREATE TRIGGER no BEFORE {act} ON {table} FOR EACH ROW EXECUTE FUNCTION no()"
                if how == "trigger"
                else f"CREATE RULE no AS ON {act} TO {table} DO INSTEAD NOTHING"
            )
        for kind in kinds:
            for count in (3, 300):  # in one call, and step by step
                with pytest.raises(StoreUnavailable, match="a trigger or a rule|fastworker check"):
                    await store.write(records(kind, count, action=action, createdAt="2024-02-02T00:00:00.000Z"))
        # one row only: that row's fault
        await pg.execute("DROP FUNCTION no CASCADE; DROP RULE IF EXISTS no ON posts; DROP RULE IF EXISTS no ON likes")
        kept = records(kinds[0], 3, action=action, text="edited")
        await pg.execute(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; "
            f"CREATE TRIGGER no BEFORE {act} ON posts FOR EACH ROW WHEN (OLD.uri = '{next(iter(kept.changes))}') "
            "EXECUTE FUNCTION no()"
        )
        with pytest.raises(RowRejected, match="a trigger or a rule"):
            await store.write(kept)
    finally:
        await store.close()


def of_odd(what: str) -> tuple[str, str]:
    """A trigger that does it for posts that say `odd`."""
    body = f"BEGIN IF NEW.text = 'odd' THEN {what}; END IF; RETURN NEW; END"
    return (
        f"CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ {body} $$",
        "CREATE TRIGGER no BEFORE INSERT ON posts FOR EACH ROW EXECUTE FUNCTION no()",
    )


ROWS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "a trigger": ("app.bsky.feed.post", of_odd("RAISE EXCEPTION 'no'"), {"text": "odd"}),
    "a trigger with a code of its own": (
        "app.bsky.feed.post", of_odd("RAISE EXCEPTION 'no' USING ERRCODE = 'AB001'"), {"text": "odd"},
    ),
    "a table that a trigger asks for": (
        "app.bsky.feed.post", of_odd("EXECUTE format('SELECT 1 FROM %I', NEW.text)"), {"text": "odd"},
    ),
    "a CHECK": (
        "app.bsky.feed.post",
        ("ALTER TABLE posts ADD CONSTRAINT short CHECK (length(text) < 1000)",),
        {"text": "x" * 2_000},
    ),
    "a row too large for an index": (
        "app.bsky.feed.post",
        ("CREATE INDEX ON posts (text)",),
        {"text": "".join(map(chr, random.Random(1).choices(range(0x4E00, 0x9FFF), k=4_000)))},
    ),
    "a unique index": (
        "app.bsky.feed.post",
        ("CREATE UNIQUE INDEX ON posts (text) WHERE text = 'odd'", ("INSERT INTO posts (uri, cid, author_did, text, "
         "created_at) VALUES ('at://did:plc:x/app.bsky.feed.post/x', '', '', 'odd', now())")),
        {"text": "odd"},
    ),
    "a partition that is not there": (
        "app.bsky.feed.like",
        (
            "ALTER TABLE likes RENAME TO likes_old",
            "CREATE TABLE likes (LIKE likes_old INCLUDING DEFAULTS) PARTITION BY RANGE (created_at)",
            "CREATE TABLE now_on PARTITION OF likes FOR VALUES FROM ('2023-06-01') TO ('infinity')",
        ),
        {"createdAt": "2023-01-01T00:00:00.000Z"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
async def test_what_it_refuses_of_one_record_is_that_records_fault(
    postgres_url: str, pg: asyncpg.Connection, name: str
) -> None:
    kind, faults, members = ROWS[name]
    for fault in faults:
        await pg.execute(fault)
    store = await Store.connect(postgres_url)
    try:
        for count in (1, 600):  # the rows of which one is refused
            made = records(kind, count)
            for change in records(kind, first=count, **members).changes.values():
                made.changes[change.uri] = change
            with pytest.raises(RowRejected):
                await store.write(made)
        assert (await store.write(records(kind, 10))).rows == 10
    finally:
        await store.close()


def batch(number: int) -> Batch:
    from fastworker.event.entry import decode_entry

    made = Batch()
    fields = {name.encode(): value.encode() for name, value in like(number).items()}
    event = decode_entry(fields)
    assert isinstance(event, Commit)
    made.put(map_commit(event, 1_700_000_000_000))
    return made


@pytest.mark.parametrize("times", usually([25, 60], 25))
async def test_backends_that_are_terminated_and_statements_that_are_cancelled(
    house: House, pg: asyncpg.Connection, times: int
) -> None:
    """At any moment of a flush: in the prologue, in the main transaction, in a commit, between two of them."""
    r = random.Random(5)
    added = 0
    errors = set()
    async with house.worker():
        for _ in range(times):
            pipe = house.redis.pipeline(transaction=False)
            for number in range(added + 1, added + 21):
                pipe.xadd("firehose:events", replies.to_add(like(number)))
            await pipe.execute()
            added += 20
            await asyncio.sleep(r.uniform(0, 0.04))
            how = r.choice(("pg_terminate_backend", "pg_cancel_backend"))
            await pg.execute(
                f"SELECT {how}(pid) FROM pg_stat_activity WHERE application_name = 'fastworker' "
                "AND datname = current_database()"
            )
            errors.add(house.slot.snapshot().error)
        async with asyncio.timeout(60):
            await house.settled()
        assert house.slot.get("store_retries") > 0
    assert any("administrator command" in error for error in errors)
    assert not any("__aexit__" in error for error in errors), "the driver's trouble, not what happened"
    assert await house.ledger() == {"committed": added}
    assert await pg.fetchval("SELECT count(*) FROM likes") == added
    assert await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", POST) == added


async def test_a_connection_whose_rollback_did_not_come_through_is_not_used_again(postgres_url: str) -> None:
    store = await Store.connect(postgres_url)
    try:
        with pytest.raises(StoreUnavailable, match="it closed the connection"):
            async with store.connection() as connection:
                await connection.execute("BEGIN")
                raise ConnectionResetError("gone")
        assert store.connections == (0, 0)
        await store.ping()
    finally:
        await store.close()


class Standby(EmbeddedPostgres):
    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, IndexError):
            return (self.files / "postmaster.pid").read_text().splitlines()[7].strip() in ("standby", "ready")
        return False


async def test_a_failover_to_a_replica(server_dir: Path, redis_url: str) -> None:
    """A real one: the address first leads to a replica that refuses writes, then it is promoted."""
    first = EmbeddedPostgres(server_dir / "first", port=free_port(), durable=False)
    with first:
        await migrate(first.url)
    shutil.copytree(first.files, server_dir / "second" / "data")
    (server_dir / "second" / "data" / "standby.signal").touch()
    for path in (server_dir / "second").rglob("*"):
        shutil.chown(path, first.files.owner(), first.files.group())
    follow = {"primary_conninfo": f"host=127.0.0.1 port={first.port} user=postgres"}
    second = Standby(server_dir / "second", port=free_port(), durable=False, settings=follow)
    first = EmbeddedPostgres(
        server_dir / "first", port=first.port, durable=False, settings={"synchronous_standby_names": "*"}
    )
    client = connect(redis_url)
    with first, second:
        async with Proxy(("127.0.0.1", first.port or 0)) as proxy:
            through = str(URL(first.url).with_port(proxy.port))
            house = House(client, redis_url, through)
            async with house.worker():
                for number in range(1, 1_001):
                    await client.xadd("firehose:events", replies.to_add(like(number)))
                async with asyncio.timeout(60):
                    while house.slot.get("committed") < 100:
                        await asyncio.sleep(0.001)
                await asyncio.to_thread(first.kill)
                proxy.target = ("127.0.0.1", second.port or 0)
                for number in range(1_001, 2_001):  # there is something to write, however fast the worker was
                    await client.xadd("firehose:events", replies.to_add(like(number)))
                async with asyncio.timeout(60):
                    while "25006" not in house.slot.snapshot().error:
                        await asyncio.sleep(0.01)
                direct = await asyncpg.connect(second.url, timeout=10)
                await direct.execute("SELECT pg_promote()")
                async with asyncio.timeout(60):
                    await house.settled()
                assert await house.ledger() == {"committed": 2_000}
                assert await direct.fetchval("SELECT count(*) FROM likes") == 2_000
                assert await direct.fetchval("SELECT like_count FROM post_aggregations") == 2_000
                await direct.close(timeout=10)
    await client.aclose()


async def test_a_table_locked_by_another_is_waited_for(postgres_url: str, pg: asyncpg.Connection) -> None:
    store = await Store.connect(postgres_url)
    transaction = pg.transaction()
    await transaction.start()
    await pg.execute("LOCK TABLE likes IN ACCESS EXCLUSIVE MODE")
    writing = asyncio.create_task(store.write(batch(1)))
    await asyncio.sleep(0.3)
    assert not writing.done()
    await transaction.rollback()
    async with asyncio.timeout(60):
        assert (await writing).rows == 1
    await store.close()


async def test_who_holds_a_lock_is_told(postgres_url: str, pg: asyncpg.Connection) -> None:
    store = await Store.connect(postgres_url)
    try:
        await store.write(batch(1))
        async with store.connection() as connection:
            await connection.execute("SET lock_timeout = '100ms'")
        await pg.execute("SET application_name = 'psql'")
        async with pg.transaction():
            await pg.execute("SELECT FROM post_aggregations WHERE post_uri = $1 FOR UPDATE", POST)
            pid = await pg.fetchval("SELECT pg_backend_pid()")
            with pytest.raises(StoreUnavailable, match=rf"held by PID {pid} \(psql\) as postgres, idle in transaction"):
                await store.write(batch(2))
        assert (await store.write(batch(2))).rows == 1
    finally:
        await store.close()


@pytest.mark.parametrize("how", ["by a transaction", "an account's row"])
async def test_a_locked_row_holds_up_only_what_touches_it(
    house: House, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(
        "fastworker.store.store.SESSION", SESSION.replace("lock_timeout = '5s'", "lock_timeout = '100ms'")
    )
    others = [POST.replace("2a", "2b"), POST.replace("2a", "2c")]
    did = "did:plc:" + "1".rjust(24, "0").replace("0", "a").replace("1", "b")
    async with house.worker():
        for number in range(1, 11):
            await house.redis.xadd("firehose:events", replies.to_add(like(number)))
        async with asyncio.timeout(60):
            await house.settled()
        by_account = how == "an account's row"
        locked = (
            f"SELECT FROM users WHERE did = '{did}' FOR UPDATE"
            if by_account
            else f"UPDATE post_aggregations SET like_count = like_count WHERE post_uri = '{POST}'"
        )
        await pg.execute(f"BEGIN; {locked}")
        waiting = (
            {"type": "identity", "data": f'{{"did":"{did}","handle":"a.test"}}', "seq": "999"}
            if by_account
            else unlike(1)
        )
        await house.redis.xadd("firehose:events", replies.to_add(waiting))
        for number in range(11, 71):
            of = [POST, *others][number % 3] if not by_account else others[0]
            entry = like(number)
            await house.redis.xadd("firehose:events", replies.to_add(entry | {"data": entry["data"].replace(POST, of)}))
        async with asyncio.timeout(60):
            while await house.pending() != (1 if by_account else 21) or not house.slot.snapshot().locked:
                await asyncio.sleep(0.02)
        assert await pg.fetchval("SELECT count(*) FROM likes") == (70 if by_account else 50)
        assert house.slot.get("state") == State.RUNNING
        assert "A lock is held by PID" in house.slot.snapshot().locked
        async with asyncio.timeout(60):
            while not house.slot.get("oldest_ms"):
                await asyncio.sleep(0.02)
        await pg.execute("ROLLBACK")
        async with asyncio.timeout(60):
            await house.settled()
    assert await house.letters() == []
    likes = await pg.fetchval("SELECT count(*) FROM likes")
    assert likes == (70 if by_account else 69)
    assert await pg.fetchval("SELECT sum(like_count) FROM post_aggregations") == likes


def post(number: int, text: str) -> dict[str, str]:
    entry = like(number)
    data = json.loads(entry["data"])
    [op] = data["ops"]
    record = {"$type": "app.bsky.feed.post", "text": text, "createdAt": "2024-01-01T00:00:00.000Z"}
    op |= {"path": op["path"].replace("like", "post"), "record": record}
    return entry | {"data": json.dumps(data)}


@pytest.mark.parametrize("how", usually(["slow", "locked"], "locked"))
async def test_what_one_row_makes_a_trigger_wait_for_holds_up_no_other(
    house: House, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """For ever: set aside at the third try. A lock is waited for."""
    monkeypatch.setattr("fastworker.worker.slow.PAUSES_S", (0.1,))
    monkeypatch.setattr("fastworker.worker.slow.HURRY", Time(statement_s=5.0, all_s=90))
    monkeypatch.setattr(
        "fastworker.store.store.SESSION", SESSION.replace("lock_timeout = '5s'", "lock_timeout = '100ms'")
    )
    await pg.execute("SELECT pg_advisory_lock(7)")
    act = "RAISE EXCEPTION 'late' USING ERRCODE = '57014'" if how == "slow" else "PERFORM pg_advisory_xact_lock(7)"
    for fault in of_odd(act):
        await pg.execute(fault)
    async with house.worker():
        for number in range(1, 41):
            await house.redis.xadd("firehose:events", replies.to_add(post(number, "odd" if number == 7 else "even")))
        async with asyncio.timeout(60):
            while await pg.fetchval("SELECT count(*) FROM posts") < 39:
                await asyncio.sleep(0.02)
            if how == "slow":
                await house.settled()
            else:
                while await house.pending() > 1 or "no()" not in house.slot.snapshot().locked:
                    await asyncio.sleep(0.02)
                pid = await pg.fetchval("SELECT pg_backend_pid()")
                assert f"A lock is held by PID {pid}" in house.slot.snapshot().locked
                await pg.execute("SELECT pg_advisory_unlock(7)")
                await house.settled()
    letters = [(letter["reason"], letter["seq"]) for letter in await house.letters()]
    assert letters == ([("too_slow", "7")] if how == "slow" else [])
    assert await pg.fetchval("SELECT count(*) FROM posts") == (39 if how == "slow" else 40)


async def test_a_batch_that_takes_too_long_is_told_from_a_database_that_does(
    postgres_url: str, pg: asyncpg.Connection
) -> None:
    store = await Store.connect(postgres_url)
    try:
        for count in (5, 300):  # in one call, and step by step
            for fault in of_odd("PERFORM pg_sleep(600)"):
                await pg.execute(fault)
            made = records("app.bsky.feed.post", count)
            made.changes |= records("app.bsky.feed.post", first=count, text="odd").changes
            statement_s, told = 0.1, ""
            while (
                "no() of this database was at work" not in told
            ):  # a busy machine needs the time for what comes before
                statement_s *= 2
                with pytest.raises(TooSlow) as caught:
                    await store.write(made, time=Time(statement_s, all_s=60))
                told = str(caught.value)
                assert (caught.value.is_contents, caught.value.is_ended) == ("no()" in told, True)
            with pytest.raises(TooSlow) as caught:  # no statement of it is cut off by the server
                await store.write(made, time=Time(statement_s=None, all_s=0.3))
            assert (caught.value.is_contents, caught.value.is_ended) == (False, False)
            async with store.connection() as connection:
                assert await connection.fetchval("SHOW statement_timeout") == "1min"
                assert await connection.fetchval("SHOW lock_timeout") == "5s"
            await pg.execute("DROP FUNCTION no CASCADE")
    finally:
        await store.close()


async def test_a_trigger_that_is_slow_for_all_is_waited_for(
    postgres_url: str, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastworker.store.blame.CONTROL_S", 1)
    await pg.execute(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(600); RETURN NEW; END $$; "
        "CREATE TRIGGER no BEFORE INSERT ON posts FOR EACH ROW EXECUTE FUNCTION no()"
    )
    store = await Store.connect(postgres_url)
    try:
        with pytest.raises(StoreUnavailable, match="no\\(\\) of this database was at work") as caught:
            await store.write(records("app.bsky.feed.post"), time=Time(statement_s=0.2, all_s=60))
        assert not isinstance(caught.value, TooSlow)
    finally:
        await store.close()


async def test_a_locked_table_is_waited_for_by_all(postgres_url: str, pg: asyncpg.Connection) -> None:
    store = await Store.connect(postgres_url)
    try:
        async with store.connection() as connection:
            await connection.execute("SET lock_timeout = '100ms'")
        async with pg.transaction():
            await pg.execute("LOCK TABLE likes IN SHARE MODE")
            with pytest.raises(StoreUnavailable, match="lock timeout") as caught:
                await store.write(batch(1))
        assert not isinstance(caught.value, RowLocked)
    finally:
        await store.close()


# Maintenance goes on beside a piece of it that fails -----------------------------------------------


def reply(number: int, root: str) -> Batch:
    ref = {"uri": root, "cid": CID}
    return records("app.bsky.feed.post", first=number, reply={"root": ref, "parent": ref})


async def maintained(store: Store, *, and_fails: bool = False) -> None:
    with pytest.raises(StoreUnavailable) if and_fails else contextlib.nullcontext():
        while await store.maintain(owed_age_s=0, dead_commit=timedelta()):
            pass


async def test_one_owed_key_that_cannot_be_paid_waits_alone(
    postgres_url: str, pg: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    [root] = records("app.bsky.feed.post").changes
    store = await Store.connect(postgres_url)
    try:
        await store.write(records("app.bsky.feed.post"))
        replies = [next(iter(reply(number, root).changes)) for number in range(2, 40)]
        for number in range(2, 40):
            await store.write(reply(number, root))
        bad = replies[7]
        await pg.execute(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
            "'canceling statement due to statement timeout' USING ERRCODE = '57014'; END $$; "
            "CREATE TRIGGER no BEFORE UPDATE OR DELETE ON thread_contexts FOR EACH ROW "
            f"WHEN (OLD.post_uri = '{bad}') EXECUTE FUNCTION no()"
        )
        await pg.execute("INSERT INTO fastworker.recheck (kind, key) SELECT 'context', unnest($1::text[])", replies)
        await pg.execute("DELETE FROM posts WHERE uri = $1", root)  # as the API does: every context is stale
        gone = "did:plc:zzzzzzzzzzzzzzzzzzzzzzzz"
        await pg.execute(
            "INSERT INTO posts (uri, cid, author_did, text, created_at, commit_seq) "
            f"VALUES ('at://{gone}/app.bsky.feed.post/a', 'c', '{gone}', '', now(), '1')"
        )
        deletion = Batch()
        deletion.put_account(Account(9, gone, active=False, status="deleted", time=None), datetime.now(UTC))
        await store.write(deletion)
        await maintained(store)
        assert [row["post_uri"] for row in await pg.fetch("SELECT post_uri FROM thread_contexts")] == [bad]
        [left] = await pg.fetch("SELECT key, attempts, error, not_before > now() FROM fastworker.recheck")
        assert (left["key"], left["attempts"], left[3]) == (bad, 1, True)
        assert "57014" in left["error"]
        assert bad in caplog.text
        found = await past(postgres_url, "s")
        assert found.late == 1
        assert bad in (found.late_error or "")
        assert not await pg.fetchval("SELECT count(*) FROM posts WHERE author_did = $1", gone)
        await pg.execute("DROP FUNCTION no CASCADE; UPDATE fastworker.recheck SET not_before = now()")
        await maintained(store)
        assert await pg.fetch("SELECT post_uri FROM thread_contexts") == []
        assert await pg.fetch("SELECT FROM fastworker.recheck") == []
    finally:
        await store.close()


async def test_one_record_that_cannot_be_removed_holds_up_no_other(postgres_url: str, pg: asyncpg.Connection) -> None:
    """Of a deleted account, and at the second look at tombstones."""
    store = await Store.connect(postgres_url)
    try:
        likes = records("app.bsky.feed.like", 30)
        await store.write(likes)
        bad = next(iter(likes.changes))
        await pg.execute(
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$; "
            f"CREATE TRIGGER no BEFORE DELETE ON likes FOR EACH ROW WHEN (OLD.uri = '{bad}') EXECUTE FUNCTION no()"
        )
        await pg.execute(  # left behind: their tombstones are there, and so are they
            "INSERT INTO fastworker.versions (uri, seq, deleted) SELECT unnest($1::text[]), 99999, true",
            list(likes.changes),
        )
        deletion = Batch()
        for did in sorted(change.repo for change in records("app.bsky.graph.list", 2).changes.values()):
            deletion.put_account(Account(99, did, active=False, status="deleted", time=None), datetime.now(UTC))
        await store.write(deletion)
        for _ in range(3):
            await store.maintain(owed_age_s=0, dead_commit=timedelta())
        assert [r[0] for r in await pg.fetch("SELECT uri FROM likes")] == [bad]
        [pending] = await pg.fetch(
            "SELECT purge_error, purge_after > now() FROM fastworker.accounts WHERE purge_pending"
        )
        assert ("no" in pending[0], pending[1]) == (True, True)
        await pg.execute("DROP FUNCTION no CASCADE; UPDATE fastworker.accounts SET purge_after = now()")
        await maintained(store)
        assert await pg.fetchval("SELECT count(*) FROM likes") == 0
    finally:
        await store.close()


async def test_a_large_thread_is_recomputed_in_pieces(postgres_url: str, pg: asyncpg.Connection) -> None:
    [root] = records("app.bsky.feed.post").changes
    store = await Store.connect(postgres_url)
    store.writer.crowd = 20
    try:
        await store.write(records("app.bsky.feed.post"))
        ref = {"uri": root, "cid": CID}
        await store.write(records("app.bsky.feed.post", 90, first=2, reply={"root": ref, "parent": ref}))
        assert await pg.fetchval("SELECT count(*) FROM thread_contexts") == 90
        await store.write(records("app.bsky.feed.post", action="delete"))
        assert await pg.fetchval("SELECT count(*) FROM thread_contexts") == 90, "not in the path of an event"
        assert [tuple(row) for row in await pg.fetch("SELECT kind, key FROM fastworker.recheck")] == [("root", root)]
        await maintained(store)
        assert await pg.fetchval("SELECT count(*) FROM thread_contexts") == 0
        assert await pg.fetch("SELECT FROM fastworker.recheck") == []
        for pool in store._pools:
            async with borrow(pool) as connection:
                assert await connection.fetchval("SHOW statement_timeout") == "1min"
                assert await connection.fetch("SELECT FROM pg_cursors WHERE name = 'crowd'") == []
        await pg.execute("DELETE FROM fastworker.versions")
        store.writer.whole_rows_max = 0
        await store.write(records("app.bsky.feed.post", first=1))  # the root comes after its replies
        assert [tuple(row) for row in await pg.fetch("SELECT kind, key FROM fastworker.recheck")] == [("root", root)]
        await maintained(store)
        assert await pg.fetchval("SELECT count(*) FROM thread_contexts") == 90
        assert await pg.fetch("SELECT FROM fastworker.recheck") == []
    finally:
        await store.close()


async def test_a_large_thread_takes_nobody_s_connection(postgres_url: str, pg: asyncpg.Connection) -> None:
    """It may take minutes: 1.6 million replies stopped a process of one connection for 100 s."""
    [root] = records("app.bsky.feed.post").changes
    store = await Store.connect(postgres_url, pool_size=1)
    other = await Store.connect(postgres_url, pool_size=1)  # another process
    store.writer.crowd = other.writer.crowd = 20
    try:
        await store.write(records("app.bsky.feed.post"))
        ref = {"uri": root, "cid": CID}
        await store.write(records("app.bsky.feed.post", 90, first=2, reply={"root": ref, "parent": ref}))
        await store.write(records("app.bsky.feed.post", action="delete"))
        at_it, go_on = asyncio.Event(), asyncio.Event()

        async def wait(step: Step) -> None:
            if step is Step.IN_RECHECK:
                at_it.set()
                await go_on.wait()

        store.writer.on_step = wait
        paying = asyncio.create_task(store.pay())
        async with asyncio.timeout(60):
            await at_it.wait()
            await store.write(records("app.bsky.feed.like"))
            assert await store.maintain(owed_age_s=0, crowds=False) == 0
            assert await other.pay() == 0, "one process does it, the others need not wait"
            assert store.connections == (1, 0)
            go_on.set()
            assert await paying == 1
        assert await pg.fetchval("SELECT count(*) FROM thread_contexts") == 0
        assert await pg.fetch("SELECT FROM fastworker.recheck") == []
        assert await pg.fetch("SELECT FROM pg_locks WHERE locktype = 'advisory' AND classid = x'66776377'::int") == []
    finally:
        await store.close()
        await other.close()


async def test_one_horizon_covers_many_pieces(postgres_url: str, pg: asyncpg.Connection) -> None:
    """The notice of a horizon takes two minutes: a piece of tombstones each would be 40 a second."""
    await pg.execute(
        "INSERT INTO fastworker.versions (uri, seq, deleted, written_at) SELECT 'at://' || n, 1, true, "
        "now() - interval '9 days' + n * interval '1 second' FROM generate_series(1, 70000) AS n"
    )
    await pg.execute(
        "INSERT INTO fastworker.progress (stream, consumer, entry_id) VALUES ('s', 'c', $1)", "9999999999999-0"
    )
    store = await Store.connect(postgres_url)
    try:
        assert await store.prune() == 0, "announced"
        assert await store.prune() == 0, "the notice"
        gone = 0
        while piece := await store.prune(notice=timedelta()):
            gone += piece
        assert gone == 70_000
    finally:
        await store.close()


async def test_a_connection_that_hangs_without_closing_is_given_up(
    postgres_server: EmbeddedPostgres, postgres_url: str, pg: asyncpg.Connection
) -> None:
    """As behind a firewall that forgot the connection: no byte comes, no end either."""
    async with Proxy(str(postgres_server.socket_dir / ".s.PGSQL.5432")) as proxy:
        through = f"postgresql://postgres@127.0.0.1:{proxy.port}/{await pg.fetchval('SELECT current_database()')}"
        store = await Store.connect(through, command_timeout_s=0.5, connect_timeout_s=0.5)
        await store.write(batch(1))
        proxy.hold()
        started = asyncio.get_running_loop().time()
        with pytest.raises(StoreUnavailable):
            await store.write(batch(2))
        with pytest.raises(StoreUnavailable):  # nor does a new one answer
            await store.write(batch(2))
        assert asyncio.get_running_loop().time() - started < 15
        proxy.release()
        async with asyncio.timeout(60):
            while True:
                try:
                    await store.write(batch(2))
                    break
                except StoreUnavailable:
                    await asyncio.sleep(0.1)
        await store.close()
    assert await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", POST) == 2


@pytest.mark.parametrize("held", [False, True], ids=["drained", "cut off"])
async def test_a_lease_is_not_given_back_while_a_commit_may_be_on_its_way(
    postgres_server: EmbeddedPostgres, redis_url: str, pg: asyncpg.Connection, held: bool
) -> None:
    """Whoever claimed its entries at once could be done before that commit, and nobody would look back after it."""
    async with Proxy(str(postgres_server.socket_dir / ".s.PGSQL.5432")) as proxy:
        database = await pg.fetchval("SELECT current_database()")
        client = connect(redis_url)
        house = House(client, redis_url, f"postgresql://postgres@127.0.0.1:{proxy.port}/{database}")
        async with house.worker(drain_s=1.0):  # enough to begin the write, whatever else the machine does
            await client.xadd("firehose:events", replies.to_add(like(1)))
            await house.settled()
            if held:
                proxy.hold()
                await client.xadd("firehose:events", replies.to_add(like(2)))
                async with asyncio.timeout(60):
                    while not await house.pending():
                        await asyncio.sleep(0.01)
                asyncio.get_running_loop().call_later(4.0, proxy.release)  # long after the drain was given up
        left = [name async for name in client.scan_iter("fastworker:consumer:*")]
        assert len(left) == held, "of two pipelines the one that was writing keeps its lease"
        await client.aclose()


async def test_a_session_whose_owner_vanished_lets_its_locks_go(postgres_url: str, pg: asyncpg.Connection) -> None:
    store = await Store.connect(postgres_url)
    async with store.connection() as connection:
        value = await connection.fetchval("SHOW idle_in_transaction_session_timeout")
    await store.close()
    assert value == "20s"


SETTINGS = {
    "default_transaction_isolation": "'serializable'",
    "default_transaction_deferrable": "on",
    "DateStyle": "'German, DMY'",
    "TimeZone": "'Asia/Tokyo'",
    "IntervalStyle": "'sql_standard'",
    "standard_conforming_strings": "off",
    "bytea_output": "escape",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "search_path": "evil, public, pg_catalog",
    "enable_indexscan": "off",
    "work_mem": "'64kB'",
    "idle_session_timeout": "'300ms'",
    "idle_in_transaction_session_timeout": "'1ms'",
    "lock_timeout": "'5ms'",
    "row_security": "off",
}


@pytest.mark.parametrize("policy", ["FOR ALL USING (author_did LIKE '%b') WITH CHECK (true)", ""], ids=["some", "none"])
async def test_rows_that_a_policy_hides_are_not_taken_for_absent(
    postgres_url: str, pg: asyncpg.Connection, role: str, policy: str
) -> None:
    """Row-level security: a delete would find nothing, and be acknowledged."""
    store = await Store.connect(postgres_url.replace("postgres@", f"{role}@"))
    try:
        await store.write(records("app.bsky.feed.post", 3))
        await pg.execute("ALTER TABLE posts ENABLE ROW LEVEL SECURITY")
        if policy:
            await pg.execute(f"CREATE POLICY hidden ON posts {policy}")
        deletes = records("app.bsky.feed.post", 3, action="delete")
        with pytest.raises(StoreUnavailable, match="ALTER TABLE posts DISABLE ROW LEVEL SECURITY"):
            await store.write(deletes)
        await pg.execute("ALTER TABLE posts DISABLE ROW LEVEL SECURITY")
        await store.write(deletes)
    finally:
        await store.close()
    assert not await pg.fetchval("SELECT count(*) FROM posts")


async def test_settings_of_a_role_change_nothing(postgres_url: str, pg: asyncpg.Connection, role: str) -> None:
    await pg.execute(
        "CREATE SCHEMA evil; CREATE TABLE evil.posts (uri text); "
        "CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE sql AS $$ SELECT '1999-01-01'::timestamptz $$; "
        "CREATE FUNCTION evil.unnest(anyarray) RETURNS SETOF anyelement LANGUAGE sql AS 'SELECT $1[1]'"
    )
    await pg.execute(f"GRANT ALL ON SCHEMA evil TO {role}")
    for name, value in SETTINGS.items():
        await pg.execute(f"ALTER ROLE {role} SET {name} = {value}")
    url = postgres_url.replace("postgres@", f"{role}@")
    async with open_schema(url) as admin:  # what a start looks at
        assert "posts" in (await admin.read()).columns
    assert await past(url, "firehose:events")
    store = await Store.connect(url)
    try:
        for count in (5, 300):
            await store.write(records("app.bsky.feed.post", count, text="é 😀 it's \\\\ok"))
        await store.write(records("app.bsky.feed.like", 300))
        await asyncio.sleep(0.4)  # longer than a session may idle there
        await store.write(records("app.bsky.feed.like", 3, action="delete"))
        while await store.maintain(owed_age_s=0):
            pass
        assert store.connections[0] == 1
    finally:
        await store.close()
    rows = await pg.fetch("SELECT DISTINCT text, created_at::text, indexed_at::text FROM posts")
    assert [tuple(row) for row in rows] == [("é 😀 it's \\\\ok", "2023-11-14 22:15:20", "2023-11-14 22:15:20")]
    counts = "SELECT like_count, reply_count FROM post_aggregations WHERE post_uri = $1"
    assert tuple(await pg.fetchrow(counts, POST) or ()) == (297, 300)
    assert await pg.fetchval("SELECT count(*) FROM users WHERE created_at > '2020-01-01'") == 300


@pytest.mark.parametrize(
    ("value", "wish", "then"),
    [("off", "on", "on"), ("off", "keep", "off"), ("local", "on", "local"), ("remote_apply", "on", "remote_apply")],
)
async def test_what_is_acknowledged_is_on_disk(
    postgres_url: str, pg: asyncpg.Connection, role: str, value: str, wish: Literal["on", "keep"], then: str
) -> None:
    await pg.execute(f"ALTER ROLE {role} SET synchronous_commit = {value}")
    store = await Store.connect(postgres_url.replace("postgres@", f"{role}@"), rules=Rules(synchronous_commit=wish))
    try:
        async with store.connection() as connection:
            assert await connection.fetchval("SHOW synchronous_commit") == then
    finally:
        await store.close()


@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_pgbouncer(server_dir: Path, mode: str) -> None:
    """Session mode works like a server. Transaction mode cannot keep a session's settings: refused, with a sentence."""
    pgbouncer = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if pgbouncer is None:
        pytest.skip("pgbouncer is not installed (Debian's package of that name)")
    with PostgresUnderTest(server_dir, durable=False, port=free_port()) as server:
        url = URL(server.url)
        await migrate(str(url))
        port = free_port()
        ini = server_dir / "pgbouncer.ini"
        users = server_dir / "users.txt"
        users.write_text('"postgres" ""\n')
        ini.write_text(
            f"[databases]\n* = host=127.0.0.1 port={url.port} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {port}\nauth_type = trust\nauth_file = {users}\npool_mode = {mode}\n"
            "ignore_startup_parameters = extra_float_digits\nunix_socket_dir =\n"
        )
        server_dir.chmod(0o711)
        for file in (ini, users):
            file.chmod(0o644)
        asked = [pgbouncer, "-q", str(ini)] if os.getuid() else [pgbouncer, "-q", "-u", "nobody", str(ini)]
        process = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            through = str(url.with_port(port))
            async with asyncio.timeout(60):
                while True:
                    try:
                        probe = await asyncpg.connect(through, timeout=2, statement_cache_size=0)
                        await probe.close(timeout=2)
                        break
                    except (OSError, asyncpg.PostgresError):
                        assert process.poll() is None
                        await asyncio.sleep(0.05)
            if mode == "transaction":
                for size in (1, 2):  # also where there is one connection only, whose session cannot be compared
                    with pytest.raises(Unreachable, match="session mode"):
                        store = await Store.connect(through, pool_size=size)
                        try:
                            await store.write(batch(1))
                        finally:
                            await store.close()
                return
            store = await Store.connect(through, pool_size=2)
            await asyncio.gather(*(store.write(batch(number)) for number in range(1, 9)))
            await store.close()
            direct = await asyncpg.connect(server.url, timeout=10)
            assert await direct.fetchval("SELECT like_count FROM post_aggregations") == 8
            await direct.close(timeout=10)
        finally:
            process.terminate()
            process.wait(10)
