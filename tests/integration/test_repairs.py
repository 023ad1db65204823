"""`fastworker repair` between real servers, a running worker and simulated hosts: the tables end equal to the network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis as sync_redis

from fastworker.commands.repairs import RepairOptions, repair
from fastworker.config import Config, parse_config
from fastworker.errors import ConfigError, ExitCode, Unreachable
from fastworker.event import Account, Commit, Identity, Sync
from fastworker.event.entry import encode_native
from fastworker.event.frame import decode_frame
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.simulator.hosts import SimHosts
from fastworker.simulator.network import Network
from fastworker.simulator.repo import SimFrame, car_bytes
from fastworker.store.repos import REPAIR, Claim, Wanted, open_queue
from fastworker.sync import many, settle
from fastworker.sync.hosts import Bounds, Hosts
from tests.integration.test_settle import comparable, may_be_lost
from tests.replies import raw, to_add
from tests.services import Service

STREAM, GROUP, CURSOR = "firehose:events", "firehose-processors", "firehose:python_cursor"


class Scene:
    def __init__(self, network: Network, sim: SimHosts, hosts: Hosts, config: Config, client: sync_redis.Redis) -> None:
        self.network = network
        self.sim = sim
        self.hosts = hosts
        self.config = config
        self.client = client
        self.model = Model()
        self.lost = 0

    def happen(self, count: int, *, lose: Callable[[int], bool] = lambda _: False) -> None:
        """Frames onto the stream and the cursor behind them, as the reader does it; some are lost on the way."""
        for number, frame in enumerate(self.network.frames(count)):
            if frame.event is None:
                continue
            entry_id = self._append(frame, lost=may_be_lost(frame) and lose(number))
            self.model.apply(frame.event, int(entry_id.partition("-")[0]))
        self.client.set(CURSOR, self.network.clock.seq)
        self.sim.settle()

    def _append(self, frame: SimFrame, *, lost: bool) -> str:
        event = decode_frame(frame.data, "sim.test")
        assert isinstance(event, Commit | Identity | Account | Sync)
        fields = {b"dropped": b"1"} if lost else dict(encode_native(event))
        entry_id = raw(self.client.xadd(STREAM, to_add(fields)))
        if lost:
            self.lost += 1
            self.client.xdel(STREAM, entry_id)
        return entry_id.decode()

    async def repair(self, *dids: str, dry_run: bool = False) -> ExitCode:
        everybody = [one.did for one in self.network.world.accounts()]
        return await repair(
            self.config, RepairOptions(dids or tuple(everybody), dry_run), asyncio.Event(), hosts=self.hosts
        )

    async def finished(self) -> None:
        async with asyncio.timeout(60):
            while True:
                group: dict[str, Any] = self.client.xinfo_groups(STREAM)[0]
                if not group["pending"] and not self.client.xrange(STREAM, b"(" + group["last-delivered-id"], count=1):
                    return
                await asyncio.sleep(0.1)

    async def differences(self, pg: asyncpg.Connection) -> str:
        """Once what is owed is paid."""
        for _ in range(40):
            found = compare.diff(comparable(self.model.tables()), comparable(await compare.dump(pg)))
            if not found:
                break
            await asyncio.sleep(0.25)
        return compare.report(found)


@pytest.fixture
async def scene(redis_url: str, postgres_url: str) -> AsyncIterator[Scene]:
    network = Network(11, accounts=14, signed=True)
    env = {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url}
    bounds = Bounds(idle_s=5, wait_max_s=30)
    with contextlib.closing(sync_redis.Redis.from_url(redis_url)) as client:
        async with (
            SimHosts(network.world) as sim,
            Hosts(sim.directory.url, own=sim.own, bounds=bounds, rate=lambda _: 100.0) as hosts,
        ):
            yield Scene(network, sim, hosts, parse_config(env), client)


@pytest.fixture
def worker(scene: Scene, services: Callable[..., Service], redis_url: str, postgres_url: str) -> Service:
    scene.client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    return services(
        "worker",
        REDIS_URL=redis_url,
        DATABASE_URL=postgres_url,
        FASTWORKER_PROCESSES="1",
        FASTWORKER_HTTP_PORT="off",
        FASTWORKER_KEEP_SECONDS="0",
    )


async def test_lost_events_are_repaired_beside_a_running_worker(
    scene: Scene, worker: Service, pg: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.happen(900, lose=lambda n: n % 3 == 0)
    assert scene.lost > 150
    assert await scene.repair(dry_run=True) == ExitCode.NO  # waits for the worker by itself
    assert "nothing was written" in capsys.readouterr().out
    assert compare.diff(comparable(scene.model.tables()), comparable(await compare.dump(pg)))
    work = asyncio.create_task(scene.repair())
    scene.happen(300)  # while it is repaired
    assert await work == ExitCode.DONE
    words = capsys.readouterr().out
    assert "rows written" in words
    await scene.finished()
    assert await scene.repair() == ExitCode.DONE  # what was lost of accounts that appeared meanwhile
    assert await scene.differences(pg) == "no difference"
    assert await scene.repair(dry_run=True) == ExitCode.DONE
    assert worker.process.poll() is None


async def test_one_bad_host_costs_its_accounts_only(
    scene: Scene, worker: Service, pg: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.happen(400, lose=lambda n: n % 3 == 0)
    bad = scene.sim.pdses[0]
    bad.fail("wrong_key")
    assert await scene.repair() == ExitCode.NO
    captured = capsys.readouterr()
    assert f"{len(bad.accounts)} could not be settled" in captured.out
    assert captured.err.count("bad_signature") == len(bad.accounts)
    bad.fail(None)
    assert await scene.repair() == ExitCode.DONE
    assert await scene.differences(pg) == "no difference"
    assert worker.process.poll() is None


async def test_recorded_syncs_are_repaired_and_forgotten(
    scene: Scene, worker: Service, pg: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that came by the stream, and those that the reader kept in Redis; what was recorded meanwhile stays."""
    scene.happen(300, lose=lambda n: n % 3 == 0)
    by_stream, by_redis, gone = (one.did for one in scene.network.world.accounts()[:3])
    for did in (by_stream, gone):
        await pg.execute("INSERT INTO fastworker.repairs (did, rev, seq) VALUES ($1, '3k', 5)", did)
    scene.client.hset("fastworker:repairs", by_redis, "{}")
    scene.sim.documents[gone] = 404

    async def recorded(*, dry_run: bool) -> ExitCode:
        return await repair(scene.config, RepairOptions((), dry_run, recorded=True), asyncio.Event(), hosts=scene.hosts)

    assert await recorded(dry_run=True) == ExitCode.NO
    assert await pg.fetchval("SELECT count(*) FROM fastworker.repairs") == 2
    assert await recorded(dry_run=False) == ExitCode.NO  # one is gone
    assert [row[0] for row in await pg.fetch("SELECT did FROM fastworker.repairs")] == [gone]
    assert not scene.client.exists("fastworker:repairs")
    assert "2 accounts" in capsys.readouterr().out
    await pg.execute("UPDATE fastworker.repairs SET seq = $1", scene.network.clock.seq + 1)
    del scene.sim.documents[gone]
    assert await recorded(dry_run=False) == ExitCode.DONE
    assert await pg.fetchval("SELECT count(*) FROM fastworker.repairs") == 1
    assert worker.process.poll() is None


async def test_a_stop_ends_a_fetch_that_would_take_long(
    scene: Scene, worker: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scene.happen(50)
    for pds in scene.sim.pdses:
        pds.fail("trickle")
    stop = asyncio.Event()
    work = asyncio.create_task(
        repair(scene.config, RepairOptions((scene.network.world.accounts()[0].did,)), stop, hosts=scene.hosts)
    )
    async with asyncio.timeout(20):
        while not any(pds.asked for pds in scene.sim.pdses):
            await asyncio.sleep(0.05)
        stop.set()
        assert await work == ExitCode.NO
    assert "Stopped after 0 of 1 accounts" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert worker.process.poll() is None


async def test_s0_is_the_cursor_before_the_request(
    scene: Scene, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the reader appends while a host answers may be newer than the answer."""
    for _ in scene.network.frames(60):
        pass
    scene.sim.settle()
    scene.client.set(CURSOR, 5)
    get_repo = scene.hosts.get_repo

    async def slow(host: str, did: str, path: Path) -> int:
        size = await get_repo(host, did, path)
        scene.client.set(CURSOR, 50)
        return size

    monkeypatch.setattr(scene.hosts, "get_repo", slow)
    did = next(one.did for one in scene.network.world.accounts() if one.live)
    assert await scene.repair(did) == ExitCode.DONE
    assert await pg.fetchval("SELECT seq FROM fastworker.repos WHERE did = $1 AND state = 'done'", did) == 5
    assert await pg.fetchval("SELECT seq FROM fastworker.floors WHERE did = $1", did) == 5


async def test_nobody_is_compared_before_the_worker_has_finished_what_was_there(
    scene: Scene, pg: asyncpg.Connection
) -> None:
    """Else what is on its way would be taken for lost, and written once more."""
    for _ in scene.network.frames(60):
        pass
    scene.sim.settle()
    scene.client.set(CURSOR, 5)
    scene.client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    entry = scene.client.xadd(STREAM, {"a": "b"})
    scene.client.xreadgroup(GROUP, "one", {STREAM: ">"})
    did = next(one.did for one in scene.network.world.accounts() if one.live)
    work = asyncio.create_task(scene.repair(did))
    async with asyncio.timeout(20):
        while not any(pds.asked for pds in scene.sim.pdses):
            await asyncio.sleep(0.05)
    await asyncio.sleep(4 * many.LOOK_S)
    assert await pg.fetchval("SELECT state FROM fastworker.repos") == "fetching"
    scene.client.xack(STREAM, GROUP, raw(entry))
    async with asyncio.timeout(20):
        assert await work == ExitCode.DONE
    assert await pg.fetchval("SELECT state FROM fastworker.repos") == "done"


async def test_nobody_waits_for_a_large_account(
    scene: Scene, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in scene.network.frames(300):
        pass
    scene.sim.settle()
    scene.client.set(CURSOR, 5)
    large = max(scene.network.world.accounts(), key=lambda one: len(one.live))
    size = len(car_bytes(*large.repo.export()))
    for module in (many, settle):
        monkeypatch.setattr(module, "SMALL_BYTES", size - 1)
    held, alone = asyncio.Event(), settle.Settle._alone

    async def hold(self: settle.Settle, look: Any) -> None:
        await held.wait()
        await alone(self, look)

    monkeypatch.setattr(settle.Settle, "_alone", hold)
    work = asyncio.create_task(scene.repair())
    async with asyncio.timeout(60):
        while await pg.fetchval("SELECT count(*) FROM fastworker.repos WHERE state <> 'done'") != 1:
            await asyncio.sleep(0.05)
    assert await pg.fetchval("SELECT did FROM fastworker.repos WHERE state <> 'done'") == large.did
    held.set()
    assert await work == ExitCode.DONE
    assert await pg.fetchval("SELECT count(*) FROM fastworker.repos WHERE state <> 'done'") == 0
    assert await scene.repair(large.did, dry_run=True) == ExitCode.DONE


async def test_what_is_older_than_the_list_said_is_no_answer(
    scene: Scene, pg: asyncpg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in scene.network.frames(60):
        pass
    scene.sim.settle()
    scene.client.set(CURSOR, 5)
    did = next(one.did for one in scene.network.world.accounts() if one.live)
    async with open_queue(str(scene.config.database_url)) as queue:
        await queue.put([Wanted(did, "7" * 13)], "gap", REPAIR)
    assert await scene.repair(did) == ExitCode.NO
    assert "as was listed" in capsys.readouterr().err + capsys.readouterr().out
    assert await pg.fetchval("SELECT state FROM fastworker.repos WHERE did = $1", did) == "refused"
    assert await pg.fetchval("SELECT count(*) FROM fastworker.floors") == 0


async def test_beside_a_worker_that_knows_no_floors_none_is_set(scene: Scene, pg: asyncpg.Connection) -> None:
    for _ in scene.network.frames(60):
        pass
    scene.sim.settle()
    scene.client.set(CURSOR, 5)
    did = next(one.did for one in scene.network.world.accounts() if one.live)
    scene.client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    scene.client.xgroup_createconsumer(STREAM, GROUP, "typescript-worker-1")
    assert await scene.repair(did) == ExitCode.DONE
    assert await pg.fetchval("SELECT count(*) FROM fastworker.floors") == 0
    scene.client.xgroup_delconsumer(STREAM, GROUP, "typescript-worker-1")
    assert await scene.repair(did) == ExitCode.DONE
    assert await pg.fetchval("SELECT count(*) FROM fastworker.floors") == 1


async def test_who_is_asked_for_again_is_not_fetched_twice_at_once(
    scene: Scene, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in scene.network.frames(60):
        pass
    scene.sim.settle()
    scene.client.set(CURSOR, 5)
    did = next(one.did for one in scene.network.world.accounts() if one.live)
    asked, at_once, most = 0, 0, 0
    account = many.Many._account

    async def watched(self: many.Many, one: Claim, work: many.Work) -> None:
        nonlocal asked
        asked += 1
        await account(self, one, work)

    get_repo = scene.hosts.get_repo

    async def slow(host: str, did: str, path: Path) -> int:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if asked == 1:
            async with open_queue(str(scene.config.database_url)) as queue:
                await queue.put([Wanted(did)], "event", REPAIR, again=True)
            async with asyncio.timeout(20):
                while asked < 2:
                    await asyncio.sleep(0.05)
        at_once -= 1
        return await get_repo(host, did, path)

    monkeypatch.setattr(many.Many, "_account", watched)
    monkeypatch.setattr(scene.hosts, "get_repo", slow)
    assert await scene.repair(did) == ExitCode.DONE
    assert (most, asked > 2) == (1, True)
    assert await pg.fetchval("SELECT state FROM fastworker.repos WHERE did = $1", did) == "done"


async def test_what_it_needs(scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a DID"):
        await scene.repair("alice.test")
    list(scene.network.frames(5))
    with pytest.raises(Unreachable, match="holds no cursor"):
        await scene.repair()
    scene.happen(20)
    with pytest.raises(Unreachable, match="no group"):
        await scene.repair()
    scene.client.xgroup_create(STREAM, GROUP, "0")
    monkeypatch.setattr(many, "STALL_S", 0.1)
    with pytest.raises(Unreachable, match="is it running"):
        await scene.repair()
    entries: Any = scene.client.xrange(STREAM)
    scene.client.xdel(STREAM, *(entry_id for entry_id, _ in entries))  # what was deleted nobody can finish
    assert await scene.repair() == ExitCode.DONE
