"""The last hour and the last day of a few figures: rings of fixed size, so that their memory never grows."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

SPANS: Final = ((10, 360), (240, 360))
"""Seconds of one point, and points: an hour, a day."""


class History:
    """`worst`: names of which a point keeps the greatest value instead of the mean."""

    def __init__(self, names: Sequence[str], worst: Collection[str] = ()) -> None:
        self._rings = [_Ring(step, points, names, frozenset(worst)) for step, points in SPANS]

    def add(self, at: float, values: Mapping[str, float | None]) -> None:
        """`at`: Unix time. None is not known, and is a gap, not a zero."""
        for ring in self._rings:
            ring.add(at, values)

    def json(self) -> bytes:
        """/history.json: for each span its step, the time of its newest point, and the points, oldest first."""
        return msgspec.json.encode([ring.shown() for ring in self._rings])


class _Ring:
    """Points by the clock: a stretch without readings stays empty."""

    def __init__(self, step_s: int, points: int, names: Sequence[str], worst: frozenset[str]) -> None:
        self._step_s = step_s
        self._points = points
        self._worst = worst
        self._series = {name: array("d", [math.nan]) * points for name in names}
        self._counts = dict.fromkeys(names, 0)  # values in the newest point
        self._newest: int | None = None  # its number since 1970

    def add(self, at: float, values: Mapping[str, float | None]) -> None:
        self._go_to(int(at // self._step_s))
        assert self._newest is not None
        place = self._newest % self._points
        for name, value in values.items():
            if value is None:
                continue
            series, count = self._series[name], self._counts[name]
            if not count:
                series[place] = value
            elif name in self._worst:
                series[place] = max(series[place], value)
            else:
                series[place] += (value - series[place]) / (count + 1)
            self._counts[name] = count + 1

    def _go_to(self, number: int) -> None:
        """Empty what lies between; a clock that was put back goes on in the newest point."""
        if self._newest is None:
            self._newest = number
        for passed in range(max(self._newest + 1, number - self._points + 1), number + 1):
            for series in self._series.values():
                series[passed % self._points] = math.nan
        if number > self._newest:
            self._newest = number
            self._counts = dict.fromkeys(self._counts, 0)

    def shown(self) -> dict[str, object]:
        newest = self._newest or 0
        order = [number % self._points for number in range(newest - self._points + 1, newest + 1)]
        return {
            "step_s": self._step_s,
            "at": newest * self._step_s,
            "series": {
                name: [None if math.isnan(value := series[n]) else float(f"{value:.4g}") for n in order]
                for name, series in self._series.items()
            },
        }
