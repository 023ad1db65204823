"""Repair beside the live stream: simulated hosts in one process, a backfill of all their accounts in another.

`python -m bench.repairing hosts SEED ACCOUNTS RECORDS` serves repositories that nobody has seen, and prints where they
are; the first of them has so many records more.
`python -m bench.repairing backfill FILE` fetches them all, FILE being what the other one printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg
import uvloop

from bench.servers import PYTHON, Servers, cpu_s, environment
from fastworker.commands.backfill import backfill
from fastworker.config import parse_config
from fastworker.process.priority import give_way
from fastworker.process.signals import stop_on_signals
from fastworker.simulator import mst
from fastworker.simulator.cbor import cid_of, encode
from fastworker.simulator.hosts import SimHosts
from fastworker.simulator.network import Network
from fastworker.simulator.repo import Clock, Repo
from fastworker.sync.choice import Choice
from fastworker.sync.hosts import Hosts

HOSTS: Final = 50
RECORD: Final = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"
EVENTS: Final = 60  # of an account, on average
_LEFT: Final = "SELECT count(*) FROM fastworker.repos WHERE state IN ('waiting', 'fetching')"
_MANY: Final = "SELECT count(*), coalesce(sum(records), 0)::bigint FROM fastworker.repos WHERE state = 'done'"


class Repair:
    """How far it is: accounts and records settled, CPU seconds of the backfill and of the simulated hosts."""

    def __init__(self, running: Servers, fetching: int, serving: int) -> None:
        self._running = running
        self._pids = {"backfill": fetching, "simulated hosts": serving}

    @property
    def pid(self) -> int:
        """Of the backfill."""
        return self._pids["backfill"]

    async def is_over(self) -> bool:
        connection = await asyncpg.connect(self._running.postgres.url)
        left = await connection.fetchval(_LEFT)
        await connection.close()
        return not left

    async def so_far(self) -> dict[str, float]:
        """Raises ProcessLookupError when the backfill has ended: then there were too few accounts."""
        connection = await asyncpg.connect(self._running.postgres.url)
        accounts, records = await connection.fetchrow(_MANY) or (0, 0)
        await connection.close()
        os.kill(self._pids["backfill"], 0)
        return {
            "repaired accounts": accounts,
            "repaired records": records,
            **{f"{name} CPU": cpu_s(pid) for name, pid in self._pids.items()},
        }


class Served(NamedTuple):
    pid: int
    plan: bytes


@contextlib.asynccontextmanager
async def served(seed: int, accounts: int, records: int = 0) -> AsyncIterator[Served]:
    """Simulated hosts, from when their repositories are made. The first account has so many records more."""
    words = ("hosts", str(seed), str(accounts), str(records))
    async with _process(*words, stdout=asyncio.subprocess.PIPE, limit=1 << 26) as process:
        assert process.stdout is not None
        yield Served(process.pid, await process.stdout.readline())


@contextlib.asynccontextmanager
async def repairing(running: Servers, hosts: Served, **settings: object) -> AsyncIterator[Repair]:
    """From the first account that is settled on. `settings`: variables of the backfill."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        plan.write_bytes(hosts.plan)
        env = environment(running, **settings)
        async with _process("backfill", str(plan), env=env, stdout=asyncio.subprocess.DEVNULL) as it:
            repair = Repair(running, it.pid, hosts.pid)
            async with asyncio.timeout(120):
                while not (await repair.so_far())["repaired accounts"]:
                    await asyncio.sleep(0.1)
            yield repair


@contextlib.asynccontextmanager
async def _process(*words: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(PYTHON, "-m", "bench.repairing", *words, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _serve(seed: int, accounts: int, records: int) -> None:
    network = Network(seed, accounts=accounts, signed=True)
    for _ in network.frames(accounts * EVENTS):
        pass
    _grow(network.world.account(0).repo, records)
    async with SimHosts(network.world, count=HOSTS, packed=False) as hosts:
        dids = [one.did for one in network.world.accounts()]
        told = {"own": sorted(hosts.own), "directory": hosts.directory.url, "dids": dids}
        print(json.dumps(told), flush=True)
        await asyncio.Event().wait()


def _grow(repo: Repo, records: int) -> None:
    """So many likes, without the commits that would have brought them."""
    clock = Clock()
    for number in range(records):
        subject = {"uri": f"at://did:plc:{'b' * 24}/app.bsky.feed.post/{number}", "cid": RECORD}
        block = encode({"$type": "app.bsky.feed.like", "subject": subject, "createdAt": "2026-07-04T14:38:07.517Z"})
        cid = cid_of(block)
        repo.records[cid] = block
        repo.root = mst.put(repo.root, f"app.bsky.feed.like/{clock.tid()}".encode(), cid)
    exported = repo.export()  # once: meanwhile no host answers
    repo.export = lambda: exported  # type: ignore[method-assign]


async def _fetch(plan: dict[str, Any], chosen: Path) -> None:
    directory = plan["directory"]
    config = parse_config({**os.environ, "FASTWORKER_PLC_URL": directory})

    def rate(host: str) -> float:
        return 1_000.0 if directory.endswith(host) else 20.0

    give_way()  # as the command and the syncer do
    with stop_on_signals() as stop:
        async with Hosts(directory, own=frozenset(plan["own"]), rate=rate) as hosts:
            await backfill(config, Choice(dids=chosen), stop, hosts=hosts)


if __name__ == "__main__":
    if sys.argv[1] == "hosts":
        uvloop.run(_serve(*map(int, sys.argv[2:])))
    else:
        here = Path(sys.argv[2])
        plan = json.loads(here.read_text("utf-8"))
        chosen = here.with_name("dids")
        chosen.write_text("\n".join(plan["dids"]))
        uvloop.run(_fetch(plan, chosen))
