"""Three hosts on one stream, one of which is cut off from Redis and PostgreSQL for a minute, and comes back.

`pytest --extended -s` tells how long it took.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from fastworker.simulator.network import Network
from tests.rig.proxy import Proxy
from tests.rig.stage import GROUP, Command, Stage, ended_in, entries_of

CUT_S = 60.0
RATE = 60.0
HOSTS = ("one", "two", "three")


class Host:
    """A worker with its own way to each server."""

    def __init__(self, command: Command, ways: list[Proxy]) -> None:
        self.command = command
        self._ways = ways

    def cut_off(self) -> None:
        """Packets are lost, as on a network: nobody is told."""
        for way in self._ways:
            way.hold()

    def come_back(self, *, late: bool) -> None:
        """`late`: what was sent meanwhile arrives after all, a COMMIT among it; else the connections are gone."""
        for way in self._ways:
            if not late:
                way.cut()
            way.release()


@contextlib.asynccontextmanager
async def hosts_of(stage: Stage) -> AsyncIterator[dict[str, Host]]:
    async with contextlib.AsyncExitStack() as stack:
        hosts = {}
        for name in HOSTS:
            targets = (stage.redis_server.port, stage.postgres.port)
            ways = [await stack.enter_async_context(Proxy(("127.0.0.1", target or 0))) for target in targets]
            env = stage.worker.env | {
                "CONSUMER_ID": name,
                "REDIS_URL": f"redis://127.0.0.1:{ways[0].port}",
                "DATABASE_URL": str(URL(stage.postgres.url).with_port(ways[1].port)),
            }
            hosts[name] = Host(Command("worker", stage.folder, env, f"host-{name}"), ways)
        stage.worker = hosts["one"].command  # what the stage knows of; all of them are alike
        try:
            for host in hosts.values():
                await host.command.start()
            yield hosts
        finally:
            for host in hosts.values():
                host.come_back(late=False)
                if host.command.is_running:
                    await host.command.end(signal.SIGKILL)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.1)


async def has_ended(stage: Stage, count: int) -> bool:
    return ended_in(await stage.ledger()) >= count


async def held_by(stage: Stage, host: str) -> int:
    """Entries that are pending for this host."""
    found: list[Any] = [
        one for stream in await stage.streams() for one in await stage.redis.xinfo_consumers(stream, GROUP)
    ]
    return sum(one["pending"] for one in found if one["name"].decode().startswith(f"{host}-"))


async def is_shared(stage: Stage, partitions: int, members: int) -> bool:
    """Each partition has an owner, and so many processes live."""
    owners: Any = await stage.redis.hgetall(stage.keys.owners)
    living: Any = await stage.redis.hgetall(stage.keys.members)
    return len(owners) == partitions and set(owners.values()) <= set(living) and len(living) == members


@pytest.mark.extended
@pytest.mark.timeout(600)
@pytest.mark.parametrize("late", [False, True], ids=["connections are gone", "what was sent arrives late"])
@pytest.mark.parametrize("partitions", [1, 4])
async def test_one_of_three_hosts_is_cut_off_for_a_minute(server_dir: Path, partitions: int, late: bool) -> None:
    form = "native" if partitions > 1 else "json"
    frames: list[Any] = list(Network(31, mix="adversarial", accounts=60).frames(int(RATE * (CUT_S + 60))))
    env = {
        "FASTWORKER_STREAM_FORMAT": form,
        "FASTWORKER_STREAM_PARTITIONS": str(partitions),
        "FASTWORKER_PROCESSES": "2",
        "BATCH_SIZE": "50",
    }
    async with (
        Stage(frames, rate=RATE, window=len(frames) + 1, folder=server_dir, env=env) as stage,
        hosts_of(stage) as hosts,
    ):
        await stage.reader.start()
        await until(lambda: has_ended(stage, 500), 120)
        if partitions > 1:
            await until(lambda: is_shared(stage, partitions, 6), 60)
        hosts["two"].cut_off()
        cut_at = time.monotonic()
        if partitions > 1:
            await until(lambda: is_shared(stage, partitions, 4), 30)
        shared_s = time.monotonic() - cut_at
        # the others finish what it had read, too: its names are free after 15 s, and are looked for every 10 s
        sent = await stage.added()

        async def is_done() -> bool:  # more comes meanwhile: so many ends alone do not say whose they are
            return await has_ended(stage, sent) and await held_by(stage, "two") == 0

        await until(is_done, CUT_S)
        done_s = time.monotonic() - cut_at
        await asyncio.sleep(max(0.0, cut_at + CUT_S - time.monotonic()))
        hosts["two"].come_back(late=late)
        back_at = time.monotonic()
        if partitions > 1:
            await until(lambda: is_shared(stage, partitions, 6), 60)
        back_s = time.monotonic() - back_at
        sys.stdout.write(
            f"its partitions had others after {shared_s:.1f} s, all that was sent had ended after {done_s:.1f} s; "
            f"{back_s:.1f} s after it came back it had its share\n"
        )
        problems = await stage.settle(lambda: frames[-1].seq or 0, 120)
        for host in hosts.values():
            problems += host.command.why_ended() + host.command.bugs()
        for name in HOSTS[1:]:
            assert await hosts[name].command.end(signal.SIGTERM) == 0
        problems += await stage.stop()
        problems += await stage.unbalanced(entries_of(frames, form), {})
        problems += await stage.different(frame.event for frame in frames if frame.event is not None)
        assert problems == [], "\n".join(problems)
