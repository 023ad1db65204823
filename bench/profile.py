"""`./scripts/profile`: where a worker's time goes, and what its sessions do in PostgreSQL meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import entries, prepare
from bench.end_to_end import worker
from bench.report import ROOT
from bench.servers import Servers, fill, first_ack, servers, tree

EVENTS = 200_000
TOP = 25
WARM_UP_S = 1.0
LOOK_S = 0.01  # between two looks at the sessions
_SESSIONS = (
    "SELECT CASE state WHEN 'active' THEN coalesce(wait_event_type || ' ' || wait_event, 'at work') ELSE state END, "
    "left(regexp_replace(query, '\\s+', ' ', 'g'), 90) FROM pg_stat_activity "
    "WHERE application_name LIKE 'fastworker%' AND pid <> pg_backend_pid() AND datname = current_database()"
)
WAITING = ("epoll_wait (libc.so.6)", "epoll_pwait (libc.so.6)", "clock_nanosleep (libc.so.6)", "poll (libc.so.6)")


async def _spy(pids: list[int], seconds: int, kind: str, out: Path) -> None:
    """py-spy on each process at once: it stops a process for each sample, so only one may look at it at a time."""
    spy = Path(sys.executable).with_name("py-spy")
    suffix = "svg" if kind == "flamegraph" else "txt"
    jobs = [
        await asyncio.create_subprocess_exec(
            str(spy), "record", "--pid", str(pid), "--duration", str(seconds), "--format", kind, "--native",
            "--output", str(out / f"{pid}.{suffix}"), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )
        for pid in pids
    ]  # fmt: skip
    for job in jobs:
        _, words = await job.communicate()
        if job.returncode:
            sys.exit(f"py-spy: {words.decode().strip()}\nIt needs the right to trace (SYS_PTRACE in a container).")


def profile(seconds: int, events: int, settings: dict[str, str]) -> None:
    out = ROOT / "profile"
    out.mkdir(exist_ok=True)
    for old in (*out.glob("*.svg"), *out.glob("*.txt")):
        old.unlink()
    with servers() as running:
        names, sessions = uvloop.run(_record(running, out, seconds, events, settings))
    for pid, name in names.items():
        spent, held = _spent((out / f"{pid}.txt").read_text())
        waiting = sum(spent.pop(function, 0) for function in WAITING)
        total = sum(spent.values()) or 1
        print(f"\n{name} {pid}: {total} samples and {waiting} waiting, profile/{pid}.svg")
        print(f"  {'itself':>7} {'with what it calls':>19}")
        for function, count in spent.most_common(TOP):
            print(f"  {count / total:7.1%} {held[function] / total:19.1%}  {function}")
    looks = sum(sessions.values()) or 1
    print("\nsessions in PostgreSQL: what they did, or waited for, in which (or since which) statement")
    for (doing, query), count in sessions.most_common(TOP):
        print(f"  {count / looks:7.1%}  {doing:26}  {query}")


async def _watch(url: str, sessions: Counter[tuple[str, str]]) -> None:
    """A lock that is waited for shows here and nowhere else: it costs nobody's CPU time."""
    connection = await asyncpg.connect(url)
    try:
        while True:
            sessions.update((row[0], row[1]) for row in await connection.fetch(_SESSIONS))
            await asyncio.sleep(LOOK_S)
    finally:
        await connection.close()


async def _record(
    running: Servers, out: Path, seconds: int, events: int, settings: dict[str, str]
) -> tuple[dict[int, str], Counter[tuple[str, str]]]:
    sessions: Counter[tuple[str, str]] = Counter()
    await fill(running.redis.url, entries(prepare(7, events), "native", events))
    async with worker(running, **settings) as process:
        async with Redis.from_url(running.redis.url) as redis:
            await first_ack(redis)
        await asyncio.sleep(WARM_UP_S)
        names = {pid: "child" if pid != process.pid else "supervisor" for pid in tree(process.pid)}
        watching = asyncio.create_task(_watch(running.postgres.url, sessions))
        await asyncio.sleep(seconds)  # before py-spy, which slows everything down
        watching.cancel()
        await asyncio.wait([watching])
        await _spy(list(names), seconds, "raw", out)
        await _spy(list(names), seconds, "flamegraph", out)
    return names, sessions


def _spent(raw: str) -> tuple[Counter[str], Counter[str]]:
    """Samples in which a function was the innermost, and in which it was on the stack. Lines are `a;b;c COUNT`."""
    spent: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        names = [frame.rpartition(":")[0] + ")" if ":" in frame else frame for frame in stack.split(";")]
        spent[names[-1]] += int(count)
        for each in set(names):
            held[each] += int(count)
    return spent, held


def main() -> None:
    """Numbers are the seconds of each of the two recordings, and the events on the stream."""
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    wrong = [argument for argument in sys.argv[1:] if not argument.isdigit() and "=" not in argument]
    if wrong:
        sys.exit(f"profile: {wrong[0]} is neither a number nor NAME=VALUE")
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    seconds, events = [*numbers, *(3, EVENTS)[len(numbers) :]][:2]
    profile(seconds, events, settings)


if __name__ == "__main__":
    main()
