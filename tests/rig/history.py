"""History of many repositories on many hosts, with everything against it: faults of hosts, live events beside it, and
kill -9 of all processes at random moments. At the end nothing may be wrong."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import asyncpg
import redis as sync_redis

from fastworker.config import parse_config
from fastworker.event.entry import encode_native
from fastworker.event.frame import decode_frame
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.simulator.hosts import Fault, SimHosts, repository
from fastworker.simulator.network import Network
from fastworker.stream.admin import age_s
from fastworker.sync.hosts import Bounds, Hosts
from tests.integration.test_settle import comparable, may_be_lost
from tests.services import ROOT, Service, environment

STREAM, GROUP, CURSOR = "firehose:events", "firehose-processors", "firehose:python_cursor"
TICK_S: Final = 0.05
AT_A_STRETCH: Final = 50
OWED_S: Final = 120.0  # until what the last flushes left owed is paid
LOOKS: Final = 3
IDLE_S: Final = 60.0  # the hosts are simulated, and may be slow on a busy machine
_OWED: Final = "SELECT (SELECT count(*) FROM fastworker.recheck) + (SELECT count(*) FROM fastworker.debts)"
FAULTS: Final[tuple[Fault, ...]] = (
    "unavailable", "limited", "limited_retry_after", "truncated", "cut", "missing_block", "changed_block",
    "commit_meanwhile", "unordered", "duplicates", "foreign", "html", "wrong_key",
)  # fmt: skip


class Plan(NamedTuple):
    """`before`: events of each repository, on average, that nobody here has seen. `rate`: requests a second at one
    host; `directory_rate`: at the directory."""

    repos: int
    hosts: int
    before: int = 30
    live_per_s: int = 500
    kills: int = 5
    kills_worker: bool = True  # it costs its lease each time
    rate: float = 20.0
    directory_rate: float = 100.0
    seed: int = 1


class Outcome(NamedTuple):
    accounts: int
    records: int
    live: int
    seconds: float
    kills: int
    faults: int
    refused_before_the_end: int
    lag_p50_s: float
    lag_p99_s: float
    differences: str
    over_the_limit: list[str]
    """Hosts that saw more than their rate."""


class History:
    """An async context manager."""

    def __init__(self, plan: Plan, env: dict[str, str], folder: Path, services: Callable[..., Service]) -> None:
        self.plan = plan
        self.network = Network(plan.seed, accounts=plan.repos, signed=True)
        self.sim = SimHosts(self.network.world, count=plan.hosts)
        self.model = Model()
        self._random = random.Random(plan.seed)
        self._env = env
        self._folder = folder
        self._services = services
        self._client = sync_redis.Redis.from_url(env["REDIS_URL"])
        self._accounts = self._live = self._faults = 0
        self._lags: list[float] = []

    async def __aenter__(self) -> Self:
        await self.sim.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client.close()
        await self.sim.__aexit__(None, None, None)

    def hosts(self) -> Hosts:
        """A client of the simulated hosts for this process."""
        plan, plc = self.plan, self.sim.directory.url

        def rate(host: str) -> float:
            return plan.directory_rate if plc.endswith(host) else plan.rate

        return Hosts(plc, own=self.sim.own, bounds=Bounds(idle_s=IDLE_S, connect_s=IDLE_S), rate=rate)

    @property
    def config(self) -> Any:
        return parse_config({**self._env, "FASTWORKER_PLC_URL": self.sim.directory.url})

    # --- what happens

    async def begin(self, pg: asyncpg.Connection) -> None:
        """What nobody has seen, and who is known."""
        for frame in self.network.frames(self.plan.repos * self.plan.before):
            self._happens(frame, is_lost=may_be_lost(frame))
        self._settle()
        known = [(one.did,) for one in self.network.world.accounts()]
        await pg.executemany(
            "INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid') ON CONFLICT DO NOTHING", known
        )
        self._client.xgroup_create(STREAM, GROUP, "0", mkstream=True)

    def truth(self, dids: set[str]) -> tuple[int, int]:
        """Records and bytes of these repositories as they are now."""
        accounts = [one for one in self.network.world.accounts() if one.did in dids]
        return sum(len(one.repo.records) for one in accounts), sum(len(repository(one)) for one in accounts)

    def _happens(self, frame: Any, *, is_lost: bool) -> None:
        if frame.event is None:
            return
        ms = int(time.time() * 1_000)
        if not is_lost:
            event = decode_frame(frame.data, "sim.test")
            ms = int(self._client.xadd(STREAM, dict(encode_native(event))).partition(b"-")[0])  # type: ignore[arg-type]
        self.model.apply(frame.event, ms)

    def _settle(self) -> None:
        self._client.set(CURSOR, self.network.clock.seq)
        if len(self.network.world.accounts()) != self._accounts:
            self.sim.settle()
            self._accounts = len(self.network.world.accounts())

    async def _go_live(self) -> None:
        """Never long at a stretch: the hosts answer from the same loop."""
        began = time.monotonic()
        while True:
            due = int((time.monotonic() - began) * self.plan.live_per_s) - self._live
            for frame in self.network.frames(min(due, AT_A_STRETCH)):
                self._happens(frame, is_lost=False)
                self._live += 1
            self._settle()
            await asyncio.sleep(TICK_S if due <= AT_A_STRETCH else 0)

    async def _fail(self) -> None:
        while True:
            self._random.choice(self.sim.pdses).fail(self._random.choice(FAULTS), times=2)
            self._faults += 1
            await asyncio.sleep(max(0.1, 5 / self.plan.hosts))

    async def _watch(self) -> None:
        """How old the oldest unfinished entry of the live stream is."""
        while True:
            group: Any = self._client.xinfo_groups(STREAM)[0]
            pending: Any = self._client.xpending(STREAM, GROUP)
            oldest = pending["min"] if pending["pending"] else None
            if oldest is None:
                rest: Any = self._client.xrange(STREAM, b"(" + group["last-delivered-id"], count=1)
                oldest = rest[0][0] if rest else None
            self._lags.append(age_s(oldest.decode()) if oldest else 0.0)
            await asyncio.sleep(0.1)

    # --- who works

    def _worker(self) -> Service:
        more = {"FASTWORKER_PROCESSES": "1", "FASTWORKER_HTTP_PORT": "off", "FASTWORKER_KEEP_SECONDS": "0"}
        return self._services("worker", **self._env, **more)

    def _backfill(self) -> subprocess.Popen[bytes]:
        plan = self._folder / "plan.json"
        told = {
            "env": {**self._env, "FASTWORKER_PLC_URL": self.sim.directory.url},
            "own": sorted(self.sim.own),
            "directory": self.sim.directory.url.removeprefix("http://"),
            "rate": self.plan.rate,
            "directory_rate": self.plan.directory_rate,
        }
        plan.write_text(json.dumps(told))
        command = [sys.executable, "-m", "tests.rig.backfill", str(plan)]
        log = (self._folder / "backfill.log").open("ab")
        with log:
            return subprocess.Popen(command, env=environment({}), cwd=ROOT, stdout=log, stderr=log)

    async def run(self, pg: asyncpg.Connection) -> Outcome:
        """Raises TimeoutError when it does not come to its end."""
        began = time.monotonic()
        beside = [asyncio.create_task(work()) for work in (self._go_live, self._watch)]
        failing = asyncio.create_task(self._fail())
        worker, running = self._worker(), [self._backfill(), self._backfill()]
        moments = sorted(self._random.randrange(self.plan.repos) for _ in range(self.plan.kills))
        try:
            while any(one.poll() is None for one in running):
                await asyncio.sleep(TICK_S)
                if moments and sum(len(pds.asked) for pds in self.sim.pdses) >= moments[0]:
                    moments.pop(0)
                    for one in running:
                        _kill(one)
                    if self.plan.kills_worker:
                        _kill(worker.process)
                        worker = self._worker()
                    running = [self._backfill(), self._backfill()]
            refused = await pg.fetchval("SELECT count(*) FROM fastworker.repos WHERE state = 'refused'")
            failing.cancel()
            for pds in self.sim.pdses:
                pds.fail(None)
            await self._the_rest(pg)
            seconds = time.monotonic() - began
        finally:
            for task in (*beside, failing):
                task.cancel()
            await asyncio.wait([*beside, failing])
            for one in running:
                if one.poll() is None:
                    _kill(one)
        for task in (*beside, failing):
            if not task.cancelled():
                task.result()
        await self._finished()
        row = await pg.fetchrow("SELECT count(*), sum(records)::int FROM fastworker.repos WHERE state = 'done'")
        assert row is not None
        lags = sorted(self._lags)
        return Outcome(
            accounts=row[0],
            records=row[1],
            live=self._live,
            seconds=seconds,
            kills=self.plan.kills - len(moments),
            faults=self._faults,
            refused_before_the_end=refused,
            lag_p50_s=lags[len(lags) // 2],
            lag_p99_s=lags[len(lags) * 99 // 100],
            differences=await self._differences(pg),
            over_the_limit=self._over_the_limit(),
        )

    async def _the_rest(self, pg: asyncpg.Connection) -> None:
        """What was refused because of a fault is tried once more by the next run."""
        for _ in range(5):
            last = self._backfill()
            while last.poll() is None:
                await asyncio.sleep(TICK_S)
            if not await pg.fetchval("SELECT count(*) FROM fastworker.repos WHERE state NOT IN ('done', 'gone')"):
                return

    async def _finished(self) -> None:
        async with asyncio.timeout(120):
            while True:
                group: Any = self._client.xinfo_groups(STREAM)[0]
                rest = self._client.xrange(STREAM, b"(" + group["last-delivered-id"], count=1)
                if not group["pending"] and not rest:
                    return
                await asyncio.sleep(0.1)

    async def _differences(self, pg: asyncpg.Connection) -> str:
        """Once what is owed is paid. A table at a time: there may be millions of rows, and each look takes minutes."""
        async with asyncio.timeout(OWED_S):
            while await pg.fetchval(_OWED):
                await asyncio.sleep(0.5)
        expected = comparable(self.model.tables())
        found: list[compare.Difference] = []
        for table in list(expected):
            rows = {table: expected.pop(table)}
            for _ in range(LOOKS):
                differs = compare.diff(rows, comparable(await compare.dump(pg, [table])))
                if not differs:
                    break
                await asyncio.sleep(1)
            found += differs
        return compare.report(found)

    def _over_the_limit(self) -> list[str]:
        """A host may see a second's worth at once, then its rate."""
        over = []
        for server in (*self.sim.pdses, self.sim.directory):
            rate = self.plan.directory_rate if server is self.sim.directory else self.plan.rate
            times = [at for at, _ in server.asked]
            most = max((bisect.bisect_left(times, at + 2.0) - n for n, at in enumerate(times)), default=0)
            if most > 3 * rate + 1:
                over.append(f"{server.url}: {most} in 2 s, {rate:g} a second allowed")
        return over


def _kill(process: subprocess.Popen[Any]) -> None:
    """It and its children, at once."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = [process.pid]
    with contextlib.suppress(OSError):
        pids += [int(pid) for pid in children.read_text().split()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
