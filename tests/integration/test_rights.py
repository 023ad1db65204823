"""Least privilege: both services run end to end with what `fastworker grants` prints, and every right of it is needed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis
from asyncpg.exceptions import InsufficientPrivilegeError, PostgresError

from fastworker.commands import grants as rights
from fastworker.law.compare import diff, dump, report
from fastworker.law.model import Model
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.store import admin as postgres_admin
from fastworker.store import repos, routines, schema_admin
from fastworker.store import statements as sql
from fastworker.store.migrate import packaged
from fastworker.stream import consumer as stream
from fastworker.stream import feed, members, skipped, slot
from fastworker.stream.scripts import script
from fastworker.sync import gaps, history, progress, syncer, tell, widen
from fastworker.table.schema import (
    DERIVED,
    FEED_GENERATORS,
    FEED_ITEMS,
    LABELER_SERVICES,
    NOTIFICATIONS,
    POSTS,
    QUOTES,
    TABLES,
    qualified,
)

ROOT = Path(__file__).resolve().parents[2]
STREAM, CURSOR = "firehose:events", "firehose:python_cursor"


def fastworker(*words: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastworker", *words],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "FASTWORKER_HTTP_PORT": "off",
            "FASTWORKER_RESOLVE_HANDLES": "off",
            "FASTWORKER_SYNC": "off",
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def role(postgres_url: str) -> Iterator[Callable[[rights.Service], str]]:
    """Make a service's role in a database that gives nothing to PUBLIC; its URL."""
    made = []

    def execute(statements: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(postgres_url, timeout=10)
            await connection.execute(statements)
            await connection.close(timeout=10)

        asyncio.run(run())

    database = re.findall(r"/(\w+)\?|$", postgres_url)[0] or postgres_url.rpartition("/")[2]
    execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC; REVOKE ALL ON SCHEMA public FROM PUBLIC")

    def make(service: rights.Service) -> str:
        name = f"{service}_{os.getpid()}"
        made.append(name)
        for _ in range(2):  # again, as after an upgrade
            execute(rights.sql(service, name))
        return postgres_url.replace("postgres@", f"{name}@", 1)

    yield make
    for name in made:
        execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.fixture
def user(redis_url: str) -> Iterator[Callable[[rights.Service], str]]:
    """Make a service's Redis user; its URL."""
    client = redis.Redis.from_url(redis_url)
    made = []

    def make(service: rights.Service) -> str:
        name = f"{service}_{os.getpid()}"
        client.execute_command(*rights.acl(service, name).replace(">PASSWORD", ">secret").split())
        made.append(name)
        scheme, _, rest = redis_url.partition("://")
        return f"{scheme}://{name}:secret@{rest}"

    yield make
    for name in made:
        client.execute_command("ACL", "DELUSER", name)
    client.execute_command("ACL", "LOG", "RESET")
    client.close()


class Seen:
    """The commands that the server has run since."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.subcommands = int(client.info("server")["redis_version"].split(".")[0]) >= 7
        client.execute_command("ACL", "LOG", "RESET")
        client.config_resetstat()

    def commands(self) -> set[str]:
        found = self._client.info("commandstats")
        return {name.removeprefix("cmdstat_") for name, one in found.items() if one["calls"]}

    def refused(self) -> set[str]:
        return {one[b"object"].decode() for one in self._client.execute_command("ACL", "LOG")}

    def known(self, commands: set[str]) -> set[str]:
        """As this server counts: before Redis 7 subcommands are not told apart."""
        return commands if self.subcommands else {one.partition("|")[0] for one in commands}


def in_scripts(*modules: Any) -> set[str]:
    """What the scripts of these modules call: also what a short run does not come to."""
    found = set()
    for name in re.findall(r'script\("(\w+)"\)', "".join(map(inspect.getsource, modules))):
        for command, sub in re.findall(r"redis\.p?call\('(\w+)'(?:, '([A-Z]+)')?", script(name)):
            is_container = command in {"XGROUP", "XINFO"}
            found.add(f"{command}|{sub}".lower() if is_container else command.lower())
    return found


def stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    return out


async def until(done: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while True:
            answer = done()
            if answer if isinstance(answer, bool) else await answer:
                return
            if process.poll() is not None:
                raise AssertionError(f"it ended: {process.stdout.read() if process.stdout else ''}")
            await asyncio.sleep(0.05)


async def test_both_services_run_with_what_is_printed(
    redis_url: str, postgres_url: str, pg: asyncpg.Connection, role: Any, user: Any
) -> None:
    frames = list(Network(11, mix="adversarial").frames(1_200))
    last = max(frame.seq or 0 for frame in frames)
    client = redis.Redis.from_url(redis_url)
    client.set(CURSOR, 0)
    client.xgroup_create(
        STREAM, "firehose-processors", "0", mkstream=True
    )  # a worker was there before: the reader asks of its group
    seen = Seen(client)
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        reader = await asyncio.to_thread(
            lambda: fastworker(
                "reader",
                REDIS_URL=user("reader"),
                DATABASE_URL=role("reader"),
                RELAY_URL=relay.url,
                FASTWORKER_STREAM_FORMAT="native",
                FASTWORKER_STREAM_PARTITIONS="2",
                FASTWORKER_STREAM_BYTES_MAX="1gb",
            )
        )
        with ended(reader):
            await until(lambda: client.getrange(CURSOR, 0, -1) == str(last).encode(), reader)
            used = seen.commands()  # before this test asks with INFO itself
            await until(lambda: seen.known({"memory|usage", "publish"}) <= seen.commands(), reader)
            used |= seen.commands() - {"info"}
            stop(reader)
    allowed = seen.known(set(rights.COMMANDS["reader"]))
    assert not seen.refused() - seen.known({"config|get", "client|setinfo"})  # these may be refused
    assert allowed == allowed & (used | seen.known(in_scripts(feed, slot, skipped))), "more is allowed than is used"
    assert in_scripts(feed, slot, skipped) <= set(rights.COMMANDS["reader"])
    assert in_scripts(stream, members, skipped) <= set(rights.COMMANDS["worker"])

    seen = Seen(client)
    worker = await asyncio.to_thread(
        lambda: fastworker("worker", REDIS_URL=user("worker"), DATABASE_URL=role("worker"))
    )
    expected = Model()
    for frame in frames:
        if frame.event is not None:
            expected.apply(frame.event)
    tables = expected.tables()

    async def done() -> bool:
        return not diff(tables, await dump(pg))

    with ended(worker):
        try:
            await until(done, worker)
        except TimeoutError:
            pytest.fail(report(diff(tables, await dump(pg))))
        stop(worker)
    used = seen.commands()
    allowed = seen.known(set(rights.COMMANDS["worker"]))
    assert not seen.refused() - seen.known({"config|get", "client|setinfo"})  # these may be refused
    seldom = {"hlen"}  # while partitions change: stream/group.py
    assert allowed == allowed & (used | seldom | seen.known(in_scripts(stream, members, feed, slot))), (
        "more than is used"
    )
    client.close()


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=10)


def worker_statements() -> list[tuple[str, list[Any] | None]]:
    """Every statement of a worker, and arguments where nothing but NULLs would not reach what is guarded."""
    constants = [value for name, value in vars(sql).items() if name.isupper() and isinstance(value, str)]
    found = [
        text for text in constants if not re.search(r"\{\w+\}", text) and re.match("SELECT|INSERT|UPDATE|DELETE", text)
    ]
    for module in (repos, gaps, tell, progress, syncer, history, widen):  # of the syncer
        mine = [value for name, value in vars(module).items() if name.startswith("_") and isinstance(value, str)]
        found += [text for text in mine if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", text)]
    found += [*sql.CIDS.values()]
    for table in TABLES:
        found += [make(table) for make in (sql.insert, sql.lock, sql.update, sql.delete, sql.absent)]
        if table.hot:
            found += [sql.versions_of(table), sql.taken(table)]
        if table.pair:
            found += [sql.locate(table), sql.winners(table)]
    found += [sql.upsert(table) for table in DERIVED]
    found += [sql.delete(table) for table in (FEED_ITEMS, QUOTES, NOTIFICATIONS)]
    found.append(schema_admin._APPLIED)
    note = ("at://a", "did:web:a", "did:web:b", "like", None, None, datetime.now(UTC).replace(tzinfo=None))
    return [
        *((text, None) for text in found),
        (sql.LABEL_EVENTS, [["at://no/such/label"]]),  # only rows take numbers from a sequence
        (sql.upsert(NOTIFICATIONS), [[note]]),
        *worker_calls(),
    ]


def reader_statements() -> list[tuple[str, list[Any] | None]]:
    return [(one, None) for one in (postgres_admin._FINISHED, postgres_admin._NOTE_GAP, postgres_admin._NOTE_FLOOR)]


POST, GENERATOR, LABELER = "at://did:web:a/app.bsky.feed.post/a", "at://generator", "at://labeler"


def worker_calls() -> Iterator[tuple[str, list[Any]]]:
    """Our routines, every statement of them; with what is in them as a comment."""
    text = "".join(one.sql for one in packaged() if one.name == "0006_relays_and_handles")
    bodies = dict(re.findall(r"(?:FUNCTION|PROCEDURE) fastworker\.(\w+)\(.*?AS \$\$(.*?)\$\$;", text, re.DOTALL))
    bodies |= {one.name: one.sql.partition("AS $$")[2] for one in routines.packaged()}
    words = {name: f" /* {body} */" for name, body in bodies.items()}
    empty: dict[str, Any] = {
        "whole": False,
        "fresh": False,
        "until_entry": "1-1",
        "until_seq": 1,
        "of_stream": "s",
        "of_consumer": "c",
    }
    empty |= {"deltas": [(POST, 0, 0, 0, 0, 0)], **dict.fromkeys(sql.COUNTED, True)}
    empty |= {"floors": False, "lowest_rev": "", "lowest_seq": 0}
    yield sql.PUT + words["put_8"], [empty.get(name, []) for name in sql.PUT_ARGUMENTS]
    empty = dict.fromkeys(("with_contexts", "with_gates", "with_services"), True) | {"lowest_rev": "", "lowest_seq": 0}
    yield sql.PUT_WHOLE + words["put_whole_9"], [empty.get(name) for name in sql.WHOLE_ARGUMENTS]
    yield sql.FIRST + words["first_2"], [[] if name != "only_verified" else False for name in sql.FIRST_ARGUMENTS]
    changes = {"gone": [False], "read_uris": ["at://none"], "tables": ["likes"]}
    yield (
        f"SELECT * FROM fastworker.change_2({sql._named(*sql.CHANGE_ARGUMENTS)})" + words["change_2"],
        [changes.get(name, []) for name in sql.CHANGE_ARGUMENTS],
    )
    owed = [["context"], ["at://none"], [datetime.now(UTC)]]
    event = [["did:web:a"], ["a.test"], [""], [1], [datetime.now(UTC)]]
    yield sql.IDENTITIES + words["claim_handles_1"] + words["show_handles_1"], [*event, False]
    yield sql.SHOW_HANDLES + words["show_handles_1"], [["did:web:a"], ["a.test"], False]
    services = [GENERATOR, LABELER]
    yield sql.RECOMPUTE + words["recompute_5"], [[POST], [POST], [POST], services, [POST], *owed, 1, True, True, True]
    yield (
        sql.RECOMPUTE + words["recompute_5"],
        [[POST], [POST], [POST], services, [POST], *owed, None, True, True, True],
    )
    yield sql.RECOUNT + words["recount_1"], [[POST], True, True]
    yield (
        sql.PAY + words["pay_2"] + words["pay_bucket_2"] + words["pay_apart_1"] + words["recount_1"],
        [True, True],
    )


async def rows_for_calls(connection: asyncpg.Connection) -> None:
    """What is not there is not recomputed."""
    for table, uri in ((POSTS, POST), (FEED_GENERATORS, GENERATOR), (LABELER_SERVICES, LABELER)):
        at = datetime.now(UTC).replace(tzinfo=None)
        values = {"timestamp": at, "jsonb": "{}"}
        row = [values.get(kind, "did:web:a") for kind in table.types]
        row[table.index("uri")] = uri
        await connection.fetch(sql.insert(table), [tuple(row)])


# What is owed in one bucket, a part of it for a counter that is put back.
OWE = (
    "INSERT INTO fastworker.debts (bucket, deltas, attempts, not_before) "
    "SELECT fastworker.bucket($1), ARRAY[(key, 0, 0, 0, 0, 0)::fastworker.post_aggregations_row], attempts, not_before "
    "FROM (VALUES ($1::varchar, 0, '-infinity'::timestamptz), ('at://refused', 0, '-infinity'), "
    "('at://refused', 1, 'infinity')) AS of (key, attempts, not_before)"
)


async def denied(connection: asyncpg.Connection, statement: str, arguments: list[Any] | None) -> bool:
    """Rights are checked before rows: NULLs do, whatever else is wrong with them."""
    try:
        async with connection.transaction():
            prepared = await connection.prepare(statement)
            await prepared.fetch(*(arguments or [None] * len(prepared.get_parameters())))
    except InsufficientPrivilegeError:
        return True
    except PostgresError:
        pass
    return False


@pytest.mark.parametrize("service", ["worker", "reader"])
async def test_every_right_is_needed_and_no_other(pg: asyncpg.Connection, service: rights.Service) -> None:
    statements = worker_statements() if service == "worker" else reader_statements()
    role = f"needs_{service}_{os.getpid()}"
    await pg.execute("REVOKE EXECUTE ON ALL ROUTINES IN SCHEMA fastworker FROM PUBLIC")  # as a careful owner may
    await pg.execute(rights.sql(service, role))
    needed = [
        *((qualified(table), right) for table, some in rights.TABLE_RIGHTS[service].items() for right in some),
        *((f"SEQUENCE public.{name}", "USAGE") for name in rights.SEQUENCES[service]),
    ]
    assert len(needed) == len(set(needed))
    await rows_for_calls(pg)
    spare = []
    try:
        await pg.execute(f"SET plan_cache_mode = force_generic_plan; SET ROLE {role}")  # NULLs are not folded away
        assert [text for text, arguments in statements if await denied(pg, text, arguments)] == []
        for table, right in needed:
            await pg.execute("RESET ROLE")
            await pg.execute(OWE, POST)  # it is paid each time
            await pg.execute(f"REVOKE {right} ON {table} FROM {role}; SET ROLE {role}")
            name = "notifications" if "notif" in table else table.rpartition(".")[2].removesuffix("_id_seq")
            touching = [one for one in statements if name in one[0]]
            if not any([await denied(pg, *one) for one in touching]):
                spare.append(f"{right} ON {table}")
            await pg.execute(f"RESET ROLE; GRANT {right} ON {table} TO {role}")
        assert spare == []
    finally:
        await pg.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


async def test_check_compares_a_role_with_what_is_needed(pg: asyncpg.Connection, postgres_url: str) -> None:
    role = f"lacks_{os.getpid()}"
    await pg.execute(rights.sql("worker", role))
    url = postgres_url.replace("postgres@", f"{role}@", 1)
    try:
        found = await postgres_admin.facts(url, rights.TABLE_RIGHTS["worker"])
        assert found.lacking == ()
        assert not found.superuser
        await pg.execute(f"REVOKE INSERT ON label_events FROM {role}; REVOKE UPDATE, DELETE ON likes FROM {role}")
        found = await postgres_admin.facts(url, rights.TABLE_RIGHTS["worker"])
        assert found.lacking == ("INSERT on label_events", "DELETE, UPDATE on likes")
    finally:
        await pg.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_the_command_applies_it_and_sets_the_password(
    postgres_url: str, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    role, password = f"applied_{os.getpid()}", "a'b@c/d#e $1 %s"
    words = ("grants", "worker", "--role", role, "--apply", "--password-env", "ROLE_PASSWORD")
    try:
        (tmp_path / "secret").write_text(f"{password}\n")
        for given in ({"ROLE_PASSWORD": "another"}, {"ROLE_PASSWORD_FILE": str(tmp_path / "secret")}):
            with fastworker(*words, DATABASE_URL=postgres_url, **given) as process:
                said, _ = process.communicate(timeout=60)
            assert (process.returncode, said) == (0, f"{role} may do what its service needs.\n")
        found = await postgres_admin.facts(
            postgres_url.replace("postgres@", f"{role}@", 1), rights.TABLE_RIGHTS["worker"]
        )
        assert found.lacking == ()
        stored = await pg.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = $1", role)
        assert is_password_of(stored, password)
    finally:
        await pg.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    with fastworker("grants", "worker", "--apply", "--password-env", "NOWHERE", DATABASE_URL=postgres_url) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "NOWHERE is not set" in said


@pytest.mark.parametrize("by", ["the command", "the SQL"])
async def test_rights_of_two_roles_are_given_at_once(postgres_url: str, pg: asyncpg.Connection, by: str) -> None:
    """As `docker compose up` does. PostgreSQL refuses who changes a table's rights while another does ("tuple
    concurrently updated"), so the second waits for the first.
    """
    roles: dict[rights.Service, str] = {"worker": f"one_{os.getpid()}", "reader": f"two_{os.getpid()}"}
    begun, separator, _ = rights.sql("worker", roles["worker"]).rpartition("COMMIT;")
    assert separator
    await pg.execute("".join(f"CREATE ROLE {role} LOGIN;" for role in roles.values()))
    other = await asyncpg.connect(postgres_url)
    try:
        await pg.execute(begun)
        second: asyncio.Task[object] = asyncio.create_task(
            rights.grant(postgres_url, "reader", roles["reader"], "secret")
            if by == "the command"
            else other.execute(rights.sql("reader", roles["reader"]))
        )
        while not second.done() and not await pg.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.02)
        await pg.execute("COMMIT")
        await second
        for service, role in roles.items():
            found = await postgres_admin.facts(
                postgres_url.replace("postgres@", f"{role}@", 1), rights.TABLE_RIGHTS[service]
            )
            assert found.lacking == ()
    finally:
        await other.close()
        await pg.execute("ROLLBACK")
        for role in roles.values():
            await pg.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize(
    "words", ["worker", "verify", "migrate", "repair did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "grants worker --apply"]
)
async def test_a_role_without_rights_is_told_in_one_sentence(
    postgres_url: str, pg: asyncpg.Connection, redis_url: str, words: str
) -> None:
    """And not as if another try would help: exit code 2."""
    role = f"nobody_{os.getpid()}"
    await pg.execute(f"CREATE ROLE {role} LOGIN")
    try:
        url = postgres_url.replace("postgres@", f"{role}@", 1)
        with fastworker(*words.split(), DATABASE_URL=url, REDIS_URL=redis_url) as process:
            said, _ = process.communicate(timeout=60)
        assert process.returncode == 2, said
        [sentence] = [line for line in said.splitlines() if line.startswith("fastworker: ")]
        assert "permission denied" in sentence
        assert "`fastworker grants worker`" in sentence
        assert not re.search(r"\\n|migration|DETAIL|\.\.", sentence), sentence
    finally:
        await pg.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_a_reader_without_rights_reads_and_says_what_it_lacks(
    postgres_url: str, pg: asyncpg.Connection, redis_url: str
) -> None:
    role = f"nobody_{os.getpid()}"
    await pg.execute(f"CREATE ROLE {role} LOGIN")
    url = postgres_url.replace("postgres@", f"{role}@", 1)
    try:
        with fastworker("reader", DATABASE_URL=url, REDIS_URL=redis_url, RELAY_URL="ws://127.0.0.1:9") as process:
            assert process.stdout is not None
            first = [process.stdout.readline() for _ in range(3)]
            process.terminate()
            process.communicate(timeout=60)
    finally:
        await pg.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert "USAGE on schema fastworker" in first[1]
    assert "`fastworker grants reader`" in first[1]
    assert re.search(r"(Redis|Valkey) [\d.]+ at .*, PostgreSQL [\d.]+ at ", first[2])


def is_password_of(stored: str, password: str) -> bool:
    """Whether SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key> was made from it."""
    _, salted, keys = stored.split("$")
    iterations, salt = salted.split(":")
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt), int(iterations))
    client = hmac.digest(key, b"Client Key", "sha256")
    return base64.b64encode(hashlib.sha256(client).digest()).decode() == keys.split(":")[0]


def test_what_the_command_prints() -> None:
    def printed(*words: str, **env: str) -> tuple[int, str]:
        with fastworker("grants", *words, **env) as process:
            out, _ = process.communicate(timeout=60)
        return process.returncode, out

    assert printed("worker") == (0, rights.sql("worker", "fastworker_worker"))
    code, line = printed("reader", "--redis", "--role", "feeder", REDIS_STREAM_KEY="events")
    assert code == 0
    assert line == rights.acl("reader", "feeder", ("events",)) + "\n"
    assert line.split()[:7] == ["ACL", "SETUSER", "feeder", "reset", "resetchannels", "on", ">PASSWORD"]
    assert "~events" in line.split()
    code, said = printed("worker", "--role", "a; DROP TABLE posts")
    assert code == 2
    assert "--role" in said
