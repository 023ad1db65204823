"""Where Redis is: one server, two that three Sentinels watch, or a cluster; and what happens to each of them.

Clients reach each server through a proxy of its own. The servers announce the proxies' ports, so that replicas and
Sentinels go that way, too; only a cluster's bus does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from fastworker.edge.embedded import EmbeddedRedis, free_port
from fastworker.stream.client import error_code
from fastworker.stream.keys import CLUSTERED, CURSOR, STREAM, slot
from tests.rig.proxy import Proxy

MASTER: Final = "events"
SENTINELS: Final = 3
NODES: Final = 3
DOWN_MS: Final = 1_000
"""So long a server gives no answer before the others think that it is gone."""
ELSEWHERE_S: Final = 30.0
PATIENCE_S: Final = 60.0
_PASSING: Final = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "LOADING", "READONLY", "MASTERDOWN")


class Place:
    """One server. `async with` starts it; `proxied`: clients go through a proxy."""

    weights: ClassVar[dict[str, int]] = {}
    """How often each of its own faults comes in a hundred."""
    stream: ClassVar[str] = STREAM
    cursor: ClassVar[str] = CURSOR

    def __init__(self, folder: Path, *, proxied: bool = True) -> None:
        self.servers: list[EmbeddedRedis] = []
        self.proxies: list[Proxy] = []
        self._at = 0  # of the servers, the one that was aimed at when it was looked for last
        self._folder = folder
        self._proxied = proxied
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}" if self._proxied else self.server.url

    @property
    def server(self) -> EmbeddedRedis:
        return self.servers[self._at]

    @property
    def proxy(self) -> Proxy:
        return self.proxies[self._at]

    def client(self, stream: str = "") -> Redis:
        """One that goes to the server itself that has this stream, and waits until it is found again."""
        pool = SentinelConnectionPool(stream or self.stream, _Finder(self))
        return _Patient.from_pool(pool)

    async def aim(self, stream: str) -> None:
        """What happens from now on happens to the server that has this partition."""

    async def find(self) -> int:
        """Which of the servers is aimed at now, as the others say."""
        self._at = await asyncio.to_thread(self._find)
        return self._at

    def locate(self, _stream: str) -> int:
        """Which of the servers has it."""
        return self._find()

    async def came_back(self, server: EmbeddedRedis) -> None:
        """It was killed and started again."""

    async def act(self, kind: str, amount: float) -> None:
        """One of `weights`."""
        raise NotImplementedError(kind)

    async def _begin(self) -> None:
        await self._start("redis", {})

    def _find(self) -> int:
        return 0

    async def _start(self, name: str, settings: dict[str, str], announce: str = "") -> EmbeddedRedis:
        """`announce`: begins the names of the settings that say where others reach it."""
        port = free_port()
        proxy = await self._stack.enter_async_context(Proxy(("127.0.0.1", port)))
        if announce:
            settings = {**settings, f"{announce}-ip": "127.0.0.1", f"{announce}-port": str(proxy.port)}
        settings = {"shutdown-timeout": "0", **settings}  # it would wait for its replicas
        server = EmbeddedRedis(self._folder / name, port=port, settings=settings)
        await asyncio.to_thread(server.start)
        self._stack.push_async_callback(asyncio.to_thread, server.stop)
        self.servers.append(server)
        self.proxies.append(proxy)
        return server


class _Several(Place):
    """Servers of which one has the stream, and another takes its place."""

    weights: ClassVar[dict[str, int]] = {"failover": 5, "primary_kill": 5, "primary_stop": 5, "replica_cut": 5}

    async def act(self, kind: str, amount: float) -> None:
        at = await self.find()
        server = self.servers[at]
        match kind:
            case "failover":
                with contextlib.suppress(RedisError):  # none is fit just now: an operator shrugs
                    await asyncio.to_thread(self._fail_over)
                    await self.is_elsewhere(at)
            case "primary_kill":
                await asyncio.to_thread(server.kill)
                await self.is_elsewhere(at)
                await asyncio.to_thread(server.start)
            case "primary_stop":  # it wakes up later, and does not know yet that another is in its place
                os.kill(server.pid or 0, signal.SIGSTOP)
                try:
                    await self.is_elsewhere(at)
                finally:
                    os.kill(server.pid or 0, signal.SIGCONT)
            case "replica_cut":
                await self._cut_off([proxy for n, proxy in enumerate(self.proxies) if n != at], 0.5 + 3 * amount)

    async def is_elsewhere(self, at: int) -> None:
        """Wait until another server has the stream. It may not come to that: no other is fit."""
        end = time.monotonic() + ELSEWHERE_S
        while time.monotonic() < end:
            with contextlib.suppress(RedisError):
                if await self.find() != at:
                    return
            await asyncio.sleep(0.1)

    def _fail_over(self) -> None:
        raise NotImplementedError

    async def _cut_off(self, proxies: list[Proxy], seconds: float) -> None:
        for proxy in proxies:
            proxy.refusing = True
            proxy.cut()
        await asyncio.sleep(seconds)
        for proxy in proxies:
            proxy.refusing = False

    def _index(self, port: int) -> int:
        """Of the server that announces this port."""
        return next(n for n, proxy in enumerate(self.proxies) if proxy.port == port)


class Sentinels(_Several):
    """Two servers, the first of which is the master at the start, and three Sentinels."""

    weights: ClassVar[dict[str, int]] = {**_Several.weights, "sentinel_kill": 3}

    def __init__(self, folder: Path, *, proxied: bool = True) -> None:
        super().__init__(folder, proxied=proxied)
        self._sentinels: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def ports(self) -> list[int]:
        return list(self._sentinels)

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.ports)}/{MASTER}"

    async def act(self, kind: str, amount: float) -> None:
        if kind != "sentinel_kill":
            await super().act(kind, amount)
            return
        port = self.ports[int(amount * SENTINELS)]
        self._end(port)
        await asyncio.sleep(3 * amount)
        self._watch(port)

    async def _begin(self) -> None:
        await self._start("first", {"repl-diskless-sync-delay": "0"}, "replica-announce")
        await self._start("second", {"repl-diskless-sync-delay": "0"}, "replica-announce")
        await asyncio.to_thread(self._follow, 1, 0)  # not by its settings: two that follow each other wait for ever
        for port in (free_port() for _ in range(SENTINELS)):
            self._config(port).write_text(
                f"port {port}\nbind 127.0.0.1\ndir {self._folder}\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {self.proxies[0].port} 2\n"
                f"sentinel down-after-milliseconds {MASTER} {DOWN_MS}\nsentinel failover-timeout {MASTER} 4000\n"
            )
            self._watch(port)
            self._stack.callback(self._end, port)
        await _until(self._all_see_all)

    async def came_back(self, server: EmbeddedRedis) -> None:
        """Sentinel writes into a server's settings whom it follows; ours are on the command line."""
        with contextlib.suppress(RedisError):  # no Sentinel knows a master just now, and one of them will say later
            at, master = self.servers.index(server), await self.find()
            if at != master:
                await asyncio.to_thread(self._follow, at, master)

    def _follow(self, number: int, master: int) -> None:
        with SyncRedis(port=self.servers[number].port or 0, socket_timeout=5) as client:
            client.replicaof("127.0.0.1", str(self.proxies[master].port))

    def _config(self, port: int) -> Path:
        return self._folder / f"sentinel-{port}.conf"

    def _watch(self, port: int) -> None:
        binary = self.servers[0]._binary  # a Sentinel is the same program
        command: list[str | Path] = [binary, self._config(port), "--sentinel"]
        self._sentinels[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _end(self, port: int) -> None:
        self._sentinels[port].kill()
        self._sentinels[port].wait()

    def _all_see_all(self) -> bool:
        """Each Sentinel knows the replica and the other Sentinels: it cannot fail over before that."""
        for port in self.ports:
            with SyncRedis(port=port, socket_timeout=5) as client:
                state = client.sentinel_master(MASTER)
            if (state["num-slaves"], state["num-other-sentinels"]) != (1, SENTINELS - 1):
                return False
        return True

    def _find(self) -> int:
        return self._index(int(_first_answer(self.ports, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1]))

    def _fail_over(self) -> None:
        _first_answer(self.ports, "SENTINEL", "FAILOVER", MASTER)


class Cluster(_Several):
    """Three masters, of which the first has the stream, and a replica of each. Further partitions are somewhere."""

    weights: ClassVar[dict[str, int]] = {**_Several.weights, "slots_move": 8}
    stream, cursor = CLUSTERED

    def __init__(self, folder: Path, *, proxied: bool = True) -> None:
        super().__init__(folder, proxied=proxied)
        self.slot = slot(self.stream)

    async def aim(self, stream: str) -> None:
        self.slot = slot(stream)
        await self.find()

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{proxy.port}' for proxy in self.proxies[1:NODES])}"

    def ask(self, number: int, *words: str | int) -> Any:
        """A node. Raises RedisError."""
        with SyncRedis(port=self.servers[number].port or 0, socket_timeout=5) as client:
            return client.execute_command(*words)

    async def act(self, kind: str, amount: float) -> None:
        if kind != "slots_move":
            await super().act(kind, amount)
            return
        at = await self.find()
        others = [number for number in await asyncio.to_thread(self._masters) if number != at]
        await asyncio.to_thread(self.move, random.Random(amount).choice(others))
        await self.find()

    def move(self, target: int) -> None:
        """The slot that is aimed at to another master, as `valkey-cli --cluster reshard` does it."""
        at = self._find()
        source_id, target_id = self._name(at), self._name(target)
        self._set_slot(target, "IMPORTING", source_id)
        self._set_slot(at, "MIGRATING", target_id)
        port = self.servers[target].port or 0
        while keys := self.ask(at, "CLUSTER GETKEYSINSLOT", self.slot, 100):
            self.ask(at, "MIGRATE", "127.0.0.1", port, "", 0, 5_000, "KEYS", *keys)
        for number in (target, at, *({*self._masters()} - {target, at})):
            self._set_slot(number, "NODE", target_id)

    def _set_slot(self, number: int, how: str, node_id: str) -> None:
        """A node whose replicas were cut off a moment ago refuses: it wants to pass it on to them first."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.ask(number, "CLUSTER SETSLOT", self.slot, how, node_id)
            except ResponseError as error:
                if error_code(error) != "NOREPLICAS" or time.monotonic() > end:
                    raise
                time.sleep(0.1)
            else:
                return

    async def _begin(self) -> None:
        for number in range(2 * NODES):
            bus = str(free_port())
            settings = {
                "cluster-enabled": "yes", "cluster-port": bus, "cluster-announce-bus-port": bus,
                "cluster-node-timeout": str(DOWN_MS), "cluster-replica-validity-factor": "0",
                "cluster-require-full-coverage": "no", "cluster-allow-replica-migration": "no",
                "repl-diskless-sync-delay": "0",
            }  # fmt: skip
            await self._start(str(number), settings, "cluster-announce")
        await asyncio.to_thread(self._form)

        def is_whole() -> bool:
            nodes = range(2 * NODES)
            return all(self.ask(n, "CLUSTER INFO")["cluster_state"] == "ok" for n in nodes) and all(
                self.ask(n, "INFO", "replication")["master_link_status"] == "up" for n in nodes[NODES:]
            )

        await _until(is_whole)

    def _form(self) -> None:
        self.ask(0, "CLUSTER ADDSLOTSRANGE", self.slot, self.slot + 9)  # a master without any slot becomes a replica
        self.ask(1, "CLUSTER ADDSLOTSRANGE", 0, self.slot - 1)
        self.ask(2, "CLUSTER ADDSLOTSRANGE", self.slot + 10, 16_383)
        for number, server in enumerate(self.servers[1:], 1):
            bus = self.ask(number, "CONFIG GET", "cluster-port")["cluster-port"]
            self.ask(0, "CLUSTER MEET", "127.0.0.1", server.port or 0, bus)
        nodes, end = range(2 * NODES), time.monotonic() + 60
        while any(self.ask(n, "CLUSTER INFO")["cluster_known_nodes"] != str(len(nodes)) for n in nodes):
            assert time.monotonic() < end
            time.sleep(0.05)
        for number in range(NODES):
            self.ask(NODES + number, "CLUSTER REPLICATE", self._name(number))

    def _name(self, number: int) -> str:
        return str(self.ask(number, "CLUSTER MYID").decode())

    def _slots(self) -> list[tuple[int, int, int]]:
        """First and last slot, and which of the servers has them."""
        ports = [server.port or 0 for server in self.servers]
        ranges = _first_answer([*ports[1:], ports[0]], "CLUSTER SLOTS")
        return [(first, last, self._index(int(master[1]))) for first, last, master, *_ in ranges]

    def _masters(self) -> set[int]:
        return {number for _, _, number in self._slots()}

    def _find(self) -> int:
        return self._owner(self.slot)

    def locate(self, stream: str) -> int:
        return self._owner(slot(stream))

    def _owner(self, wanted: int) -> int:
        return next(number for first, last, number in self._slots() if first <= wanted <= last)

    def _fail_over(self) -> None:
        """To the replica of the master that is aimed at."""
        at = self._at
        name = self._name(at)
        for number in range(len(self.servers)):
            nodes = self.ask(number, "CLUSTER NODES").values() if number != at else ()
            if any("myself" in node["flags"] and node["master_id"] == name for node in nodes):
                self.ask(number, "CLUSTER FAILOVER")


def _first_answer(ports: list[int], *words: str) -> Any:
    """Of those that are there."""
    error: Exception = RedisConnectionError("nobody")
    for port in ports:
        try:
            with SyncRedis(port=port, socket_timeout=1) as client:
                answer: Any = client.execute_command(*words)
                if answer:
                    return answer
        except RedisError as told:
            error = told
    raise error


async def _until(condition: Callable[[], bool]) -> None:
    """In a thread, since the proxies are in this loop."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(RedisError, KeyError):
                if await asyncio.to_thread(condition):
                    return
            await asyncio.sleep(0.05)


class _Finder:
    """What a pool asks at each new connection."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def discover_master(self, stream: str) -> tuple[str, int]:
        found = await asyncio.to_thread(self._place.locate, stream)
        return "127.0.0.1", self._place.servers[found].port or 0


class _Patient(Redis):
    """Repeats what failed: nothing that must not be done twice."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
            except (RedisError, OSError) as error:
                lasts = isinstance(error, ResponseError) and error_code(error) not in _PASSING
                if lasts or time.monotonic() > end:
                    raise
                await self.connection_pool.disconnect()
                await asyncio.sleep(0.1)
