"""What the status page remembers: an hour and a day, in memory that never grows."""

from __future__ import annotations

import json
from array import array
from typing import Any

from fastworker.monitor.history import SPANS, History


def shown(history: History, span: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(history.json())[span]
    return found


def test_a_point_is_the_mean_or_the_worst_and_what_is_unknown_is_a_gap() -> None:
    history = History(["rate", "lag", "never"], worst=["lag"])
    for at, value in ((1_000.0, 10.0), (1_003.0, 20.0), (1_009.9, 60.0), (1_010.0, 7.0)):
        history.add(at, {"rate": value, "lag": 100 - value, "never": None})
    history.add(1_045.0, {"rate": 1.0, "lag": None})
    hour = shown(history)
    assert (hour["step_s"], hour["at"]) == (10, 1_040)
    assert hour["series"]["rate"][-5:] == [30.0, 7.0, None, None, 1.0]
    assert hour["series"]["lag"][-5:] == [90.0, 93.0, None, None, None]
    assert hour["series"]["never"] == [None] * 360
    assert shown(history, 1)["series"]["rate"][-1] == 19.6, "the day's point holds all of them"


def test_a_day_fits_and_what_is_older_goes() -> None:
    history = History(["rate"])
    for minute in range(3 * 24 * 60):
        history.add(minute * 60.0, {"rate": float(minute)})
    for (step, points), span in zip(SPANS, (0, 1), strict=True):
        found = shown(history, span)["series"]["rate"]
        assert len(found) == points
        assert found[-1] >= 3 * 24 * 60 - step / 60 - 1
    assert None not in shown(history, 1)["series"]["rate"]
    assert shown(history, 0)["series"]["rate"].count(None) == 300, "one value a minute, six points a minute"
    sizes = [len(series) for ring in history._rings for series in ring._series.values()]
    assert sizes == [points for _, points in SPANS]
    assert all(isinstance(series, array) for ring in history._rings for series in ring._series.values())


def test_long_silence_empties_it_and_a_clock_that_is_put_back_does_not() -> None:
    history = History(["rate"])
    history.add(50_000.0, {"rate": 5.0})
    history.add(49_000.0, {"rate": 7.0})
    assert shown(history)["series"]["rate"][-2:] == [None, 6.0]
    history.add(50_000.0 + 10 * 86_400, {"rate": 1.0})
    assert shown(history)["series"]["rate"] == [None] * 359 + [1.0]
