"""The whole worker, real processes on real servers, killed at every named place: nothing lost, nothing counted twice.

Run as a program, this file is the process under test; its arguments are the settings as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from fastworker.config import Config
from fastworker.crashpoint import Step
from fastworker.errors import ExitCode
from fastworker.event import Event
from fastworker.event.entry import decode_entry
from fastworker.log import setup_logging
from fastworker.process import children
from fastworker.process.board import Heartbeats, Slot, now_ms
from fastworker.process.supervisor import Supervisor
from fastworker.stream.client import connect
from fastworker.stream.keys import USUAL
from fastworker.worker import held, suspects
from fastworker.worker.suspects import QUIET_DEATHS_MAX, Record, Suspects, like_it, say_trying
from fastworker.worker.worker import shrunk, worker_child
from tests import replies
from tests.runs import usually

ROOT = Path(__file__).parents[2]
KEY, GROUP = "firehose:events", "firehose-processors"
POST = "at://did:plc:aaaaaaaaaaaaaaaaaaaaaaaa/app.bsky.feed.post/3kaaaaaaaaa2a"
CID = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"


def slowly(worker: Callable[[Slot], int], slot: Slot) -> int:
    time.sleep(0.8)  # longer than a drain: whoever stops the old one first leaves a gap that can be seen
    return worker(slot)


def deadly(fields: dict[bytes, bytes]) -> Event:
    """As decode_entry; but some bytes reach a bug that ends the process: of memory, of a library in C, of ours."""
    if b"DEADLY" in fields[b"data"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_entry(fields)


def out_of_memory(fields: dict[bytes, bytes]) -> Event:
    """As decode_entry, on a machine where any process may be killed at any entry, whichever it is."""
    if Path(os.environ["OUTAGE"]).exists() and random.random() < 0.2:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_entry(fields)


def main() -> int:
    setup_logging("INFO", "human")
    settings = msgspec.json.decode(sys.argv[1], type=Config)
    worker = worker_child(settings)
    match sys.argv[2:]:
        case ["slow"]:
            worker = msgspec.structs.replace(worker, target=partial(slowly, worker.target))
        case ["deadly"]:
            patch("fastworker.worker.held.decode_entry", deadly).start()
        case ["deadly-quiet"]:
            patch("fastworker.worker.held.decode_entry", deadly).start()
            suspects.PATIENCE_MS = (300, 300)
        case ["outage"]:
            patch("fastworker.worker.held.decode_entry", out_of_memory).start()
    children.BACKOFF_S = (0.1, 0.2) if len(sys.argv) > 2 else children.BACKOFF_S
    return Supervisor([worker], Heartbeats(8)).run()


if __name__ == "__main__":
    sys.exit(main())


class Bench:
    """A worker to be, its servers, and what it must make of what is put on the stream."""

    def __init__(self, redis: Redis, redis_url: str, postgres_url: str) -> None:
        self.redis = redis
        self.settings = Config(
            redis_url=redis_url,
            database_url=postgres_url,
            consumer_id="w",
            resolve_handles=False,
            batch_size=10,
            lease_ms=1_500,
            scan_s=0.3,
            processes=2,
            pipelines=2,
        )
        self.process: subprocess.Popen[str]
        self.seq = 0
        self.outage = Path("/nonexistent")
        self.likes = self.deletes = 0

    def start(self, how: str = "", **changes: object) -> None:
        settings = msgspec.structs.replace(self.settings, **changes)
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, msgspec.json.encode(settings).decode(), *([how] if how else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OUTAGE": str(self.outage)},
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self, expected: int = 0) -> str:
        """Drain; what it printed."""
        self.process.send_signal(signal.SIGTERM)
        text, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == expected, text
        return text

    def end(self, seconds: float = 60.0) -> str:
        """Wait until it ends by itself; what it printed."""
        try:
            return self.process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"it did not end:\n{self.process.communicate()[0]}")

    async def add(self, count: int) -> None:
        """Likes of one post by `count` accounts; every tenth is deleted again."""
        pipe = self.redis.pipeline(transaction=False)
        for _ in range(count):
            self.seq += 1
            did, rkey = f"did:plc:{self.seq:024d}".replace("0", "a").replace("1", "b"), f"3k{self.seq:011d}"
            subject = {"uri": POST, "cid": CID}
            record = {"$type": "app.bsky.feed.like", "subject": subject, "createdAt": "2024-01-01T00:00:00.000Z"}
            ops = [{"action": "create", "path": f"app.bsky.feed.like/{rkey}", "cid": CID, "record": record}]
            pipe.xadd(KEY, {"type": "commit", "data": json.dumps({"repo": did, "ops": ops}), "seq": str(self.seq)})
            self.likes += 1
            if self.seq % 10 == 0:
                self.seq += 1
                ops = [{"action": "delete", "path": f"app.bsky.feed.like/{rkey}"}]
                pipe.xadd(KEY, {"type": "commit", "data": json.dumps({"repo": did, "ops": ops}), "seq": str(self.seq)})
                self.likes -= 1
                self.deletes += 1
        await pipe.execute()

    async def until(self, fact: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not await fact():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                pytest.fail(f"{await self.ledger()} {await self.pending()} pending\n{self.process.communicate()[0]}")
            await asyncio.sleep(0.02)

    async def ledger(self) -> dict[str, int]:
        return replies.counts(await self.redis.hgetall(USUAL.ledger))

    async def pending(self) -> int:
        return replies.number((await self.redis.xpending(KEY, GROUP))["pending"])

    async def settled(self) -> bool:
        return sum((await self.ledger()).values()) == await self.redis.xlen(KEY)

    async def settled_less_drops(self) -> bool:
        ended = sum(n for name, n in (await self.ledger()).items() if not name.startswith("drop:"))
        return ended == await self.redis.xlen(KEY)

    async def assert_ledger(self, others: dict[str, int]) -> None:
        """Each entry is counted once: as `others` say, or committed. A like whose delete another pipeline had stored
        before it is nothing to store."""
        ledger = await self.ledger()
        nothing = ledger.pop("nothing_to_store", 0)
        assert nothing <= self.deletes
        other_entries = sum(count for name, count in others.items() if not name.startswith("drop:"))
        committed = await self.redis.xlen(KEY) - other_entries - nothing
        assert ledger == {"committed": committed} | others

    async def assert_all_is_well(self, pg: asyncpg.Connection) -> None:
        await self.assert_ledger({})
        assert await self.pending() == 0
        assert await self.redis.exists("firehose:dead-letters") == 0
        assert await pg.fetchval("SELECT count(*) FROM likes") == self.likes
        assert await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", POST) == self.likes


@pytest.fixture
async def bench(redis_url: str, postgres_url: str) -> AsyncIterator[Bench]:
    client = connect(redis_url)
    bench = Bench(client, redis_url, postgres_url)
    await client.xgroup_create(KEY, GROUP, id="0", mkstream=True)
    yield bench
    if bench.process is not None and bench.process.poll() is None:
        bench.kill()
    await client.aclose()


async def test_entries_become_rows_and_a_stop_leaves_nothing(bench: Any, pg: asyncpg.Connection) -> None:
    bench.start()
    await bench.add(1_000)
    await bench.until(bench.settled)
    text = bench.stop()
    await bench.assert_all_is_well(pg)
    assert "Traceback" not in text
    assert await bench.redis.keys("fastworker:consumer:*") == []
    assert await bench.redis.xinfo_consumers(KEY, GROUP) == []
    connected = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fastworker'"
    async with asyncio.timeout(30):  # a backend takes a moment to see that its client is gone
        while await pg.fetchval(connected):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "place",
    usually(
        [
            "after_tombstone_commit",
            "before_main_commit",
            "after_main_commit",
            "after_look_back",
            "before_ack",
            "before_ack:3",
        ],
        "after_main_commit",
        "before_ack:3",
    ),
)
async def test_a_kill_anywhere_in_a_flush_loses_and_doubles_nothing(
    bench: Any, pg: asyncpg.Connection, place: Any
) -> None:
    await bench.add(600)
    bench.start(crashpoint=place)
    await bench.until(bench.settled)
    await bench.add(100)
    await bench.until(bench.settled)
    text = bench.stop()
    assert "was killed by SIGKILL" in text  # the fault was there
    await bench.assert_all_is_well(pg)


async def test_a_kill_in_a_claim_and_of_the_supervisor(bench: Any, pg: asyncpg.Connection) -> None:
    await bench.add(1_000)
    bench.start(crashpoint="before_ack")
    await bench.until(lambda: _has(bench.pending))
    bench.kill()
    # Another host takes over; its first claims are cut off too.
    bench.start(consumer_id="x", crashpoint=str(Step.IN_CLAIM))
    await bench.until(bench.settled)
    text = bench.stop()
    assert "was killed by SIGKILL" in text
    assert "Adopted" in text
    await bench.assert_all_is_well(pg)


async def test_a_kill_before_a_dead_letter_sets_aside_once(bench: Any) -> None:
    await bench.redis.xadd(KEY, {"type": "commit", "data": "{", "seq": "1"})
    bench.start(crashpoint="between_dead_letter_and_ack")
    await bench.until(lambda: _has(lambda: bench.redis.xlen("firehose:dead-letters")))
    assert "was killed by SIGKILL" in bench.stop()
    assert await bench.redis.xlen("firehose:dead-letters") == 1
    assert await bench.ledger() == {"set_aside": 1, "drop:bad_json": 1}


async def test_an_entry_that_kills_whoever_touches_it_is_set_aside_alone(bench: Any, pg: asyncpg.Connection) -> None:
    await bench.add(150)
    await bench.redis.xadd(KEY, {"type": "commit", "data": "DEADLY", "seq": "1"})
    await bench.add(150)
    bench.start("deadly")

    async def is_over() -> bool:
        await bench.add(5)
        return replies.number(await bench.redis.xlen("firehose:dead-letters")) > 0

    await bench.until(is_over, 60)
    await bench.until(bench.settled_less_drops)
    text = bench.stop()
    [(_, letter)] = await bench.redis.xrange("firehose:dead-letters")
    assert (letter[b"reason"], letter[b"data"]) == (b"kills_worker", b"DEADLY")
    assert text.count("was killed by SIGKILL") <= 8, "two in normal work, one or two with a piece, three with it alone"
    await bench.assert_ledger({"set_aside": 1, "drop:kills_worker": 1})
    assert await pg.fetchval("SELECT count(*) FROM likes") == bench.likes


@pytest.mark.extended  # on a busy stream: the test above, in every run
async def test_an_entry_that_kills_on_a_quiet_stream_is_set_aside_too(bench: Any, pg: asyncpg.Connection) -> None:
    """There are not enough others to learn from: what a process did before and without it is the control."""
    await bench.add(7)
    await bench.redis.xadd(KEY, {"type": "commit", "data": "DEADLY", "seq": "1"})
    bench.start("deadly-quiet")
    await bench.until(lambda: _has(lambda: bench.redis.xlen("firehose:dead-letters")), 60)
    await bench.until(bench.settled_less_drops)
    text = bench.stop()
    [(_, letter)] = await bench.redis.xrange("firehose:dead-letters")
    assert (letter[b"reason"], letter[b"data"]) == (b"kills_worker", b"DEADLY")
    assert text.count("was killed by SIGKILL") >= QUIET_DEATHS_MAX
    await bench.assert_ledger({"set_aside": 1, "drop:kills_worker": 1})
    assert await pg.fetchval("SELECT count(*) FROM likes") == bench.likes == 7


@pytest.mark.parametrize(
    ("lived_ms", "with_it_ms", "counts"), [(1_900, 1, 0), (2_100, 1, 1), (9_000, 3_000, 0), (50_000, 11_000, 1)]
)
def test_a_death_on_a_quiet_stream_counts_after_a_life_that_was_long_enough(
    lived_ms: int, with_it_ms: int, counts: int
) -> None:
    known, slot = Suspects(), Heartbeats(1)[0]
    say_trying(slot, ["7-1"], with_control=False)
    now = now_ms()
    slot.set(started_ms=now - with_it_ms - lived_ms, tried_at_ms=now - with_it_ms)
    known.note_death(slot)
    assert known.records(["7-1", "8-1"]) == {"7-1": Record(deaths=1, alone=0, quiet=counts)}


def test_the_control_of_a_quiet_stream_is_as_large_as_what_killed() -> None:
    fields = like_it({b"type": b"commit", b"data": b"x" * 1_000_000})
    assert 1_000_000 < sum(map(len, fields.values())) < 1_001_000
    one = held.Held()
    assert one.apply("1-1", fields)
    assert not one.rejected


async def test_a_machine_that_kills_at_random_empties_no_stream(
    bench: Any, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    bench.outage = tmp_path / "outage"
    bench.outage.touch()
    await bench.add(300)
    bench.start("outage")
    lived: set[int] = set()

    async def many_died() -> bool:
        lived.update(children_of(bench.process.pid))
        return len(lived) > 10

    await bench.until(many_died)
    bench.outage.unlink()

    async def is_well() -> bool:
        await bench.add(5)
        return replies.number((await bench.ledger()).get("committed", 0)) > 300

    await bench.until(is_well)
    await bench.until(bench.settled)
    bench.stop()
    await bench.assert_all_is_well(pg)


# --- an outage, beside others on the same group


async def claim_as_the_old_worker_does(redis: Redis, idle_ms: int) -> None:
    """One round of the TypeScript worker."""
    for one in await redis.xpending_range(KEY, GROUP, "-", "+", 100):
        if replies.number(one["time_since_delivered"]) <= idle_ms:
            continue
        entry_id = one["message_id"]
        deliveries = replies.number(one["times_delivered"])
        if deliveries >= 10:
            for _, fields in replies.entries(await redis.xrange(KEY, entry_id, entry_id)):
                letter = {**fields, b"origId": replies.raw(entry_id), b"deliveries": b"%d" % deliveries}
                await redis.xadd("firehose:dead-letters", replies.to_add(letter))
            await redis.xack(KEY, GROUP, entry_id)
        else:
            await redis.xclaim(KEY, GROUP, "worker-0-p0", idle_ms, [entry_id])


@pytest.mark.parametrize(
    ("lease_ms", "idle_ms", "outage_s"),
    [
        (12_000, 12_000, 14.0),  # a loaded machine lets a worker stand still for seconds
        pytest.param(15_000, 10_000, 150, marks=[pytest.mark.extended, pytest.mark.timeout(400)], id="real figures"),
    ],
)
async def test_nobody_takes_what_a_live_worker_cannot_finish(
    bench: Any, pg: asyncpg.Connection, lease_ms: Any, idle_ms: Any, outage_s: Any
) -> None:
    """PostgreSQL hangs; an old worker claims after 10 s (scaled) and gives up after 10 deliveries; another worker of
    ours, of another name, looks for the dead all the time."""
    other = Bench(bench.redis, bench.settings.redis_url, bench.settings.database_url)
    try:
        async with pg.transaction():
            await pg.execute("LOCK TABLE likes")
            await bench.add(2_000)
            bench.start(lease_ms=lease_ms)
            await bench.until(lambda: _has(bench.pending))
            other.start(consumer_id="x", lease_ms=lease_ms, scan_s=0.2, foreign_idle_ms=idle_ms)
            await asyncio.sleep(1)
            held = {one["message_id"]: one["consumer"] for one in await pending_entries(bench.redis)}
            until = time.monotonic() + outage_s
            while time.monotonic() < until:
                await claim_as_the_old_worker_does(bench.redis, idle_ms)
                await asyncio.sleep(0.05)
            after = {one["message_id"]: one["consumer"] for one in await pending_entries(bench.redis)}
            assert held.items() <= after.items()
            assert b"worker-0-p0" not in after.values()
        await bench.until(bench.settled)
        bench.stop()
        other.stop()
    finally:
        if other.process is not None and other.process.poll() is None:
            other.kill()
    await bench.assert_all_is_well(pg)


async def test_a_rolling_restart_under_load_leaves_no_gap(bench: Any, pg: asyncpg.Connection) -> None:
    bench.start("slow", lease_ms=15_000)  # a lease that runs out on a loaded machine is no gap
    await bench.add(100)
    await bench.until(bench.settled)
    done, fewest, longest = False, 99, 0.0

    async def feed() -> None:
        while not done:
            await bench.add(20)
            await asyncio.sleep(0.02)

    async def watch() -> None:
        nonlocal fewest, longest
        seen, since = 0, time.monotonic()
        while not done:
            if (committed := (await bench.ledger())["committed"]) != seen:
                seen, since = committed, time.monotonic()
            longest = max(longest, time.monotonic() - since)
            fewest = min(fewest, len(await bench.redis.keys("fastworker:consumer:*")))
            await asyncio.sleep(0.005)

    before = set(children_of(bench.process.pid))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(feed())
        tasks.create_task(watch())
        bench.process.send_signal(signal.SIGHUP)
        await bench.until(lambda: _of(not before & (now := set(children_of(bench.process.pid))) and len(now) == 2))
        done = True
    assert fewest == 4, "a process was told to stop before its successor had its consumers"
    assert longest < 10, "nothing was finished for seconds"
    await bench.until(bench.settled)
    assert "Replacing all children" in bench.stop()
    await bench.assert_all_is_well(pg)


async def test_too_many_entries_that_nobody_can_store_stop_the_worker(bench: Any) -> None:
    """Exit 4, loudly, with everything still there: a bad release must not empty the stream into the dead letters."""
    pipe = bench.redis.pipeline(transaction=False)
    for number in range(2_500):
        pipe.xadd(KEY, {"type": "commit", "data": "{", "seq": str(number + 1)})
    await pipe.execute()
    bench.start()
    text = bench.end()
    assert bench.process.returncode == ExitCode.STOPPED_ITSELF, text
    assert "Too many entries cannot be stored" in text
    assert "stopped itself: stopping all" in text
    assert "Traceback" not in text
    letters = await bench.redis.xlen("firehose:dead-letters")
    group = (await bench.redis.xinfo_groups(KEY))[0]
    unread = await bench.redis.xrange(KEY, b"(" + group["last-delivered-id"])  # Redis 6.2 knows no lag
    assert letters + group["pending"] + len(unread) == 2_500
    assert letters <= 4 * 500
    bench.start(dead_letters_in_a_row=2_500)  # the operator looked at them, and they may go
    await bench.until(bench.settled_less_drops)
    bench.stop()
    assert await bench.ledger() == {"set_aside": 2_500, "drop:bad_json": 2_500}
    assert await bench.redis.xlen("firehose:dead-letters") == 2_500


# --- poison


async def test_poison_costs_log_n_attempts_and_none_of_its_siblings(bench: Any, pg: asyncpg.Connection) -> None:
    """One of 1,024 entries is refused by PostgreSQL. A sequence counts the attempts: it is not rolled back."""
    await pg.execute(
        "CREATE SEQUENCE attempts; CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM nextval('attempts'); RAISE check_violation USING MESSAGE = 'poison'; END $$; "
        "CREATE TRIGGER refuse BEFORE INSERT ON likes FOR EACH ROW WHEN (NEW.uri LIKE '%/3k00000000705') "
        "EXECUTE FUNCTION refuse()"
    )
    await bench.add(930)
    assert await bench.redis.xlen(KEY) >= 1_000
    bench.start(processes=1, pipelines=1, batch_size=5_000)
    await bench.until(bench.settled_less_drops)
    bench.stop()
    [(_, letter)] = await bench.redis.xrange("firehose:dead-letters")
    assert (letter[b"reason"], letter[b"deliveries"], letter[b"consumer"]) == (b"row_rejected", b"1", b"w-0")
    assert b"poison" in letter[b"error"]
    await bench.assert_ledger({"set_aside": 1, "drop:row_rejected": 1})
    assert 8 <= await pg.fetchval("SELECT last_value FROM attempts") <= 12  # log2 of about 1,000, and the first
    assert await pg.fetchval("SELECT count(*) FROM likes") == bench.likes - 1


async def test_a_group_destroyed_under_load_is_made_again_from_the_right_place(
    bench: Any, pg: asyncpg.Connection
) -> None:
    bench.start()
    await bench.add(1_000)
    await bench.until(bench.settled)
    await bench.redis.xgroup_destroy(KEY, GROUP)
    await bench.add(500)
    await bench.until(lambda: _is(pg.fetchval("SELECT count(*) FROM likes"), bench.likes))
    bench.stop()
    assert await bench.pending() == 0


@pytest.mark.parametrize("which", ["redis", "postgres"])
async def test_an_unreachable_server_at_the_start_is_exit_code_3(bench: Any, which: Any, tmp_path: Path) -> None:
    if which == "redis":
        bench.start(redis_url=f"unix://{tmp_path}/none")
    else:
        bench.start(database_url=f"postgresql:///x?host={tmp_path}")
    text, _ = bench.process.communicate(timeout=60)
    assert bench.process.returncode == ExitCode.UNREACHABLE, text
    assert "cannot be reached" in text
    assert "Traceback" not in text


def test_pipelines_shrink_to_the_connections() -> None:
    settings = Config(redis_url="", database_url="", processes=4, pipelines=5, pool_size=20)
    fits = shrunk(settings)
    assert (fits.processes, fits.pipelines) == (4, 4)
    fits = shrunk(msgspec.structs.replace(settings, pool_size=1))
    assert (fits.processes, fits.pipelines) == (1, 1)
    few = msgspec.structs.replace(settings, processes=2, pipelines=2, pool_size=8)
    assert shrunk(few) is few


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def pending_entries(redis: Redis) -> list[dict[str, Any]]:
    return await redis.xpending_range(KEY, GROUP, "-", "+", 100_000)


async def _of(value: bool) -> bool:
    return value


async def _has(count: Callable[[], Awaitable[int]]) -> bool:
    return await count() > 0


async def _is(value: Awaitable[object], expected: object) -> bool:
    return await value == expected


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1])
@pytest.mark.parametrize("name", ["worker", "up"])
def test_what_is_asked_of_a_service_that_waits_for_its_servers_does_not_end_it(
    name: str, number: signal.Signals, tmp_path: Path
) -> None:
    """`systemctl reload` while it starts: there is nothing to replace yet."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are taken, and nothing is said
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        environment = {
            "PATH": os.environ["PATH"],
            "REDIS_URL": f"redis://{url}",
            "DATABASE_URL": f"postgresql://{url}/x",
        }
        environment |= {"FASTWORKER_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "fastworker", name]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert f"{name} on Python" in process.stdout.readline().decode()
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state != "T", "stopped"
        finally:
            process.kill()
            process.communicate()
