"""`./scripts/bench [NAME ...]`: every benchmark, or those named."""

from __future__ import annotations

import functools
import itertools
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

import bench.servers
from bench import corpus
from bench.backfill import backfill
from bench.backfill import repositories as cars
from bench.baseline import baseline
from bench.decode import decode
from bench.derived import derived
from bench.end_to_end import end_to_end
from bench.flush import TABLES, flush, strategies
from bench.growth import growth
from bench.latency import latency
from bench.life import life
from bench.memory import memory
from bench.presets import PRESETS
from bench.proof import proofs, repositories
from bench.reader import reader
from bench.report import RESULTS, Figures, Report, medians
from bench.scale import scale
from bench.scale import table as scale_table
from bench.settings import CHANGES, has_huge_pages, of_change
from bench.syncer import syncer
from bench.targets import compare
from bench.verify import verify
from bench.wal import wal
from fastworker.commands.tune import Extent
from fastworker.simulator.keys import Curve


class Options(NamedTuple):
    seed: int
    events: int
    runs: int
    rows: int
    settings: dict[str, str]
    quick: bool
    tuned: Extent | None
    processes: tuple[int, ...]


class Session:
    """What one invocation is told, and what it knows so far."""

    def __init__(self, options: Options, report: Report) -> None:
        self.seed, self.events, self.runs, self.rows, self.settings, self.quick, self.tuned, self.processes = options
        self.report = report

    def measure(self, name: str, what: dict[str, Any], work: Callable[[], Figures], *, runs: int = 0) -> Figures:
        return self.report.measure(name, what, runs or self.runs, work)

    @functools.cached_property
    def folder(self) -> Path:
        """The corpus, once somebody asks for it."""
        return corpus.prepare(self.seed, self.events)

    @functools.cached_property
    def baseline(self) -> float:
        """Events per second of the guide's shape, once per invocation."""
        work = functools.partial(baseline, self.folder, events=min(self.events, 20_000))
        return float(self.measure("baseline", {"form": "json"}, work)["events/s"])


def _baseline(session: Session) -> None:
    assert session.baseline > 0


def _decode(session: Session) -> None:
    for form in corpus.FORMS:
        session.measure(
            "decode", {"form": form}, functools.partial(decode, session.folder, form, min(session.events, 100_000))
        )


def _strategies(session: Session) -> None:
    for table, old in itertools.product(TABLES, (0.0, 0.01)):
        figures, text = strategies(session.folder, table=table, old=old, events=session.events)
        session.report.tell("strategies", {"table": table.name, "rows there already": old}, figures, text=text)


def _derived(session: Session) -> None:
    session.measure("derived", {"rows": "likes"}, functools.partial(derived, session.seed))


def _wal(session: Session) -> None:
    work = functools.partial(wal, session.folder, form="native", events=session.events)
    session.measure("wal", {"form": "native"}, work)


def _flush(session: Session) -> None:
    for derive, size in itertools.product(("full", "core"), (1, 10, 100, 1_000, 4_000, 10_000)):
        count = min(session.events, 40_000, size * 500)
        work = functools.partial(flush, session.folder, size=size, events=count, derive=derive)
        session.measure("flush", {"derive": derive, "size": size}, work)


def _end_to_end(session: Session) -> None:
    for derive, form in itertools.product(("full", "core"), ("json", "native", "frame")):
        work = functools.partial(
            end_to_end,
            session.folder,
            form=form,
            events=session.events,
            settings={"FASTWORKER_DERIVE": derive, **session.settings},
            baseline=session.baseline,
            tuned=session.tuned,
        )
        what = {"derive": derive, "form": form, "tuned": session.tuned or "no", **session.settings}
        session.measure("end_to_end", what, work)


def _presets(session: Session) -> None:
    runs: dict[str, list[Figures]] = {name: [] for name in PRESETS}
    for n, name in itertools.product(range(session.runs), PRESETS):  # in turns: a slow minute meets all of them
        print(f"... presets {name}: run {n + 1} of {session.runs}", flush=True)
        settings = {"FASTWORKER_DERIVE": "full", **PRESETS[name]}
        runs[name].append(
            end_to_end(
                session.folder,
                form="json",
                events=session.events,
                settings=settings,
                baseline=session.baseline,
            )
        )
    best = max(medians(found)["events/s"] for found in runs.values())
    for name, found in runs.items():
        figures = medians(found)
        figures["share of the best"] = figures["events/s"] / best
        session.report.tell("presets", {"preset": name, **PRESETS[name]}, figures, runs=found)


def _settings(session: Session) -> None:
    runs: dict[str, list[Figures]] = {name: [] for name in CHANGES if name != "huge_pages" or has_huge_pages()}
    for n, name in itertools.product(range(session.runs), runs):  # in turns: a slow minute meets all of them
        print(f"... settings {name}: run {n + 1} of {session.runs}", flush=True)
        runs[name].append(of_change(session.folder, name, events=session.events))
    new = medians(runs["a new server"])["events/s"]
    for name, found in runs.items():
        figures = medians(found)
        figures["multiple of a new server"] = figures["events/s"] / new
        session.report.tell("settings", {"setting": name, **CHANGES[name].server}, figures, runs=found)


def _grid(session: Session) -> None:
    for processes, pipelines in itertools.product((1, 2, 3), (1, 2, 4)):
        work = functools.partial(
            end_to_end,
            session.folder,
            form="native",
            events=min(session.events, 100_000),
            settings={
                "FASTWORKER_PROCESSES": processes,
                "PARALLEL_CONSUMERS": pipelines,
                "DB_POOL_SIZE": processes * pipelines + 1,
            },
            baseline=session.baseline,
        )
        session.measure("grid", {"processes": processes, "pipelines": pipelines}, work, runs=1)


def _scale(session: Session) -> None:
    for derive in ("full", "core"):
        found: list[tuple[int, Figures]] = []
        for processes in session.processes:
            settings = {"FASTWORKER_DERIVE": derive, **session.settings}
            work = functools.partial(
                scale, session.folder, form="native", events=session.events, processes=processes, settings=settings
            )
            what = {"derive": derive, "processes": processes, "form": "native", **session.settings}
            runs = session.report.run("scale", what, session.runs, work)
            figures = medians(runs)
            first, alone = found[0] if found else (processes, figures)
            figures["efficiency"] = figures["events/s"] / processes / (alone["events/s"] / first)
            found.append((processes, figures))
            session.report.tell("scale", what, figures, runs=runs, text=scale_table(found))


def _growth(session: Session) -> None:
    empty: Figures = {}
    for likes in (0, session.rows // 10, session.rows):
        found = growth(session.seed, session.events, session.runs, likes=likes)
        figures = medians(found)
        empty = empty or figures
        figures["share of empty tables"] = figures["events/s"] / empty["events/s"]
        figures["share of the floor of empty tables"] = figures["events/s"] / empty["floor events/s"]
        figures["multiple of baseline"] = figures["events/s"] / session.baseline
        session.report.tell("growth", {"likes": likes, "form": "native"}, figures, runs=found)


def _reader(session: Session) -> None:
    for form in corpus.FORMS:
        work = functools.partial(reader, session.folder, form=form, events=session.events)
        session.measure("reader", {"form": form}, work)


def _latency(session: Session) -> None:
    for rate in (100, 1_000, 5_000):
        work = functools.partial(latency, session.seed, rate=rate, seconds=2.0 if session.quick else 30.0)
        session.measure("latency", {"rate": rate}, work)


def _beside(session: Session) -> None:
    accounts = 400 if session.quick else 3_000
    for repaired in (0, accounts):
        work = functools.partial(
            latency, session.seed, rate=1_000, seconds=3.0 if session.quick else 20.0, repaired=repaired
        )
        session.measure("beside", {"repaired": repaired}, work)


def _syncer(session: Session) -> None:
    for records in (0, 20_000 if session.quick else 1_000_000):
        work = functools.partial(syncer, session.seed, records=records)
        session.measure("syncer", {"records": records}, work, runs=1)


def _life(session: Session) -> None:
    session.measure("life", {"form": "native"}, functools.partial(life, session.folder, events=session.events))


def _memory(session: Session) -> None:
    events, every_s = (session.events, 1.0) if session.quick else (max(2_000_000, session.events), 5.0)
    work = functools.partial(memory, session.seed, events=events, every_s=every_s)
    session.measure("memory", {"events": events, "form": "native"}, work, runs=1)


def _backfill(session: Session) -> None:
    folder = cars(session.seed, session.events)
    for derive in ("full", "core"):
        rows = []
        for bulk in (False, True):
            work = functools.partial(backfill, folder, derive=derive, bulk=bulk)
            what = {"derive": derive, "path": "bulk" if bulk else "live"}
            rows.append(session.measure("backfill", what, work)["rows"])
        if rows[0] != rows[1]:
            raise RuntimeError(f"{derive}: the live path made {rows[0]:,} rows, bulk {rows[1]:,}")
    if session.rows >= 1_000_000:
        work = functools.partial(backfill, folder, derive="full", bulk=False, likes=session.rows)
        session.measure("backfill", {"derive": "full", "path": "live", "likes": session.rows}, work, runs=1)


def _proof(session: Session) -> None:
    curves: tuple[Curve, ...] = ("k256", "p256")
    for curve in curves:
        commits = 300 if session.quick else 1_800
        session.measure("proof", {"curve": curve}, functools.partial(proofs, curve, commits=commits), runs=1)
    records = 1_000 if session.quick else 20_000
    session.measure(
        "proof", {"records": records}, functools.partial(repositories, session.seed, records=records), runs=1
    )


def _verify(session: Session) -> None:
    rounds = 3 if session.quick else 40
    session.measure("verify", {"levels": "all"}, functools.partial(verify, 400, rounds), runs=1)


class Bench(NamedTuple):
    run: Callable[[Session], None]
    minutes: int  # of a full run on two quiet cores, about; each says at its end what it took
    text: str


BENCHES: dict[str, Bench] = {
    "baseline": Bench(
        _baseline,
        1,
        "the guide's shape written simply: five pipelines, batches of ten, a transaction per event, a statement "
        "per row",
    ),
    "decode": Bench(_decode, 1, "bytes to rows on one core, each form (`frame` is the raw frame), by stage"),
    "strategies": Bench(
        _strategies,
        4,
        "ways to write rows side by side on likes and notifications, batches of 1 to 10,000, and where COPY begins to "
        "pay",
    ),
    "derived": Bench(
        _derived, 1, "rows that follow from likes: sent by the worker, or made by a statement in PostgreSQL"
    ),
    "flush": Bench(_flush, 5, "the store alone, batches of 1 to 10,000 entries, full and core"),
    "end_to_end": Bench(
        _end_to_end,
        11,
        "a full stream, `fastworker worker` with its defaults, until acked: events/s, CPU of each, memory, WAL, "
        "share of the floor, multiple of the baseline; full and core, all forms",
    ),
    "wal": Bench(_wal, 2, "the write-ahead log of a full stream by table, its indexes with it"),
    "presets": Bench(_presets, 6, "the same with the guide's presets and an old environment file"),
    "settings": Bench(
        _settings,
        20,
        "end_to_end with PostgreSQL's settings changed one at a time, against a new server's; huge pages only where "
        "the machine has some (sysctl vm.nr_hugepages=600)",
    ),
    "reader": Bench(_reader, 3, "frames from a local WebSocket into Redis, each form"),
    "latency": Bench(
        _latency, 6, "relay, reader and worker at 100, 1,000 and 5,000 events/s: append to commit, and CPU"
    ),
    "beside": Bench(_beside, 6, "latency at 1,000 events/s, alone and beside the repair of 3,000 accounts"),
    "syncer": Bench(
        _syncer, 15, "memory of what fetches and settles 400 accounts, without and with one of 1,000,000 records"
    ),
    "life": Bench(_life, 1, "from exec to the first ack, and from SIGTERM under full load to the end"),
    "memory": Bench(_memory, 9, "relay, reader and worker over 2,000,000 events: memory every 5 s, connections"),
    "proof": Bench(
        _proof, 1, "signatures and proofs of commits, walking and mapping whole repositories, settling one of them"
    ),
    "backfill": Bench(
        _backfill,
        15,
        "repositories from CAR files through the live path and in bulk, full and core: records/s, share of the floor, "
        "memory; and the live path with --rows likes there before",
    ),
    "verify": Bench(_verify, 1, "what the reader's levels of verification add to a commit, beside its decoding"),
    "grid": Bench(_grid, 3, "end_to_end for processes x pipelines, 100,000 events, one run each"),
    "scale": Bench(
        _scale,
        6,
        "end_to_end with each number of --processes, full and core: what each one adds, CPU of each part, the share of "
        "working PostgreSQL sessions that wait for locks, and with which statements",
    ),
    "growth": Bench(
        _growth,
        16,
        "end_to_end on empty tables, and with --rows / 10 and --rows likes and what follows from them there",
    ),
}


def _list() -> str:
    lines = [f"  {name:<12} about {bench.minutes:>2} min  {bench.text}" for name, bench in BENCHES.items()]
    return "\b\n" + "\n".join(lines)


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 150},
    help=f"""Benchmarks on servers that they start themselves. Run nothing beside them.

Each prints a table and appends one JSON line to bench/results.jsonl (commit, host, versions, mix, figures); at the end
the targets that they have figures for. Without NAMES all of them run.

{_list()}

\b
Also, each by itself:
  --micro           time the pure parts, a thousand events at a time
  --save            the same, and keep the result
  --compare         the same, and fail where one is 25 % slower than what was kept
  --instructions    count their instructions (valgrind), and fail where one takes 5 % more than bench/instructions.json
                    (a word after it: only those whose name has it)
  --instructions --save   keep the counts there
""",
)
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHES)), metavar="[NAMES]...")
@click.option("--events", default=200_000, show_default=True, help="Of the corpus.")
@click.option("--runs", default=3, show_default=True, help="The median of so many is told.")
@click.option("--tuned", type=click.Choice(["tables", "indexes"]), help="end_to_end after `migrate --tune=...`.")
@click.option(
    "--processes",
    default="1,2,4,8",
    show_default=True,
    callback=lambda _context, _option, value: tuple(int(n) for n in value.split(",")),
    help="Of the workers of scale.",
)
@click.option("--seed", default=7, show_default=True, help="Of the corpus.")
@click.option("--rows", default=10_000_000, show_default=True, help="Likes that growth puts there before.")
@click.option("--quick", is_flag=True, help="20,000 events and rows, one run: shows that it works, measures little.")
@click.option(
    "--set", "given", multiple=True, metavar="NAME=VALUE", help="A setting of end_to_end's worker; may be repeated."
)
@click.option(
    "--python",
    type=click.Path(exists=True, dir_okay=False),
    default=sys.executable,
    show_default="this environment's",
    help="What runs fastworker; where only its dependencies are installed it is smaller.",
)
@click.option(
    "--results",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RESULTS,
    show_default="bench/results.jsonl",
    help="Where the JSON lines go.",
)
def main(
    names: tuple[str, ...],
    events: int,
    runs: int,
    seed: int,
    rows: int,
    given: tuple[str, ...],
    python: str,
    results: Path,
    processes: tuple[int, ...],
    *,
    quick: bool,
    tuned: Extent | None,
) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: servers and their files go
    if quick:
        events, runs, rows = min(events, 20_000), 1, min(rows, 20_000)
    if any("=" not in setting for setting in given):
        raise click.UsageError("--set takes NAME=VALUE")
    settings = dict(setting.split("=", 1) for setting in given)
    bench.servers.PYTHON = python
    mix = {"mix": "production", "seed": seed, "events": events, "accounts": corpus.ACCOUNTS}
    report = Report({**mix, "environment": "its own" if python == sys.executable else "another"}, results)
    session = Session(Options(seed, events, runs, rows, settings, quick, tuned, processes), report)
    failed = []
    for name in names or BENCHES:
        began = time.monotonic()
        try:
            BENCHES[name].run(session)
        except Exception:  # noqa: BLE001 - the others are worth their time all the same
            traceback.print_exc()
            failed.append(name)
        print(f"\n{name} took {time.monotonic() - began:,.0f} s", flush=True)
    if words := compare(report.told):
        print(f"\nTargets (two cores shared with both servers)\n{words}")
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
