"""`fastworker migrate` against real databases: empty, adopted, broken, ahead of us, raced and killed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import textwrap
from pathlib import Path

import asyncpg
import pytest

from fastworker.commands import check as checks
from fastworker.commands import grants as rights
from fastworker.edge.embedded import EmbeddedPostgres
from fastworker.errors import ConfigError, ExitCode, FastworkerError, Unreachable
from fastworker.store import migrate as module
from fastworker.store import routines
from fastworker.store.admin import facts
from fastworker.store.migrate import Migration, SchemaRefused, check, migrate, packaged
from fastworker.store.schema_admin import open_schema
from tests.servers import connected

ROOT = Path(__file__).resolve().parents[2]
NAMES = [migration.name for migration in packaged()]
DONE = [*NAMES, *(f"routine {routine.name}" for routine in routines.packaged())]
CONTRACT_SQL = packaged()[0].sql


async def execute(url: str, *statements: str) -> None:
    async with connected(url) as connection:
        for statement in statements:
            await connection.execute(statement)


async def fetch(url: str, statement: str) -> list[asyncpg.Record]:
    async with connected(url) as connection:
        return await connection.fetch(statement)


async def public_fingerprint(url: str) -> list[tuple[str, ...]]:
    """Everything in public that a migration could touch, by oid: a table made again has another."""
    return [
        tuple(row)
        for row in await fetch(
            url,
            "SELECT oid::text, relname, relkind::text FROM pg_class WHERE relnamespace = 'public'::regnamespace "
            "UNION ALL SELECT oid::text, proname, 'p' FROM pg_proc WHERE pronamespace = 'public'::regnamespace "
            "ORDER BY 2",
        )
    ]


async def test_empty_database_gets_everything_once(empty_postgres_url: str) -> None:
    assert await check(empty_postgres_url) == [f"{name} is not applied: run `fastworker migrate`." for name in NAMES]
    assert await migrate(empty_postgres_url) == DONE
    assert await check(empty_postgres_url) == []
    assert await migrate(empty_postgres_url) == []


async def test_parsed_expectations_are_what_postgres_made(postgres_url: str) -> None:
    """The patterns that read our SQL files find all of it: else a missing column would go unnoticed."""
    async with open_schema(postgres_url) as admin:
        schema = await admin.read()
    columns: dict[str, dict[str, str]] = {}
    uniques: dict[str, set[frozenset[str]]] = {}
    for table in (table for migration in packaged() for table in module._expected(migration.sql)):
        columns.setdefault(table.name, {}).update(table.columns)
        if table.uniques:
            uniques.setdefault(table.name, set()).update(table.uniques)
    assert columns == {name: found for name, found in schema.columns.items() if name != "fastworker.migrations"}
    assert uniques == {name: found for name, found in schema.uniques.items() if name != "fastworker.migrations"}


async def test_search_vector_follows_the_user(pg: asyncpg.Connection) -> None:
    await pg.execute("INSERT INTO users (did, handle, display_name) VALUES ('did:web:a', 'a.test', 'Running Ünal')")
    find = "SELECT count(*) FROM users WHERE search_vector @@ plainto_tsquery('english', $1)"
    assert await pg.fetchval(find, "runs ünal") == 1
    await pg.execute("UPDATE users SET description = 'gardens'")
    assert await pg.fetchval(find, "garden") == 1


async def test_contract_details(pg: asyncpg.Connection) -> None:
    """Names that others rely on: constraint and unique index names, defaults, the two cascades."""
    indexes = {row[0] for row in await pg.fetch("SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")}
    assert {
        "unique_like_user_post",
        "unique_repost_user_post",
        "unique_follow_follower_following",
        "unique_block_blocker_blocked",
        "unique_bookmark_user_post",
        "unique_list_item",
        "unique_list_block",
        "unique_quote_post_quoted",
        "unique_verification_subject",
        "notifications_uri_unique",
        "firehose_cursor_service_unique",
        "idx_post_viewer_states_post_viewer",
    } <= indexes
    await pg.execute("INSERT INTO thread_gates (post_uri, owner_did) VALUES ('at://a', 'did:web:a')")
    gate = await pg.fetchrow(
        "SELECT allow_mentions, allow_following, allow_list_members, allow_list_uris FROM thread_gates"
    )
    assert gate is not None
    assert tuple(gate) == (True, True, False, "[]")
    await pg.execute("INSERT INTO labels VALUES ('at://l', 'did:web:a', 'at://a', 'spam', false, now())")
    await pg.execute("INSERT INTO label_events (label_uri, action) VALUES ('at://l', 'created')")
    await pg.execute("DELETE FROM labels")
    assert await pg.fetchval("SELECT count(*) FROM label_events") == 0


async def test_database_of_the_appview_is_adopted_untouched(empty_postgres_url: str) -> None:
    await execute(
        empty_postgres_url, CONTRACT_SQL, "CREATE TABLE sessions (id text)", "ALTER TABLE lists ALTER name TYPE text"
    )
    before = await public_fingerprint(empty_postgres_url)
    assert await check(empty_postgres_url) == [f"{name} is not applied: run `fastworker migrate`." for name in NAMES]
    assert await migrate(empty_postgres_url) == [f"{NAMES[0]} (adopted)", *DONE[1:]]
    assert await public_fingerprint(empty_postgres_url) == before
    assert await check(empty_postgres_url) == []


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("DROP TABLE quotes", "Table quotes is missing: let the AppView make its schema"),
        ("DROP TABLE users CASCADE", "Table users is missing: "),
        ("ALTER TABLE likes DROP via", "Column likes.via (jsonb) is missing: "),
        ("ALTER TABLE posts ALTER cid TYPE varchar(64)", "Column posts.cid is character varying(64), expected"),
        ("ALTER TABLE posts ALTER created_at TYPE timestamptz", "Column posts.created_at is timestamp with time zone"),
        (
            "DROP INDEX unique_like_user_post",
            "Table likes has no unique index on (post_uri, user_did): CREATE UNIQUE INDEX",
        ),
        (
            "ALTER TABLE posts DROP CONSTRAINT posts_pkey",
            "Table posts has no unique index on (uri): CREATE UNIQUE INDEX",
        ),
    ],
)
async def test_incomplete_database_is_refused_and_says_what(empty_postgres_url: str, damage: str, found: str) -> None:
    await execute(empty_postgres_url, CONTRACT_SQL, damage)
    assert any(found in sentence for sentence in await check(empty_postgres_url))
    with pytest.raises(SchemaRefused) as refused:
        await migrate(empty_postgres_url)
    assert found in str(refused.value)
    assert refused.value.exit_code == ExitCode.NO
    assert await fetch(empty_postgres_url, "SELECT 1 FROM pg_namespace WHERE nspname = 'fastworker'") == []


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (
            "DROP INDEX unique_like_user_post",
            "Table likes has no unique index on (post_uri, user_did): CREATE UNIQUE INDEX",
        ),
        ("DROP TABLE fastworker.versions", "Table fastworker.versions is missing: restore"),
    ],
)
async def test_later_damage_is_reported(postgres_url: str, damage: str, found: str) -> None:
    await execute(postgres_url, damage)
    sentences = await check(postgres_url)
    assert len(sentences) == 1
    assert found in sentences[0]


ODD = (  # what somebody makes of our tables, what is told to do, and that as it is done
    ("CREATE RULE away AS ON INSERT TO likes DO INSTEAD NOTHING", "DROP RULE away ON likes", ""),
    (
        "ALTER TABLE posts RENAME TO kept; CREATE VIEW posts AS SELECT * FROM kept",
        "ALTER VIEW posts RENAME TO another name, then give the table its name back (ALTER TABLE ... RENAME TO posts)",
        "ALTER VIEW posts RENAME TO another; ALTER TABLE kept RENAME TO posts",
    ),
    (
        "ALTER TABLE blocks RENAME TO old; CREATE MATERIALIZED VIEW blocks AS SELECT * FROM old",
        "ALTER MATERIALIZED VIEW blocks RENAME TO another name",
        "ALTER MATERIALIZED VIEW blocks RENAME TO more; ALTER TABLE old RENAME TO blocks",
    ),
    (
        "ALTER TABLE lists DROP COLUMN name; ALTER TABLE lists ADD COLUMN name text GENERATED ALWAYS AS (cid) STORED",
        "ALTER TABLE lists ALTER COLUMN name DROP EXPRESSION",
        "",
    ),
    ("CREATE TABLE reposts_old () INHERITS (reposts)", "ALTER TABLE reposts_old NO INHERIT reposts", ""),
    (
        "CREATE PUBLICATION everything FOR ALL TABLES",
        "ALTER TABLE post_viewer_states REPLICA IDENTITY USING INDEX idx_post_viewer_states_post_viewer",
        "",
    ),
    (
        "ALTER TABLE follows REPLICA IDENTITY NOTHING",
        "ALTER TABLE follows REPLICA IDENTITY USING INDEX follows_pkey",
        "",
    ),
    (
        "ALTER TABLE quotes DROP CONSTRAINT quotes_pkey; ALTER TABLE quotes ADD PRIMARY KEY (uri) DEFERRABLE",
        "CREATE UNIQUE INDEX CONCURRENTLY ON quotes (uri)",
        "ALTER TABLE quotes REPLICA IDENTITY FULL; CREATE UNIQUE INDEX ON quotes (uri)",
    ),
)


async def test_what_somebody_made_of_our_tables_is_named_with_its_cure(
    postgres_url: str, pg: asyncpg.Connection
) -> None:
    await pg.execute("; ".join(fault for fault, _, _ in ODD))
    # Nobody's concern: a view and a column of the API's, ids that are given by nobody.
    await pg.execute(
        "CREATE VIEW trending AS SELECT 1; ALTER TABLE likes ADD COLUMN n int GENERATED ALWAYS AS (1) STORED; "
        "ALTER TABLE notifications ALTER id DROP DEFAULT; ALTER TABLE notifications ALTER id ADD GENERATED ALWAYS AS IDENTITY"
    )
    problems = await check(postgres_url)
    assert [told for _, told, _ in ODD if not any(told in problem for problem in problems)] == []
    with pytest.raises(SchemaRefused, match="rule away"):
        await migrate(postgres_url)
    await pg.execute("; ".join(done or told for _, told, done in ODD))
    assert await check(postgres_url) == []


async def test_what_is_unsafe_about_our_tables_is_told(postgres_url: str, pg: asyncpg.Connection) -> None:
    await pg.execute("ALTER TABLE posts SET UNLOGGED; ALTER TABLE users DISABLE TRIGGER users_search_vector_update")
    await pg.execute(
        f"ALTER DATABASE {await pg.fetchval('SELECT current_database()')} SET session_replication_role = replica"
    )
    found = await facts(postgres_url, rights.TABLE_RIGHTS["worker"])
    told = " ".join(finding.sentence for finding in checks.postgres_rights(found))
    for cure in (
        "RESET session_replication_role",
        "ALTER TABLE posts SET LOGGED",
        "ALTER TABLE users ENABLE TRIGGER users_search_vector_update",
    ):
        assert cure in told
    assert await check(postgres_url) == []


async def test_database_of_a_newer_release_is_refused(empty_postgres_url: str) -> None:
    newer = (*packaged(), Migration(number=9000, name="9000_later", sql="CREATE TABLE later (x int)"))
    assert "9000_later" in await migrate(empty_postgres_url, newer)
    with pytest.raises(SchemaRefused, match="9000_later"):
        await migrate(empty_postgres_url)
    assert "9000_later" in (await check(empty_postgres_url))[0]


async def test_changed_migration_is_refused(empty_postgres_url: str) -> None:
    first = packaged()[0]
    other = (Migration(number=1, name=first.name, sql=first.sql + "\n-- another"), *packaged()[1:])
    await migrate(empty_postgres_url, other)
    with pytest.raises(SchemaRefused, match="another build"):
        await migrate(empty_postgres_url)


async def test_failing_migration_changes_nothing(empty_postgres_url: str) -> None:
    broken = (*packaged(), Migration(number=9000, name="9000_broken", sql="CREATE TABLE half (x int); SELECT 1/0"))
    before = await public_fingerprint(empty_postgres_url)
    with pytest.raises(SchemaRefused, match="division by zero"):
        await migrate(empty_postgres_url, broken)
    assert await public_fingerprint(empty_postgres_url) == before
    assert await migrate(empty_postgres_url) == DONE


async def test_several_at_once_apply_each_once(empty_postgres_url: str) -> None:
    results = await asyncio.gather(*(migrate(empty_postgres_url) for _ in range(6)))
    assert sorted(results) == [[], [], [], [], [], DONE]


async def test_killed_in_the_middle_leaves_no_half_migration(empty_postgres_url: str) -> None:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from fastworker.store.migrate import Migration, migrate, packaged
        slow = Migration(number=9000, name="9000_slow", sql="CREATE TABLE half (x int); SELECT pg_sleep(60)")
        asyncio.run(migrate(sys.argv[1], (*packaged(), slow)))
        """
    )
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", program, empty_postgres_url, cwd=ROOT)
    sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    async with asyncio.timeout(60):
        while not await fetch(empty_postgres_url, sleeping):
            assert child.returncode is None
    child.kill()
    await child.wait()
    await fetch(empty_postgres_url, f"SELECT pg_cancel_backend(pid) FROM ({sleeping}) AS its_backend")
    assert await migrate(empty_postgres_url) == DONE
    assert await check(empty_postgres_url) == []


async def test_killed_at_its_crash_point_the_next_run_does_all_of_it(empty_postgres_url: str) -> None:
    """Between the migrations: the first one has run, nothing of it is there."""
    env = {**os.environ, "DATABASE_URL": empty_postgres_url, "FASTWORKER_CRASHPOINT": "in_migration:1"}
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "fastworker", "migrate", cwd=ROOT, env=env)
    assert await child.wait() == -signal.SIGKILL
    assert await fetch(empty_postgres_url, "SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []
    assert len(await check(empty_postgres_url)) == len(NAMES)
    del env["FASTWORKER_CRASHPOINT"]
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "fastworker", "migrate", cwd=ROOT, env=env)
    assert await child.wait() == 0
    assert await check(empty_postgres_url) == []


async def test_migrated_database_needs_no_rights(postgres_url: str, postgres_server: EmbeddedPostgres) -> None:
    role = "reader_" + postgres_url.partition("?")[0].rpartition("/")[2]
    await execute(
        postgres_url,
        f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA fastworker TO {role};"
        f"GRANT SELECT ON fastworker.migrations TO {role}",
    )
    url = postgres_url.replace("postgres@", f"{role}@")
    assert await migrate(url) == []
    assert await check(url) == []
    await execute(postgres_url, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_unreachable_and_unusable_urls_are_told_apart(postgres_server: EmbeddedPostgres, tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no_such"):
        await check(postgres_server.url_of("no_such"))
    with pytest.raises(Unreachable):
        await check(f"postgresql://x@/y?host={tmp_path}")
    with pytest.raises(Unreachable) as gone:
        await check("postgresql://x:secret@127.0.0.1:1/y")
    assert "secret" not in str(gone.value)
    with pytest.raises(ConfigError) as bad:
        await check("mysql://x:secret@localhost/y")
    assert "secret" not in str(bad.value)


async def test_another_encoding_is_refused_before_anything_is_made(postgres_server: EmbeddedPostgres) -> None:
    admin = postgres_server.url_of("postgres")
    ((number,),) = await fetch(admin, "SHOW server_version_num")
    provider = "LOCALE_PROVIDER libc" if int(number) >= 150_000 else ""  # there is no other one before
    await execute(
        admin, f"CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' {provider} LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    url = postgres_server.url_of("latin")
    try:
        with pytest.raises(SchemaRefused, match="The database's encoding is LATIN1: create it with ENCODING 'UTF8'"):
            await migrate(url)
        assert (await check(url))[0] == "The database's encoding is LATIN1: create it with ENCODING 'UTF8'."
        with pytest.raises(Unreachable, match="LATIN1"):
            await checks._worker_preflight(url)
        assert await fetch(url, "SELECT 1 FROM pg_namespace WHERE nspname = 'fastworker'") == []
    finally:
        await execute(admin, "DROP DATABASE latin WITH (FORCE)")


async def test_wider_columns_are_as_good_and_others_are_not(postgres_url: str) -> None:
    wider = {"notifications": "id bigint", "post_aggregations": "like_count bigint", "posts": "uri text"}
    for table, column in wider.items():
        name, _, type_ = column.partition(" ")
        await execute(postgres_url, f"ALTER TABLE {table} ALTER {name} TYPE {type_}")
    assert await check(postgres_url) == []
    assert await migrate(postgres_url) == []
    await checks._worker_preflight(postgres_url)
    for odd in ("timestamptz", "date", "text"):
        await execute(postgres_url, f"ALTER TABLE likes ALTER created_at TYPE {odd}")
        words = "likes.created_at is .*ALTER TABLE likes ALTER COLUMN created_at TYPE timestamp without time zone"
        assert re.search(words, (await check(postgres_url))[0])
        with pytest.raises(SchemaRefused, match=words):
            await migrate(postgres_url)
        with pytest.raises(Unreachable, match=words):
            await checks._worker_preflight(postgres_url)
        await execute(postgres_url, "ALTER TABLE likes ALTER created_at TYPE timestamp USING now()")


async def test_what_migrate_cannot_mend_is_not_sent_to_migrate(postgres_url: str) -> None:
    await execute(postgres_url, "ALTER TABLE fastworker.twins DROP COLUMN pair")
    with pytest.raises(SchemaRefused, match="twins.pair .* restore it from a backup"):
        await migrate(postgres_url)
    with pytest.raises(Unreachable) as refused:
        await checks._worker_preflight(postgres_url)
    assert "twins.pair" in str(refused.value)
    assert "migrate" not in str(refused.value)


@pytest.mark.parametrize(
    "without", ["USAGE ON SCHEMA fastworker", "INSERT ON likes", "SELECT ON fastworker.migrations"]
)
async def test_a_worker_without_a_right_is_told_which(postgres_url: str, without: str) -> None:
    role = "lacking"
    await execute(postgres_url, rights.sql("worker", role), f"REVOKE {without} FROM {role}")
    try:
        with pytest.raises(FastworkerError, match="fastworker grants worker") as refused:
            await checks._worker_preflight(postgres_url.replace("postgres@", f"{role}@"))
        assert refused.value.exit_code == 2, "systemd does not try again"
        for word in without.split(" ON ")[1].removeprefix("SCHEMA ").split():
            assert word.removeprefix("fastworker.") in str(refused.value)
        assert "migrate`" not in str(refused.value)
    finally:
        await execute(postgres_url, f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_settings_of_the_role_change_nothing(postgres_url: str, empty_postgres_url: str) -> None:
    for url in (postgres_url, empty_postgres_url):
        await execute(url, *(
            f"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {one}', current_database()); END $$"
            for one in ("quote_all_identifiers = on", "search_path = ''evil''", "standard_conforming_strings = off",
                        "default_transaction_isolation = ''serializable''", "statement_timeout = 1000")
        ))  # fmt: skip
    assert await migrate(empty_postgres_url) == DONE
    assert await migrate(postgres_url) == []
    assert await check(postgres_url) == []


async def test_a_server_that_hangs_up_is_told_in_our_words() -> None:
    """As Docker's proxy does in front of a container whose PostgreSQL does not listen yet."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable, match=r"cannot be reached: it closed the connection$"):
            await migrate(f"postgresql://postgres@127.0.0.1:{port}/atproto")
