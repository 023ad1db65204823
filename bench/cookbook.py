"""`scripts/cookbook`: each query of docs/cookbook.md on tables of many million rows, and the plan that is chosen.

The rows are made by PostgreSQL itself: accounts, posts and who likes or follows whom are drawn so that a few have much
and most have little. The plans are printed, or written under their queries (--write).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from fastworker.edge.embedded import EmbeddedPostgres
from fastworker.store.migrate import migrate

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "cookbook.md"
SERVER: Final = {"shared_buffers": "1GB", "max_wal_size": "8GB", "jit": "off", "maintenance_work_mem": "512MB"}
QUERY: Final = re.compile(r"^```sql\n(.*?)^```\n(\n```text plan\n.*?^```\n)?", re.MULTILINE | re.DOTALL)

NOISE: Final = re.compile(r"\s*(Planning|Sort Method|Buckets|Batches|Worker |Storage|Index Searches)")

# Shares of all rows; {users} and the like are counts.
SHARES: Final = {"users": 0.02, "posts": 0.10, "likes": 0.42, "reposts": 0.05, "follows": 0.08, "notifications": 0.08}
FUNCTIONS: Final = """
CREATE FUNCTION pg_temp.did(n bigint) RETURNS text IMMUTABLE PARALLEL SAFE LANGUAGE sql
    AS $$ SELECT 'did:plc:' || left(md5(n::text), 24) $$;
CREATE FUNCTION pg_temp.uri(did text, kind text, n bigint) RETURNS text IMMUTABLE PARALLEL SAFE LANGUAGE sql
    AS $$ SELECT 'at://' || did || '/app.bsky.' || kind || '/3k' || lpad(n::text, 11, '0') $$;
CREATE FUNCTION pg_temp.post(n bigint, users bigint) RETURNS text IMMUTABLE PARALLEL SAFE LANGUAGE sql
    AS $$ SELECT pg_temp.uri(pg_temp.did(n % users), 'feed.post', n) $$;
CREATE FUNCTION pg_temp.few(size bigint) RETURNS bigint VOLATILE LANGUAGE sql
    AS $$ SELECT floor(size * random() ^ 4)::bigint $$;
CREATE FUNCTION pg_temp.at(n bigint, size bigint) RETURNS timestamp IMMUTABLE PARALLEL SAFE LANGUAGE sql
    AS $$ SELECT timestamp '2026-01-01' + n * (interval '300 days' / size) $$;
CREATE FUNCTION pg_temp.cid(n bigint) RETURNS text IMMUTABLE PARALLEL SAFE LANGUAGE sql
    AS $$ SELECT 'bafyrei' || left(md5(n::text) || md5((n + 1)::text), 52) $$;
"""
ROWS: Final = {
    "users": """
INSERT INTO users (did, handle, display_name, created_at)
SELECT pg_temp.did(n), 'user' || n || '.example',
    CASE WHEN n % 500 = 0 THEN 'Alice' ELSE 'N' || left(md5(n::text), 5) END,
    pg_temp.at(n, {users}) FROM generate_series(0, {users} - 1) AS n""",
    "posts": """
INSERT INTO posts (uri, cid, author_did, text, parent_uri, root_uri, created_at, indexed_at)
SELECT pg_temp.post(n, {users}), pg_temp.cid(n), pg_temp.did(n % {users}),
    (ARRAY['good morning', 'tomatoes', 'balcony', 'rain again', 'what a game', 'new picture'])[1 + n % 6] || ' ' ||
    (ARRAY['today', 'on the balcony', 'in the garden', 'at home', 'with friends'])[1 + n % 5] || ' ' || md5(n::text),
    CASE WHEN root < n THEN pg_temp.post(root, {users}) END, CASE WHEN root < n THEN pg_temp.post(root, {users}) END,
    pg_temp.at(n, {posts}), pg_temp.at(n, {posts})
FROM (SELECT n, CASE WHEN n % 2 = 0 THEN pg_temp.few({posts}) ELSE {posts} END AS root
    FROM generate_series(0, {posts} - 1) AS n) AS numbered""",
    "likes": """
INSERT INTO likes (uri, user_did, post_uri, created_at)
SELECT pg_temp.uri(pg_temp.did(n % {users}), 'feed.like', n), pg_temp.did(n % {users}),
    pg_temp.post(pg_temp.few({posts}), {users}), pg_temp.at(n, {likes}) FROM generate_series(0, {likes} - 1) AS n
ON CONFLICT DO NOTHING""",
    "reposts": """
INSERT INTO reposts (uri, user_did, post_uri, created_at)
SELECT pg_temp.uri(pg_temp.did(n % {users}), 'feed.repost', n), pg_temp.did(n % {users}),
    pg_temp.post(pg_temp.few({posts}), {users}), pg_temp.at(n, {reposts}) FROM generate_series(0, {reposts} - 1) AS n
ON CONFLICT DO NOTHING""",
    "follows": """
INSERT INTO follows (uri, follower_did, following_did, created_at)
SELECT pg_temp.uri(pg_temp.did(who), 'graph.follow', n), pg_temp.did(who), pg_temp.did(pg_temp.few({users})),
    pg_temp.at(n, {follows}) FROM (SELECT n, pg_temp.few({users}) AS who
    FROM generate_series(0, {follows} - 1) AS n) AS numbered ON CONFLICT DO NOTHING""",
    "feed_items": """
INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at)
SELECT uri, uri, author_did, 'post', created_at, cid, created_at FROM posts
UNION ALL SELECT uri, post_uri, user_did, 'repost', created_at, pg_temp.cid(1), created_at FROM reposts""",
    "post_aggregations": """
INSERT INTO post_aggregations (post_uri, like_count, repost_count, reply_count)
SELECT p.uri, coalesce(l.count, 0), coalesce(r.count, 0), coalesce(a.count, 0) FROM posts AS p
LEFT JOIN (SELECT post_uri, count(*) FROM likes GROUP BY 1) AS l ON l.post_uri = p.uri
LEFT JOIN (SELECT post_uri, count(*) FROM reposts GROUP BY 1) AS r ON r.post_uri = p.uri
LEFT JOIN (SELECT parent_uri, count(*) FROM posts GROUP BY 1) AS a ON a.parent_uri = p.uri""",
    "notifications": """
INSERT INTO notifications (uri, recipient_did, author_did, reason, reason_subject, is_read, created_at)
SELECT uri, pg_temp.did(substr(post_uri, length(post_uri) - 10)::bigint % {users}), user_did, 'like', post_uri,
    random() < 0.9, created_at FROM likes LIMIT {notifications}""",
    "post_viewer_states": """
INSERT INTO post_viewer_states (post_uri, viewer_did, like_uri)
SELECT post_uri, user_did, uri FROM likes LIMIT {notifications}""",
    "generic_records": """
INSERT INTO generic_records (uri, cid, author_did, record_type, record, created_at)
SELECT pg_temp.uri(pg_temp.did(n % {users}), 'actor.status', n), pg_temp.cid(n), pg_temp.did(n % {users}),
    CASE WHEN n % 3 = 0 THEN 'app.bsky.actor.status' ELSE 'com.example.note' END, '{{"status": "live"}}',
    pg_temp.at(n, {users}) FROM generate_series(0, {users} - 1) AS n""",
}
INDEXES: Final = """
SELECT i.indexrelid::regclass::text AS name, pg_get_indexdef(i.indexrelid) AS definition
FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = 'public' AND c.relname = ANY($1) AND NOT i.indisunique AND NOT EXISTS (
    SELECT FROM pg_constraint AS o WHERE o.conindid = i.indexrelid)
"""
MUCH: Final = {
    "viewer": "SELECT follower_did FROM follows GROUP BY 1 ORDER BY count(*) DESC, 1 OFFSET 20 LIMIT 1",
    "root": "SELECT root_uri FROM posts WHERE root_uri <> '' GROUP BY 1 ORDER BY count(*) DESC, 1 OFFSET 5 LIMIT 1",
}
"""Who stands for :viewer and :root: not the one who has most, but nearly."""

if TYPE_CHECKING:
    Connection = asyncpg.Connection[Any]


async def fill(db: Connection, rows: int) -> int:
    """Indexes are made when the rows are there, as a restore does it. Returns how many rows there are."""
    counts = {table: max(100, int(rows * share)) for table, share in SHARES.items()}
    await db.execute(FUNCTIONS)
    indexes = await db.fetch(INDEXES, list(ROWS))
    for name, _ in indexes:
        await db.execute(f"DROP INDEX {name}")
    for table, statement in ROWS.items():
        began = time.monotonic()
        told = await db.execute(statement.format(**counts))
        print(f"{table}: {int(told.split()[-1]):,} rows, {time.monotonic() - began:.0f} s", file=sys.stderr)
    for name, definition in indexes:
        print(name, file=sys.stderr)
        await db.execute(definition)
    for table in ROWS:
        await db.execute(f"VACUUM (ANALYZE) {table}")
    found = [await db.fetchval(f"SELECT count(*) FROM {table}") for table in ROWS]
    return int(sum(found))


async def plans(db: Connection) -> dict[str, str]:
    """Query -> the plan of its second run, with what each step really gave. An index of the page is made."""
    places = {name: await db.fetchval(query) for name, query in MUCH.items()}
    found = {}
    for query, _ in QUERY.findall(PAGE.read_text()):
        text = re.sub(r"(?<!:):(viewer|root)\b", lambda one: f"'{places[one[1]]}'", query)
        if text.startswith("CREATE INDEX"):
            await db.execute(text.replace(" CONCURRENTLY", ""))
            await db.execute("ANALYZE")
            continue
        lines: list[str] = []
        for _ in range(2):
            lines = [row[0] for row in await db.fetch(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS OFF) {text}")]
        shown = "\n".join(line for line in lines if not NOISE.match(line))
        found[query] = re.sub(r"did:plc:\w{20,}", "did:plc:...", re.sub(r"\((\w+(?:\.\w+)?)\)::text", r"\1", shown))
    return found


def written(page: str, found: dict[str, str]) -> str:
    """The page with these plans under their queries."""

    def one(match: re.Match[str]) -> str:
        plan = found.get(match[1])
        return f"```sql\n{match[1]}```\n" + (f"\n```text plan\n{plan}\n```\n" if plan else "")

    return QUERY.sub(one, page)


async def run(rows: int, folder: Path, *, is_written: bool) -> None:
    with EmbeddedPostgres(folder / "postgres", durable=False, settings=SERVER) as postgres:
        await migrate(postgres.url)
        db: Connection = await asyncpg.connect(postgres.url, timeout=60, statement_cache_size=0)
        print(f"{await fill(db, rows):,} rows, {await db.fetchval('SHOW server_version')}", file=sys.stderr)
        found = await plans(db)
        size = await db.fetchval("SELECT pg_size_pretty(pg_database_size(current_database()))")
        await db.close()
    print(f"the database has {size}", file=sys.stderr)
    if is_written:
        PAGE.write_text(written(PAGE.read_text(), found))
    else:
        print("\n\n".join(f"{query}\n{plan}" for query, plan in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/cookbook", description=__doc__)
    parser.add_argument("--millions", type=float, default=1.0, help="rows in all tables together (0.6 GB each)")
    parser.add_argument("--write", action="store_true", help="put the plans into docs/cookbook.md")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fw-cookbook-"))
    folder.chmod(0o711)
    try:
        asyncio.run(run(int(options.millions * 1_000_000), folder, is_written=options.write))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
