"""History of many repositories on many hosts, with faults, live events beside it, and kill -9 of everything."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from fastworker.commands.backfill import backfill, estimate
from fastworker.commands.sample import sample
from fastworker.errors import ExitCode
from fastworker.sync.choice import Choice
from tests.rig.history import History, Plan
from tests.services import Service


@pytest.fixture
def env(redis_url: str, postgres_url: str) -> dict[str, str]:
    return {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url}


@pytest.mark.timeout(420)  # seconds; a busy machine takes its time
async def test_a_few(
    env: dict[str, str], pg: asyncpg.Connection, tmp_path: Path, services: Callable[..., Service]
) -> None:
    plan = Plan(repos=12, hosts=3, before=20, live_per_s=30, kills=2, kills_worker=False)
    async with History(plan, env, tmp_path, services) as history:
        await history.begin(pg)
        async with asyncio.timeout(400):
            outcome = await history.run(pg)
    assert outcome.differences == "no difference", outcome
    assert outcome.over_the_limit == []
    assert outcome.kills == 2
    assert outcome.accounts >= 10
    assert outcome.records > 100


@pytest.mark.extended
@pytest.mark.timeout(7_200)
async def test_many(
    env: dict[str, str],
    pg: asyncpg.Connection,
    tmp_path: Path,
    services: Callable[..., Service],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """HISTORY_REPOS=10000 HISTORY_HOSTS=50 for more. What an estimate says is compared with what the hosts hold then."""
    plan = Plan(int(os.environ.get("HISTORY_REPOS", "1000")), int(os.environ.get("HISTORY_HOSTS", "20")))
    async with History(plan, env, tmp_path, services) as history:
        await history.begin(pg)
        dids = [one.did for one in history.network.world.accounts()]
        some, others = (tmp_path / name for name in ("some", "others"))
        fetched = set(random.Random(plan.seed).sample(dids, len(dids) // 5))  # the first ones have written most
        some.write_text("\n".join(fetched))
        others.write_text("\n".join(did for did in dids if did not in fetched))
        async with history.hosts() as hosts:
            worker = services("worker", **env, FASTWORKER_PROCESSES="1", FASTWORKER_HTTP_PORT="off")
            assert await backfill(history.config, Choice(dids=some), asyncio.Event(), hosts=hosts) == ExitCode.DONE
            capsys.readouterr()
            assert await estimate(history.config, Choice(dids=others), hosts=hosts) == ExitCode.DONE
            words = capsys.readouterr().out
            assert worker.stop() == 0
        accounts, megabytes, rows = (
            float(text.replace(",", ""))
            for text in re.findall(r"^(?:accounts|to fetch|rows) +([\d.,]+)(?: MB)?$", words, re.MULTILINE)
        )
        records, size = history.truth(set(others.read_text().split()))
        async with asyncio.timeout(7_000):
            outcome = await history.run(pg)
        async with history.hosts() as hosts:
            code = await sample(
                history.config, repos=100, as_json=True, stop=asyncio.Event(), hosts=hosts, is_repaired=False
            )
    with capsys.disabled():
        sys.stdout.write(f"\n{plan}\n{outcome}\n{words}There were {records:,} records, {size:,} bytes.\n")
    assert outcome.differences == "no difference"
    assert outcome.over_the_limit == []
    assert outcome.kills == plan.kills
    assert code == ExitCode.DONE  # truth 1.0
    assert accounts == len(others.read_text().split())
    assert 0.8 < rows / records < 1.2
    assert 0.8 < megabytes * 1e6 / size < 1.2
