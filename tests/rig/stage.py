"""The whole pipeline on a stage of its own: real PostgreSQL and Valkey, the simulated relay, reader and worker.

What plays on it is somebody else's (`chaos`, `soak`); here is what must be so afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import urlopen

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from yarl import URL

from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from fastworker.errors import ExitCode
from fastworker.law import compare
from fastworker.law.model import Event, Model
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import SimFrame
from fastworker.store.migrate import migrate
from fastworker.store.store import Store
from fastworker.stream.keys import Keys, has_slots
from fastworker.stream.partitions import layout_of
from tests.rig.proxy import Proxy
from tests.rig.redises import Place

KEY, GROUP = "firehose:events", "firehose-processors"
_UNEXPECTED = re.compile(r"^Traceback|\bCRITICAL\b|our bug", re.MULTILINE)
_PORT = re.compile(r"HTTP on http://127\.0\.0\.1:(\d+)")
_DIED = re.compile(r"was killed by SIG\w+|ended with exit code [1-9]")
UNFINISHED_S_MAX, DEATHS_MAX = 320.0, 3
_READY = re.compile(r"(\S+) \(pid (\d+)\) is ready")


class Command:
    """A `fastworker` command in a process of its own, started again and again; each life has a log.

    `label`: of the log, where several run the same command.
    """

    def __init__(self, name: str, folder: Path, env: dict[str, str], label: str = "") -> None:
        self.name = name
        self.label = label or name
        self.env = env
        """Of the next life."""
        self._folder = folder
        self._lives = 0
        self._process: asyncio.subprocess.Process | None = None
        self._kills = 0  # of children, by us
        self._asked = False  # to end, by us
        self._crashpoint = ""
        self.crashes: Counter[str] = Counter()

    @property
    def log(self) -> Path:
        return self._folder / f"{self.label}-{self._lives:03d}.log"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, crashpoint: str = "") -> None:
        self._lives += 1
        self._kills = 0
        self._asked = False
        self._crashpoint = crashpoint
        env = {**self.env, **({"FASTWORKER_CRASHPOINT": crashpoint} if crashpoint else {})}
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.rig.shrunk" if "CHAOS_LIMITS" in env else "fastworker",
                self.name,
                env=env,
                stdout=log,
                stderr=log,
                stdin=asyncio.subprocess.DEVNULL,
            )

    def tell(self, number: signal.Signals) -> None:
        if self._process is not None and self.is_running:
            self._process.send_signal(number)

    async def end(self, how: signal.Signals) -> int:
        """The exit code, negative for a signal."""
        assert self._process is not None
        self._asked = True
        self.tell(how)
        try:
            async with asyncio.timeout(25):
                code = await self._process.wait()
        except TimeoutError:
            self.tell(signal.SIGKILL)
            code = await self._process.wait()
        if self.has_crashed:
            self.crashes[self._crashpoint.partition(":")[0]] += 1
        return code

    def why_ended(self) -> list[str]:
        """What is wrong with an end that nobody asked for. At its start a command may give up on a server: code 3."""
        if self._asked or self._process is None or self._process.returncode in (None, ExitCode.UNREACHABLE):
            return []
        return [f"{self.label} ended by itself with {self._process.returncode}: {self.log}"]

    def bugs(self) -> list[str]:
        """Logs of all its lives that tell of what was never expected: a child that ended so is started again."""
        logs = sorted(self._folder.glob(f"{self.label}-*.log"))
        return [f"Unexpected: {log}" for log in logs if _UNEXPECTED.search(log.read_text(errors="replace"))]

    @property
    def has_crashed(self) -> bool:
        """Whether this life's crash point was passed."""
        return bool(self._crashpoint) and self._died() > self._kills

    def deaths(self) -> int:
        """Of children in this life, whoever killed them."""
        return len(_DIED.findall(self.log.read_text(errors="replace"))) if self.log.exists() else 0

    def _died(self) -> int:
        return self.log.read_text(errors="replace").count("was killed by SIGKILL")

    def children(self) -> list[int]:
        if self._process is None or not self.is_running:
            return []
        pid = self._process.pid
        with contextlib.suppress(OSError):
            return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def tell_child(self, which: float, number: signal.Signals) -> None:
        if children := self.children():
            if number is signal.SIGKILL:
                self._kills += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[int(which * len(children))], number)

    def processes(self) -> dict[str, int]:
        """The pids of those that live, by the names that the log gives them."""
        if self._process is None or not self.is_running:
            return {}
        children = set(self.children())
        named = {name: int(pid) for name, pid in _READY.findall(self.log.read_text(errors="replace"))}
        return {self.name if not children else "supervisor": self._process.pid} | {
            name: pid for name, pid in named.items() if pid in children
        }


class Stage:
    """`async with` starts the servers and the relay; reader and worker are the caller's to start.

    `proxied`: both go through proxies that can be told to misbehave. `folder` None: a temporary one, gone afterwards.
    `place`: makes Redis in a folder; without it, it is one server.
    """

    reader: Command
    worker: Command
    redis: Redis

    def __init__(
        self,
        source: Iterable[SimFrame],
        *,
        rate: float,
        window: int,
        folder: Path | None = None,
        proxied: bool = False,
        env: dict[str, str] | None = None,
        place: Callable[[Path], Place] | None = None,
    ) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="fw-stage-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.postgres = EmbeddedPostgres(self.folder / "postgres", port=free_port())
        self.place = place(self.folder) if place is not None else Place(self.folder, proxied=proxied)
        self.keys = Keys(self.place.stream)
        self.relay = SimRelay(source, rate=rate, window=window, start="oldest", wait_for_client=True)
        self.clock = self.folder / "clock"  # tests/rig/shrunk.py
        self._is_ours = folder is None
        self._proxied = proxied
        self._env = env or {}
        self._proxies: dict[str, Proxy] = {}
        self._clients: dict[str, Redis] = {}
        self._stack = contextlib.AsyncExitStack()

    @property
    def redis_server(self) -> EmbeddedRedis:
        return self.place.server

    def proxy(self, name: str) -> Proxy:
        """To `postgres`, `relay`, or the `redis` that has the stream."""
        return self.place.proxy if name == "redis" else self._proxies[name]

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _begin(self) -> None:
        enter = self._stack.enter_async_context
        if self._is_ours:
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._stack.enter_context(self.postgres)
        await enter(self.place)
        await migrate(self.postgres.url)
        await enter(self.relay)
        urls = {"postgres": URL(self.postgres.url), "relay": URL(self.relay.url)}
        if self._proxied:
            self._proxies = {name: await enter(Proxy((url.host or "", url.port or 0))) for name, url in urls.items()}
            urls = {name: url.with_port(self._proxies[name].port) for name, url in urls.items()}
        env = self._env = {name: value for name, value in os.environ.items() if not name.startswith("FASTWORKER_")} | {
            "REDIS_URL": self.place.url,
            "DATABASE_URL": str(urls["postgres"]),
            "RELAY_URL": str(urls["relay"]),
            "FASTWORKER_HTTP_PORT": "off",
            "FASTWORKER_RESOLVE_HANDLES": "off",
            "CHAOS_CLOCK": str(self.clock),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "FASTWORKER_SYNC": "off",
            **self._env,
        }
        self.redis = self.at(self.keys.stream)
        self.reader = Command("reader", self.folder, env)
        self.worker = Command("worker", self.folder, env | {"FASTWORKER_HTTP_PORT": "0"})
        self._stack.push_async_callback(self._stop_all)

    async def _stop_all(self) -> None:
        for command in (self.reader, self.worker):
            for child in command.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGCONT)
            if command.is_running:
                await command.end(signal.SIGKILL)

    # --- what is so now

    def at(self, stream: str) -> Redis:
        """A client for the server that has it."""
        key = stream if has_slots(stream) else ""  # else all are on one
        if key not in self._clients:
            self._clients[key] = self.place.client(stream)
            self._stack.push_async_callback(self._clients[key].aclose)
        return self._clients[key]

    async def partitions(self) -> list[Keys]:
        """Of all that there ever were."""
        told: Any = await self.redis.get(self.keys.partitions)
        return [Keys(self.place.stream, partition=number) for number in range(layout_of(told).known)]

    async def streams(self) -> list[str]:
        """The first partition, and the others that are there."""
        first, *others = [keys.stream for keys in await self.partitions()]
        return [first, *[stream for stream in others if await self.at(stream).exists(stream)]]

    async def added(self) -> int:
        """Entries that were ever put on the stream."""
        return sum([int((await self.at(one).xinfo_stream(one))["entries-added"]) for one in await self.streams()])

    async def ledger(self) -> dict[str, int]:
        """The sum of all partitions that have one."""
        total: Counter[str] = Counter()
        for name, stream in {keys.ledger: keys.stream for keys in await self.partitions()}.items():
            found: Any = await self.at(stream).hgetall(name)
            total.update({field.decode(): int(value) for field, value in found.items()})
        return dict(total)

    async def dead_letters(self) -> list[dict[bytes, bytes]]:
        letters: list[dict[bytes, bytes]] = []
        for name, stream in {keys.dead_letters: keys.stream for keys in await self.partitions()}.items():
            found: Any = await self.at(stream).xrange(name)
            letters += [fields for _, fields in found]
        return letters

    async def pending(self) -> int:
        """-1 while the group is not there (again)."""
        try:
            return sum([int((await self.at(one).xpending(one, GROUP))["pending"]) for one in await self.streams()])
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return -1

    async def unfinished_s(self) -> float:
        """Age of the oldest entry that the group has not finished; 0 while there is none, or no group."""
        return max([await self._unfinished_s(one) for one in await self.streams()])

    async def _unfinished_s(self, stream: str) -> float:
        try:
            redis = self.at(stream)
            found: Any = [one for one in await redis.xinfo_groups(stream) if one["name"] == GROUP.encode()]
            if not found:
                return 0.0
            lowest: Any = (await redis.xpending(stream, GROUP))["min"]
        except ResponseError:
            return 0.0
        if not lowest:
            unread: Any = await redis.xrange(stream, b"(" + found[0]["last-delivered-id"], count=1)
            lowest = unread[0][0] if unread else None
        seconds, micros = await redis.time()
        return seconds + micros / 1e6 - int(lowest.split(b"-")[0]) / 1000 if lowest else 0.0

    async def is_read(self) -> bool:
        """The group was given all that is on the stream, and nothing is pending. By what Redis says now."""
        return all([await self._is_read(one) for one in await self.streams()]) and await self.pending() == 0

    async def _is_read(self, stream: str) -> bool:
        try:
            last = (await self.at(stream).xinfo_stream(stream))["last-generated-id"]
            groups: Any = await self.at(stream).xinfo_groups(stream)
        except ResponseError:
            return False
        return any(one["name"] == GROUP.encode() and one["last-delivered-id"] == last for one in groups)

    async def not_well(self, deaths: int) -> list[str]:
        """What an outsider sees that is not well while the worker says that all is. `deaths`: more than these are ours."""
        why = []
        if (age := await self.unfinished_s()) > UNFINISHED_S_MAX:
            why.append(f"the oldest entry is {age:.0f} s old")
        if (died := self.worker.deaths() - deaths) > DEATHS_MAX:
            why.append(f"{died} children died by themselves")
        letters = await self.dead_letters()
        if strange := {fields[b"reason"].decode() for fields in letters} - {"bad_json"}:
            return [f"Set aside: {strange}"]
        if not why or (said := await self.says()) is None:
            return []
        well, words = said
        return [f"/readyz says {words!r}, but {'; '.join(why)}: {self.worker.log}"] if well else []

    async def says(self) -> tuple[bool, str] | None:
        """What /readyz of the worker answers: whether all is well, and its words. None while it has no port."""
        ports = _PORT.findall(self.worker.log.read_text(errors="replace")) if self.worker.is_running else []
        return await asyncio.to_thread(_ask, int(ports[-1])) if ports else None

    async def wrongly_green(self, since_s: float) -> list[str]:
        """Nothing ended for so long: whether /readyz of the worker says that all is well all the same."""
        said = await self.says() if await self._is_something_left() and not await self._goes_on() else None
        if said is None:
            return []
        well, words = said
        state = f"{await self.pending()} pending, the oldest {await self.unfinished_s():.0f} s old, ledger {await self.ledger()}"
        place = (await self.redis.info("server"))["tcp_port"]
        why = f"Nothing ended for {since_s:g} s, and /readyz says {words!r} ({state}, server at {place})"
        return [f"{why}: {self.worker.log}"] if well else []

    async def _goes_on(self) -> bool:
        """Whether entries end where clients are led to now: our connection may be to a server that is no master any more."""
        before = ended_in(await self.ledger())
        for client in self._clients.values():
            await client.connection_pool.disconnect()
            with contextlib.suppress(RedisConnectionError):  # said once of another server
                await client.ping()
        await asyncio.sleep(1.0)
        return ended_in(await self.ledger()) > before

    async def _is_something_left(self) -> bool:
        """On a stream, or in the group's hands. A new partition that nothing was appended to has no group yet."""
        streams = [one for one in await self.streams() if await self.at(one).xlen(one)]
        return not all([await self._is_read(one) for one in streams]) or await self.pending() > 0

    async def has_progress(self) -> None:
        """Wait until PostgreSQL knows how far the stream is stored."""
        connection = await asyncpg.connect(self.postgres.url, timeout=10)
        try:
            async with asyncio.timeout(120):
                while not await connection.fetchval("SELECT count(*) FROM fastworker.progress WHERE seq IS NOT NULL"):
                    await asyncio.sleep(0.1)
        finally:
            await connection.close(timeout=10)

    async def keep_running(self) -> list[str]:
        """Start what has ended; what is wrong with how it did."""
        problems = []
        for command in (self.worker, self.reader):
            if not command.is_running:
                problems += command.why_ended()
                await command.start()
        return problems

    # --- what must be so in the end

    async def settle(self, last_seq: Callable[[], int], limit_s: float) -> list[str]:
        """Wait until everything up to `last_seq` is on the stream and has ended; what is wrong if it gets nowhere.

        `last_seq` is asked again each time: until the source is exhausted, there may be more. `limit_s` is the longest
        time in which nothing ends: how long a backlog takes is the machine's business.
        """
        loop = asyncio.get_running_loop()
        state, problems, most = "", [], -1
        try:
            async with asyncio.timeout(limit_s) as limit:
                while True:
                    unless_over(limit)
                    problems += await self.keep_running()
                    last, is_all = last_seq(), self.relay.exhausted
                    cursor = int(await self.redis.get(self.place.cursor) or 0)
                    added, ended, pending = await self.added(), ended_in(await self.ledger()), await self.pending()
                    state = f"cursor {cursor} of {last}, {added} entries, {ended} ended, {pending} pending"
                    if is_all and cursor >= last and ended >= added and not pending:
                        return problems
                    if ended > most:
                        most = ended
                        limit.reschedule(loop.time() + limit_s)
                    await asyncio.sleep(0.1)
        except TimeoutError:
            problems += await self.wrongly_green(limit_s)
            return [*problems, f"Not settled, and nothing ended for {limit_s:g} s: {state}"]

    async def settle_somehow(self, last_seq: Callable[[], int], limit_s: float, still_s: float = 6.0) -> list[str]:
        """As `settle`, where keys were removed and counts say little: all is read, and stays so for a while."""
        loop = asyncio.get_running_loop()
        problems: list[str] = []
        state, before, since = "", "", loop.time()
        try:
            async with asyncio.timeout(limit_s) as limit:
                while True:
                    unless_over(limit)
                    problems += await self.keep_running()
                    last, cursor = last_seq(), int(await self.redis.get(self.place.cursor) or 0)
                    is_done = self.relay.exhausted and cursor >= last and await self.is_read()
                    ended = ended_in(await self.ledger())
                    state = f"cursor {cursor} of {last}, {ended} ended, {await self.pending()} pending"
                    if state != before:
                        before, since = state, loop.time()
                        limit.reschedule(loop.time() + limit_s)
                    if is_done and loop.time() - since > still_s:
                        return problems
                    await asyncio.sleep(0.1)
        except TimeoutError:
            problems += await self.wrongly_green(limit_s)
            return [*problems, f"Not settled, and nothing ended for {limit_s:g} s: {state}"]

    async def stop(self) -> list[str]:
        """Both commands in good order; what is wrong with how they ended."""
        return [
            f"{command.name} ended with {code}: {command.log}"
            for command in (self.reader, self.worker)
            if (code := await command.end(signal.SIGTERM)) != 0
        ]

    async def unbalanced(self, expected: int, letters: dict[str, int]) -> list[str]:
        """Whether each of the `expected` entries is there and has ended once, and only `letters` were set aside."""
        problems = []
        entries, ledger = await self.added(), await self.ledger()
        if entries != expected:
            problems.append(f"{entries} entries were put on the stream for {expected} events")
        if (ended := ended_in(ledger)) != entries:
            problems.append(f"The ledger knows the end of {ended} of {entries} entries: {ledger}")
        reasons = Counter(fields[b"reason"].decode() for fields in await self.dead_letters())
        if reasons != Counter(letters):
            problems.append(f"The dead letters hold {dict(reasons)}; they should hold {letters}")
        if pending := await self.pending():
            problems.append(f"{pending} entries are pending")
        if (unaccounted := await self._unaccounted()) != 0:
            problems.append(f"`fastworker status` says that {unaccounted} entries are unaccounted for")
        return problems

    async def _unaccounted(self) -> int | None:
        """What an operator would see."""
        command = [sys.executable, "-m", "fastworker", "status", "--json"]
        process = await asyncio.create_subprocess_exec(*command, env=self._env, stdout=asyncio.subprocess.PIPE)
        said, _ = await process.communicate()
        return json.loads(said)["unaccounted_entries"] if process.returncode == 0 else None

    async def different(self, events: Iterable[Event]) -> list[str]:
        """How the tables differ from what the model of the state law makes of the events."""
        store = await Store.connect(self.postgres.url)
        while await store.maintain(owed_age_s=0, dead_commit=timedelta()):
            pass
        await store.close()
        model = Model()
        for event in events:
            model.apply(event)
        expected = model.tables()
        differences = []
        connection = await asyncpg.connect(self.postgres.url, timeout=10)
        try:
            for table in list(expected):  # one at a time: a long run has millions of rows
                found = await compare.dump(connection, [table])
                differences += compare.diff({table: expected.pop(table)}, found)
        finally:
            await connection.close(timeout=10)
        return [compare.report(differences)] if differences else []


def unless_over(limit: asyncio.Timeout) -> None:
    """For loops of Redis commands: on Python 3.11 the client swallows a cancellation whose command has just left."""
    ends = limit.when()
    if ends is not None and asyncio.get_running_loop().time() > ends:
        raise TimeoutError


def _ask(port: int) -> tuple[bool, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return answer.status == 200, answer.read().decode()
    except HTTPError as refused:
        return False, refused.read().decode()
    except OSError as error:
        return False, str(error)


def ended_in(ledger: dict[str, int]) -> int:
    return sum(count for name, count in ledger.items() if not name.startswith("drop:"))


def is_entry(frame: SimFrame, form: str = "json") -> bool:
    """Whether the reader puts it on a stream of this form."""
    event = frame.event
    if event is None or (event["kind"] == "commit" and not event["ops"]):
        return False
    return event["kind"] != "sync" or form != "json"


def entries_of(frames: Iterable[SimFrame], form: str = "json") -> int:
    """How many of them the reader puts on a stream of this form; the relay repeats some."""
    count = newest = 0
    for frame in frames:
        if frame.seq is not None and frame.seq > newest:
            newest = frame.seq
            count += is_entry(frame, form)
    return count
