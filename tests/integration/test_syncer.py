"""The syncer beside a running worker, on simulated hosts: what events ask for, gaps and samples are repaired by itself."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from fastworker.config import Config, parse_config
from fastworker.errors import ConfigError
from fastworker.process.priority import NICE
from fastworker.simulator.hosts import SimHosts
from fastworker.sync import many, sampling, syncer, widen
from fastworker.sync.choice import Choice
from fastworker.sync.history import asked_for
from fastworker.sync.syncer import run_syncer
from fastworker.table.chosen import choose, choose_accounts
from tests.integration.test_repairs import GROUP, STREAM, Scene, scene, worker  # noqa: F401 - fixtures
from tests.runs import usually
from tests.services import Service, get


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syncer, "ROUND_S", 0.3)
    monkeypatch.setattr(sampling, "AGAIN_S", 0.1)


@contextlib.asynccontextmanager
async def syncing(scene: Scene, **changes: Any) -> AsyncIterator[None]:
    config: Config = msgspec.structs.replace(scene.config, sample_per_hour=0, **changes)
    stop = asyncio.Event()
    task = asyncio.create_task(run_syncer(config, stop, hosts=scene.hosts))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await task


async def until(fact: Callable[[], Awaitable[Any]], limit_s: float = 90.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await fact():
            await asyncio.sleep(0.1)


def told(scene: Scene) -> dict[str, Any]:
    text: Any = scene.client.get("fastworker:repair")
    return json.loads(text) if text else {}


def note(scene: Scene, dids: list[str]) -> None:
    """As the reader records a #sync, or a broken chain."""
    for did in dids:
        scene.client.hset("fastworker:repairs", did, json.dumps({"reason": "break"}))


async def test_what_events_ask_for_is_repaired(scene: Scene, worker: Service, pg: asyncpg.Connection) -> None:
    scene.happen(500, lose=lambda n: n % 3 == 0)
    await scene.finished()
    assert await scene.differences(pg) != "no difference"
    note(scene, [one.did for one in scene.network.world.accounts()])
    async with syncing(scene):

        async def forgotten() -> bool:
            return not scene.client.hlen("fastworker:repairs")

        await until(forgotten)

        async def is_told() -> bool:
            return bool(told(scene).get("mended")) and not told(scene)["waiting"] + told(scene)["fetching"]

        await until(is_told)
    assert await scene.differences(pg) == "no difference"
    status = told(scene)
    assert status["mended"]["event"]["differences"] > 100
    assert await pg.fetchval("SELECT count(*) FROM fastworker.floors") > 5


async def test_a_gap_is_closed_by_itself(scene: Scene, worker: Service, pg: asyncpg.Connection) -> None:
    scene.happen(300)
    first = scene.network.clock.seq
    scene.client.set("fastworker:relay", "sim.test")
    renamed, unnamed = scene.network.world.accounts()[:2]
    for number, account in enumerate((renamed, unnamed)):  # what #identity said is lost, and the second one names none
        handle = None if number else f"new-{account.handle}"
        scene.network.world.operations.append((scene.network.clock.iso(), account.did, handle or "Not A Handle"))
        account.handle = handle or account.handle
    scene.happen(300, lose=lambda _: True)
    gap = {
        "relay": "sim.test",
        "reason": "outdated_cursor",
        "after": first,
        "resumed": scene.network.clock.seq,
        "at": 1,
    }
    scene.client.lpush("fastworker:gaps", json.dumps(gap))
    scene.happen(50)
    await scene.finished()
    assert await scene.differences(pg) != "no difference"
    relays = (scene.sim.relay.url.replace("http", "ws"),)
    async with syncing(scene, relay_urls=relays, resolve_handles=False):  # nobody here would verify what it finds

        async def closed() -> bool:
            return not scene.client.llen("fastworker:gaps")

        await until(closed)

        async def is_told() -> bool:
            return "gap" in told(scene)["mended"] and not told(scene)["gaps_open"]

        await until(is_told)
    assert await pg.fetchval("SELECT count(*) FROM fastworker.gaps WHERE closed_at IS NULL") == 0
    assert await scene.differences(pg) == "no difference"
    assert await pg.fetchval("SELECT handle FROM users WHERE did = $1", renamed.did) == renamed.handle
    assert sum(path == "/export" for _, path in scene.sim.directory.asked) == 1


async def test_the_relays_list_says_who_is_active(scene: Scene, worker: Service, pg: asyncpg.Connection) -> None:
    scene.happen(200)
    await scene.finished()
    gap = {"relay": "127.0.0.1", "reason": "relay_switch", "after": 1, "resumed": scene.network.clock.seq, "at": 1}
    scene.client.lpush("fastworker:gaps", json.dumps(gap))
    gone, back, *others = (one.did for one in scene.network.world.accounts())
    scene.sim.statuses = {gone: "takendown", back: None, others[0]: ""}
    scene.network.world.accounts()[2].status = "deactivated"  # as its host says
    for did in (back, others[0]):  # of the second the list says nothing
        await pg.execute(
            "INSERT INTO fastworker.accounts (did, relay, seq, event_at, active, status) "
            "VALUES ($1, '127.0.0.1', 1, now(), false, 'deactivated') ON CONFLICT (did) DO UPDATE SET active = false",
            did,
        )
    scene.client.set("fastworker:relay", "127.0.0.1")
    async with syncing(scene, relay_urls=(scene.sim.relay.url.replace("http", "ws"),)):

        async def closed() -> bool:
            return not scene.client.llen("fastworker:gaps")

        await until(closed)
    told = "SELECT active, status FROM fastworker.accounts WHERE did = $1"
    assert [tuple(row) for row in await pg.fetch(told, gone)] == [(False, "takendown")]
    assert [tuple(row) for row in await pg.fetch(told, back)] == [(True, None)]
    assert await pg.fetchval(told, others[0]) is False
    reason = "SELECT reason FROM fastworker.repos WHERE did = $1"
    assert await pg.fetchval(reason, back) in ("reactivated", "gap")


async def test_samples_say_how_true_the_tables_are(scene: Scene, worker: Service, pg: asyncpg.Connection) -> None:
    scene.happen(400, lose=lambda n: n % 2 == 0)
    await scene.finished()
    config = msgspec.structs.replace(scene.config, sample_per_hour=3600)
    stop = asyncio.Event()
    task = asyncio.create_task(run_syncer(config, stop, hosts=scene.hosts))

    async def some_repaired() -> bool:
        done = await pg.fetchval("SELECT count(*) FROM fastworker.repos WHERE reason = 'sample' AND state = 'done'")
        many = await pg.fetchval("SELECT count(*) FROM fastworker.samples")
        return bool(done and many >= 3)

    try:
        await until(some_repaired)

        async def is_told() -> bool:
            return bool(told(scene).get("samples", 0) >= 3)

        await until(is_told)
    finally:
        stop.set()
        await task
    status = told(scene)
    truths = [one["truth"] for one in status["tables"].values()]
    assert min(truths) < 1
    assert max(truths) > 0
    assert all(0 <= one["low"] <= one["truth"] for one in status["tables"].values())
    assert set(status["hosts"]) == {"others"}
    assert any("missing" in line for line in status["examples"])
    before = await pg.fetchval("SELECT max(at) FROM fastworker.samples")
    async with syncing(scene):  # none an hour
        await asyncio.sleep(2)
    assert await pg.fetchval("SELECT max(at) FROM fastworker.samples") == before


async def test_a_host_that_breaks_at_each_commit_costs_less_and_less(
    scene: Scene, worker: Service, pg: asyncpg.Connection
) -> None:
    scene.happen(200)
    await scene.finished()
    did = next(iter(scene.network.world.accounts())).did
    async with syncing(scene):
        for turn in range(3):
            scene.client.hset("fastworker:repairs", did, json.dumps({"reason": "break", "turn": turn}))

            async def settled() -> bool:
                state: str | None = await pg.fetchval("SELECT state FROM fastworker.repos WHERE did = $1", did)
                return state == "done"

            await until(settled)
            await asyncio.sleep(1)
    assert scene.client.hlen("fastworker:repairs") == 1

    def asked() -> int:
        return sum(path.endswith("getRepo") for pds in scene.sim.pdses for _, path in pds.asked)

    assert asked() == 1
    waits = []
    for age in (13, 25, 49, 200):  # minutes after the one before it: each wait is twice as long, until it was quiet
        await pg.execute("UPDATE fastworker.repos SET ended_at = now() - make_interval(mins => $1)", age)
        scene.client.hset("fastworker:repairs", did, json.dumps({"reason": "break", "age": age}))
        before = asked()
        async with syncing(scene):

            async def once_more() -> bool:
                return asked() == before + 1 and await settled()  # noqa: B023 - awaited here

            await until(once_more)
        waits.append(await pg.fetchval("SELECT apart_s / 60 FROM fastworker.repos"))
    assert waits == [24, 48, 96, 12]
    await pg.execute("UPDATE fastworker.repos SET ended_at = now() - interval '30 minutes', apart_s = 2880")
    scene.client.hset("fastworker:repairs", did, json.dumps({"reason": "break", "turn": "last"}))
    async with syncing(scene):
        await asyncio.sleep(1.5)
    assert asked() == 5


async def test_who_is_asked_for_again_while_it_is_repaired_is_repaired_again(
    scene: Scene, pg: asyncpg.Connection
) -> None:
    """What is fetched just now may be older than what asked."""
    did = "did:plc:" + "a" * 24
    records: dict[str, bytes] = {}
    async with many.opened(scene.config, "test", scene.hosts, reads_only=True) as there:
        for reason in ("break", "sync"):
            scene.client.hset("fastworker:repairs", did, json.dumps({"reason": reason}))
            await syncer._take_recorded(there, records)
            assert await pg.fetchval("SELECT state FROM fastworker.repos WHERE did = $1", did) == "waiting"
            await pg.execute("UPDATE fastworker.repos SET state = 'fetching'")
            await syncer._take_recorded(there, records)  # nobody asks once more
            assert await pg.fetchval("SELECT state FROM fastworker.repos WHERE did = $1", did) == "fetching"


@pytest.mark.parametrize("missing", ["REDIS_URL", "DATABASE_URL"])
async def test_nothing_is_fetched_while_a_server_is_away(
    missing: str, scene: Scene, worker: Service, pg: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    scene.happen(50)
    note(scene, [one.did for one in scene.network.world.accounts()])
    caplog.set_level(logging.INFO, "fastworker.sync.syncer")
    away = {"REDIS_URL": "redis://127.0.0.1:9/0", "DATABASE_URL": "postgresql://127.0.0.1:9/none"}[missing]
    async with syncing(scene, **{missing.lower(): away}):

        async def is_told() -> bool:
            return any("Repairs wait: " in record.message for record in caplog.records)

        await until(is_told)
        await asyncio.sleep(1.2)  # another round
    assert sum("Repairs wait: " in record.message for record in caplog.records) == 1
    assert not scene.sim.counts
    assert scene.client.hlen("fastworker:repairs") == len(scene.network.world.accounts())
    assert await pg.fetchval("SELECT count(*) FROM fastworker.repos") == 0


@pytest.mark.parametrize("place", usually([None, "floor_committed:2"], "floor_committed:2"))
async def test_two_syncers_share_and_one_may_be_killed(
    place: str | None,
    scene: Scene,
    worker: Service,
    pg: asyncpg.Connection,
    tmp_path: Path,
) -> None:
    """Each in a process of its own; the first dies with repositories on disk, or after a floor; nothing is left of it."""
    scene.happen(900, lose=lambda n: n % 3 == 0)
    await scene.finished()
    note(scene, [one.did for one in scene.network.world.accounts()])
    env = {
        "REDIS_URL": scene.config.redis_url,
        "DATABASE_URL": scene.config.database_url,
        "FASTWORKER_PLC_URL": scene.sim.directory.url,
        "FASTWORKER_SAMPLE_PER_HOUR": "0",
    }
    spool = tmp_path / "spool"
    spool.mkdir()

    async def start(crash: str | None) -> asyncio.subprocess.Process:
        plan = tmp_path / f"{crash}.json"
        plan.write_text(json.dumps({"env": env, "own": sorted(scene.sim.own), "crash": crash}))
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.rig.syncer", str(plan), env={**os.environ, "TMPDIR": str(spool)}
        )

    one = await start(place)
    async with asyncio.timeout(120):
        while place is None and not list(spool.glob("*/*.car")):
            await asyncio.sleep(0.01)
        if place is None:
            os.kill(one.pid, signal.SIGKILL)
        assert await one.wait() == -signal.SIGKILL
    assert list(spool.glob("*/*.car"))
    two, three = await start(None), await start(None)
    try:

        async def forgotten() -> bool:
            return not scene.client.hlen("fastworker:repairs")

        await until(forgotten)
    finally:
        for process in (two, three):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            async with asyncio.timeout(60):
                await process.wait()
    assert await scene.differences(pg) == "no difference"
    assert list(spool.iterdir()) == []


async def test_a_worker_has_a_syncer_unless_it_is_switched_off(
    scene: Scene, services: Callable[..., Service], redis_url: str, postgres_url: str
) -> None:
    env = {
        "REDIS_URL": redis_url,
        "DATABASE_URL": postgres_url,
        "FASTWORKER_PROCESSES": "1",
        "FASTWORKER_HTTP_PORT": "0",
        "FASTWORKER_PLC_URL": scene.sim.directory.url,
        "RELAY_URL": scene.sim.relay.url.replace("http", "ws"),
        "FASTWORKER_SAMPLE_PER_HOUR": "0",
    }
    env |= {"BACKFILL_DAYS": "-1", "BACKFILL_BATCH_SIZE": "5", "BACKFILL_DB_POOL_SIZE": "2"}  # an old .env.backfill
    on = services("worker", FASTWORKER_SYNC="on", **env)
    for name in ("BACKFILL_BATCH_SIZE", "BACKFILL_DB_POOL_SIZE"):
        on.wait_for(rf"{name} has no effect here: history is as fast as")
    on.wait_for("History begins: FASTWORKER_BACKFILL=known BACKFILL_DAYS=-1")
    syncer = int(on.wait_for(r"syncer \(pid (\d+)\) is ready")[1])
    assert os.getpriority(os.PRIO_PROCESS, syncer) == max(NICE, os.nice(0))  # live events go first
    on.wait_for("FASTWORKER_SYNC is on: repositories are asked for")
    port = int(on.wait_for(r"HTTP on http://127\.0\.0\.1:(\d+)")[1])

    async def is_told() -> bool:
        return bool(told(scene))

    await until(is_told)

    async def is_shown() -> bool:
        return "fastworker_gaps_open 0" in (await asyncio.to_thread(get, port, "/metrics"))[1]

    await until(is_shown)
    assert "Equal to the network" in (await asyncio.to_thread(get, port, "/status.json"))[1]
    assert on.stop() == 0
    off = services("worker", **env)
    off.wait_for("BACKFILL_DAYS and FASTWORKER_BACKFILL have no effect: ")
    off.wait_for(r"monitor \(pid \d+\) is ready")
    assert off.stop() == 0
    assert not any("syncer" in line or "FASTWORKER_SYNC is" in line for line in off.lines)


def test_the_simulated_hosts_are_on_loopback_only(scene: Scene) -> None:
    assert isinstance(scene.sim, SimHosts)
    assert all("127.0.0.1" in one for one in scene.sim.own)


async def test_history_that_the_environment_asks_for_is_fetched_once(
    scene: Scene, worker: Service, pg: asyncpg.Connection
) -> None:
    """Everybody who is known; a deleted cursor row of the old dashboard comes again; the second time nobody is asked."""
    scene.happen(500, lose=lambda n: n % 3 == 0)
    await scene.finished()
    for one in scene.network.world.accounts():
        await pg.execute(
            "INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid') ON CONFLICT DO NOTHING", one.did
        )
    async with syncing(scene, backfill_days=-1):

        async def done() -> bool:
            return bool(await pg.fetchval("SELECT done_at IS NOT NULL FROM fastworker.backfill"))

        await until(done)
    assert await scene.differences(pg) == "no difference"
    assert await pg.fetchval("SELECT asked FROM fastworker.backfill") == "FASTWORKER_BACKFILL=known BACKFILL_DAYS=-1"
    accounts = await pg.fetchval("SELECT count(*)::text FROM fastworker.repos")
    assert await pg.fetchval("SELECT cursor FROM firehose_cursor WHERE service = 'backfill'") == accounts
    asked = sum(len(pds.asked) for pds in scene.sim.pdses)
    async with syncing(scene, backfill_days=30):
        await asyncio.sleep(2)
    assert sum(len(pds.asked) for pds in scene.sim.pdses) == asked


async def test_what_is_added_to_the_choice_is_fetched(
    scene: Scene,
    services: Callable[..., Service],
    pg: asyncpg.Connection,
    redis_url: str,
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Narrow, run, widen: at the end the tables are those of the wide choice."""
    monkeypatch.setattr(widen, "ALL_HAVE_READ_S", 0.2)
    narrow = ("app.bsky.graph.*", "app.bsky.feed.like")
    file = tmp_path / "accounts"
    scene.client.xgroup_create(STREAM, GROUP, "0", mkstream=True)

    async def run(collections: tuple[str, ...], events: int) -> None:
        """A worker and a syncer with this choice, until nothing that was added is left."""
        env = {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url, "FASTWORKER_ACCOUNTS": str(file)}
        env |= {"FASTWORKER_COLLECTIONS": ",".join(collections), "FASTWORKER_HTTP_PORT": "off"}
        worker = services("worker", FASTWORKER_PROCESSES="1", FASTWORKER_KEEP_SECONDS="0", **env)
        worker.wait_for(r"worker-0 \(pid \d+\) is ready")
        choose(collections)
        scene.happen(events)
        await scene.finished()
        async with syncing(scene, collections=collections, accounts=str(file)):

            async def is_settled() -> bool:
                row = await pg.fetchrow("SELECT collections, is_widening FROM fastworker.backfill")
                many = await pg.fetchval("SELECT count(*) FROM fastworker.kept_accounts")
                assert row is not None
                return (row["collections"], row["is_widening"], many) == (list(collections), False, len(chosen))

            await until(is_settled)
        assert worker.stop() == 0

    try:
        scene.happen(250)
        everybody = [one.did for one in scene.network.world.accounts()]
        chosen = everybody[:6]
        file.write_text("\n".join(chosen))
        await run(narrow, 50)
        assert await pg.fetchval("SELECT count(*) FROM posts") == 0
        assert not scene.sim.counts  # a first choice is no history
        await run((*narrow, "app.bsky.feed.*"), 50)
        asked = [path for pds in scene.sim.pdses for _, path in pds.asked if path.endswith("getRepo")]
        assert len(asked) == len(chosen)
        authors = {row[0] for row in await pg.fetch("SELECT DISTINCT author_did FROM posts")}
        assert len(authors) > 1
        assert authors <= set(chosen)
        await run((), 50)
        chosen = [one.did for one in scene.network.world.accounts()]
        file.write_text("\n".join(chosen))
        await run((), 0)
    finally:
        choose(())
        choose_accounts(None)
    assert await scene.differences(pg) == "no difference"


@pytest.mark.parametrize(
    ("env", "choice"),
    [
        ({}, None),
        ({"BACKFILL_DAYS": "0"}, None),
        ({"BACKFILL_DAYS": "-1"}, Choice(known=True)),
        ({"BACKFILL_DAYS": "30"}, Choice(known=True, days=30)),
        ({"BACKFILL_DAYS": "30", "FASTWORKER_BACKFILL": "off"}, None),
        ({"BACKFILL_DAYS": "0", "FASTWORKER_BACKFILL": "known"}, None),
        ({"FASTWORKER_BACKFILL": "follows-of:did:plc:a,did:plc:b"}, Choice(follows_of=("did:plc:a", "did:plc:b"))),
    ],
)
def test_what_the_variables_ask_for(env: dict[str, str], choice: Choice | None) -> None:
    assert asked_for(parse_config(env)) == choice


def test_everybody_is_not_asked_for_by_a_variable() -> None:
    with pytest.raises(ConfigError, match="backfill --all --yes"):
        parse_config({"FASTWORKER_BACKFILL": "all"})
