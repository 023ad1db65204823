"""PostgreSQL in every bad state: the worker waits, says why, and goes on by itself; nothing is lost or set aside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from yarl import URL

from fastworker.edge.embedded import EmbeddedPostgres, free_port
from fastworker.errors import StoreUnavailable, Unreachable
from fastworker.process.board import State
from fastworker.store.migrate import migrate
from fastworker.store.store import Store
from fastworker.stream.client import connect
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit
from tests.e2e.house import House
from tests.rig.proxy import Proxy
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
        await house.redis.xadd("firehose:events", like(1))
        async with asyncio.timeout(60):
            await house.settled()
        await fault(pg)
        for number in range(2, 60):
            await house.redis.xadd("firehose:events", like(number))
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


def batch(number: int) -> Batch:
    from fastworker.event.entry import decode_entry

    made = Batch()
    fields = {name.encode(): value.encode() for name, value in like(number).items()}
    made.put(map_commit(decode_entry(fields), 1_700_000_000_000))
    return made


async def test_backends_that_are_terminated_and_statements_that_are_cancelled(
    house: House, pg: asyncpg.Connection
) -> None:
    """At any moment of a flush: in the prologue, in the main transaction, in a commit, between two of them."""
    r = random.Random(5)
    added = 0
    errors = set()
    async with house.worker():
        for _ in range(60):
            pipe = house.redis.pipeline(transaction=False)
            for number in range(added + 1, added + 21):
                pipe.xadd("firehose:events", like(number))
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
        with pytest.raises(StoreUnavailable, match="gone"):
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
                    await client.xadd("firehose:events", like(number))
                async with asyncio.timeout(60):
                    while house.slot.get("committed") < 100:
                        await asyncio.sleep(0.001)
                await asyncio.to_thread(first.kill)
                proxy.target = ("127.0.0.1", second.port or 0)
                for number in range(1_001, 2_001):  # there is something to write, however fast the worker was
                    await client.xadd("firehose:events", like(number))
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
            await client.xadd("firehose:events", like(1))
            await house.settled()
            if held:
                proxy.hold()
                await client.xadd("firehose:events", like(2))
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
