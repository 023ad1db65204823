"""`fastworker demo`: the whole pipeline on embedded servers, fed by the simulated relay, verified against its truth.

One supervisor, as in production, with four kinds of children: the relay (makes the events, then serves them over a real
WebSocket), the reader, the worker's processes, and the conductor, which shows what happens, decides when it is over,
compares the tables with the model of the state law and says how it went. The parent only starts the servers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastworker.commands import outage
from fastworker.config import Config
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.errors import ExitCode
from fastworker.law.compare import Difference, diff, dump, report
from fastworker.law.model import COLUMNS, Model
from fastworker.process.board import LATENCY_MS, Heartbeats, Slot, State, quantile
from fastworker.process.child import run_child
from fastworker.process.children import ChildSpec, Patience
from fastworker.process.outage import span
from fastworker.process.supervisor import Supervisor
from fastworker.reader.reader import run_reader
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.store.migrate import migrate
from fastworker.store.store import Store
from fastworker.stream.admin import RedisAdmin
from fastworker.stream.client import connect
from fastworker.stream.keys import GROUP, STREAM, USUAL
from fastworker.stream.limits import PARTITIONS_MAX
from fastworker.worker.worker import worker_child

log = logging.getLogger(__name__)

EVENTS: Final = 30_000  # about half a minute on two slow cores, half of it making and checking the events
ACCOUNTS: Final = 2_000  # few enough that people meet
LOOK_S: Final = 0.25
LINE_S: Final = 2.0  # between plain lines where there is no terminal
STALL_S: Final = 60.0  # without any progress the demo gives up
GONE_S: Final = 5.0  # tries to remove its folder


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the children are told before they are forked."""

    events: int
    rate: float | None
    seed: int
    folder: Path
    redis_url: str
    database_url: str
    partitions: int
    outage: bool = False

    @property
    def truth(self) -> Path:
        """The events as the simulator knows them, one JSON document a line."""
        return self.folder / "events.jsonl"

    @property
    def address(self) -> Path:
        """The relay's URL and its last seq, once it serves."""
        return self.folder / "relay.json"


class Served(msgspec.Struct, frozen=True):
    url: str
    last_seq: int
    places: outage.Places | None = None


def run_demo(config: Config, *, events: int | None, rate: float | None, seed: int, is_outage: bool = False) -> ExitCode:
    """Exit code DONE only if every table is as it must be. Of the configuration, only the worker's shape is used."""
    console = Console()
    heartbeats = Heartbeats()
    wanted = EVENTS if events is None else events
    try:
        code = _run(config, console, heartbeats, events=wanted, rate=rate, seed=seed, is_outage=is_outage)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    if code is ExitCode.INTERRUPTED:
        console.print(_interrupted(heartbeats, wanted), highlight=False, soft_wrap=True)
        console.print("[bold red]NOT verified:[/] interrupted before the tables were compared.", soft_wrap=True)
    return code


def _run(
    config: Config,
    console: Console,
    heartbeats: Heartbeats,
    *,
    events: int,
    rate: float | None,
    seed: int,
    is_outage: bool,
) -> ExitCode:
    started = time.monotonic()
    with _folder() as folder:
        console.print("Starting PostgreSQL and Valkey for this demo ...")
        with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis", aof=False) as redis:
            asyncio.run(migrate(postgres.url))
            plan = DemoOptions(
                events=events,
                rate=rate,
                seed=seed,
                folder=folder,
                redis_url=redis.url,
                database_url=postgres.url,
                partitions=min(config.processes, PARTITIONS_MAX),
                outage=is_outage,
            )
            console.print(f"Servers are ready and migrated after {time.monotonic() - started:.1f} s.")
            worker = Config(
                redis_url=redis.url,
                database_url=postgres.url,
                consumer_id="demo",
                batch_size=config.batch_size,
                processes=config.processes,
                pipelines=config.pipelines,
                pool_size=config.pool_size,
                resolve_handles=False,
            )
            supervisor = Supervisor(
                [
                    ChildSpec("relay", partial(_relay_main, plan)),
                    ChildSpec("reader", partial(_reader_main, plan)),
                    worker_child(worker),
                    ChildSpec("conductor", partial(_conductor_main, plan, heartbeats), ends_run=True),
                ],
                heartbeats,
                patience=Patience(start_s=600.0, drain_s=3.0),
                told_code=ExitCode.INTERRUPTED,
            )
            logging.getLogger("fastworker").setLevel(logging.WARNING)
            return supervisor.run()


def _interrupted(heartbeats: Heartbeats, events: int) -> str:
    """What was done, from the board: it is the parent's, so it is there whoever is gone."""
    everybody = heartbeats.snapshot()
    made = sum(one.counters.read for one in everybody if one.name == "relay")
    workers = [one for one in everybody if one.name.startswith("worker")]
    settled, set_aside = sum(one.acked for one in workers), sum(one.counters.set_aside for one in workers)
    return (
        f"events      {made:,} of {events:,} made, {settled:,} settled, {set_aside:,} set aside\n"
        f"rows        {sum(one.counters.rows for one in workers):,} written"
    )


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is gone afterwards; SIGTERM before the supervisor listens is as good as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="fastworker-demo-"))
    try:
        yield folder
    finally:
        give_up = time.monotonic() + GONE_S
        while folder.exists() and time.monotonic() < give_up:  # what was killed may still be writing its last file
            shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


# The relay ------------------------------------------------------------------------------------------


def _relay_main(plan: DemoOptions, slot: Slot) -> int:
    return run_child(slot, partial(_relay, plan))


async def _relay(plan: DemoOptions, slot: Slot, stopping: asyncio.Event) -> None:
    """Make all events first, so that making them does not slow down what is shown; then serve them."""
    network = Network(plan.seed, accounts=outage.accounts(plan.events) if plan.outage else ACCOUNTS, signed=plan.outage)
    frames: list[bytes] = []
    after: list[bytes] = []  # of an outage
    last_seq = 0
    encode = msgspec.json.Encoder().encode
    away = range(plan.events // 3, plan.events * 2 // 3) if plan.outage else range(plan.events, plan.events)
    with plan.truth.open("wb") as truth:
        made = outage.frames(network, plan.events, away) if plan.outage else network.frames(plan.events)
        for number, frame in enumerate(made):
            if number < away.start:
                frames.append(frame.data)
            elif number not in away or not outage.is_forgotten(frame):
                after.append(frame.data)
            if frame.event is not None:
                last_seq = frame.event["seq"]
                truth.write(encode(frame.event) + b"\n")
            if number % 64 == 63:
                slot.add(read=64)
                await asyncio.sleep(0)
                if stopping.is_set():
                    return
    relay = SimRelay(frames, rate=plan.rate, window=len(frames) + 1, start="oldest", wait_for_client=True)
    async with AsyncExitStack() as stack:
        places = await stack.enter_async_context(outage.places_of(network)) if plan.outage else None
        async with relay:
            temporary = plan.address.with_suffix(".new")
            temporary.write_bytes(encode(Served(relay.url, last_seq, places)))
            temporary.rename(plan.address)
            slot.set(ready=1, state=State.RUNNING)
            await (outage.sent(relay, len(frames), stopping) if plan.outage else stopping.wait())
            if stopping.is_set():
                await outage.until_left(relay)
        if plan.outage:
            again = await stack.enter_async_context(outage.back_again(after, port=relay.port, rate=plan.rate))
            await stopping.wait()
            await outage.until_left(again)


# The reader -----------------------------------------------------------------------------------------


def _reader_main(plan: DemoOptions, slot: Slot) -> int:
    return run_child(slot, partial(_reader, plan))


async def _reader(plan: DemoOptions, slot: Slot, stopping: asyncio.Event) -> None:
    while not plan.address.exists():
        await asyncio.sleep(0.02)
        if stopping.is_set():
            return
    served = msgspec.json.decode(plan.address.read_bytes(), type=Served)
    slot.set(ready=1, state=State.RUNNING)
    config = Config(
        relay_urls=(served.url,), redis_url=plan.redis_url, stream_format="native", partitions=plan.partitions
    )
    await run_reader(config, stopping)


# The conductor --------------------------------------------------------------------------------------


def _conductor_main(plan: DemoOptions, heartbeats: Heartbeats, slot: Slot) -> int:
    found: list[ExitCode] = []

    async def main(slot: Slot, stopping: asyncio.Event) -> None:
        slot.set(ready=1, state=State.RUNNING)
        found.append(await _Conductor(plan, heartbeats, stopping).conduct())

    return run_child(slot, main) or (found[0] if found else ExitCode.DONE)


class Look(msgspec.Struct):
    """One look at everything: counts since the start, rates over the last looks."""

    at: float
    made: int = 0
    on_stream: int = 0
    settled: int = 0
    pending: int = 0
    lag: int = 0
    rows: int = 0
    tables: Counter[str] = msgspec.field(default_factory=Counter)
    memory_bytes: int = 0


class _Conductor:
    def __init__(self, plan: DemoOptions, heartbeats: Heartbeats, stopping: asyncio.Event) -> None:
        self._plan = plan
        self._heartbeats = heartbeats
        self._stopping = stopping
        self._console = Console()
        self._first: float | None = None  # when the first event was settled
        self._last = 0.0
        self._peak_bytes = 0
        self._looks: list[Look] = []

    async def conduct(self) -> ExitCode:
        redis = connect(self._plan.redis_url, client_name="fastworker-demo")
        try:
            ended = await self._watch(RedisAdmin(redis, STREAM))
            if self._stopping.is_set():
                return ExitCode.DONE
            set_aside = int(await redis.xlen(USUAL.dead_letters))
        finally:
            await redis.aclose()
        if not ended:
            self._console.print(f"[bold red]Nothing has moved for {STALL_S:g} s: giving up.[/]")
            return ExitCode.NO
        return await self._verify(set_aside)

    async def _watch(self, admin: RedisAdmin) -> bool:
        """Show progress until everything is settled. False: nothing moved for too long."""
        moved_at = time.monotonic()
        line_at = 0.0
        before = (-1, -1, -1)
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while not self._stopping.is_set():
                look = await self._look(admin)
                now = time.monotonic()
                moved = (look.made, look.on_stream, look.settled)
                if moved != before:
                    before, moved_at = moved, now
                if self._console.is_terminal:
                    live.update(self._picture(look), refresh=True)
                elif now >= line_at:
                    line_at = now + LINE_S
                    self._console.print(self._line(look), soft_wrap=True)
                if await self._is_over(admin, look):
                    return True
                if now > moved_at + STALL_S:
                    return False
                await asyncio.sleep(LOOK_S)
        return True

    async def _look(self, admin: RedisAdmin) -> Look:
        look = Look(time.monotonic())
        for snapshot in self._heartbeats.snapshot():
            name = snapshot.name
            if name.startswith("relay"):
                look.made = snapshot.counters.read
            elif name.startswith("worker"):
                look.settled += snapshot.acked
                look.rows += snapshot.counters.rows
                look.tables.update(snapshot.tables)
            if snapshot.gauges.pid and not name.startswith(("relay", "conductor")):
                look.memory_bytes += _pss(snapshot.gauges.pid)
        look.memory_bytes += _pss(os.getppid())
        self._peak_bytes = max(self._peak_bytes, look.memory_bytes)
        stream = await admin.stream()
        group = stream.group(GROUP) if stream is not None else None
        if group is not None:
            look.pending, look.lag = group.pending, group.lag or 0
        stats = await admin.reader_stats()
        look.on_stream = max(int(stats.get("entries", 0)), look.settled + look.pending + look.lag)
        if look.settled:
            if self._first is None:
                self._first = look.at
            if not self._looks or look.settled > self._looks[-1].settled:
                self._last = look.at
        self._looks = [*self._looks[-8:], look]
        return look

    async def _is_over(self, admin: RedisAdmin, look: Look) -> bool:
        if not self._plan.address.exists() or look.pending or look.lag:
            return False
        served = msgspec.json.decode(self._plan.address.read_bytes(), type=Served)
        stats = await admin.reader_stats()
        return int(stats.get("last_seq") or 0) >= served.last_seq and look.settled >= int(stats.get("entries", 0))

    def _rate(self) -> float:
        old, new = self._looks[0], self._looks[-1]
        return (new.settled - old.settled) / (new.at - old.at) if new.at > old.at else 0.0

    def _left(self, look: Look) -> str:
        """How long it will take, at the rate of the last looks."""
        rate, left = self._rate(), self._plan.events - look.settled
        return f", {span(left / rate)} left" if rate and left > 0 else ""

    def _line(self, look: Look) -> str:
        if not self._plan.address.exists():
            return f"making events: {look.made:,} of {self._plan.events:,}"
        return (
            f"events settled: {look.settled:,} ({self._rate():,.0f}/s{self._left(look)}), on the stream: "
            f"{look.on_stream:,}, behind: {look.pending + look.lag:,}, rows: {look.rows:,}, "
            f"memory: {look.memory_bytes >> 20} MB"
        )

    def _bar(self, look: Look) -> Table:
        """Two stretches: the events are made, then they go through everything."""
        is_made = self._plan.address.exists()
        done, wanted = (look.settled if is_made else look.made), self._plan.events
        bar = Table.grid(padding=(0, 1))
        words = f"{min(1.0, done / wanted):4.0%} {f'{self._rate():,.0f}/s{self._left(look)}' if is_made else ''}"
        bar.add_row("settled" if is_made else "making ", ProgressBar(wanted, min(done, wanted), width=40), words)
        return bar

    def _picture(self, look: Look) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, value in (
            ("events made", f"{look.made:,} of {self._plan.events:,}"),
            ("on the stream", f"{look.on_stream:,}"),
            ("settled", f"{look.settled:,}"),
            ("behind", f"{look.pending + look.lag:,}"),
            ("rows written", f"{look.rows:,}"),
            ("memory", f"{look.memory_bytes >> 20} MB"),
        ):
            table.add_row(Text(name, style="dim"), Text(value, style="bold"))
        rows = Table(box=None, padding=(0, 2, 0, 0))
        rows.add_column("changes written to", style="dim")
        rows.add_column("", justify="right")
        for name, count in look.tables.most_common(8):
            if count:
                rows.add_row(name, f"{count:,}")
        title = Text("fastworker demo: relay -> reader -> stream -> worker -> PostgreSQL\n")
        return Group(title, self._bar(look), Text(), table, Text(), rows)

    # --- the end

    async def _verify(self, set_aside: int) -> ExitCode:
        latency = self._latency()
        self._console.print("Comparing every table with what the simulator knows ...")
        expected, found = self._truth(), await self._tables()
        if self._plan.outage:
            expected, found = outage.compared(expected, expected), await self._mended(expected, found)
        differences = diff(expected, found)
        self._summary(expected, found, differences, set_aside, latency)
        return ExitCode.NO if differences or set_aside else ExitCode.DONE

    async def _tables(self) -> dict[str, list[dict[str, Any]]]:
        store = await Store.connect(self._plan.database_url, application_name="fastworker-demo")
        try:
            while await store.maintain(owed_age_s=0):
                pass
            async with store.connection() as db:
                return await dump(db)
        finally:
            await store.close()

    async def _mended(
        self, expected: dict[str, list[dict[str, Any]]], found: dict[str, list[dict[str, Any]]]
    ) -> dict[str, list[dict[str, Any]]]:
        """The tables after the repair of the gap; says what share of them was true before it, and is after it."""
        everything, expected = expected, outage.compared(expected, expected)
        served = msgspec.json.decode(self._plan.address.read_bytes(), type=Served)
        assert served.places is not None
        found = outage.compared(found, everything)
        before = outage.ratios(expected, found, diff(expected, found))
        self._console.print("The relay has forgotten a third of the events. Repairing from the hosts ...")
        await outage.mend(served.places, self._plan.redis_url, self._plan.database_url, self._stopping)
        found = outage.compared(await self._tables(), everything)
        after = outage.ratios(expected, found, diff(expected, found))
        table = Table(title="truth per table", title_justify="left")
        for column in ("table", "before the repair", "after"):
            table.add_column(column, justify="left" if column == "table" else "right")
        for name, share in before.items():
            table.add_row(
                name, f"{share:.4f}", f"{after.get(name, 1):.4f}", style="bold red" if after.get(name, 1) < 1 else None
            )
        self._console.print(table)
        return found

    def _truth(self) -> dict[str, list[dict[str, Any]]]:
        model = Model()
        decode = msgspec.json.Decoder().decode
        with self._plan.truth.open("rb") as lines:
            for line in lines:
                model.apply(decode(line), None)
        return model.tables()

    def _latency(self) -> str:
        counts = [0] * (len(LATENCY_MS) + 1)
        for snapshot in self._heartbeats.snapshot():
            if snapshot.name.startswith("worker"):
                counts = [a + b for a, b in zip(counts, snapshot.histograms["latency_ms"], strict=True)]
        return f"p50 {_quantile(counts, 0.5)}, p99 {_quantile(counts, 0.99)}"

    def _summary(
        self,
        expected: dict[str, list[dict[str, Any]]],
        found: dict[str, list[dict[str, Any]]],
        differences: list[Difference],
        set_aside: int,
        latency: str,
    ) -> None:
        wrong = Counter(difference.table for difference in differences)
        table = Table(title="rows per table", title_justify="left")
        table.add_column("table")
        for column in ("expected", "found", "differences"):
            table.add_column(column, justify="right")
        for name in COLUMNS:
            if name in expected:
                bad = wrong[name]
                table.add_row(
                    name,
                    f"{len(expected[name]):,}",
                    f"{len(found.get(name, [])):,}",
                    str(bad) if bad else "0",
                    style="bold red" if bad else None,
                )
        self._console.print(table)
        if differences:
            self._console.print(report(differences, 20), markup=False, highlight=False)
        look = self._looks[-1]
        seconds = max(self._last - (self._first or self._last), 1e-9)
        flat_out = "flat out: most of it is waiting in the stream" if self._plan.rate is None else "at the chosen rate"
        self._console.print(
            f"events      {look.settled:,} settled, {set_aside} set aside\n"
            f"throughput  {look.settled / seconds:,.0f} events/s, relay to commit, all on this machine\n"
            f"latency     {latency}, from the stream to the ack\n"
            f"            ({flat_out})\n"
            f"memory      {self._peak_bytes >> 20} MB at most (PSS): supervisor, reader, worker processes",
            highlight=False,
            soft_wrap=True,
        )
        if differences or set_aside:
            self._console.print("[bold red]NOT verified.[/]")
        else:
            words = "[bold green]Verified:[/] every row and every counter is as it must be."
            self._console.print(words, soft_wrap=True)


def _quantile(counts: list[int], share: float) -> str:
    """The bucket that holds the share, as a bound."""
    if not sum(counts):
        return "unknown"
    bound = quantile(LATENCY_MS, counts, share)
    return f"over {LATENCY_MS[-1]:,} ms" if bound is None else f"under {bound:,} ms"


def _pss(pid: int) -> int:
    """Proportional set size in bytes; 0 where it cannot be read."""
    try:
        with Path(f"/proc/{pid}/smaps_rollup").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0
