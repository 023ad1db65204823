"""`python -m tests.rig.chaos --faults N --seed N`: the whole pipeline while everything is pulled out of it.

Real Valkey with its append-only file, real PostgreSQL, the simulated relay, `fastworker reader` and `fastworker worker`
with two processes, each connection through a proxy. The seed fixes the plan of faults; when exactly each of them hits
is the machine's business. Afterwards the tables must equal the model of the state law, every entry must have ended
exactly once, nothing may be pending, and only the poison that was put there may be in the dead letters.

`--operator`: people are at work as well (`rig/operators.py`), with limits that the seed draws (`rig/shrunk.py`). They remove
entries and counts, so that the ledger says little; what the relay sent must be in the tables all the same, since the
relay still has all of it, and no gap may be recorded. After each step /readyz may not say that all is well when an
outsider sees that it is not.

`--partitions N`: the stream begins with so many, and their number and their owners change. `--sentinel`, `--cluster`: Redis is
found among several (`rig/redises.py`), and another server takes the place of the one that has the stream. What that one had
not got yet is lost, entries with their cursor: they are appended again, and the ledger balances all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import click

from fastworker.crashpoint import Step
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.simulator.network import Network
from fastworker.simulator.relay import Fault as RelayFault
from fastworker.simulator.repo import SimFrame
from tests.rig import operators, shrunk
from tests.rig.operators import Operator
from tests.rig.proxy import Proxy
from tests.rig.redises import Cluster, Place, Sentinels
from tests.rig.stage import GROUP, Stage, ended_in, entries_of, unless_over

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
PARTITIONED = {"partitions": 6, "owners_lost": 3, "owners_taken": 3}
PARTITIONS, PARTITIONS_MAX = "FASTWORKER_STREAM_PARTITIONS", 6
PLACES_OF_REDIS: dict[str, type[Place]] = {"sentinel": Sentinels, "cluster": Cluster}
SERVERS = ("postgres_kill", "redis_kill", "primary_kill", "primary_stop", *operators.SERVERS)
# Steps of commands and of the syncer, none of which runs here: where each is died at instead.
ELSEWHERE = {
    Step.IN_MIGRATION: "tests/integration/test_migrate.py",
    Step.FLOOR_COMMITTED: "tests/property/test_floors.py",
    Step.BULK_STAGING: "tests/integration/test_bulk.py",
    Step.BULK_HELD: "tests/integration/test_bulk.py",
    Step.BULK_IN_STEP: "tests/integration/test_bulk.py",
    Step.BULK_AFTER_STEP: "tests/integration/test_bulk.py",
    Step.BULK_RELEASED: "tests/integration/test_bulk.py",
}
PLACES = [place for place in Step if place not in ELSEWHERE]  # what the pipeline passes
ON_TOP = 0.2  # faults of a smaller amount leave no time to recover: the next one comes on top
RECOVERY_S = 15.0
RATE = 150.0
OPERATOR_RATE = 40.0  # events a second: most of them are given several times
LOST = ("stream_lost", "store_lost")  # other gaps are the relay's word, which it gives now and then to confuse
CRASH_S = 13.0  # owed rows are looked at every ten seconds
# Passed once in a while only; `Chaos._provoked` brings it about.
RARE = (Step.IN_CLAIM, Step.IN_RECHECK, Step.BETWEEN_DEAD_LETTER_AND_ACK, Step.IN_ACCOUNT_DELETION)
_DEADLY = ("child_kill", "child_stop", "crashpoint", "postgres_kill", "redis_kill")
RELAY_FAULTS = ("drop", "torn", "silence", "too_slow", "close")


class Fault(NamedTuple):
    """One of the plan. `pause_s` before it; `amount` in [0, 1) is its size, whatever that means for its kind."""

    kind: str
    pause_s: float
    amount: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{':' + self.detail if self.detail else ''} ({self.amount:.2f})"


class Form(NamedTuple):
    """What chaos is made of: people at work, how many partitions the stream begins with, where Redis is."""

    with_operator: bool = False
    partitions: int = 0
    redis: str = ""

    @property
    def weights(self) -> Mapping[str, int]:
        """Of the faults that only this form has."""
        own: dict[str, int] = {}
        if self.with_operator:
            own |= operators.WEIGHTS
        if self.partitions:
            own |= PARTITIONED
        if self.redis:
            own |= PLACES_OF_REDIS[self.redis].weights
        return own


USUAL = Form()


def plan(seed: int, count: int, form: Form = USUAL) -> list[Fault]:
    """The faults of this seed: each kind once, as far as `count` goes, then by weight. The form's own come first."""
    r = random.Random(f"chaos {seed}")
    own = form.weights
    weights = {**WEIGHTS, **own}
    kinds = list(weights)
    r.shuffle(kinds)
    kinds.sort(key=lambda kind: bool(own) and kind not in own)
    most = max(1, count // 10)
    servers = [kind for kind in kinds if kind in SERVERS][:most]
    kinds = [kind for kind in kinds if kind not in SERVERS or kind in servers][:count]
    while len(kinds) < count:
        kind = r.choices(list(weights), list(weights.values()))[0]
        if kind not in SERVERS or sum(one in SERVERS for one in kinds) < most:
            kinds.append(kind)
    if own:
        r.shuffle(kinds)
    if form.with_operator:
        kinds = _with_later(seed, kinds)
    places: list[Step] = []
    faults = []
    for kind in kinds:
        detail = ""
        if kind == "crashpoint":
            places = places or r.sample(PLACES, len(PLACES))
            place = places.pop()
            detail = f"{place}:{1 if place in RARE else r.randint(1, 4)}"
        elif kind == "relay_fault":
            detail = r.choice(RELAY_FAULTS)
        elif kind == "refuse":
            detail = r.choice(("redis", "postgres", "relay"))
        faults.append(Fault(kind, r.uniform(0.1, 1.2), r.random(), detail))
    return faults


def _with_later(seed: int, kinds: list[str]) -> list[str]:
    """Each second of some kinds is of one that came later: which of the two comes first is the seed's."""
    is_later = {old: bool((seed + at) % 2) for at, old in enumerate(operators.LATER.values())}
    later = {old: new for new, old in operators.LATER.items()}
    found = []
    for kind in kinds:
        found.append(later[kind] if is_later.get(kind) else kind)
        if kind in is_later:
            is_later[kind] = not is_later[kind]
    return found


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
        return "\n".join(lines + (self.problems or ["The tables equal the model."]))


class Chaos:
    """Does the damage on a stage, and says what came of it."""

    def __init__(self, seed: int, folder: Path | None, form: Form, *, rate: float = RATE, accounts: int = 40) -> None:
        self._done = False
        self._form = form
        self._random = random.Random(f"partitions {seed}")
        self._served: list[SimFrame] = []
        self._poison = 0
        self._network = Network(seed, mix="adversarial", accounts=accounts)
        env = {"FASTWORKER_PROCESSES": "2", "PARALLEL_CONSUMERS": "2", "BATCH_SIZE": "50"}
        if form.with_operator:
            rate = min(rate, OPERATOR_RATE)
            env |= shrunk.drawn(seed)
            sys.stderr.write(f"limits: {env}\n")
        if form.partitions:
            env |= {"FASTWORKER_STREAM_FORMAT": "native", PARTITIONS: str(form.partitions)}
        place = PLACES_OF_REDIS.get(form.redis, Place)
        self.stage = Stage(
            self._frames(), rate=rate, window=10_000_000, folder=folder, proxied=True, env=env, place=place
        )
        self._operator = Operator(self.stage, seed) if form.with_operator else None

    def _frames(self) -> Iterator[SimFrame]:
        while not self._done:
            for frame in self._network.step():
                self._served.append(frame)
                yield frame

    async def run(self, faults: list[Fault], limit_s: float = 120.0, recovery_s: float = RECOVERY_S) -> Outcome:
        """`recovery_s`: longest wait after a fault for something to end again."""
        done: Counter[str] = Counter()
        stage = self.stage
        problems: list[str] = []
        started = time.monotonic()
        if self._operator is not None:
            await stage.has_progress()
        for number, fault in enumerate(faults, 1):
            await asyncio.sleep(fault.pause_s)
            sys.stderr.write(f"{time.monotonic() - started:7.1f} s  {number:4}/{len(faults)}  {fault}\n")
            await self._do(fault)
            done[fault.kind] += 1
            if self._operator is not None:
                problems += self._operator.problems
                self._operator.problems.clear()
            problems += await stage.keep_running()
            problems += await stage.not_well(sum(kind in _DEADLY for kind in done.elements()))
            if fault.amount > ON_TOP:
                problems += await self._recovered(recovery_s)
        self._done = True
        settle = stage.settle if self._operator is None else stage.settle_somehow
        problems += await settle(lambda: max((f.seq or 0 for f in self._served), default=0), limit_s)
        problems += await stage.stop()
        for command in (stage.worker, stage.reader):
            problems += command.bugs()
        entries, ledger = await stage.added(), await stage.ledger()
        problems += await (self._unbalanced() if self._operator is None else self._lost())
        problems += await stage.different(frame.event for frame in self._served if frame.event is not None)
        return Outcome(len(self._served), entries, ledger, done, stage.worker.crashes, problems)

    async def _unbalanced(self) -> list[str]:
        letters = poison = self._poison
        if self._form.redis:
            # Who takes a server's place may not have got the poison that was put there last, and nobody repeats it; or
            # not that it was set aside, and then there are two letters of it.
            found = await self.stage.dead_letters()
            letters, poison = len(found), len({fields[b"origId"] for fields in found})
        expected = entries_of(self._served, "native" if self._form.partitions else "json")
        return await self.stage.unbalanced(poison + expected, {"bad_json": letters} if letters else {})

    async def _lost(self) -> list[str]:
        """With people at work: whether a gap is recorded that is none, or more was set aside than they can have doubled."""
        stage = self.stage
        gaps: Any = await stage.redis.lrange(stage.keys.gaps, 0, -1)
        lost = [gap.decode() for gap in gaps if json.loads(gap)["reason"] in LOST]
        letters = len(await stage.dead_letters())
        return [
            *(f"A gap is recorded, and the relay has it all: {gap}" for gap in lost),
            *[f"{letters} dead letters for {self._poison} poisons"] * (letters > 2 * self._poison),
        ]

    async def _recovered(self, limit_s: float) -> list[str]:
        """Until something ends again, so that the next fault meets a pipeline at work; not for ever.

        What is wrong: the worker said all the while that it is well.
        """
        lowest = ended = ended_in(await self.stage.ledger())
        try:
            async with asyncio.timeout(limit_s) as limit:
                while ended <= lowest:
                    ended = ended_in(await self.stage.ledger())
                    lowest = min(lowest, ended)  # a server that took over may have lost some of it
                    unless_over(limit)
                    await asyncio.sleep(0.1)
        except TimeoutError:
            is_long = limit_s >= RECOVERY_S  # readiness gives work some seconds
            return await self.stage.wrongly_green(limit_s) if is_long else []
        return []

    # --- faults

    async def _do(self, fault: Fault) -> None:
        kind, amount = fault.kind, fault.amount
        target, _, what = kind.partition("_")
        await self.stage.place.aim(self._random.choice(await self.stage.partitions()).stream)
        match kind:
            case "child_kill":
                self.stage.worker.tell_child(amount, signal.SIGKILL)
            case "child_stop":
                await self._stopped_child(amount)
            case "supervisor_kill":
                await self.stage.worker.end(signal.SIGKILL)
            case "supervisor_hup":
                self.stage.worker.tell(signal.SIGHUP)
            case "crashpoint":
                await self._crashed(fault.detail)
            case "reader_kill":
                await self.stage.reader.end(signal.SIGKILL)
            case "reader_term":
                await self.stage.reader.end(signal.SIGTERM)
            case "poison":
                await self._poisoned()
            case "backends":
                await self._sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'fastworker%'"
                )
            case "clients":
                await self.stage.redis.client_kill_filter(_type="normal", skipme=True)
            case "relay_fault":
                self.stage.relay.faults.append(RelayFault(frames=int(50 * amount), then=fault.detail))  # type: ignore[arg-type]
                self.stage.relay.drop_clients()
            case "refuse":
                await self._refused(fault.detail, amount)
            case "postgres_kill":
                await self._server_killed(self.stage.postgres, signal.SIGQUIT if amount < 0.5 else signal.SIGKILL)
            case "redis_kill":
                await self._server_killed(self.stage.redis_server, signal.SIGKILL)
            case "partitions":
                await self._cut_otherwise(amount)
            case "owners_lost":
                await self.stage.redis.delete(self.stage.keys.owners, self.stage.keys.members)
            case "owners_taken":
                await self._owned_by_one()
            case _ if self._operator is not None and kind in (*operators.WEIGHTS, *operators.LATER):
                await self._operator.act(kind)
            case _ if kind in self.stage.place.weights:
                await self.stage.place.act(kind, amount)
            case _:
                await self._misled(self.stage.proxy(target), what, amount)

    async def _cut_otherwise(self, amount: float) -> None:
        """The reader is replaced by one that has another number of partitions, while its entries are not all read."""
        reader = self.stage.reader
        await reader.end(signal.SIGKILL if amount < 0.5 else signal.SIGTERM)
        reader.env[PARTITIONS] = str(self._random.randint(1, PARTITIONS_MAX))
        await reader.start()

    async def _owned_by_one(self) -> None:
        keys = self.stage.keys
        members: Any = await self.stage.redis.hgetall(keys.members)
        if members:
            await self.stage.redis.hset(keys.owners, mapping=dict.fromkeys(range(PARTITIONS_MAX), min(members)))

    async def _crashed(self, crashpoint: str) -> None:
        await self.stage.worker.end(signal.SIGTERM)
        await self._provoked(Step(crashpoint.partition(":")[0]))
        await self.stage.worker.start(crashpoint)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CRASH_S):
                while not self.stage.worker.has_crashed and self.stage.worker.is_running:
                    await asyncio.sleep(0.1)

    async def _provoked(self, place: Step) -> None:
        """Make a worker that starts now come past a place which it seldom sees."""
        redis = self.stage.redis
        await redis.ping()  # so that the next command, which must not be repeated, has a connection
        match place:
            case Step.IN_CLAIM:  # somebody read these entries and died a minute ago
                keys = self.stage.keys
                await redis.sadd(keys.consumers, "dead-0")
                found: Any = await redis.xreadgroup(GROUP, "dead-0", {keys.stream: ">"}, count=5)
                for _, entries in found:
                    await redis.xclaim(keys.stream, GROUP, "dead-0", 0, [entry[0] for entry in entries], idle=90_000)
            case Step.IN_RECHECK:
                await self._sql(
                    "INSERT INTO fastworker.recheck (kind, key) "  # roots: any other key is paid by the next flush
                    "SELECT 'root', uri FROM posts LIMIT 20 ON CONFLICT DO NOTHING"
                )
            case Step.BETWEEN_DEAD_LETTER_AND_ACK:
                await self._poisoned()
            case _:
                pass

    async def _poisoned(self) -> None:
        self._poison += 1
        await self.stage.redis.ping()  # as above
        await self.stage.redis.xadd(self.stage.keys.stream, {"type": "commit", "data": "{", "seq": "1"})

    async def _stopped_child(self, which: float) -> None:
        if children := self.stage.worker.children():
            pid = children[int(which * len(children))]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(1 + 2 * which)
                os.kill(pid, signal.SIGCONT)

    async def _refused(self, which: str, amount: float) -> None:
        proxy = self.stage.proxy(which)
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
        if isinstance(server, EmbeddedRedis):
            await self.stage.place.came_back(server)

    async def _sql(self, statement: str) -> Any:
        connection = await asyncpg.connect(self.stage.postgres.url, timeout=10)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close(timeout=10)


@contextlib.asynccontextmanager
async def chaos(folder: Path | None, seed: int, form: Form = USUAL, rate: float = RATE) -> AsyncIterator[Chaos]:
    """Everything in `folder`, which is kept; or in a temporary one, which is not."""
    one = Chaos(seed, folder, form, rate=rate)
    async with one.stage as stage:
        await stage.worker.start()
        await stage.reader.start()
        yield one


async def _main(faults: int, seed: int, rate: float, folder: Path | None, form: Form) -> int:
    async with chaos(folder, seed, form, rate) as started:
        outcome = await started.run(plan(seed, faults, form))
    sys.stdout.write(outcome.report() + "\n")
    return 1 if outcome.problems else 0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--faults", default=50, show_default=True, help="How many.")
@click.option("--seed", default=1, show_default=True, help="Fixes the plan and the traffic.")
@click.option("--rate", default=RATE, show_default=True, help="Events a second.")
@click.option("--operator", "with_operator", is_flag=True, help="People are at work, too, and limits are small.")
@click.option(
    "--partitions",
    type=click.IntRange(0, PARTITIONS_MAX),
    default=0,
    help="So many, in native form; their number and owners change.",
)
@click.option("--sentinel", "redis", flag_value="sentinel", help="Redis is two servers that three Sentinels watch.")
@click.option("--cluster", "redis", flag_value="cluster", help="Redis is a cluster of three masters with replicas.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep servers' files and logs here.")
def main(
    faults: int, seed: int, rate: float, folder: Path | None, *, with_operator: bool, partitions: int, redis: str | None
) -> None:
    """Run the pipeline on servers of its own, break everything FAULTS times, and check that nothing was lost."""
    if with_operator and (partitions or redis):
        raise click.UsageError("--operator is for one stream on one server.")
    sys.exit(asyncio.run(_main(faults, seed, rate, folder, Form(with_operator, partitions, redis or ""))))


if __name__ == "__main__":
    main()
