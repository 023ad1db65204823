"""Repair beside the live stream: simulated hosts in one process, a backfill of all their accounts in another.

`python -m bench.repairing hosts SEED ACCOUNTS` serves repositories that nobody has seen, and prints where they are;
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
from fastworker.process.signals import stop_on_signals
from fastworker.simulator.hosts import SimHosts
from fastworker.simulator.network import Network
from fastworker.sync.choice import Choice
from fastworker.sync.hosts import Hosts

HOSTS: Final = 50
EVENTS: Final = 60  # of an account, on average
_MANY: Final = "SELECT count(*), coalesce(sum(records), 0)::bigint FROM fastworker.repos WHERE state = 'done'"


class Repair:
    """How far it is: accounts and records settled, CPU seconds of the backfill and of the simulated hosts."""

    def __init__(self, running: Servers, fetching: int, serving: int) -> None:
        self._running = running
        self._pids = {"backfill": fetching, "simulated hosts": serving}

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
async def served(seed: int, accounts: int) -> AsyncIterator[Served]:
    """Simulated hosts, from when their repositories are made."""
    async with _process("hosts", str(seed), str(accounts), stdout=asyncio.subprocess.PIPE, limit=1 << 26) as process:
        assert process.stdout is not None
        yield Served(process.pid, await process.stdout.readline())


@contextlib.asynccontextmanager
async def repairing(running: Servers, hosts: Served) -> AsyncIterator[Repair]:
    """From the first account that is settled on."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        plan.write_bytes(hosts.plan)
        async with _process("backfill", str(plan), env=environment(running), stdout=asyncio.subprocess.DEVNULL) as it:
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


async def _serve(seed: int, accounts: int) -> None:
    network = Network(seed, accounts=accounts, signed=True)
    for _ in network.frames(accounts * EVENTS):
        pass
    async with SimHosts(network.world, count=HOSTS, packed=False) as hosts:
        dids = [one.did for one in network.world.accounts()]
        told = {"own": sorted(hosts.own), "directory": hosts.directory.url, "dids": dids}
        print(json.dumps(told), flush=True)
        await asyncio.Event().wait()


async def _fetch(plan: dict[str, Any], chosen: Path) -> None:
    directory = plan["directory"]
    config = parse_config({**os.environ, "FASTWORKER_PLC_URL": directory})

    def rate(host: str) -> float:
        return 1_000.0 if directory.endswith(host) else 20.0

    with stop_on_signals() as stop:
        async with Hosts(directory, own=frozenset(plan["own"]), rate=rate) as hosts:
            await backfill(config, Choice(dids=chosen), stop, hosts=hosts)


if __name__ == "__main__":
    if sys.argv[1] == "hosts":
        uvloop.run(_serve(int(sys.argv[2]), int(sys.argv[3])))
    else:
        here = Path(sys.argv[2])
        plan = json.loads(here.read_text("utf-8"))
        chosen = here.with_name("dids")
        chosen.write_text("\n".join(plan["dids"]))
        uvloop.run(_fetch(plan, chosen))
