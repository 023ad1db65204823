"""Memory of what fetches and settles repositories: many small ones, and one large one among them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import uvloop
from redis.asyncio import Redis

from bench.repairing import Repair, repairing, served
from bench.report import Figures
from bench.servers import Servers, servers

ACCOUNTS = 400
LIMIT_S = 1_800.0
_EVERY_S = 0.1


def syncer(seed: int, *, records: int) -> Figures:
    """`records` of the large one; 0: there is none."""
    with servers() as running:
        return uvloop.run(_run(running, seed, records))


async def _run(running: Servers, seed: int, records: int) -> Figures:
    async with Redis.from_url(running.redis.url) as redis:
        await redis.set("firehose:python_cursor", "1")
    async with (
        served(seed, ACCOUNTS, records) as hosts,
        repairing(running, hosts, FASTWORKER_BACKFILL_SHARE=1) as repair,
    ):
        began, most = time.monotonic(), 0.0
        async with asyncio.timeout(LIMIT_S):
            while not await repair.is_over():
                most = max(most, _resident_mb(repair))
                await asyncio.sleep(_EVERY_S)
        return {
            "accounts": ACCOUNTS,
            "records of the largest": records,
            "s": time.monotonic() - began,
            "MB at most": most,
        }


def _resident_mb(repair: Repair) -> float:
    """Most of it so far, pages that it shares with other processes included."""
    try:
        status = Path(f"/proc/{repair.pid}/status").read_text("ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1_000 for line in status.splitlines() if line.startswith("VmHWM:")), 0.0)
