"""What is aimed at on two cores that PostgreSQL, Redis and fastworker share, against what this invocation measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.report import Figures, shown


class Target(NamedTuple):
    bench: str
    figure: str
    bound: float  # a lower one where `at_least`, else an upper one
    at_least: bool = True
    where: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def reached(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = (
    Target("end_to_end", "share of the floor", 0.5, where={"derive": "full"}),
    Target("end_to_end", "share of the floor", 0.5, where={"derive": "core"}),
    Target("end_to_end", "multiple of baseline", 15, where={"derive": "core"}),
    Target("decode", "events/s", 60_000, where={"form": "native"}),
    Target("decode", "events/s", 50_000, where={"form": "json"}),
    Target("decode", "events/s", 40_000, where={"form": "frame"}),
    Target("reader", "frames/s", 20_000),
    Target("latency", "all p50 ms", 10, at_least=False, where={"rate": 1_000}),
    Target("latency", "all p99 ms", 50, at_least=False, where={"rate": 1_000}),
    Target("latency", "reader and worker, share of a core", 0.25, at_least=False, where={"rate": 1_000}),
    Target("memory", "peak MB (PSS)", 200, at_least=False),
    Target("memory", "last third over first third", 1.1, at_least=False),
    Target("memory", "connections at most", 8, at_least=False),
    Target("life", "first ack s", 1.5, at_least=False),
    Target("life", "drained s", 5, at_least=False),
    Target("growth", "share of empty tables", 0.6, where={"likes": 10_000_000}),
    Target("backfill", "share of the floor", 0.5, where={"derive": "full", "path": "live"}),
    Target("backfill", "share of the floor", 1.5, where={"derive": "full", "path": "bulk"}),
    Target("backfill", "memory MB (PSS)", 300, at_least=False),
    Target("scale", "waits for locks", 0.05, at_least=False, where={"processes": 8}),
    Target("scale", "oldest debt s max", 1, at_least=False, where={"processes": 8}),
    Target("scale", "paid after s", 1, at_least=False, where={"processes": 8}),
    Target("presets", "share of the best", 0.5),
    Target("syncer", "MB at most", 120, at_least=False, where={"records": 0}),
    Target("syncer", "MB at most", 250, at_least=False, where={"records": 1_000_000}),
    Target("verify", "chain us", 3, at_least=False),
    Target("verify", "signed us", 65, at_least=False),
    Target("verify", "full us", 120, at_least=False),
)


def compare(told: list[tuple[str, dict[str, Any], Figures]]) -> str:
    """A line for each target that this invocation has a figure for; empty if there is none."""
    lines = []
    for target in TARGETS:
        for name, what, figures in told:
            if name != target.bench or any(what.get(key) != value for key, value in target.where.items()):
                continue
            if (value := figures.get(target.figure)) is None:
                continue
            words = " ".join(f"{key}={value}" for key, value in what.items())
            bound = f"{'at least' if target.at_least else 'at most'} {shown(target.bound)}"
            lines.append(
                f"  {'reached' if target.reached(value) else 'MISSED ':<8} {shown(value):>10}  {bound:<16} "
                f"{target.figure}: {name} {words}"
            )
    return "\n".join(lines)
