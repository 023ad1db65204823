"""Our SQL, read by tools that know the language: what PostgreSQL itself says only when a statement is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastworker.edge.embedded import EmbeddedPostgres
from fastworker.store import routines
from fastworker.store.migrate import migrate
from tests.servers import POSTGRES_BIN, connected

ROOT = Path(__file__).resolve().parents[2]
MIGRATIONS = sorted((ROOT / "fastworker/store/migrations").glob("*.sql"))
CHECKED = """
SELECT p.proname, f.lineno, f.level, f.sqlstate, f.message, f.query
FROM pg_proc AS p
JOIN pg_language AS l ON l.oid = p.prolang AND l.lanname = 'plpgsql'
LEFT JOIN pg_trigger AS t ON t.tgfoid = p.oid AND NOT t.tgisinternal
CROSS JOIN LATERAL plpgsql_check_function_tb(p.oid, coalesce(t.tgrelid, 0), fatal_errors => false) AS f
WHERE (p.pronamespace = 'fastworker'::regnamespace OR p.pronamespace = 'public'::regnamespace)
  AND (p.prorettype <> 'trigger'::regtype OR t.oid IS NOT NULL)
ORDER BY p.proname, f.lineno
"""
A_CAST = "42804"  # '{}' for an empty array, text for varchar: meant, and told of most routines


def server_with_plpgsql_check() -> Path:
    """Its folder of programs; Debian has the extension, the wheel has not."""
    for programs in [Path(POSTGRES_BIN)] if POSTGRES_BIN else sorted(Path("/usr/lib/postgresql").glob("*/bin")):
        if (programs.parent / "lib/plpgsql_check.so").exists():
            return programs
    pytest.skip("plpgsql_check is not there: apt-get install postgresql-15-plpgsql-check")


@pytest.mark.extended
async def test_routines_are_sound_in_every_branch(server_dir: Path) -> None:
    """Names, types and variables of each statement, also of those that no test comes to."""
    programs = server_with_plpgsql_check()
    server_dir.mkdir()
    server_dir.chmod(0o755)
    postgres = EmbeddedPostgres(server_dir / "postgres", durable=False, binary=programs)
    postgres.start()
    try:
        await migrate(postgres.url)
        async with connected(postgres.url) as connection:
            await connection.execute("CREATE EXTENSION plpgsql_check")
            told = [dict(row) for row in await connection.fetch(CHECKED)]
            assert [one for one in told if one["sqlstate"] != A_CAST] == []
            await connection.execute(
                "CREATE FUNCTION fastworker.wrong() RETURNS int LANGUAGE plpgsql AS "
                "$$ BEGIN IF false THEN RETURN nowhere FROM public.likes; END IF; RETURN 1; END $$"
            )
            (wrong,) = [row for row in await connection.fetch(CHECKED) if row["sqlstate"] != A_CAST]
            assert (wrong["proname"], wrong["sqlstate"]) == ("wrong", "42703")
    finally:
        postgres.stop()


@pytest.mark.extended
@pytest.mark.parametrize("name", [*(one.name for one in routines.packaged()), *(one.name for one in MIGRATIONS)])
def test_sqlfluff_reads_it(name: str) -> None:
    """It parses as PostgreSQL's SQL, and no name in it is ambiguous."""
    sqlfluff = pytest.importorskip("sqlfluff", reason="sqlfluff is not there: ./scripts/setup extended")
    texts = {one.name: one.sql for one in routines.packaged()} | {
        one.name: one.read_text("utf-8") for one in MIGRATIONS
    }
    rules = ["AM01", "AM02", "AM06", "RF01", "RF02", "ST03", "ST08"]
    assert sqlfluff.lint(texts[name], dialect="postgres", rules=rules) == []
    assert {one["code"] for one in sqlfluff.lint("SELECT FROM WHERE (;", dialect="postgres")} == {"PRS"}
