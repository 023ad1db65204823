# ruff: noqa: F811 - fixtures of another file
"""`backfill --bulk`: fetched from simulated hosts, loaded, killed in each phase."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from fastworker.crashpoint import Step
from fastworker.errors import ExitCode
from tests.integration.test_repairs import Scene, scene, worker  # noqa: F401 - fixtures
from tests.services import ROOT, Service, environment, run

RATE = 20.0
_PROCESS = """
import asyncio, json, os, sys
from pathlib import Path
from fastworker.commands.backfill import backfill
from fastworker.commands.bulk import load_choice
from fastworker.sync.choice import Choice
from fastworker.config import parse_config
from fastworker.sync.hosts import Bounds, Hosts
told = json.loads(sys.argv[1])
async def main():
    bounds, config, choice = Bounds(idle_s=5, wait_max_s=30), parse_config(os.environ), Choice(known=True)
    async with Hosts(told["plc"], own=frozenset(told["own"]), bounds=bounds, rate=lambda _: told["rate"]) as hosts:
        if told["spool"]:
            return await load_choice(config, choice, Path(told["spool"]), asyncio.Event(), hosts=hosts)
        return await backfill(config, choice, asyncio.Event(), hosts=hosts)
if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
"""


def process(scene: Scene, spool: Path | None = None, **more: str) -> subprocess.Popen[bytes]:
    told = {"plc": scene.sim.directory.url, "own": sorted(scene.sim.own), "rate": RATE, "spool": str(spool or "")}
    env = {"REDIS_URL": scene.config.redis_url, "DATABASE_URL": scene.config.database_url or "", **more}
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, json.dumps(told)],
        env=environment(env),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.extended
async def test_bulk_from_hosts_goes_on_after_a_kill_in_each_phase(
    scene: Scene, worker: Service, services: Callable[..., Service], postgres_url: str, tmp_path: Path
) -> None:
    """What came live meanwhile is applied afterwards; `verify` finds nothing."""
    scene.happen(500, lose=lambda _: True)
    await scene.finished()
    assert worker.stop() == ExitCode.DONE
    dids = [account.did for account in scene.network.world.accounts()]
    await asked(
        postgres_url,
        "INSERT INTO users (did, handle) SELECT did, 'handle.invalid' FROM unnest($1::text[]) AS a (did) "
        "ON CONFLICT DO NOTHING",
        dids,
    )
    fetching = process(scene, tmp_path)
    async with asyncio.timeout(120):
        while sum(len(pds.asked) for pds in scene.sim.pdses) < 4:
            await asyncio.sleep(0.02)
    fetching.send_signal(signal.SIGKILL)
    fetching.communicate()
    scene.happen(80)  # they wait on the stream
    for place in (
        Step.BULK_STAGING,
        Step.BULK_HELD,
        f"{Step.BULK_IN_STEP}:3",
        f"{Step.BULK_AFTER_STEP}:6",
        Step.BULK_RELEASED,
    ):
        await gone(postgres_url)
        killed = process(scene, tmp_path, FASTWORKER_CRASHPOINT=place)
        _, words = await asyncio.to_thread(killed.communicate)
        is_in_child = place == Step.BULK_STAGING
        assert (killed.returncode == -signal.SIGKILL) is not is_in_child, (place, words.decode())
        assert killed.returncode != ExitCode.DONE
    await gone(postgres_url)
    last = process(scene, tmp_path)
    _, words = await asyncio.to_thread(last.communicate)
    assert last.returncode == ExitCode.DONE, words.decode()
    assert list(tmp_path.iterdir()) == []
    states = await asked(postgres_url, "SELECT DISTINCT state FROM fastworker.repos")
    assert {row[0] for row in states} <= {"done", "gone"}
    env = {"REDIS_URL": scene.config.redis_url, "DATABASE_URL": postgres_url, "FASTWORKER_HTTP_PORT": "off"}
    again = services("worker", **env, FASTWORKER_PROCESSES="1", FASTWORKER_SYNC="off")
    await scene.finished()
    connection = await asyncpg.connect(postgres_url)
    assert await scene.differences(connection) == "no difference"
    await connection.close()
    assert again.stop() == ExitCode.DONE
    checked = await asyncio.to_thread(run, "verify", DATABASE_URL=postgres_url, timeout=120)
    assert checked.returncode == ExitCode.DONE, checked.stdout + checked.stderr


async def asked(url: str, statement: str, *arguments: Any) -> list[Any]:
    """By a connection that is gone afterwards: a load wants to be alone."""
    connection = await asyncpg.connect(url)
    try:
        return list(await connection.fetch(statement, *arguments))
    finally:
        await connection.close()


async def gone(url: str) -> None:
    """Wait until the sessions of a killed process are gone."""
    async with asyncio.timeout(60):
        while (await asked(url, "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^fastworker'"))[0][0]:
            await asyncio.sleep(0.1)
