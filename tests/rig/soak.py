"""`python -m tests.rig.soak`: the pipeline at a steady rate for long, while its servers leave and come back.

Real PostgreSQL and Valkey, the simulated relay at RATE frames a second, `fastworker reader` and `fastworker worker`
with two processes. PostgreSQL is stopped for some minutes, later Redis for one. A line every ten seconds; in the end a
verdict: nothing lost (ledger, pending entries, dead letters, tables against the model), both backlogs worked off, and
as much memory as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from redis.exceptions import RedisError

from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.law.model import Event
from fastworker.simulator.network import Network
from fastworker.simulator.repo import SimFrame
from tests.rig.stage import Stage, ended_in, is_entry

LINE_S = 10.0
LOOK_S = 1.0
CATCH_UP = 2.0  # times the rate: less, and a backlog takes longer to go than it took to come
GROWTH, GROWTH_BYTES = 1.05, 2 << 20  # of a process, from the first to the last third of the time after all outages
WARM_UP_S = 30.0
SETTLE_S = 120.0  # what is left at the end must go, too; with nothing ending for so long it does not


class Outage(NamedTuple):
    name: str
    at_s: float
    length_s: float


class Look(NamedTuple):
    """Once a second. `ended` is None while Redis cannot be asked."""

    at_s: float
    made: int
    ended: int | None
    pss: dict[str, int]


class CatchUp(NamedTuple):
    """How a backlog went: the first entry was settled `wait_s` after the server was back, the last one at `until_s`.

    `until_s` None: there was still a backlog when the run ended.
    """

    backlog: int
    wait_s: float
    until_s: float | None
    rate: float


class Soak:
    def __init__(self, folder: Path | None, *, seed: int, rate: float, seconds: float, outages: list[Outage]) -> None:
        self._rate = rate
        self._seconds = seconds
        self._outages = outages
        self._network = Network(seed)
        self._is_over = False
        self._frames_made = 0
        self._made = 0  # entries
        self._last_seq = 0
        self._stage = Stage(self._frames(), rate=rate, window=int(rate * 180), folder=folder)
        self._truth = self._stage.folder / "events.jsonl"
        self._looks: list[Look] = []
        self._back: dict[str, float] = {}  # when each server was there again
        self._out = ""

    def _frames(self) -> Iterator[SimFrame]:
        """Until the time is over, their meaning kept in a file, not in memory."""
        encode = msgspec.json.Encoder().encode
        with self._truth.open("wb") as truth:
            while not self._is_over:
                for frame in self._network.step():
                    if frame.event is not None:
                        truth.write(encode(frame.event) + b"\n")
                    if frame.seq is not None and frame.seq > self._last_seq:
                        self._last_seq = frame.seq
                        self._made += is_entry(frame)
                    self._frames_made += 1
                    yield frame

    async def run(self) -> list[str]:
        """The problems; what else there is to know is printed."""
        async with self._stage as stage:
            await stage.worker.start()
            await stage.reader.start()
            started = time.monotonic()
            looking = asyncio.create_task(self._watch(started))
            try:
                for outage in self._outages:
                    await asyncio.sleep(started + outage.at_s - time.monotonic())
                    await self._leave(outage, started)
                await asyncio.sleep(started + self._seconds - time.monotonic())
                self._is_over = True
                problems = self._pace()
                problems += await stage.settle(lambda: self._last_seq, SETTLE_S)
            finally:
                looking.cancel()
                await asyncio.wait([looking])
            problems += await stage.stop()
            _say("Comparing every table with what the simulator knows ...")
            problems += await stage.unbalanced(self._made, {})
            problems += await stage.different(self._events())
            return problems + self._judged()

    async def _leave(self, outage: Outage, started: float) -> None:
        servers: dict[str, EmbeddedPostgres | EmbeddedRedis] = {
            "PostgreSQL": self._stage.postgres,
            "Redis": self._stage.redis_server,
        }
        server = servers[outage.name]
        self._out = outage.name
        await asyncio.to_thread(server.stop)
        _say(f"{time.monotonic() - started:7.0f} s  {outage.name} is stopped for {outage.length_s:g} s")
        await asyncio.sleep(outage.length_s)
        await asyncio.to_thread(server.start)
        self._out = ""
        self._back[outage.name] = time.monotonic() - started
        _say(f"{self._back[outage.name]:7.0f} s  {outage.name} is there again")

    async def _watch(self, started: float) -> None:
        line_at = LINE_S
        before = Look(0.0, 0, 0, {})
        while True:
            await asyncio.sleep(LOOK_S)
            ended = None
            if self._out != "Redis":
                with contextlib.suppress(RedisError, OSError):
                    ended = ended_in(await self._stage.ledger())
            now = time.monotonic() - started
            pss = {}
            if now >= line_at:
                everybody = self._stage.reader.processes() | self._stage.worker.processes()
                pss = {name: _pss(pid) for name, pid in everybody.items()}
            look = Look(now, self._made, ended, pss)
            self._looks.append(look)
            if now >= line_at:
                _say(_line(before, look))
                before, line_at = look, line_at + LINE_S

    def _events(self) -> Iterator[Event]:
        decode = msgspec.json.Decoder().decode
        with self._truth.open("rb") as lines:
            for line in lines:
                yield decode(line)

    # --- the verdict

    def _pace(self) -> list[str]:
        """Whether the relay could keep up the rate at all."""
        rate = self._frames_made / self._seconds
        _say(f"{self._frames_made:,} frames were made: {rate:,.0f}/s")
        return [f"This machine is too busy to make {self._rate:,.0f} frames/s"] if rate < 0.95 * self._rate else []

    def _judged(self) -> list[str]:
        """Backlogs and memory; the time between outages, once their backlogs are gone, is a steady stretch."""
        problems = []
        stretches: list[tuple[float, float]] = []
        since = WARM_UP_S
        for outage in self._outages:
            stretches.append((since, outage.at_s))
            back = self._back[outage.name]
            found = catch_up(self._looks, back, self._rate)
            gone = "was not gone in time" if found.until_s is None else f"was gone {found.until_s - back:.0f} s later"
            _say(
                f"{outage.name} was back, a backlog of {found.backlog:,} {gone}: {found.rate:,.0f} entries/s "
                f"from the first one on, which took {found.wait_s:.0f} s"
            )
            if found.until_s is None or found.rate < CATCH_UP * self._rate:
                problems.append(f"The backlog of {outage.name}'s outage went too slowly")
            since = found.until_s or back
        stretches.append((since, self._seconds))
        for name in sorted({name for look in self._looks for name in look.pss}):
            told = []
            first = last = 0.0
            for begin, end in stretches:
                third = (end - begin) / 3
                first, last = (
                    _median(self._looks, name, begin, begin + third),
                    _median(self._looks, name, end - third, end),
                )
                told.append(f"{_mb(first)} to {_mb(last)}")
            peak = max(look.pss.get(name, 0) for look in self._looks)
            _say(f"{name:10} {', '.join(told)} in the steady stretches; {_mb(peak)} at most (PSS)")
            if last > first * GROWTH + GROWTH_BYTES:
                problems.append(f"{name} grows: {_mb(first)}, then {_mb(last)}, with nothing out")
        most = max(sum(look.pss.values()) for look in self._looks)
        _say(f"{'together':10} {_mb(most)} at most (PSS)")
        return problems


def catch_up(looks: list[Look], back_s: float, rate: float) -> CatchUp:
    """Until the first look with less than a second's worth of backlog."""
    after = [(look.at_s, look.made, look.ended) for look in looks if look.at_s >= back_s and look.ended is not None]
    if not after:
        return CatchUp(0, 0.0, None, 0.0)
    _, made, ended = after[0]
    begun = max((at for at, _, e in after if e == ended), default=back_s)
    until, last = next(((at, e) for at, m, e in after if m - e < rate), (None, after[-1][2]))
    seconds = (after[-1][0] if until is None else until) - begun
    return CatchUp(made - ended, begun - back_s, until, (last - ended) / max(seconds, LOOK_S))


def _median(looks: list[Look], name: str, since_s: float, until_s: float) -> float:
    found = [look.pss[name] for look in looks if since_s <= look.at_s <= until_s and name in look.pss]
    return statistics.median(found) if found else 0.0


def _line(before: Look, look: Look) -> str:
    memory = "  ".join(f"{name} {_mb(size)}" for name, size in sorted(look.pss.items()))
    if look.ended is None:
        what = f"made {look.made:,}, Redis does not answer"
    else:
        rate = (look.ended - (before.ended or 0)) / (look.at_s - before.at_s)
        shown = f"{rate:,.0f}/s" if before.ended is not None else "-"
        what = f"settled {look.ended:,} ({shown}), behind {look.made - look.ended:,}"
    return f"{look.at_s:7.0f} s  {what}; {memory}"


def _mb(size: float) -> str:
    return f"{size / (1 << 20):.1f} MB"


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seconds", default=1800.0, show_default=True, help="How long events come.")
@click.option("--rate", default=1000.0, show_default=True, help="Frames a second.")
@click.option("--postgres-out", default=180.0, show_default=True, help="Seconds without PostgreSQL, after a sixth.")
@click.option("--redis-out", default=60.0, show_default=True, help="Seconds without Redis, after a half.")
@click.option("--seed", default=1, show_default=True, help="Fixes the traffic.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep servers' files and logs here.")
def main(seconds: float, rate: float, postgres_out: float, redis_out: float, seed: int, folder: Path | None) -> None:
    """Feed the pipeline for SECONDS, stop PostgreSQL and Redis meanwhile, and check what came of it."""
    outages = [
        Outage("PostgreSQL", seconds / 6, postgres_out),
        Outage("Redis", seconds / 2, redis_out),
    ]
    if max(postgres_out, redis_out) > seconds / 6:
        raise click.UsageError("The outages do not fit: each may take a sixth of SECONDS.")
    soak = Soak(folder, seed=seed, rate=rate, seconds=seconds, outages=[one for one in outages if one.length_s])
    problems = asyncio.run(soak.run())
    _say("\n".join(problems) if problems else "Nothing was lost, the tables equal the model, memory is flat.")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
