"""Commands as an operator runs them: a process, its environment, its words and its exit code, on real servers."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from fastworker import __version__
from fastworker.cli import cli
from fastworker.config import VARIABLES
from fastworker.event.entry import decode_entry, received_ms
from fastworker.event.recording import write_frames
from fastworker.metrics import OF_SYNCER, PARTITION_LAG, READER_METRICS, WORKER_METRICS
from fastworker.simulator.network import Network
from fastworker.stream.keys import Keys
from fastworker.sync.told import HistoryStatus, Mended, RepairStatus, TableTruth
from tests import replies
from tests.runs import usually
from tests.servers import RedisUnderTest
from tests.services import Service, get, run, until

ROOT = Path(__file__).resolve().parents[2]
STREAM, GROUP, DEAD = "firehose:events", "firehose-processors", "firehose:dead-letters"
DID = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
CID = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"
NOBODY = "127.0.0.1:1"  # a port where nobody listens
REPAIRS = RepairStatus(
    at=time.time(),
    gaps_open=1,
    gap_oldest_s=60.0,
    waiting=2,
    fetching=1,
    refused=0,
    oldest_s=30.0,
    mended={"gap": Mended(accounts=3, differences=4)},
    samples=5,
    tables={"posts": TableTruth(truth=0.999, low=0.99, compared=1_000, differing=1)},
    hosts={},
    examples=[],
    resting=[],
)
"""As a syncer tells it."""
HISTORY = HistoryStatus(
    at=time.time(),
    waiting=600,
    fetching=8,
    done=380,
    gone=10,
    refused=2,
    records=165_300,
    share=0.392,
    accounts_per_s=4.0,
    records_per_s=1_740.0,
    bytes_per_s=640_000.0,
    left_s=152.0,
    lists_open=1,
    paused=False,
    resting={"slow.example.com": 240.0},
    resting_hosts=1,
)
"""As a backfill tells it."""


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=10) as connection:
        yield connection


def post(number: int) -> dict[str, str]:
    """A JSON stream entry with one post."""
    record = {"$type": "app.bsky.feed.post", "text": f"post {number}", "createdAt": "2024-01-01T00:00:00.000Z"}
    op = {"action": "create", "path": f"app.bsky.feed.post/3k{number:011d}", "cid": CID, "record": record}
    return {"type": "commit", "data": json.dumps({"repo": DID, "ops": [op]}), "seq": str(number)}


def fetch(url: str, query: str) -> list[tuple[object, ...]]:
    async def main() -> list[tuple[object, ...]]:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close(timeout=10)

    return asyncio.run(main())


def _families(port: int) -> set[str]:
    """Nobody's client library sends `_total` in a family's name."""
    return {family.name for family in text_string_to_metric_families(get(port, "/metrics")[1])}


# --- help


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"fastworker {__version__}\n")


@pytest.mark.parametrize("command", sorted(set(cli.commands) - {"dlq"}))
def test_help_shows_the_environment_and_its_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(
        [command, "--help"],
        prog_name="fastworker",
        standalone_mode=False,
        terminal_width=1000,
        max_content_width=1000,
    )
    said = " ".join(capsys.readouterr().out.partition("Environment:")[2].split())
    for variable in VARIABLES:
        assert (f" {variable.name} " in f" {said}") == variable.is_used_by(command)
        if variable.is_used_by(command):
            assert variable.default.split()[0] in said
    assert "70 a bug of ours" in said


def test_every_command_of_a_variable_exists() -> None:
    commands = {*cli.commands, "*"}
    for variable in VARIABLES:
        assert set(variable.used_by) <= commands, variable.name


# --- refusals: one sentence, the right exit code, no traceback, no password


@pytest.mark.parametrize(
    ("args", "env", "code", "words"),
    [
        (["worker"], {}, 2, "DATABASE_URL is not set"),
        (["worker"], {"DATABASE_URL": "mysql://u:hunter2@h/x"}, 2, "postgresql://"),
        (["worker"], {"FASTWORKER_PROCESES": "2"}, 2, "did you mean FASTWORKER_PROCESSES?"),
        (["worker"], {"DATABASE_URL": f"postgresql://u:hunter2@{NOBODY}/x", "REDIS_URL": "{redis}"}, 3, "PostgreSQL"),
        (["worker"], {"DATABASE_URL": "{empty}", "REDIS_URL": "{redis}"}, 3, "fastworker migrate"),
        (["worker"], {"DATABASE_URL": "{pg}", "REDIS_URL": f"redis://:hunter2@{NOBODY}"}, 3, "Redis cannot be reached"),
        (["worker", "--reapply", "yesterday"], {"DATABASE_URL": "{pg}", "REDIS_URL": "{redis}"}, 2, "stream id"),
        (["reader"], {"REDIS_URL": f"redis://:hunter2@{NOBODY}"}, 3, "Redis cannot be reached"),
        (["reader"], {"REDIS_URL": "{redis}", "REDIS_STREAM_KEY": "a-list"}, 3, "a-list is a list, not a stream"),
        (["reader"], {"RELAY_URL": "ftp://x"}, 2, "RELAY_URL"),
        (["status"], {"REDIS_URL": f"redis://u:hunter2@{NOBODY}"}, 3, "Redis cannot be reached"),
        (["dlq", "list"], {"REDIS_URL": "redis://x:hunter2@nowhere.invalid"}, 3, "Redis cannot be reached"),
        (["dlq", "purge"], {}, 2, "--all"),
        (["migrate"], {"DATABASE_URL": f"postgresql://u:hunter2@{NOBODY}/x"}, 3, "PostgreSQL"),
        (["migrate"], {"DATABASE_URL": f"postgresql://u:hunter2@{NOBODY}/x"}, 3, NOBODY),
        (["migrate"], {"DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1,127.0.0.1:2/x"}, 3, "127.0.0.1:1 or 127."),
        (["migrate"], {"DATABASE_URL": "{pg}&no_such=hunter2"}, 2, '"no_such"'),
        (["worker"], {"DATABASE_URL": "{pg}&statement_timeout=soon", "REDIS_URL": "{redis}"}, 2, '"statement_timeout"'),
        (["worker", "--reapply", "0"], {"DATABASE_URL": "{pg}&no_such=1", "REDIS_URL": "{redis}"}, 2, '"no_such"'),
        (["migrate", "--check"], {"DATABASE_URL": "{pg}&shared_buffers=1"}, 2, '"shared_buffers"'),
        (["verify"], {"DATABASE_URL": "{pg}&sslcert=/nonexistent"}, 2, "sslcert names no file"),
        (["status"], {"REDIS_URL": "redis://:hunter2@a,b"}, 2, "several servers"),
        (["status"], {"REDIS_URL_FILE": "/nonexistent"}, 2, "No such file"),
        (["replay", "/nonexistent"], {}, 2, "does not exist"),
        (["health"], {"FASTWORKER_HTTP_PORT": "1"}, 1, "nobody answers"),
        (["health"], {"FASTWORKER_HTTP_PORT": "off"}, 2, "FASTWORKER_HTTP_PORT"),
        (["nonsense"], {}, 2, "No such command"),
        (["relay", "--port", "{port}", "--events", "5"], {}, 3, "in use: give --port another one"),
        (["relay", "--host", "203.0.113.1", "--events", "5"], {}, 2, "Cannot listen on 203.0.113.1"),
        (["relay", "--host", "nowhere.invalid", "--events", "5"], {}, 2, "Cannot listen on nowhere.invalid"),
        (["up"], {"FASTWORKER_HOME": "/proc/nowhere"}, 2, "FASTWORKER_HOME"),
    ],
)
def test_refusal(
    args: list[str],
    env: dict[str, str],
    code: int,
    words: str,
    client: redis.Redis,
    request: pytest.FixtureRequest,
) -> None:
    client.rpush("a-list", "x")
    for name, fixture in {"{redis}": "redis_url", "{pg}": "postgres_url", "{empty}": "empty_postgres_url"}.items():
        if any(name in value for value in env.values()):  # a database is made for those that name it
            env = {key: value.replace(name, request.getfixturevalue(fixture)) for key, value in env.items()}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        if args[0] in {"worker", "reader"}:  # the usual port may be a neighbour's, which is worth a line of its own
            env = {"FASTWORKER_HTTP_PORT": "0", **env}
        done = run(*(arg.replace("{port}", port) for arg in args), **env)
    said = done.stderr
    assert done.returncode == code, said
    assert words in said
    assert "Traceback" not in said
    assert "hunter2" not in said + done.stdout
    if "Usage:" not in said:
        told = [line for line in said.splitlines() if "[INFO] " not in line]  # how a service is set, what it found
        assert len(told) == 1, said


# --- services


def test_worker_from_entry_to_row_and_what_it_tells_meanwhile(
    services: Callable[..., Service], client: redis.Redis, redis_url: str, postgres_url: str
) -> None:
    for number in range(1, 101):
        client.xadd(STREAM, replies.to_add(post(number)))
    env = {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url, "FASTWORKER_HTTP_PORT": "0"}
    worker = services("worker", BATCH_SIZE="10", PARALLEL_CONSUMERS="5", DB_POOL_SIZE="20", **env)
    port = int(worker.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1])
    until(lambda: client.hget("fastworker:ledger", "committed") == b"100")
    assert fetch(postgres_url, "SELECT count(*) FROM posts") == [(100,)]
    worker.wait_for(r"^\[[-\d]{10} [:\d]{8}\] \[INFO\] Processed 100 events \(~[\d,]+ events/sec\)$")

    until(lambda: get(port, "/readyz") == (200, "ok\n"))
    assert get(port, "/livez") == (200, "ok\n")
    health = run("health", FASTWORKER_HTTP_PORT=str(port))
    assert (health.returncode, health.stdout) == (0, "ok\n")

    until(lambda: 'fastworker_entries_total{outcome="committed"} 100.0' in get(port, "/metrics")[1])
    known = {metric.name.removesuffix("_total") for metric in WORKER_METRICS}
    elsewhere = {metric.name for metric in (*OF_SYNCER, PARTITION_LAG)}  # a syncer's, and of several partitions
    counts_reads = "entries-read" in client.xinfo_groups(STREAM)[0]  # from Redis 7 on
    if not counts_reads:
        known.discard("fastworker_unaccounted_entries")
    until(lambda: _families(port) == known - elsewhere)
    families = {family.name: family for family in text_string_to_metric_families(get(port, "/metrics")[1])}
    for histogram in ("latency_seconds", "flush_seconds", "flush_entries"):
        of = {
            sample.name.removeprefix(f"fastworker_{histogram}"): sample
            for sample in families[f"fastworker_{histogram}"].samples
        }
        assert of["_count"].value > 0
        assert of["_sum"].value > 0
    drops = {sample.labels["reason"]: sample.value for sample in families["fastworker_drops"].samples}
    assert drops["bad_frame"] == 0.0, "drops are visible at zero"
    until(lambda: not client.xlen(STREAM))  # what the only group has finished is trimmed

    page = json.loads(get(port, "/status.json")[1])
    assert page["ready"] is True
    assert {"worker-0", "worker-1"} <= {process["name"] for process in page["processes"]}
    assert "<title>fastworker</title>" in get(port, "/")[1]

    until(lambda: client.hlen("fastworker:status:worker"))

    def told() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("status", "--json", REDIS_URL=redis_url).stdout)
        return found

    def all_ready() -> bool:
        return [process["ready"] for process in told()["workers"][0]["processes"]] == [True, True, True]

    until(all_ready)  # told every few seconds
    status = told()
    unaccounted = 0 if counts_reads else None
    assert (status["ledger"]["committed"], status["unaccounted_entries"], status["lag_entries"]) == (
        100,
        unaccounted,
        0,
    )
    shown = run("status", REDIS_URL=redis_url)
    assert "100 committed" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80

    # The parent holds no threads, no sockets and no loop: so it can fork at any time.
    parent = Path(f"/proc/{worker.process.pid}")
    assert len(list((parent / "task").iterdir())) == 1
    held = []
    for one in (parent / "fd").iterdir():
        with suppress(FileNotFoundError):  # what it had just read in /proc
            held.append(str(one.readlink()))
    assert not [one for one in held if "socket:" in one or "eventpoll" in one]

    client.set(Keys().repair_status, msgspec.json.encode(REPAIRS), ex=3_600)
    client.set(Keys().history_status, msgspec.json.encode(HISTORY), ex=3_600)
    client.set(Keys().partitions, "2 2")
    until(lambda: _families(port) == known)
    scraped = get(port, "/metrics")[1]
    assert 'fastworker_history_accounts{state="waiting"} 600.0' in scraped
    assert "fastworker_history_left_seconds 152.0" in scraped
    cards = {card["title"]: card["value"] for card in json.loads(get(port, "/status.json")[1])["cards"]["History"]}
    assert cards == {
        "history done": "39.2%",
        "accounts open": 608,
        "history": 1_740.0,
        "history is done in": 152.0,
        "hosts that hold back": 1,
        "accounts given up": 2,
    }
    words = " ".join(run("status", REDIS_URL=redis_url).stdout.split())
    assert "39.2%, 392 of 1,000 accounts, 165,300 records, 2 refused; 4.0 accounts/s" in words
    assert "3 min left; lists of accounts are still being read; holding back: slow.example.com (4 min)" in words

    started = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - started < 10
    assert not client.hlen("fastworker:status:worker")
    assert "Traceback" not in "\n".join(worker.lines)


def test_a_worker_that_cannot_finish_entries_is_not_ready(
    services: Callable[..., Service], client: redis.Redis, redis_url: str, postgres_url: str
) -> None:
    """Health means progress: the sockets are open, the processes live, and nothing gets done."""
    env = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": postgres_url,
        "FASTWORKER_HTTP_PORT": "0",
        "FASTWORKER_PROCESSES": "1",
    }
    worker = services("worker", **env)
    port = int(worker.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1])
    until(lambda: get(port, "/readyz")[0] == 200)
    fetch(postgres_url, "ALTER TABLE posts RENAME TO posts_away")
    client.xadd(STREAM, replies.to_add(post(1)))
    until(lambda: "waits for PostgreSQL" in get(port, "/readyz")[1])
    assert get(port, "/readyz")[0] == 503
    assert run("health", FASTWORKER_HTTP_PORT=str(port)).returncode == 1
    assert run("health", "--live", FASTWORKER_HTTP_PORT=str(port)).returncode == 0
    fetch(postgres_url, "ALTER TABLE posts_away RENAME TO posts")
    until(lambda: get(port, "/readyz")[0] == 200)
    assert fetch(postgres_url, "SELECT count(*) FROM posts") == [(1,)]
    assert worker.stop() == 0


def test_series_that_others_name_are_bounded(
    services: Callable[..., Service], client: redis.Redis, redis_url: str, postgres_url: str
) -> None:
    for n in range(60):
        client.xgroup_create(STREAM, b"\xff" * 500 + str(n).encode(), id="0", mkstream=True)
    client.hset("fastworker:ledger", mapping={f"drop:of our own {n}": n for n in range(500)})
    client.hset("cluster:metrics", mapping={f"#kind {n}": n for n in range(500)})
    worker = services("worker", FASTWORKER_HTTP_PORT="0", REDIS_URL=redis_url, DATABASE_URL=postgres_url)
    port = int(worker.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1])
    own = f'fastworker_group_lag_entries{{group="{GROUP}"}}'
    until(lambda: own in get(port, "/metrics")[1])  # the first reading may be older than our group
    code, text = get(port, "/metrics")
    assert code == 200
    assert len(text) < 25_000
    assert own in text
    assert text.count("fastworker_group_lag_entries{") <= 20
    assert get(port, "/status.json")[0] == 200

    half_open = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for one in half_open:
        one.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        one.setblocking(False)

    def ended() -> int:
        count = 0
        for one in half_open:
            try:
                count += not one.recv(1)
            except BlockingIOError:
                pass
            except OSError:
                count += 1
        return count

    until(lambda: ended() >= 68)  # the others are younger than a minute
    assert get(port, "/readyz")[0] == 200
    for one in half_open:
        one.close()
    assert worker.stop() == 0


def test_a_port_that_the_operator_chose_must_be_free(
    services: Callable[..., Service], redis_url: str, postgres_url: str
) -> None:
    env = {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url, "FASTWORKER_PROCESSES": "1"}
    first = services("worker", FASTWORKER_HTTP_PORT="0", **env)
    port = first.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1]
    second = services("worker", FASTWORKER_HTTP_PORT=port, **env)
    second.wait_for(f"Port {port} of 127.0.0.1 is in use")
    assert second.process.wait(60) == 3
    second.stop()
    assert len(second.lines) == 2, "how it is set and one sentence, before anything is started"
    assert first.stop() == 0


def test_a_default_port_that_is_taken_gives_way_and_everybody_says_where(
    services: Callable[..., Service], redis_url: str, postgres_url: str, tmp_path: Path
) -> None:
    env = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": postgres_url,
        "TMPDIR": str(tmp_path),
        "FASTWORKER_PROCESSES": "1",
    }
    with suppress(OSError), closing(socket.create_server(("127.0.0.1", 9400))):  # if it is not another test's
        worker = services("worker", **env)
        port = worker.wait_for(r"Port 9400 of 127.0.0.1 is in use: this service is at port (\d+)")[1]
        assert worker.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1] == port
        until(lambda: get(int(port), "/readyz")[0] == 200)
        shown = json.loads(run("status", "--json", **env).stdout)["workers"]
        assert [one["http"] for one in shown] == [f"127.0.0.1:{port}"]
        health = run("health", FASTWORKER_HTTP_HOST="127.0.0.1", TMPDIR=str(tmp_path))
        assert (health.returncode, health.stdout) == (0, "ok\n")
        assert worker.stop() == 0


def test_relay_reader_and_its_port(services: Callable[..., Service], client: redis.Redis, redis_url: str) -> None:
    relay = services("relay", "--events", "300", "--port", "0", "--seed", "5")
    url = relay.wait_for("RELAY_URL=(.+)")[1]
    env = {"RELAY_URL": url, "REDIS_URL": redis_url, "FASTWORKER_HTTP_PORT": "0", "FASTWORKER_STREAM_FORMAT": "native"}
    reader = services("reader", FASTWORKER_LOG_FORMAT="json", **env)
    port = int(reader.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1])
    until(lambda: client.xlen(STREAM) > 250)
    until(lambda: get(port, "/readyz") == (200, "ok\n"))
    until(lambda: re.search(r"^fastworker_reader_frames_total 300\.0$", get(port, "/metrics")[1], re.MULTILINE))
    until(lambda: _families(port) == {metric.name.removesuffix("_total") for metric in READER_METRICS})
    assert json.loads(get(port, "/status.json")[1])["processes"][0]["state"] == "connected"
    relay.stop(signal.SIGINT)
    until(lambda: "not connected to the relay" in get(port, "/readyz")[1])
    assert get(port, "/readyz")[0] == 503
    assert reader.stop() == 0
    reader.wait_for("Stopped. Total events: ")
    assert {"time", "level", "message", "logger", "pid"} <= set.intersection(
        *(set(json.loads(one)) for one in reader.lines)
    )


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def answers(question: Callable[[], bool]) -> bool:
    """Whether it is true; not while its server starts."""
    try:
        return question()
    except (redis.RedisError, OSError, asyncpg.PostgresError):
        return False


def test_up_keeps_its_data_and_is_alone(services: Callable[..., Service], tmp_path: Path) -> None:
    relay = services("relay", "--events", "200", "--port", "0", "--seed", "7")
    url = relay.wait_for("RELAY_URL=(.+)")[1]
    home = tmp_path / "a home"
    env = {
        "RELAY_URL": url,
        "FASTWORKER_HOME": str(home),
        "FASTWORKER_HTTP_PORT": "0",
        "FASTWORKER_PROCESSES": "1",
    }
    up = services("up", **env)
    database = up.wait_for("psql '(.+)'", 60)[1]
    stream = up.wait_for("REDIS_URL='(.+)' fastworker status")[1]
    up.wait_for("is ready after")
    until(lambda: fetch(database, "SELECT count(*) > 50 FROM likes") == [(True,)])
    until(lambda: "connected to ws://127.0.0.1" in run("status", REDIS_URL=stream).stdout)  # told every few seconds
    found = run("status", FASTWORKER_HOME=str(home))
    assert "connected to ws://127.0.0.1" in found.stdout, "operators' commands find the servers by the folder"
    assert run("verify", FASTWORKER_HOME=str(home)).returncode in {0, 1}
    second = run("up", **env)
    assert second.returncode == 2
    assert "Another `fastworker up` runs in" in second.stderr
    last = max(frame.seq or 0 for frame in Network(7).frames(200))
    with redis.Redis.from_url(stream, socket_timeout=10) as own:

        def all_stored() -> bool:
            came = own.get("firehose:python_cursor") == str(last).encode()
            newest, (group,) = own.xinfo_stream(STREAM)["last-generated-id"], own.xinfo_groups(STREAM)
            # what was handed out is not stored yet
            return bool(came and group["last-delivered-id"] == newest and group["pending"] == 0)

        until(all_stored)
    assert json.loads(run("status", "--json", REDIS_URL=stream).stdout)["lag_entries"] == 0
    likes = fetch(database, "SELECT count(*) FROM likes")
    for what, name in (("Valkey", "valkey-server"), ("PostgreSQL", "postgres")):
        [pid] = [pid for pid in children_of(up.process.pid) if name in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(pid, signal.SIGKILL)
        up.wait_for(rf"the embedded {what} \(pid \d+\) was started again")
    with redis.Redis.from_url(stream, socket_timeout=10) as own:
        until(lambda: answers(lambda: own.xlen(STREAM) >= 0))
        added = own.xadd(STREAM, {"type": "commit", "data": "{", "seq": "1"})
        until(lambda: added in [letter[b"origId"] for _, letter in own.xrevrange("firehose:dead-letters")])
    until(lambda: answers(lambda: fetch(database, "SELECT count(*) FROM likes") == likes))
    assert up.stop(signal.SIGINT) == 0

    again = services("up", **env)
    again.wait_for("is ready after", 60)
    assert fetch(database, "SELECT count(*) FROM likes") == likes
    assert again.stop() == 0


def test_a_future_cursor_ends_the_reader_and_a_gap_is_shown(
    services: Callable[..., Service], client: redis.Redis, redis_url: str
) -> None:
    relay = services("relay", "--events", "50", "--port", "0", "--seed", "5")
    url = relay.wait_for("RELAY_URL=(.+)")[1]
    client.set("firehose:python_cursor", "99999999999")
    client.lpush(
        "fastworker:gaps",
        json.dumps({"relay": "r.test", "reason": "outdated_cursor", "after": 10, "resumed": 50, "at": 1767323045678}),
    )
    done = run("reader", REDIS_URL=redis_url, RELAY_URL=url, FASTWORKER_HTTP_PORT="off")
    assert done.returncode == 4, done.stderr
    assert "says that the cursor 99999999999 lies in its future" in done.stderr
    assert "Run `fastworker reader --from live` once" in done.stderr
    assert "delete" not in done.stderr, "PostgreSQL would give the same cursor again"
    assert "Traceback" not in done.stderr
    assert client.get("firehose:python_cursor") == b"99999999999"
    shown = run("status", REDIS_URL=redis_url).stdout
    assert "2026-01-02 03:04 UTC r.test: 10 to 50, outdated_cursor" in shown
    [gap] = json.loads(run("status", "--json", REDIS_URL=redis_url).stdout)["reader"]["newest_gaps"]
    assert gap == {"relay": "r.test", "reason": "outdated_cursor", "after": 10, "resumed": 50, "at": 1767323045.678}


def test_the_reader_begins_where_it_is_told(
    services: Callable[..., Service], client: redis.Redis, redis_url: str, postgres_url: str
) -> None:
    relay = services("relay", "--events", "60", "--port", "0", "--seed", "5")
    env = {"REDIS_URL": redis_url, "RELAY_URL": relay.wait_for("RELAY_URL=(.+)")[1], "DATABASE_URL": postgres_url}
    env["FASTWORKER_HTTP_PORT"] = "off"
    client.set("firehose:python_cursor", "1")
    reader = services("reader", "--from", "31000000000", **env)
    until(lambda: client.xlen(STREAM) > 20 or reader.process.poll() is not None)
    assert reader.stop() == 0, reader.lines
    assert int(replies.entries(client.xrange(STREAM))[0][1][b"seq"]) > 31_000_000_000
    assert fetch(postgres_url, "SELECT from_seq, to_seq FROM fastworker.gaps") == [(1, 30_999_999_999)]
    assert run("reader", "--from", "tip", **env).returncode == 2


# --- one-shot commands


def test_a_reader_that_waits_for_postgresql_says_it_once(services: Callable[..., Service], redis_url: str) -> None:
    """And then each minute, not at each try."""
    relay = services("relay", "--events", "50", "--port", "0")
    env = {"REDIS_URL": redis_url, "RELAY_URL": relay.wait_for("RELAY_URL=(.+)")[1], "FASTWORKER_HTTP_PORT": "off"}
    reader = services("reader", DATABASE_URL=f"postgresql://postgres@{NOBODY}/x", **env)
    reader.wait_for("PostgreSQL is away: .*Connection refused; the cursor is lost", 60)
    time.sleep(2)  # some ten tries
    assert sum("only PostgreSQL knows it" in line for line in reader.lines) == 1, reader.lines
    assert not any("Errno" in line or "Connect call failed" in line for line in reader.lines), reader.lines
    assert reader.stop() == 0


@pytest.mark.parametrize(
    "words",
    usually(
        ["migrate", "export did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", "sample", "backfill --status", "repair --recorded"],
        "migrate",
        "repair --recorded",
    ),
)
def test_every_command_looks_for_the_servers_of_its_home(tmp_path: Path, words: str) -> None:
    home = tmp_path / "home"
    done = run(*words.split(), FASTWORKER_HOME=str(home))
    assert done.returncode == 3, done.stderr
    assert str(home) in done.stderr, "it asked there, and nobody answered"
    assert not home.exists(), "only `up` makes it"


def test_settings_of_files(tmp_path: Path, redis_url: str) -> None:
    """Before or after the command; the environment goes first, then the last file; an empty value is not set."""
    first, second = tmp_path / "first.env", tmp_path / "second.env"
    first.write_text(f"REDIS_URL=redis://{NOBODY}\nREDIS_STREAM_KEY=one\n")
    second.write_text(f"export REDIS_URL='{redis_url}'\n")
    for args in (["--env-file", str(first), "dlq", "list"], ["dlq", "list", "--env-file", str(first)]):
        assert run(*args).returncode == 3
        assert run(*args, REDIS_URL=redis_url).returncode == 0
        assert run(*args, "--env-file", str(second)).returncode == 0
    assert run("dlq", "list", "--env-file", str(second), REDIS_URL="").returncode == 0
    refused = run("dlq", "list", "--env-file", str(tmp_path / "none"))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_migrate_and_its_check(empty_postgres_url: str) -> None:
    before = run("migrate", "--check", DATABASE_URL=empty_postgres_url)
    assert before.returncode == 1
    assert "0001_contract is not applied" in before.stdout
    assert "applied 0001_contract" in run("migrate", DATABASE_URL=empty_postgres_url).stdout
    after = run("migrate", "--check", DATABASE_URL=empty_postgres_url)
    assert (after.returncode, after.stdout) == (0, "The schema is up to date.\n")


@pytest.mark.parametrize("form", usually(["json", "native", "frame"], "json", "frame"))
def test_replay_skips_bad_frames(form: str, tmp_path: Path, client: redis.Redis, redis_url: str) -> None:
    frames = [frame.data for frame in Network(11, accounts=20).frames(60)]
    file = tmp_path / "some.frames"
    write_frames(file, [*frames[:30], b"not a frame", b"", *frames[30:]])
    with file.open("ab") as tail:
        tail.write(b"\x00\x00\x01\x00cut off")
    done = run("replay", str(file), REDIS_URL=redis_url, FASTWORKER_STREAM_FORMAT=form)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{client.xlen(STREAM)} entries appended to firehose:events as {form}, ", done.stdout)
    assert "bad_frame 2" in done.stdout
    assert "ends in the middle of a frame" in done.stderr
    assert client.xlen(STREAM) >= 55
    for _, fields in replies.entries(client.xrange(STREAM)):
        event = decode_entry(fields)  # which is judged by its own time
        told_ms = datetime.fromisoformat(event.time or "").timestamp() * 1000
        assert received_ms("1-0", fields) == pytest.approx(told_ms, abs=1)
    swapped = run("replay", str(file), "--little-endian", REDIS_URL=redis_url)
    assert swapped.returncode == 2
    assert "byte order" in swapped.stderr


def test_replay_waits_while_the_stream_is_full(
    tmp_path: Path, services: Callable[..., Service], client: redis.Redis, redis_url: str
) -> None:
    file = tmp_path / "some.frames"
    write_frames(file, [frame.data for frame in Network(11, accounts=20).frames(40)])
    replay = services("replay", str(file), REDIS_URL=redis_url, REDIS_MAX_STREAM_LEN="15")
    replay.wait_for("The stream is full")
    seen = client.xlen(STREAM)
    assert seen == 15
    while replay.process.poll() is None:
        assert client.xlen(STREAM) <= 15
        seen += client.xtrim(STREAM, maxlen=0, approximate=False)
        time.sleep(0.05)
    assert replay.stop() == 0
    replay.wait_for(r"^\d+ entries appended")


def test_reapply_heals_what_an_old_worker_dropped(client: redis.Redis, redis_url: str, postgres_url: str) -> None:
    half = 1_700_000_000_000
    ids = [
        replies.text(client.xadd(STREAM, replies.to_add(post(n)), id=f"{half}-{n}" if n < 16 else f"{half + n}-0"))
        for n in range(1, 31)
    ]
    client.xgroup_create(STREAM, GROUP, id="0")
    client.xreadgroup(GROUP, "python-worker-0", {STREAM: ">"})
    client.xack(STREAM, GROUP, *ids)  # and stored nothing
    env = {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url}
    done = run("worker", "--reapply", ids[10], **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20 entries applied again from ")
    assert fetch(postgres_url, "SELECT count(*) FROM posts") == [(20,)]
    assert run("worker", "--reapply", ids[20], **env).stdout.startswith("10 entries applied again from ")
    assert run("worker", "--reapply", "0", **env).stdout.startswith("30 entries applied again from 0 ")
    assert fetch(postgres_url, "SELECT count(*), max(uri) FROM posts") == [
        (30, f"at://{DID}/app.bsky.feed.post/3k00000000030")
    ]
    assert client.xlen(STREAM) == 30
    assert not client.exists("fastworker:ledger")


def test_check_on_good_servers_and_on_one_that_evicts(
    client: redis.Redis, redis_url: str, postgres_url: str, server_dir: Path
) -> None:
    client.xadd(STREAM, replies.to_add(post(1)))
    done = run("check", REDIS_URL=redis_url, DATABASE_URL=postgres_url)
    assert done.returncode == 0, done.stdout
    assert "ok   postgresql: The schema is complete." in done.stdout
    assert "warn redis: appendonly is off" in done.stdout
    with RedisUnderTest(server_dir, settings={"maxmemory-policy": "allkeys-lru"}) as server:
        done = run("check", "--json", REDIS_URL=server.url, DATABASE_URL=f"postgresql://u:hunter2@{NOBODY}/x")
    findings = json.loads(done.stdout)
    assert done.returncode == 1
    failed = [finding["sentence"] for finding in findings if finding["verdict"] == "fail"]
    assert any("maxmemory-policy noeviction" in sentence for sentence in failed)
    assert any("PostgreSQL at 127.0.0.1:1 cannot be reached" in sentence for sentence in failed)
    assert "hunter2" not in done.stdout


def test_check_sees_trimmed_pending_and_a_missing_table(client: redis.Redis, redis_url: str, postgres_url: str) -> None:
    for number in range(5):
        client.xadd(STREAM, replies.to_add(post(number + 1)))
    client.xgroup_create(STREAM, GROUP, id="0")
    client.xreadgroup(GROUP, "worker-0-p0", {STREAM: ">"})
    client.xtrim(STREAM, maxlen=1, approximate=False)
    fetch(postgres_url, "DROP TABLE quotes")
    done = run("check", REDIS_URL=redis_url, DATABASE_URL=postgres_url)
    said = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "4 of the oldest pending entries are not on the stream" in said
    assert "Other workers are active in group firehose-processors: worker-0-p0" in said
    assert "fail postgresql: Table quotes is missing: let the AppView make its schema" in said


# --- dead letters


@pytest.fixture
def letters(client: redis.Redis) -> dict[str, str]:
    """One of each kind: the predecessor's, our worker's (JSON, native, unknown), our reader's."""
    frame = next(frame for frame in Network(3).frames(5) if frame.event and frame.event["kind"] == "commit")
    base = {"seq": "7", "origId": "1-0", "deliveries": "3"}
    ours = {"error": "why", "consumer": "python-worker-0", "setAsideAt": "1700000000000"}
    found: dict[str, dict[str, Any]] = {
        "predecessor": {"type": "commit", "data": post(1)["data"], **base, "deliveries": "10"},
        "json": {"type": "commit", "data": post(2)["data"], **base, "reason": "row_rejected", "form": "json", **ours},
        "native": {"type": "native", "data": b"\xff\x00", **base, "reason": "unknown_format", "form": "native", **ours},
        "reader": {
            "type": "frame",
            "data": base64.b64encode(frame.data),
            "seq": "",
            "origId": "",
            "deliveries": "0",
            "reason": "bad_frame",
            "error": "",
            "form": "frame",
            "consumer": "reader",
            "setAsideAt": "1700000000000",
        },
        "broken": {
            "type": "frame",
            "data": base64.b64encode(b"nothing"),
            "seq": "",
            "origId": "",
            "deliveries": "0",
            "reason": "bad_frame",
            "form": "frame",
            "consumer": "reader",
        },
    }
    return {name: replies.text(client.xadd(DEAD, replies.to_add(fields))) for name, fields in found.items()}


def test_dlq_list_and_show(letters: dict[str, str], redis_url: str) -> None:
    listed = run("dlq", "list", REDIS_URL=redis_url)
    assert listed.returncode == 0
    assert "5 dead letters: bad_frame 2, deliveries 1, row_rejected 1, unknown_format 1" in listed.stdout
    lines = run("dlq", "list", "--json", "--reason", "bad_frame", REDIS_URL=redis_url).stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [letters["reader"], letters["broken"]]
    shown = json.loads(run("dlq", "show", letters["predecessor"], REDIS_URL=redis_url).stdout)
    assert shown["reason"] == "deliveries"
    assert shown["event"]["ops"][0]["record"]["text"] == "post 1"
    shown = json.loads(run("dlq", "show", letters["reader"], REDIS_URL=redis_url).stdout)
    assert shown["event"]["kind"] == "commit"
    shown = json.loads(run("dlq", "show", letters["native"], REDIS_URL=redis_url).stdout)
    assert shown["not_understood"].startswith("unknown_format")
    assert shown["data"] == {"$bytes": "/wA="}
    assert run("dlq", "show", "9-9", REDIS_URL=redis_url).returncode == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["show", "nonsense"], "'nonsense' is not the id of a dead letter"),
        (["retry", "1-2-3"], "'1-2-3' is not the id of a dead letter"),
        (["purge", "-"], "'-' is not the id"),
        (["purge", "--reason", "typo"], "the reasons are bad_entry, "),
        (["retry", "--reason", "typo"], "deliveries"),
        (["list", "--reason", "typo"], "the reasons are"),
        (["purge", "--all"], "--yes"),
    ],
)
def test_dlq_refuses_what_cannot_be(args: list[str], words: str, client: redis.Redis, redis_url: str) -> None:
    client.xadd(DEAD, {"reason": "typo"})
    done = run("dlq", *args, REDIS_URL=redis_url)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert client.xlen(DEAD) == 1


def test_dead_letters_cannot_speak_to_the_terminal(client: redis.Redis, redis_url: str) -> None:
    """Nor break its table, nor what reads its JSON."""
    evil = "x\n[2026-11-27 00:00:00] [CRITICAL] lost \x1b[31m\x1b]0;title\x07\x9b1m\r\u202e\u2028[/bold] [red] :smile:"
    fields = dict.fromkeys(("type", "reason", "error", "consumer", "form", "deliveries", "origId", "seq"), evil)
    letter_id = replies.text(client.xadd(DEAD, replies.to_add(fields | {"data": evil, "setAsideAt": "9" * 30})))
    told = []
    for args in (["list"], ["list", "--json"], ["show", letter_id]):
        done = run("dlq", *args, REDIS_URL=redis_url, COLUMNS="1000")
        told.append(done.stdout)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert not set(said) & set("\x1b\x07\x9b\r\u202e\u2028"), args
        assert not re.search(r"(?m)^\[2026", said), said
    listed, as_json, shown = told
    assert r"[CRITICAL] lost \x1b[31m\x1b]0;title\x07\x9b1m\r\u202e\u2028[/bold] [red] :smile:" in listed
    assert json.loads(as_json)["error"] == json.loads(shown)["error"] == evil


def test_dlq_retry_gives_back_what_the_entry_was(letters: dict[str, str], client: redis.Redis, redis_url: str) -> None:
    done = run("dlq", "retry", letters["json"], "9-9", REDIS_URL=redis_url)
    assert done.returncode == 1
    assert "9-9: there is no such dead letter" in done.stderr
    ((_, fields),) = replies.entries(client.xrange(STREAM))
    data = post(2)["data"].encode()
    assert list(fields.items()) == [(b"type", b"commit"), (b"data", data), (b"seq", b"7"), (b"at", b"1")]  # of 1-0
    done = run("dlq", "retry", "--all", REDIS_URL=redis_url, FASTWORKER_STREAM_FORMAT="native")
    assert done.returncode == 1
    assert "3 dead letters went back" in done.stdout
    assert letters["broken"] in done.stderr
    assert [letter_id.decode() for letter_id, _ in replies.entries(client.xrange(DEAD))] == [letters["broken"]]
    forms = [set(fields) for _, fields in replies.entries(client.xrange(STREAM))][1:]
    assert forms == [{b"type", b"data", b"seq", b"at"}, {b"n", b"at"}, {b"n"}]


def test_a_retry_goes_through_the_version_guard_and_the_horizon(
    services: Callable[..., Service], client: redis.Redis, redis_url: str, postgres_url: str
) -> None:
    """Three posts are refused. One is deleted meanwhile, of one the delete was forgotten, one lives."""
    fetch(postgres_url, "ALTER TABLE posts ADD CONSTRAINT poison CHECK (text NOT LIKE '%post%')")
    days = int((time.time() - 30 * 86_400) * 1000)
    client.xadd(STREAM, replies.to_add(post(1)), id=f"{days}-1")  # without a time of its own: its id tells
    for number in (2, 3):
        client.xadd(STREAM, replies.to_add(post(number)))
    env = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": postgres_url,
        "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_PROCESSES": "1",
    }
    worker = services("worker", **env)
    until(lambda: client.xlen(DEAD) == 3)
    op = {"action": "delete", "path": "app.bsky.feed.post/3k00000000002"}
    client.xadd(STREAM, {"type": "commit", "data": json.dumps({"repo": DID, "ops": [op]}), "seq": "9"})
    until(lambda: client.hget("fastworker:ledger", "committed") == b"1")
    assert worker.stop() == 0
    fetch(postgres_url, "ALTER TABLE posts DROP CONSTRAINT poison")
    fetch(postgres_url, "UPDATE fastworker.horizon SET pruned_until = now() - interval '7 days'")
    done = run("dlq", "retry", "--all", REDIS_URL=redis_url)
    assert done.stdout == "3 dead letters went back to firehose:events.\n"
    worker = services("worker", **env)
    until(lambda: client.hget("fastworker:ledger", "committed") == b"2" and client.xlen(DEAD) == 1)
    until(lambda: client.hget("fastworker:ledger", "nothing_to_store") == b"1")
    assert worker.stop() == 0
    ((_, letter),) = replies.entries(client.xrange(DEAD))
    assert letter[b"reason"] == b"older_than_tombstones"
    assert b"3k00000000001" in letter[b"data"]
    assert fetch(postgres_url, "SELECT text FROM posts") == [("post 3",)]
    assert client.xpending(STREAM, GROUP)["pending"] == 0


def test_dlq_purge(letters: dict[str, str], client: redis.Redis, redis_url: str) -> None:
    done = run("dlq", "purge", "--reason", "bad_frame", REDIS_URL=redis_url)
    assert (done.returncode, done.stdout) == (0, "2 dead letters are gone.\n")
    assert client.xlen(DEAD) == 3
    assert run("dlq", "purge", "--all", "--yes", REDIS_URL=redis_url).returncode == 0
    assert client.xlen(DEAD) == 0
    assert run("dlq", "list", REDIS_URL=redis_url).stdout == "No dead letters.\n"
