"""`./scripts/bench [NAME ...]`: every benchmark, or those named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import click

from bench import corpus, report
from bench.baseline import baseline
from bench.decode import decode
from bench.end_to_end import end_to_end
from bench.flush import flush
from bench.latency import latency
from bench.reader import reader

NAMES = ("decode", "flush", "baseline", "end_to_end", "grid", "reader", "latency")


def _measure(name: str, what: dict[str, Any], runs: int, work: Callable[[], dict[str, Any]]) -> None:
    report.tell(name, what, report.medians([work() for _ in range(runs)]), runs=runs)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--events", default=200_000, show_default=True, help="Of the corpus.")
@click.option("--runs", default=3, show_default=True, help="The median of so many is told.")
@click.option("--seed", default=7, show_default=True)
@click.option("--quick", is_flag=True, help="20,000 events, one run: shows that it works, measures little.")
@click.option("--processes", default=2, show_default=True, help="Of end_to_end.")
@click.option("--pipelines", default=1, show_default=True, help="Of end_to_end.")
@click.option("--batch-size", default=500, show_default=True, help="BATCH_SIZE of end_to_end.")
def main(
    names: tuple[str, ...],
    events: int,
    runs: int,
    seed: int,
    *,
    quick: bool,
    processes: int,
    pipelines: int,
    batch_size: int,
) -> None:
    """Benchmarks on servers that they start themselves. Run nothing beside them.

    Prints a table for each and appends one JSON line to bench/results.jsonl.
    """
    if quick:
        events, runs = 20_000, 1
    folder = corpus.prepare(seed, events)
    small = min(events, 40_000)
    for name in names or NAMES:
        match name:
            case "decode":
                for form in corpus.FORMS:
                    _measure(name, {"form": form}, runs, lambda form=form: decode(folder, form, min(events, 100_000)))  # type: ignore[misc]
            case "flush":
                for derive, size in itertools.product(("full", "core"), (1, 10, 100, 1_000, 4_000, 10_000)):
                    count = min(small, size * 500)
                    _measure(
                        name,
                        {"derive": derive, "size": size},
                        runs,
                        lambda size=size, count=count, derive=derive: flush(
                            folder, size=size, events=count, derive=derive
                        ),  # type: ignore[misc]
                    )
            case "baseline":
                _measure(name, {"form": "json"}, runs, lambda: baseline(folder, events=min(events, 20_000)))
            case "end_to_end":
                for derive, form in (("full", "json"), ("full", "native"), ("core", "json"), ("core", "native")):
                    _measure(
                        name,
                        {
                            "derive": derive,
                            "form": form,
                            "processes": processes,
                            "pipelines": pipelines,
                            "batch": batch_size,
                        },
                        runs,
                        lambda derive=derive, form=form: end_to_end(  # type: ignore[misc]
                            folder,
                            form=form,
                            events=events,
                            derive=derive,
                            processes=processes,
                            pipelines=pipelines,
                            batch_size=batch_size,
                        ),
                    )
            case "grid":
                for some, each in itertools.product((1, 2, 3), (1, 2, 4)):
                    _measure(
                        name,
                        {"derive": "full", "form": "native", "processes": some, "pipelines": each},
                        1,
                        lambda some=some, each=each: end_to_end(  # type: ignore[misc]
                            folder,
                            form="native",
                            events=min(events, 100_000),
                            derive="full",
                            processes=some,
                            pipelines=each,
                            floor=False,
                        ),
                    )
            case "reader":
                for form in corpus.FORMS:
                    _measure(name, {"form": form}, runs, lambda form=form: reader(folder, form=form, events=events))  # type: ignore[misc]
            case "latency":
                for rate in (100, 1_000, 5_000):
                    seconds = 10.0 if quick else 20.0
                    _measure(
                        name,
                        {"rate": rate},
                        1,
                        lambda rate=rate, seconds=seconds: latency(
                            folder, rate=rate, seconds=min(seconds, events / rate)
                        ),  # type: ignore[misc]
                    )


if __name__ == "__main__":
    main()
