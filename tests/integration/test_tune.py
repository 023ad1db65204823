"""`fastworker migrate --tune` on a real server: what is printed, applied, kept, undone and refused."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from fastworker.commands.tune import STORAGE, report, tune, untune
from fastworker.commands.verify import VerifyOptions, verify
from fastworker.edge.embedded import EmbeddedPostgres
from fastworker.errors import ExitCode
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.store.migrate import check, packaged
from fastworker.store.rules import DEFAULTS
from fastworker.store.schema_admin import SchemaRefused
from fastworker.store.store import Store
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit
from tests.rig.histories import entry_ms, random_history, to_entry

ROOT = Path(__file__).resolve().parents[2]
PREFIXES = {
    "idx_blocks_blocker",
    "idx_bookmarks_user_did",
    "idx_feed_items_originator",
    "idx_follows_follower",
    "idx_labels_subject",
    "idx_likes_user_did",
    "idx_list_blocks_blocker",
    "idx_list_items_list",
    "idx_notifications_recipient",
    "idx_post_viewer_states_post",
    "idx_quotes_post",
    "idx_reposts_user_did",
    "idx_verifications_subject",
}
MIGRATED = {"fastworker.debts", "fastworker.notes"}  # migrations gave these their parameters
COUNTERS = {f"idx_post_aggregations_{name}_count" for name in ("like", "repost", "reply", "bookmark", "quote")}


def nothing(_: str) -> None:
    pass


async def parameters(pg: asyncpg.Connection) -> dict[str, set[str]]:
    rows = await pg.fetch(
        "SELECT oid::regclass::text, reloptions FROM pg_class WHERE reloptions IS NOT NULL AND relkind = 'r' "
        "AND relnamespace IN ('public'::regnamespace, 'fastworker'::regnamespace)"
    )
    return {name: set(options) for name, options in rows if name not in MIGRATED}


async def indexes(pg: asyncpg.Connection) -> dict[str, str]:
    """Definitions of the valid ones."""
    rows = await pg.fetch(
        "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index WHERE indisvalid "
        "AND indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)"
    )
    return {row[0]: row[1] for row in rows}


def advised() -> dict[str, set[str]]:
    return {
        table: {f"{name}={value}" for name, value in advice.parameters.items()}
        for advice in STORAGE
        for table in advice.tables
    }


async def write(url: str, seed: int) -> None:
    """A random history, as the worker writes it."""
    store = await Store.connect(url)
    try:
        events = random_history(seed, 300).events
        for start in range(0, len(events), 50):
            batch = Batch()
            for event in events[start : start + 50]:
                decoded = decode_entry(to_entry(event))
                if isinstance(decoded, Commit):
                    batch.put(map_commit(decoded, entry_ms(event)))
            await store.write(batch)
        while await store.maintain(owed_age_s=0):
            pass
    finally:
        await store.close()


async def test_tables_are_tuned_once_reported_and_undone(postgres_url: str, pg: asyncpg.Connection) -> None:
    before = await indexes(pg)
    said: list[str] = []
    assert not await report(postgres_url, "tables", said.append)
    words = "\n".join(said)
    assert "ALTER TABLE public.post_aggregations SET (fillfactor = 80" in words
    assert 'DROP INDEX CONCURRENTLY IF EXISTS public."idx_likes_user_did"' in words
    assert "max_wal_size is" in words
    assert await parameters(pg) == {}, "a report changes nothing"

    await tune(postgres_url, "tables", nothing)
    assert await parameters(pg) == advised()
    assert await indexes(pg) == before, "indexes go only when they are named"
    assert await check(postgres_url) == []
    said.clear()
    assert await report(postgres_url, "tables", said.append)
    assert not await report(postgres_url, "indexes", nothing)
    stamp = await pg.fetch("SELECT * FROM fastworker.tuning ORDER BY kind, table_name, name")
    said.clear()
    await tune(postgres_url, "tables", said.append)
    assert not [line for line in said if line.startswith("applied")]
    assert await pg.fetch("SELECT * FROM fastworker.tuning ORDER BY kind, table_name, name") == stamp

    assert not await untune(postgres_url, nothing, only_check=True)
    assert await parameters(pg) == advised()
    await untune(postgres_url, nothing, only_check=False)
    assert await parameters(pg) == {}
    assert await pg.fetchval("SELECT to_regclass('fastworker.tuning')") is None
    assert await untune(postgres_url, nothing, only_check=True)


async def test_indexes_go_and_come_back_as_they_were(postgres_url: str, pg: asyncpg.Connection) -> None:
    before = await indexes(pg)
    await tune(postgres_url, "indexes", nothing)
    assert set(before) - set(await indexes(pg)) == PREFIXES | COUNTERS
    assert await report(postgres_url, "indexes", nothing)
    assert await check(postgres_url) == [], "the worker starts on it"
    await untune(postgres_url, nothing, only_check=False)
    assert await indexes(pg) == before
    assert await parameters(pg) == {}


async def test_what_others_set_is_theirs(postgres_url: str, pg: asyncpg.Connection) -> None:
    await pg.execute("ALTER TABLE likes SET (autovacuum_vacuum_scale_factor = 0.5)")
    await pg.execute("ALTER TABLE posts SET (autovacuum_vacuum_scale_factor = 0.02)")  # as we would
    said: list[str] = []
    await tune(postgres_url, "tables", said.append)
    assert any("likes: autovacuum_vacuum_scale_factor is 0.5" in line for line in said)
    assert "autovacuum_vacuum_scale_factor=0.5" in (await parameters(pg))["likes"]
    await pg.execute("ALTER TABLE reposts SET (autovacuum_vacuum_scale_factor = 0.3)")  # after us
    await untune(postgres_url, nothing, only_check=False)
    assert await parameters(pg) == {
        "likes": {"autovacuum_vacuum_scale_factor=0.5"},
        "posts": {"autovacuum_vacuum_scale_factor=0.02"},
        "reposts": {"autovacuum_vacuum_scale_factor=0.3"},
    }


async def test_figures_of_an_earlier_release_are_replaced(postgres_url: str, pg: asyncpg.Connection) -> None:
    await tune(postgres_url, "tables", nothing)
    await pg.execute("ALTER TABLE likes SET (autovacuum_analyze_scale_factor = 0.07)")
    await pg.execute(
        "UPDATE fastworker.tuning SET value = '0.07' WHERE table_name = 'likes' "
        "AND name = 'autovacuum_analyze_scale_factor'"
    )
    assert not await report(postgres_url, "tables", nothing)
    await tune(postgres_url, "tables", nothing)
    assert await parameters(pg) == advised()


async def test_only_repeated_indexes_count_as_such(postgres_url: str, pg: asyncpg.Connection) -> None:
    """Another order, operator class or predicate serves other look-ups; a unique index is a promise."""
    await pg.execute(
        "CREATE INDEX other_class ON likes (user_did varchar_pattern_ops);"
        "CREATE INDEX other_order ON likes (user_did DESC);"
        "CREATE INDEX with_columns ON likes (user_did) INCLUDE (created_at);"
        "CREATE INDEX some_rows ON likes (user_did) WHERE via IS NULL;"
        "CREATE INDEX expression ON likes (lower(user_did));"
        "CREATE UNIQUE INDEX promise ON likes (user_did, post_uri, uri);"
        "CREATE UNIQUE INDEX twice ON likes (user_did, post_uri);"
        "CREATE INDEX copy_a ON likes (created_at); CREATE INDEX copy_b ON likes (created_at);"
    )
    before = await indexes(pg)
    await tune(postgres_url, "indexes", nothing)
    gone = set(before) - set(await indexes(pg))
    assert gone == PREFIXES | COUNTERS | {"copy_b"}


async def test_interrupted_and_remade_indexes(postgres_url: str, pg: asyncpg.Connection) -> None:
    before = await indexes(pg)
    await tune(postgres_url, "indexes", nothing)
    # drizzle-kit push makes one again; a creation of another was interrupted and left it invalid
    await pg.execute(before["idx_likes_user_did"])
    await pg.execute(before["idx_quotes_post"])
    await pg.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_quotes_post'::regclass")
    said: list[str] = []
    assert not await report(postgres_url, "indexes", said.append)
    assert "it was dropped before and is there again" in "\n".join(said)
    await untune(postgres_url, nothing, only_check=False)
    assert await indexes(pg) == before
    # and the other way: both are dropped again
    await tune(postgres_url, "indexes", nothing)
    await pg.execute(before["idx_likes_user_did"])
    await tune(postgres_url, "indexes", nothing)
    assert set(before) - set(await indexes(pg)) == PREFIXES | COUNTERS


@pytest.fixture
def other_role(postgres_url: str, postgres_server: EmbeddedPostgres) -> Iterator[tuple[str, str]]:
    """A role with every right on the rows and none on the tables, and its URL."""
    role = "writer_" + postgres_url.partition("?")[0].rpartition("/")[2]

    def execute(statement: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(postgres_url, timeout=10)
            await connection.execute(statement)
            await connection.close(timeout=10)

        asyncio.run(run())

    execute(
        f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA fastworker TO {role};"
        f"GRANT ALL ON ALL TABLES IN SCHEMA public, fastworker TO {role}"
    )
    assert postgres_server.is_running()
    yield role, postgres_url.replace("postgres@", f"{role}@")
    execute(f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}; DROP ROLE {role}")


def test_refused_without_ownership(postgres_url: str, other_role: tuple[str, str]) -> None:
    role, url = other_role

    async def run() -> None:
        pg = await asyncpg.connect(postgres_url, timeout=10)
        with pytest.raises(SchemaRefused) as refused:
            await tune(url, "indexes", nothing)
        assert f"The role {role} does not own the table" in str(refused.value)
        assert "DATABASE_URL of postgres or of a superuser" in str(refused.value)
        assert refused.value.exit_code == ExitCode.NO
        said: list[str] = []
        assert not await report(url, "tables", said.append)
        assert "does not own" in said[-1]
        # an owner who may not remember is told, too; once granted it works, without superuser
        for (table,) in await pg.fetch(
            "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND relname !~ '^pg_' AND relnamespace IN ('public'::regnamespace, 'fastworker'::regnamespace)"
        ):
            await pg.execute(f"ALTER TABLE {table} OWNER TO {role}")
        with pytest.raises(SchemaRefused, match="GRANT USAGE, CREATE ON SCHEMA fastworker"):
            await tune(url, "tables", nothing)
        assert await parameters(pg) == {}
        before = await indexes(pg)
        await pg.execute(f"GRANT CREATE ON SCHEMA fastworker TO {role}")
        await pg.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # the default from PostgreSQL 15 on
        with pytest.raises(SchemaRefused, match="GRANT CREATE ON SCHEMA public"):
            await tune(url, "indexes", nothing)
        await pg.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
        await tune(url, "indexes", nothing)
        assert await parameters(pg) == advised()
        await untune(url, nothing, only_check=False)
        assert await indexes(pg) == before
        await pg.close()

    asyncio.run(run())


async def test_without_the_schema_it_says_migrate(empty_postgres_url: str) -> None:
    with pytest.raises(SchemaRefused, match="run `fastworker migrate` first"):
        await tune(empty_postgres_url, "tables", nothing)


async def test_a_vacuum_in_the_way_is_named(
    postgres_url: str, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastworker.store.schema_admin.LOCK_WAIT", "200ms")
    async with pg.transaction():
        await pg.execute("LOCK TABLE likes IN SHARE UPDATE EXCLUSIVE MODE")
        with pytest.raises(SchemaRefused, match=r"No storage parameter was changed; a VACUUM, .* was in the way"):
            await tune(postgres_url, "tables", nothing)
    assert await parameters(pg) == {}


async def test_a_drop_that_waited_in_vain_is_finished_or_undone(
    postgres_url: str, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long transaction that has read the table keeps DROP INDEX CONCURRENTLY waiting."""
    before = await indexes(pg)
    for end in ("tune", "untune"):
        async with pg.transaction():
            await pg.fetch("SELECT count(*) FROM likes")
            with monkeypatch.context() as patch:  # not afterwards: an autovacuum may be in the way for a moment
                patch.setattr("fastworker.store.tuning.TRANSACTIONS_WAIT", "200ms")
                with pytest.raises(SchemaRefused, match="idx_likes_user_did stays, or is left invalid"):
                    await tune(postgres_url, "indexes", nothing)
        if end == "tune":
            await tune(postgres_url, "indexes", nothing)
            assert set(before) - set(await indexes(pg)) == PREFIXES | COUNTERS
        await untune(postgres_url, nothing, only_check=False)
        assert await indexes(pg) == before


async def test_the_worker_writes_on_while_it_is_tuned(postgres_url: str, pg: asyncpg.Connection) -> None:
    """The law holds on tuned tables, and counter updates become HOT: that is what it is for."""

    async def hot() -> tuple[int, int]:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE 'fastworker%'"
        async with asyncio.timeout(30):  # a session counts when it ends, a moment after it was closed
            while await pg.fetchval(others):
                await asyncio.sleep(0.02)
        if pg.get_server_version().major < 15:
            await asyncio.sleep(2)  # a collector counts there, a while later
        row = await pg.fetchrow(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'post_aggregations'"
        )
        assert row is not None
        return row["n_tup_upd"], row["n_tup_hot_upd"]

    await write(postgres_url, 1)
    updates, were_hot = await hot()
    assert updates > 0
    assert were_hot < updates / 4
    await asyncio.gather(write(postgres_url, 2), tune(postgres_url, "indexes", nothing))
    updates, were_hot = await hot()
    await write(postgres_url, 3)
    after = await hot()
    assert after[1] - were_hot > (after[0] - updates) / 2
    await asyncio.gather(write(postgres_url, 4), untune(postgres_url, nothing, only_check=False))
    options = VerifyOptions(False, (), 10_000, 0.0, None, True)
    assert await verify(postgres_url, DEFAULTS, options, asyncio.Event()) == ExitCode.DONE


def test_the_command(postgres_url: str) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastworker", "migrate", *args],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "DATABASE_URL": postgres_url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert run("--tune", "--untune").returncode == ExitCode.USAGE
    before = run("--tune", "--check")
    assert before.returncode == ExitCode.NO
    assert "why: " in before.stdout
    assert "applied ALTER TABLE public.likes SET" in run("--tune").stdout
    after = run("--check", "--tune")
    assert after.returncode == ExitCode.DONE
    assert "In force: " in after.stdout
    assert "DROP INDEX CONCURRENTLY" in after.stdout
    assert "applied ALTER TABLE public.likes RESET" in run("--untune").stdout


def test_every_tuned_table_is_of_the_schema() -> None:
    sql = "".join(migration.sql for migration in packaged())
    for advice in STORAGE:
        for table in advice.tables:
            assert f"CREATE TABLE {table} (" in sql
