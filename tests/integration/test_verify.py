"""`fastworker verify`: silent on what the writer wrote, finds and mends every way in which a table can drift."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from fastworker.commands.verify import VerifyOptions, names, verify
from fastworker.edge.embedded import EmbeddedPostgres
from fastworker.errors import ConfigError, ExitCode, Unreachable
from fastworker.event import Account, Commit, Op
from fastworker.law import compare
from fastworker.law.model import Model, tid_time
from fastworker.store import audit
from fastworker.store.audit import first_tid
from fastworker.store.rules import DEFAULTS, Rules
from fastworker.store.store import Store
from fastworker.table import derive
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit
from tests.property.feeding import put
from tests.rig.histories import DIDS, Event, cid_of, entry_ms, number, random_history
from tests.servers import connected

SEED = 11
EVENTS = 2_500


async def write(
    url: str,
    events: list[Event],
    features: frozenset[str] = derive.FULL,
    size: int = 400,
    trusted: tuple[str, ...] = (),
) -> None:
    store = await Store.connect(url, rules=Rules(features, trusted))
    try:
        for start in range(0, len(events), size):
            batch = Batch()
            for event in events[start : start + size]:
                put(batch, event)
            await store.write(batch)
        while await store.maintain(owed_age_s=0):
            pass
    finally:
        await store.close()


async def test_no_check_reads_a_whole_table_for_a_range_of_keys(postgres_url: str) -> None:
    """Where collations differ an index serves nothing, and a check costs the square of the rows."""
    small = {"debts", "gates"}  # what is owed just now; the other way, by keys, is a choice of the planner's
    async with connected(postgres_url) as connection:
        await connection.execute(audit._SESSION)
        await connection.execute(audit._TRUSTED, "")
        for check in audit.CHECKS:
            for where in (audit._between, audit._among):
                statement = re.sub(r"\$\d+::varchar\[\]", "ARRAY['x']::varchar[]", check.sql(where, derive.FULL))
                statement = re.sub(r"\$\d+::varchar", "'x'::varchar", statement)
                plan = json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {statement}"))[0]["Plan"]
                whole = {
                    node["Relation Name"]
                    for node in nodes_of(plan)
                    if "Relation Name" in node and node["Node Type"] != "Bitmap Heap Scan" and "Index Cond" not in node
                }
                assert whole <= small, f"{check.name}: {plan}"


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes_of(below)


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return random_history(SEED, EVENTS).events


@pytest.fixture(scope="module")
def expected(events: list[Event]) -> compare.Tables:
    model = Model()
    for event in events:
        model.apply(event, entry_ms(event))
    return model.tables()


@pytest.fixture(scope="module")
def written(postgres_server: EmbeddedPostgres, events: list[Event]) -> Iterator[str]:
    """A template: the history, written by the writer."""
    name = "template_verify"
    run(f"CREATE DATABASE {name} TEMPLATE template_contract", postgres_server.url_of("postgres"))
    asyncio.run(write(postgres_server.url_of(name), events))
    yield name
    run(f"DROP DATABASE {name} WITH (FORCE)", postgres_server.url_of("postgres"))


_numbers = iter(range(10_000))


@pytest.fixture
def url(postgres_server: EmbeddedPostgres, written: str) -> Iterator[str]:
    name = f"verify_{next(_numbers)}"
    run(f"CREATE DATABASE {name} TEMPLATE {written}", postgres_server.url_of("postgres"))
    yield postgres_server.url_of(name)
    run(f"DROP DATABASE {name} WITH (FORCE)", postgres_server.url_of("postgres"))


@pytest.fixture
async def db(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url, timeout=10)
    yield connection
    connection.terminate()


def run(statement: str, url: str) -> None:
    async def execute() -> None:
        connection = await asyncpg.connect(url, timeout=10)
        await connection.execute(statement)
        await connection.close(timeout=10)

    asyncio.run(execute())


async def told(
    url: str,
    capsys: pytest.CaptureFixture[str],
    wish: VerifyOptions,
    features: frozenset[str] = derive.FULL,
    trusted: tuple[str, ...] = (),
) -> tuple[ExitCode, dict[str, dict[str, int]]]:
    """The exit code and the drift by check."""
    code = await verify(url, Rules(features, trusted), wish)
    report = json.loads(capsys.readouterr().out)
    return code, {found["check"]: found["drift"] for found in report["checks"] if found["drift"]}


async def differences(url: str, expected: compare.Tables) -> str:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return compare.report(compare.diff(expected, await compare.dump(connection)))
    finally:
        await connection.close(timeout=10)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else writes: what differs need not be waited for."""
    monkeypatch.setattr("fastworker.commands.verify.LOOK_AGAIN_S", (0.0,))
    monkeypatch.setattr("fastworker.commands.verify.LOOK_AGAIN_JOINED_S", (0.0,))


FIND = VerifyOptions(as_json=True, rows=300)
MEND = VerifyOptions(as_json=True, rows=300, repair=True)


async def test_what_the_writer_wrote_has_no_drift(
    url: str, expected: compare.Tables, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await differences(url, expected) == "no difference"
    assert await told(url, capsys, FIND) == (ExitCode.DONE, {})
    assert await told(url, capsys, VerifyOptions(as_json=True, rows=1_000_000)) == (ExitCode.DONE, {})


_SOME = "(SELECT {key} FROM public.{table} WHERE {where} ORDER BY {key} LIMIT 3)"


def some(table: str, key: str = "uri", where: str = "true") -> str:
    return _SOME.format(table=table, key=key, where=where)


# name: (statement, check, problem, how many); what is mended must equal the model again
CORRUPTIONS: dict[str, tuple[str, str, str]] = {
    "counter": (
        f"UPDATE post_aggregations SET like_count = like_count + 2 WHERE post_uri IN {some('post_aggregations', 'post_uri')}",
        "post_aggregations",
        "wrong",
    ),
    "replies never counted": (
        (
            "UPDATE post_aggregations SET reply_count = 0 WHERE post_uri IN "
            f"{some('post_aggregations', 'post_uri', 'reply_count > 0')}"
        ),
        "post_aggregations",
        "wrong",
    ),
    "no aggregate": (
        f"DELETE FROM post_aggregations WHERE post_uri IN {some('post_aggregations', 'post_uri')}",
        "post_aggregations",
        "missing",
    ),
    "aggregate of nothing": (
        (
            "INSERT INTO post_aggregations (post_uri) SELECT 'at://did:plc:gone/app.bsky.feed.post/' || n "
            "FROM generate_series(1, 3) AS n"
        ),
        "post_aggregations",
        "extra",
    ),
    "no feed item": (
        f"DELETE FROM feed_items WHERE uri IN {some('feed_items', where='type = $$post$$')}",
        "feed_items",
        "missing",
    ),
    "feed item of nothing": (
        (
            "INSERT INTO feed_items (uri, post_uri, originator_did, type, sort_at, cid, created_at) SELECT "
            "'at://did:plc:gone/app.bsky.feed.post/' || n, 'x', 'did:plc:gone', 'post', now(), 'c', now() "
            "FROM generate_series(1, 3) AS n"
        ),
        "feed_items",
        "extra",
    ),
    "feed item of another": (
        f"UPDATE feed_items SET originator_did = 'did:plc:other' WHERE uri IN {some('feed_items')}",
        "feed_items",
        "wrong",
    ),
    "no quote": (f"DELETE FROM quotes WHERE uri IN {some('quotes')}", "quotes", "missing"),
    "quote of nothing": (
        (
            "INSERT INTO quotes (uri, cid, post_uri, quoted_uri, created_at) SELECT uri || '#gone', 'c', uri, "
            f"'at://did:plc:gone/app.bsky.feed.post/1', now() FROM posts WHERE uri IN {some('posts')}"
        ),
        "quotes",
        "extra",
    ),
    "quote under another key": (
        f"UPDATE quotes SET uri = post_uri || '#other' WHERE uri IN {some('quotes')}",
        "quotes",
        "missing",
    ),
    "no notification of a post": (
        f"DELETE FROM notifications WHERE uri IN {some('notifications', where='reason = $$reply$$')}",
        "notifications.posts",
        "missing",
    ),
    "notification to another": (
        (
            "UPDATE notifications SET recipient_did = 'did:plc:other' WHERE uri IN "
            f"{some('notifications', where='reason = $$like$$')}"
        ),
        "notifications.likes",
        "wrong",
    ),
    "notification of a like that is gone": (
        (
            "INSERT INTO notifications (uri, recipient_did, author_did, reason, created_at) SELECT "
            "'at://did:plc:gone/app.bsky.feed.like/' || n || '#notification', 'did:plc:a', 'did:plc:gone', 'like', now() "
            "FROM generate_series(1, 3) AS n"
        ),
        "notifications.extra",
        "extra",
    ),
    "no viewer state": (
        f"DELETE FROM post_viewer_states WHERE viewer_did IN {some('post_viewer_states', 'viewer_did')}",
        "post_viewer_states",
        "missing",
    ),
    "viewer state of a like that is gone": (
        (
            "UPDATE post_viewer_states SET like_uri = 'at://did:plc:gone/app.bsky.feed.like/1' WHERE post_uri IN "
            f"{some('post_viewer_states', 'post_uri')}"
        ),
        "post_viewer_states",
        "wrong",
    ),
    "empty viewer state": (
        (
            "INSERT INTO post_viewer_states (post_uri, viewer_did) SELECT 'at://did:plc:gone/app.bsky.feed.post/' || n, "
            "'did:plc:gone' FROM generate_series(1, 3) AS n"
        ),
        "post_viewer_states",
        "extra",
    ),
    "no thread context": (
        f"DELETE FROM thread_contexts WHERE post_uri IN {some('thread_contexts', 'post_uri')}",
        "thread_contexts",
        "missing",
    ),
    "thread context without its like": (
        "UPDATE thread_contexts SET root_author_like_uri = 'at://did:plc:gone/app.bsky.feed.like/1'",
        "thread_contexts",
        "wrong",
    ),
    "thread context of nothing": (
        "INSERT INTO thread_contexts (post_uri) VALUES ('at://did:plc:gone/app.bsky.feed.post/1')",
        "thread_contexts",
        "extra",
    ),
    "gate flags": ("UPDATE posts SET has_thread_gate = NOT has_thread_gate", "posts.gates", "wrong"),
    "no thread gate": (
        f"DELETE FROM thread_gates WHERE post_uri IN {some('thread_gates', 'post_uri')}",
        "thread_gates",
        "missing",
    ),
    "thread gate of nothing": (
        (
            "INSERT INTO thread_gates (post_uri, owner_did, created_at) VALUES "
            "('at://did:plc:gone/app.bsky.feed.post/1', 'did:plc:gone', now())"
        ),
        "thread_gates",
        "extra",
    ),
    "post gate without its rules": (
        "UPDATE post_gates SET embedding_rules = '{\"disableRule\": false}'",
        "post_gates",
        "wrong",
    ),
    "likes of a generator": ("UPDATE feed_generators SET like_count = 77", "feed_generators.like_count", "wrong"),
    "likes of a labeler": ("UPDATE labeler_services SET like_count = 77", "labeler_services.like_count", "wrong"),
    "profile": (
        "UPDATE users SET display_name = 'somebody else' WHERE did IN (SELECT did FROM fastworker.profiles LIMIT 3)",
        "users.profile",
        "wrong",
    ),
    "handle": (
        (
            "UPDATE users SET handle = 'somebody.else' WHERE did IN "
            "(SELECT did FROM fastworker.identities WHERE handle IS NOT NULL ORDER BY did LIMIT 3)"
        ),
        "users.handle",
        "wrong",
    ),
    "no label event": (
        f"DELETE FROM label_events WHERE label_uri IN {some('labels')}",
        "label_events",
        "missing",
    ),
    "label event twice": (
        f"INSERT INTO label_events (label_uri, action) SELECT uri, 'created' FROM labels WHERE uri IN {some('labels')}",
        "label_events",
        "extra",
    ),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", CORRUPTIONS)
async def test_drift_is_found_and_mended(
    name: str, url: str, expected: compare.Tables, capsys: pytest.CaptureFixture[str]
) -> None:
    statement, check, problem = CORRUPTIONS[name]
    connection = await asyncpg.connect(url, timeout=10)
    changed = int((await connection.execute(statement)).rpartition(" ")[2])
    await connection.close(timeout=10)
    assert changed
    assert await differences(url, expected) != "no difference"

    code, drift = await told(url, capsys, FIND)
    assert code is ExitCode.NO
    assert drift.get(check, {}).get(problem, 0) > 0, drift

    code, drift = await told(url, capsys, MEND)
    assert code is ExitCode.DONE, drift
    assert drift.get(check, {}).get(problem, 0) > 0
    assert await told(url, capsys, FIND) == (ExitCode.DONE, {})
    left = await differences(url, expected)
    # a notification's and a repost's CID are nowhere else: what was deleted has lost it
    assert left == "no difference"


@pytest.mark.usefixtures("quiet")
async def test_users_that_are_missing_are_made_again(
    url: str, db: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    before = await db.fetchval("SELECT count(*) FROM users")
    gone = await db.fetchval(
        "WITH d AS (DELETE FROM users WHERE did IN (SELECT author_did FROM posts LIMIT 5) RETURNING 1) SELECT count(*) FROM d"
    )
    assert gone
    code, drift = await told(url, capsys, MEND)
    assert code is ExitCode.DONE
    assert sum(found.get("missing", 0) for check, found in drift.items() if check.startswith("users.")) == gone
    assert await db.fetchval("SELECT count(*) FROM users") == before


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("narrow", [derive.CORE, frozenset({"counts"})], ids=["core", "counts"])
async def test_widening_fills_in_what_was_left_out(
    narrow: frozenset[str],
    postgres_url: str,
    events: list[Event],
    expected: compare.Tables,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await write(postgres_url, events, narrow)
    assert await told(postgres_url, capsys, FIND, narrow) == (ExitCode.DONE, {})
    code, drift = await told(postgres_url, capsys, MEND)
    assert code is ExitCode.DONE, drift
    connection = await asyncpg.connect(postgres_url, timeout=10)
    found = compare.diff(expected, await compare.dump(connection))
    await connection.close(timeout=10)
    # The CID of a like, a repost and a follow is only in what follows from it.
    lost = [d for d in found if (d.table, d.column) in {("notifications", "cid"), ("feed_items", "cid")}]
    assert found == lost, compare.report(found)
    assert len(drift) >= 5


@pytest.mark.usefixtures("quiet")
async def test_a_twin_takes_the_place_of_a_row_that_the_api_process_deleted(
    url: str, db: asyncpg.Connection, expected: compare.Tables, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = await db.fetch("SELECT DISTINCT table_name, pair FROM fastworker.twins")
    tables = {r["table_name"] for r in waiting}
    assert {"likes", "bookmarks"} & tables
    promoted = []
    for table, columns in (
        ("likes", "user_did, post_uri"),
        ("follows", "follower_did, following_did"),
        ("bookmarks", "user_did, post_uri"),
    ):
        for row in waiting:
            if row["table_name"] == table:
                names_ = columns.split(", ")
                await db.execute(
                    f"DELETE FROM {table} WHERE {names_[0]} = $1 AND {names_[1]} = $2", *row["pair"].split("\n")
                )
                promoted.append(row["pair"])
    assert promoted
    code, drift = await told(url, capsys, MEND)
    assert code is ExitCode.DONE, drift
    assert drift["twins"]["missing"] >= len(promoted)
    assert await told(url, capsys, FIND) == (ExitCode.DONE, {})
    for row in waiting:
        if row["pair"] in promoted:
            columns = (
                "user_did || E'\\n' || post_uri"
                if row["table_name"] != "follows"
                else "follower_did || E'\\n' || following_did"
            )
            assert await db.fetchval(f"SELECT count(*) FROM {row['table_name']} WHERE {columns} = $1", row["pair"]) == 1


async def test_verifications_of_trusted_verifiers_first_also_when_others_are_trusted(
    postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the writer as in the law; rows from before the setting are settled by a repair."""
    steps: list[Event] = []
    for verifier in DIDS:
        for rkey, subject in (("3", DIDS[0]), ("2", DIDS[0]), ("4", DIDS[1]), ("5", f"did:web:{verifier[-3:]}")):
            record = {
                "$type": "app.bsky.graph.verification",
                "subject": subject,
                "handle": f"{rkey}{verifier[-9:]}.test",
            }
            path = f"app.bsky.graph.verification/{rkey}"
            op = {"action": "create", "path": path, "cid": cid_of(record), "record": record}
            steps.append({"kind": "commit", "repo": verifier, "bare": False, "ops": [op]})
    gone = {"action": "delete", "path": "app.bsky.graph.verification/2", "cid": None}
    steps.append({"kind": "commit", "repo": DIDS[2], "bare": False, "ops": [gone]})
    events = number(steps, bare=False)
    trusted = (DIDS[2], DIDS[1])
    await write(postgres_url, events[::-1], trusted=trusted, size=3)
    winners = set()
    for now_trusted in (trusted, (DIDS[3],), ()):
        model = Model(trusted=now_trusted)
        for event in events:
            model.apply(event, entry_ms(event))
        code, drift = await told(postgres_url, capsys, MEND, trusted=now_trusted)
        assert (code, list(drift)) == (ExitCode.DONE, [] if now_trusted is trusted else ["twins"])
        assert await told(postgres_url, capsys, FIND, trusted=now_trusted) == (ExitCode.DONE, {})
        assert await differences(postgres_url, model.tables()) == "no difference"
        winners.add(tuple(sorted(row["uri"] for row in model.tables()["verifications"])))
    assert len(winners) == 3


@pytest.mark.usefixtures("quiet")
async def test_records_of_a_user_who_forbade_it_later_are_removed(
    url: str, db: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    did = await db.fetchval("SELECT author_did FROM posts GROUP BY 1 ORDER BY count(*) DESC LIMIT 1")
    await db.execute("INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ($1, true)", did)
    code, drift = await told(url, capsys, FIND)
    assert code is ExitCode.NO
    assert drift["forbidden.posts"]["forbidden"] > 0
    code, drift = await told(url, capsys, MEND)
    assert code is ExitCode.DONE, drift
    for table, column in (
        ("posts", "author_did"),
        ("likes", "user_did"),
        ("follows", "follower_did"),
        ("generic_records", "author_did"),
        ("lists", "creator_did"),
        ("feed_items", "originator_did"),
        ("notifications", "author_did"),
        ("post_viewer_states", "viewer_did"),
        ("fastworker.profiles", "did"),
        ("thread_gates", "owner_did"),
    ):
        assert await db.fetchval(f"SELECT count(*) FROM {table} WHERE {column} = $1", did) == 0, table
    assert await db.fetchval("SELECT count(*) FROM fastworker.twins WHERE uri LIKE $1", f"at://{did}/%") == 0
    assert await told(url, capsys, FIND) == (ExitCode.DONE, {})


@pytest.mark.usefixtures("quiet")
async def test_gates_of_an_earlier_system_are_left_alone(
    url: str, db: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    await db.execute("UPDATE fastworker.migrations SET adopted = true WHERE number = 1")
    post = await db.fetchval("SELECT uri FROM posts WHERE NOT has_thread_gate ORDER BY uri LIMIT 1")
    await db.execute("INSERT INTO thread_gates (post_uri, owner_did, created_at) VALUES ($1, 'did:plc:x', now())", post)
    await db.execute("UPDATE posts SET has_thread_gate = true WHERE uri = $1", post)
    assert await told(url, capsys, MEND) == (ExitCode.DONE, {"thread_gates": {"unowned": 1}})
    assert await db.fetchval("SELECT has_thread_gate FROM posts WHERE uri = $1", post)
    assert await db.fetchval("SELECT count(*) FROM thread_gates WHERE post_uri = $1", post) == 1


async def test_writing_beside_it_is_no_drift(
    postgres_url: str, events: list[Event], expected: compare.Tables, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verify and repair again and again while two writers work: nothing is found, nothing is harmed."""
    r = random.Random(3)
    ends = asyncio.Event()
    rounds = 0

    async def writer(mine: list[Event]) -> None:
        store = await Store.connect(postgres_url)
        try:
            while mine:
                batch = Batch()
                size = r.choice([1, 5, 40])
                for event in mine[:size]:
                    put(batch, event)
                mine = mine[size:]
                await store.write(batch)
            while await store.maintain(owed_age_s=0):
                pass
        finally:
            await store.close()

    async def verifier() -> None:
        nonlocal rounds
        while not ends.is_set():
            code, drift = await told(postgres_url, capsys, MEND)
            assert (code, drift) == (ExitCode.DONE, {})
            rounds += 1

    async with asyncio.TaskGroup() as tasks:
        verifying = tasks.create_task(verifier())
        async with asyncio.TaskGroup() as writing:
            for n in range(2):
                writing.create_task(writer(events[n::2]))
        ends.set()
        await verifying
    assert rounds >= 1
    assert await differences(postgres_url, expected) == "no difference"


async def test_a_stopped_run_says_where_to_go_on(
    url: str, db: asyncpg.Connection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await db.execute("UPDATE feed_generators SET like_count = 77")

    stop, pauses = asyncio.Event(), 0

    async def pause(seconds: float, stopping: asyncio.Event) -> bool:
        nonlocal pauses
        pauses += 1
        if pauses == 20:  # pieces, however long they take
            stop.set()
        return stopping.is_set()

    monkeypatch.setattr("fastworker.commands.verify.pause", pause)
    code = await verify(url, DEFAULTS, VerifyOptions(rows=5, as_json=True), stop)
    report = json.loads(capsys.readouterr().out)
    assert code is ExitCode.NO
    assert report["continue_from"].partition(":")[0] in names()
    done = len(report["checks"])
    code = await verify(url, DEFAULTS, VerifyOptions(start=report["continue_from"], as_json=True))
    rest = json.loads(capsys.readouterr().out)
    assert code is ExitCode.NO
    assert rest["checks"][0]["check"] == report["checks"][-1]["check"]
    assert done + len(rest["checks"]) - 1 == len([n for n in names() if not n.startswith("forbidden.")])
    assert sum(found["drift"].get("wrong", 0) for found in rest["checks"]) > 0


async def test_wishes_that_cannot_be(url: str, empty_postgres_url: str) -> None:
    with pytest.raises(ConfigError, match="--check nonsense: there are"):
        await verify(url, DEFAULTS, VerifyOptions(only=("nonsense",)))
    with pytest.raises(ConfigError, match="--from"):
        await verify(url, DEFAULTS, VerifyOptions(start="nonsense:at://"))
    with pytest.raises(Unreachable, match="fastworker migrate"):
        await verify(empty_postgres_url, DEFAULTS, VerifyOptions())


def test_the_command(url: str) -> None:
    def command(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastworker", "verify", *args],
            env={**os.environ, "DATABASE_URL": url},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    done = command()
    assert (done.returncode, done.stderr) == (0, "")
    assert "no drift" in done.stdout
    run("UPDATE labeler_services SET like_count = 77", url)
    found = command("--check", "labeler_services.like_count")
    assert found.returncode == 1
    assert "like_count 77 -> " in found.stdout
    assert "verify --repair" in found.stdout
    mended = command("--repair")
    assert mended.returncode == 0
    assert "all mended" in mended.stdout
    assert command("--check", "list").stdout.split() == names()
    wrong = command("--check", "nonsense")
    assert (wrong.returncode, wrong.stdout) == (2, "")


def is_verified(url: str) -> bool:
    """It has a session: so it has its signal handlers, too."""

    async def ask() -> bool:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            return bool(
                await connection.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND application_name = 'fastworker-verify'"
                )
            )
        finally:
            await connection.close(timeout=10)

    return asyncio.run(ask())


def test_ctrl_c_says_where_to_go_on(url: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastworker", "verify", "--rows", "1", "--pause", "0.05"],
        env={**os.environ, "DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - one signal, before exec
    )
    try:
        give_up = time.monotonic() + 60
        while not is_verified(url):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "fastworker verify --from '" in out


@pytest.mark.parametrize("date", ["20000-01-01", "0044-03-15 BC", "infinity", "-infinity"])
async def test_what_only_postgresql_can_hold_is_no_obstacle(
    postgres_url: str, pg: asyncpg.Connection, capsys: pytest.CaptureFixture[str], date: str
) -> None:
    """Dates, versions and numbers of other writers: their rows are updated, deleted, purged and verified."""
    did, other, cid = f"did:plc:{'a' * 24}", f"did:plc:{'b' * 24}", "bafyold"
    embed = json.dumps({"$type": "app.bsky.embed.record", "n": 0}).replace("0}", "1e400}")
    for nth in range(4):
        uri = f"at://{did}/app.bsky.feed.post/3p{nth}"
        await pg.execute(
            "INSERT INTO posts (uri, cid, author_did, text, embed, created_at, indexed_at, commit_seq) "
            "VALUES ($1, $2, $3, 'old', $4, $5::text::timestamp, $5::text::timestamp, $6)",
            *(uri, cid, did, embed, date, "9" * 30 if nth else None),
        )
        await pg.execute(
            "INSERT INTO likes (uri, user_did, post_uri, created_at) VALUES ($1, $2, $3, $4::text::timestamp)",
            *(f"at://{other}/app.bsky.feed.like/3l{nth}", other, uri, date),
        )
    code, _ = await told(postgres_url, capsys, VerifyOptions(repair=True, as_json=True))
    code, drift = await told(postgres_url, capsys, VerifyOptions(as_json=True))
    assert (code, drift) == (ExitCode.DONE, {})
    op = {"text": "new", "createdAt": "2026-11-27T00:00:00.000Z", "$type": "app.bsky.feed.post"}
    like = {"$type": "app.bsky.feed.like", "subject": {"uri": f"at://{did}/app.bsky.feed.post/3p2", "cid": cid}}
    batch = Batch()
    for commit in (
        Commit(1, did, None, None, [Op("update", "app.bsky.feed.post", "3p0", cid, record=op)], []),
        Commit(2, did, None, None, [Op("delete", "app.bsky.feed.post", "3p1")], []),
        Commit(3, other, None, None, [Op("delete", "app.bsky.feed.like", "3l0")], []),
        Commit(4, other, None, None, [Op("create", "app.bsky.feed.like", "3a2", cid, record=like)], []),  # a twin
    ):
        batch.put(map_commit(commit, 1_700_000_000_000))
    batch.put_account(Account(9, other, active=False, status="deleted", time=None), datetime.now(UTC))
    store = await Store.connect(postgres_url)
    try:
        await store.write(batch)
        while await store.maintain(owed_age_s=0, dead_commit=timedelta()):
            pass
    finally:
        await store.close()
    assert [r[0] for r in await pg.fetch("SELECT text FROM posts ORDER BY uri")] == ["new", "old", "old"]
    assert await pg.fetchval("SELECT count(*) FROM likes") == 0
    code, drift = await told(postgres_url, capsys, VerifyOptions(as_json=True))
    assert (code, drift) == (ExitCode.DONE, {})


@pytest.mark.parametrize(
    "moment",
    [
        datetime(1969, 12, 31, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2026, 11, 29, 12, 34, 56, 789_012, tzinfo=UTC),
        datetime(2199, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2300, 1, 1, tzinfo=UTC),
    ],
    ids=lambda moment: f"{moment:%Y-%m-%d}",
)
async def test_the_first_tid_of_a_moment_is_said_twice_and_the_same(moment: datetime, pg: asyncpg.Connection) -> None:
    """What a deleted account beats when several relays are known: the writer's words, and those of verify."""
    row = await pg.fetchrow(f"SELECT {first_tid('$1::timestamptz')}, fastworker.tid($1)", moment)
    assert row is not None
    assert row[0] == row[1]
    nearest = min(max(moment, datetime(1970, 1, 1, tzinfo=UTC)), datetime(2200, 1, 1, tzinfo=UTC))
    assert tid_time(row[0]) == nearest.replace(tzinfo=None)


@pytest.mark.parametrize("shown", ["Bob.Test", "carol.test"])
async def test_a_handle_that_an_older_worker_wrote_is_no_drift(
    postgres_url: str, pg: asyncpg.Connection, shown: str
) -> None:
    """It counts as verified, in its own letters; a claim that is newer than it wants another one, and has to share."""
    winner, loser = "did:plc:aaaaaaaaaaa2222222222222", "did:plc:aaaaaaaaaaa2222222222223"
    await pg.execute("INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid'), ($2, $3)", winner, loser, shown)
    claim = "SELECT fastworker.claim_handles_1($1, $2, $3, $4, $5, false)"
    at = datetime(2026, 1, 1, tzinfo=UTC)
    for seq, did in enumerate((winner, loser), 1):
        await pg.execute(claim, [did], ["bob.test"], [""], [seq], [at])
    await pg.execute("UPDATE fastworker.identities SET resolve_pending = true")  # an event without a handle came
    found = {row["did"]: row["handle"] for row in await pg.fetch("SELECT did, handle FROM users")}
    assert found == {winner: "bob.test", loser: "handle.invalid"}
    assert await verify(postgres_url, DEFAULTS, VerifyOptions(as_json=True)) is ExitCode.DONE
    await pg.execute("UPDATE users SET handle = 'handle.invalid'")
    assert await verify(postgres_url, DEFAULTS, VerifyOptions(as_json=True)) is ExitCode.NO
