"""`python -m fastworker.testing.chaos --faults N --seed N`: the whole pipeline while everything is pulled out of it.

Real Valkey with its append-only file, real PostgreSQL, the simulated relay, `fastworker reader` and `fastworker worker`
with two processes, each connection through a proxy. The seed fixes the plan of faults; when exactly each of them hits
is the machine's business. Afterwards the tables must equal the model of the state law, every entry must have ended
exactly once, nothing may be pending, and only the poison that was put there may be in the dead letters.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import asyncpg
import click
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError
from yarl import URL

from fastworker.crashpoint import Place
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from fastworker.edge.store import Store
from fastworker.run.migrate import migrate
from fastworker.testing import compare
from fastworker.testing.model import Model
from fastworker.testing.network import Network
from fastworker.testing.proxy import Proxy
from fastworker.testing.relay import Fault as RelayFault
from fastworker.testing.relay import SimRelay
from fastworker.testing.repo import SimFrame

KEY, GROUP = "firehose:events", "firehose-processors"
LEDGER, LETTERS, CURSOR = "fastworker:ledger", "firehose:dead-letters", "firehose:python_cursor"

# How often each fault comes in a hundred. The servers themselves: a tenth.
WEIGHTS = {
    "child_kill": 10,
    "child_stop": 3,
    "supervisor_kill": 6,
    "supervisor_hup": 3,
    "crashpoint": 14,
    "reader_kill": 7,
    "reader_term": 3,
    "poison": 4,
    "backends": 6,
    "clients": 5,
    "redis_cut": 6,
    "postgres_cut": 6,
    "relay_cut": 4,
    "redis_slow": 2,
    "postgres_slow": 2,
    "redis_hold": 3,
    "postgres_hold": 3,
    "relay_hold": 2,
    "refuse": 3,
    "relay_fault": 4,
    "postgres_kill": 4,
    "redis_kill": 4,
}
SERVERS = ("postgres_kill", "redis_kill")
# What the pipeline passes; the migration's is tested with the migration.
PLACES = [place for place in Place if place is not Place.IN_MIGRATION]
RELAY_FAULTS = ("drop", "torn", "silence", "too_slow", "close")


class Fault(NamedTuple):
    """One of the plan. `pause_s` before it; `amount` in [0, 1) is its size, whatever that means for its kind."""

    kind: str
    pause_s: float
    amount: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{':' + self.detail if self.detail else ''} ({self.amount:.2f})"


def plan(seed: int, count: int) -> list[Fault]:
    """The faults of this seed: each kind once, as far as `count` goes, then by weight."""
    r = random.Random(f"chaos {seed}")
    kinds = list(WEIGHTS)
    r.shuffle(kinds)
    most = max(1, count // 10)
    servers = [kind for kind in kinds if kind in SERVERS][:most]
    kinds = [kind for kind in kinds if kind not in SERVERS or kind in servers][:count]
    while len(kinds) < count:
        kind = r.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind not in SERVERS or sum(one in SERVERS for one in kinds) < most:
            kinds.append(kind)
    places: list[Place] = []
    faults = []
    for kind in kinds:
        detail = ""
        if kind == "crashpoint":
            places = places or r.sample(PLACES, len(PLACES))
            detail = f"{places.pop()}:{r.randint(1, 4)}"
        elif kind == "relay_fault":
            detail = r.choice(RELAY_FAULTS)
        elif kind == "refuse":
            detail = r.choice(("redis", "postgres", "relay"))
        faults.append(Fault(kind, r.uniform(0.1, 1.2), r.random(), detail))
    return faults


class Outcome(NamedTuple):
    """What a run came to. `problems` empty: nothing was lost, doubled or left."""

    events: int
    entries: int
    ledger: dict[str, int]
    faults: Counter[str]
    crashes: Counter[str]
    problems: list[str]

    def report(self) -> str:
        lines = [
            f"{sum(self.faults.values())} faults: "
            + ", ".join(f"{n} {kind}" for kind, n in sorted(self.faults.items())),
            "crash points that were hit: " + (", ".join(f"{n} {p}" for p, n in sorted(self.crashes.items())) or "none"),
            f"{self.events:,} events, {self.entries:,} entries; ledger {self.ledger}",
        ]
        return "\n".join(lines + (self.problems or ["The tables equal the model; every entry ended once."]))


class Command:
    """A `fastworker` command in a process of its own, started again and again; each life has a log."""

    def __init__(self, name: str, folder: Path, env: dict[str, str]) -> None:
        self.name = name
        self._folder = folder
        self._env = env
        self._lives = 0
        self._process: asyncio.subprocess.Process | None = None
        self._kills = 0  # of children, by us
        self._crashpoint = ""
        self.crashes: Counter[str] = Counter()

    @property
    def log(self) -> Path:
        return self._folder / f"{self.name}-{self._lives:03d}.log"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self, crashpoint: str = "") -> None:
        self._lives += 1
        self._kills = 0
        self._crashpoint = crashpoint
        env = {**self._env, **({"FASTWORKER_CRASHPOINT": crashpoint} if crashpoint else {})}
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fastworker",
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
        self.tell(how)
        try:
            async with asyncio.timeout(25):
                code = await self._process.wait()
        except TimeoutError:
            self.tell(signal.SIGKILL)
            code = await self._process.wait()
        if self._crashpoint and self._died() > self._kills:
            self.crashes[self._crashpoint.partition(":")[0]] += 1
        return code

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


class Chaos:
    """`async with` starts everything; `run` does the damage and says what came of it."""

    def __init__(self, folder: Path, *, seed: int, rate: float = 150.0, accounts: int = 40) -> None:
        self._folder = folder
        self._seed = seed
        self._done = False
        self._served: list[SimFrame] = []
        self._poison = 0
        self._postgres = EmbeddedPostgres(folder / "postgres", port=free_port())
        self._redis = EmbeddedRedis(folder / "redis", port=free_port())
        self._relay = SimRelay(
            self._frames(accounts), rate=rate, window=10_000_000, start="oldest", wait_for_client=True
        )
        self._stack = contextlib.AsyncExitStack()
        self._proxies: dict[str, Proxy]
        self._reader: Command
        self._worker: Command
        self._client: Redis

    def _frames(self, accounts: int) -> Iterator[SimFrame]:
        network = Network(self._seed, mix="adversarial", accounts=accounts)
        while not self._done:
            for frame in network.step():
                self._served.append(frame)
                yield frame

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
        self._stack.enter_context(self._postgres)
        self._stack.enter_context(self._redis)
        await migrate(self._postgres.url)
        await enter(self._relay)
        postgres, redis = URL(self._postgres.url), URL(self._redis.url)
        relay = URL(self._relay.url)
        self._proxies = {
            name: await enter(Proxy((url.host or "", url.port or 0)))
            for name, url in (("postgres", postgres), ("redis", redis), ("relay", relay))
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith("FASTWORKER_")} | {
            "REDIS_URL": str(redis.with_port(self._proxies["redis"].port)),
            "DATABASE_URL": str(postgres.with_port(self._proxies["postgres"].port)),
            "RELAY_URL": str(relay.with_port(self._proxies["relay"].port)),
            "FASTWORKER_HTTP_PORT": "off",
            "FASTWORKER_RESOLVE_HANDLES": "off",
            "FASTWORKER_PROCESSES": "2",
            "PARALLEL_CONSUMERS": "2",
            "BATCH_SIZE": "50",
        }
        self._client = Redis.from_url(
            self._redis.url, retry=Retry(ExponentialBackoff(), 8), retry_on_error=[BusyLoadingError]
        )
        self._stack.push_async_callback(self._client.aclose)
        self._reader = Command("reader", self._folder, env)
        self._worker = Command("worker", self._folder, env)
        self._stack.push_async_callback(self._stop_all)
        await self._worker.start()
        await self._reader.start()

    async def _stop_all(self) -> None:
        for command in (self._reader, self._worker):
            for child in command.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGCONT)
            if command.is_running:
                await command.end(signal.SIGKILL)

    async def run(self, faults: list[Fault], limit_s: float = 120.0) -> Outcome:
        done: Counter[str] = Counter()
        started = time.monotonic()
        for number, fault in enumerate(faults, 1):
            await asyncio.sleep(fault.pause_s)
            sys.stderr.write(f"{time.monotonic() - started:7.1f} s  {number:4}/{len(faults)}  {fault}\n")
            await self._do(fault)
            done[fault.kind] += 1
            for command in (self._worker, self._reader):
                if not command.is_running:
                    await command.start()
        self._done = True
        problems = await self._settle(limit_s)
        for command in (self._reader, self._worker):
            if (code := await command.end(signal.SIGTERM)) != 0:
                problems.append(f"{command.name} ended with {code}: {command.log}")
        entries, ledger = await self._added(), await self._ledger()
        problems += await self._check(entries, ledger)
        return Outcome(len(self._served), entries, ledger, done, self._worker.crashes, problems)

    # --- faults

    async def _do(self, fault: Fault) -> None:
        kind, amount = fault.kind, fault.amount
        target, _, what = kind.partition("_")
        match kind:
            case "child_kill":
                self._worker.tell_child(amount, signal.SIGKILL)
            case "child_stop":
                await self._stopped_child(amount)
            case "supervisor_kill":
                await self._worker.end(signal.SIGKILL)
            case "supervisor_hup":
                self._worker.tell(signal.SIGHUP)
            case "crashpoint":
                await self._worker.end(signal.SIGTERM)
                await self._worker.start(fault.detail)
                await asyncio.sleep(1.0 + 2 * amount)
            case "reader_kill":
                await self._reader.end(signal.SIGKILL)
            case "reader_term":
                await self._reader.end(signal.SIGTERM)
            case "poison":
                self._poison += 1
                await self._client.ping()  # so that the next command, which must not be repeated, has a connection
                await self._client.xadd(KEY, {"type": "commit", "data": "{", "seq": "1"})
            case "backends":
                await self._sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'fastworker%'"
                )
            case "clients":
                await self._client.client_kill_filter(_type="normal", skipme=True)
            case "relay_fault":
                self._relay.faults.append(RelayFault(frames=int(50 * amount), then=fault.detail))  # type: ignore[arg-type]
                self._relay.drop_clients()
            case "refuse":
                await self._refused(fault.detail, amount)
            case "postgres_kill":
                await self._server_killed(self._postgres, signal.SIGQUIT if amount < 0.5 else signal.SIGKILL)
            case "redis_kill":
                await self._server_killed(self._redis, signal.SIGKILL)
            case _:
                await self._misled(self._proxies[target], what, amount)

    async def _stopped_child(self, which: float) -> None:
        if children := self._worker.children():
            pid = children[int(which * len(children))]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(1 + 2 * which)
                os.kill(pid, signal.SIGCONT)

    async def _refused(self, which: str, amount: float) -> None:
        proxy = self._proxies[which]
        proxy.refusing = True
        proxy.cut()
        await asyncio.sleep(0.5 + 2 * amount)
        proxy.refusing = False

    async def _misled(self, proxy: Proxy, what: str, amount: float) -> None:
        match what:
            case "cut":
                proxy.cut_after = int(200_000 * amount**3)
                await asyncio.sleep(0.5)
            case "slow":
                proxy.delay_s = 0.02 + 0.2 * amount
                await asyncio.sleep(2.0)
                proxy.delay_s = 0.0
            case _:
                proxy.hold()
                await asyncio.sleep(0.5 + 3 * amount if amount < 0.97 else 13.0)  # longer than any wait for a reply
                if amount < 0.5:
                    proxy.cut()
                proxy.release()

    async def _server_killed(self, server: EmbeddedPostgres | EmbeddedRedis, how: signal.Signals) -> None:
        pid = server.pid
        if pid is not None and how is not signal.SIGKILL:
            os.kill(pid, how)  # PostgreSQL's immediate shutdown
            await asyncio.sleep(0.3)
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.start)

    async def _sql(self, statement: str) -> Any:
        connection = await asyncpg.connect(self._postgres.url, timeout=10)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close(timeout=10)

    # --- what came of it

    async def _settle(self, limit_s: float) -> list[str]:
        """Wait until everything that was served is on the stream and has ended."""
        state = ""
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    last = max((frame.seq or 0 for frame in self._served), default=0)
                    cursor = int(await self._client.get(CURSOR) or 0)
                    added, ledger = await self._added(), await self._ledger()
                    ended = sum(count for name, count in ledger.items() if not name.startswith("drop:"))
                    pending = (await self._client.xpending(KEY, GROUP))["pending"]
                    state = f"cursor {cursor} of {last}, {added} entries, {ended} ended, {pending} pending"
                    if self._relay.exhausted and cursor >= last and ended >= added and not pending:
                        return []
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return [f"Not settled after {limit_s:g} s: {state}"]

    async def _added(self) -> int:
        return int((await self._client.xinfo_stream(KEY))["entries-added"])

    async def _ledger(self) -> dict[str, int]:
        found: dict[bytes, bytes] = await self._client.hgetall(LEDGER)  # type: ignore[assignment]
        return {name.decode(): int(value) for name, value in found.items()}

    async def _check(self, entries: int, ledger: dict[str, int]) -> list[str]:
        problems = []
        expected, newest = self._poison, 0
        for frame in self._served:
            if frame.seq is not None and frame.seq > newest:  # the relay repeats some
                newest = frame.seq
                expected += _is_entry(frame)
        if entries != expected:
            problems.append(f"{entries} entries were put on the stream for {expected} events")
        ended = sum(count for name, count in ledger.items() if not name.startswith("drop:"))
        if ended != entries:
            problems.append(f"The ledger knows the end of {ended} of {entries} entries: {ledger}")
        found: Any = await self._client.xrange(LETTERS)
        letters = Counter(fields[b"reason"].decode() for _, fields in found)
        if letters != Counter({"bad_json": self._poison} if self._poison else {}):
            problems.append(f"The dead letters hold {dict(letters)}; {self._poison} were put on the stream")
        if pending := (await self._client.xpending(KEY, GROUP))["pending"]:
            problems.append(f"{pending} entries are pending")
        store = await Store.connect(self._postgres.url)
        while await store.maintain(owed_age_s=0):
            pass
        await store.close()
        model = Model()
        for frame in self._served:
            if frame.event is not None:
                model.apply(frame.event)
        connection = await asyncpg.connect(self._postgres.url, timeout=10)
        try:
            different = compare.diff(model.tables(), await compare.dump(connection))
        finally:
            await connection.close(timeout=10)
        return problems + ([compare.report(different)] if different else [])


def _is_entry(frame: SimFrame) -> bool:
    """Whether the reader puts it on a JSON stream."""
    event = frame.event
    return event is not None and event["kind"] != "sync" and (event["kind"] != "commit" or bool(event["ops"]))


@contextlib.asynccontextmanager
async def chaos(folder: Path | None, seed: int) -> AsyncIterator[Chaos]:
    """Everything in `folder`, which is kept; or in a temporary one, which is not."""
    home = folder or Path(tempfile.mkdtemp(prefix="fw-chaos-"))
    home.mkdir(parents=True, exist_ok=True)
    try:
        async with Chaos(home, seed=seed) as started:
            yield started
    finally:
        if folder is None:
            shutil.rmtree(home, ignore_errors=True)


async def _main(faults: int, seed: int, folder: Path | None) -> int:
    async with chaos(folder, seed) as started:
        outcome = await started.run(plan(seed, faults))
    sys.stdout.write(outcome.report() + "\n")
    return 1 if outcome.problems else 0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--faults", default=50, show_default=True, help="How many.")
@click.option("--seed", default=1, show_default=True, help="Fixes the plan and the traffic.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep servers' files and logs here.")
def main(faults: int, seed: int, folder: Path | None) -> None:
    """Run the pipeline on servers of its own, break everything FAULTS times, and check that nothing was lost."""
    sys.exit(asyncio.run(_main(faults, seed, folder)))


if __name__ == "__main__":
    main()
