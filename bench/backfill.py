"""History: the same repositories through the live path and in bulk, against the COPY floor of the rows they make."""

from __future__ import annotations

import asyncio
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from bench.corpus import cache
from bench.floor import floor_s
from bench.growth import preload
from bench.report import Figures
from bench.servers import PYTHON, Servers, cpu_s, environment, pss_mb, servers
from fastworker.commands.backfill import RECORDS
from fastworker.simulator.network import Network
from fastworker.simulator.repo import car_bytes

_COUNTS = (
    "SELECT count(*) FROM posts",
    "SELECT count(*) FROM likes",
    "SELECT sum(like_count) + sum(reply_count) + sum(quote_count) FROM post_aggregations",
    "SELECT count(*) FROM notifications",
    "SELECT count(*) FROM post_viewer_states",
    "SELECT count(*) FROM thread_contexts",
    "SELECT count(*) FROM users",
)
_SIZES = (
    "SELECT oid::regclass::text, pg_total_relation_size(oid) FROM pg_class WHERE relkind = 'r' "
    "AND relnamespace IN ('public'::regnamespace, 'fastworker'::regnamespace) ORDER BY 2 DESC"
)


def repositories(seed: int, events: int) -> Path:
    """A folder of CAR files in the user's cache: what so many events of the production mix leave, with as many records
    in each as an account of the network has on average."""
    folder = cache() / f"cars-{seed}-{events}"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    network = Network(seed, accounts=max(8, events // RECORDS), signed=True)
    told = time.monotonic()
    for number, _ in enumerate(network.frames(events)):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"repositories: {number:,} of {events:,} events", file=sys.stderr, flush=True)
    for account in network.world.accounts():
        if account.repo.rev is not None:
            (folder / f"{account.number}.car").write_bytes(car_bytes(*account.repo.export()))
    (folder / "done").touch()
    return folder


def backfill(folder: Path, *, derive: str, bulk: bool, likes: int = 0) -> Figures:
    """From the start of the command to its end, decoding, derived tables and indexes included."""
    load = None if not likes else lambda url: uvloop.run(preload(url, likes))
    with servers(preload=load) as running:
        figures: Figures = uvloop.run(_import(running, folder, derive, bulk=bulk, likes=likes))
        figures |= _in_sync(running, folder, derive)
        if not likes:
            before = cpu_s(running.postgres.pid)
            figures["floor records/s"] = figures["records"] / uvloop.run(floor_s(running.postgres.url))
            figures["floor CPU us/record"] = (cpu_s(running.postgres.pid) - before) / figures["records"] * 1e6
            figures["share of the floor"] = figures["records/s"] / figures["floor records/s"]
    return figures


def _in_sync(running: Servers, folder: Path, derive: str) -> Figures:
    """The same once more, with nothing to write: as the command itself says it, without the start of Python."""
    words = [PYTHON, "-m", "fastworker", "import", str(folder)]
    before, before_us = cpu_s(running.postgres.pid), _ended_s()
    done = subprocess.run(
        words, env=environment(running, FASTWORKER_DERIVE=derive), capture_output=True, text=True, check=True
    )
    found = re.search(r"([\d,]+) records in ([\d.]+) s: no difference", done.stdout)
    assert found is not None, done.stdout
    records = int(found[1].replace(",", ""))
    return {
        "in sync records/s": records / float(found[2]),
        "in sync command CPU us/record": (_ended_s() - before_us) / records * 1e6,
        "in sync postgres CPU us/record": (cpu_s(running.postgres.pid) - before) / records * 1e6,
    }


def _ended_s() -> float:
    """CPU of processes of ours that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def _import(running: Servers, folder: Path, derive: str, *, bulk: bool, likes: int = 0) -> dict[str, Any]:
    before, before_us = cpu_s(running.postgres.pid), _ended_s()
    began = time.perf_counter()
    words = ("import", "--bulk", str(folder)) if bulk else ("import", str(folder))
    process = await asyncio.create_subprocess_exec(
        PYTHON, "-m", "fastworker", *words, env=environment(running, FASTWORKER_DERIVE=derive),
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    peak = 0.0
    waiting = asyncio.create_task(process.wait())
    while not waiting.done():
        await asyncio.wait([waiting], timeout=1.0)  # to look costs milliseconds of the same cores
        peak = max(peak, pss_mb(process.pid))
    if process.returncode:
        raise RuntimeError(f"fastworker {' '.join(words)} ended with exit code {process.returncode}")
    seconds = time.perf_counter() - began
    connection = await asyncpg.connect(running.postgres.url)
    counts = [int(await connection.fetchval(one) or 0) for one in _COUNTS]
    stored = int(
        await connection.fetchval(
            "SELECT (SELECT count(*) FROM fastworker.versions WHERE NOT deleted) + (SELECT count(*) FROM posts) "
            "+ (SELECT count(*) FROM likes) + (SELECT count(*) FROM reposts) + (SELECT count(*) FROM follows) "
            "+ (SELECT count(*) FROM blocks)"
        )
    )
    sizes = await connection.fetch(_SIZES)
    await connection.close()
    records = stored - likes  # that were there before
    return {
        "records/s": records / seconds,
        "records": records,
        "seconds": seconds,
        "command CPU us/record": (_ended_s() - before_us) / records * 1e6,
        "postgres CPU us/record": (cpu_s(running.postgres.pid) - before) / records * 1e6,
        "memory MB (PSS)": peak,
        "rows": sum(counts),
        "bytes/record in PostgreSQL": sum(size for _, size in sizes) / stored,
        **{f"{table} bytes/record": size / stored for table, size in sizes if size > stored},
    }
