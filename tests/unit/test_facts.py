"""What an operator is told of a stream: put together once, for status, page and Prometheus."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastworker.monitor.facts import backlog
from fastworker.monitor.rates import WINDOW, Rates, Sample, per_s
from fastworker.process.board import LATENCY_MS
from fastworker.stream.parts import Group, Stream

NOW = 100_000
GROUP = Group("g", 1, 3, "60000-0", 5, 7, lag_is_exact=True, oldest_pending_id="50000-0", next_id="70000-0")


def stream(*groups: Group) -> Stream:
    return Stream(10, 10, None, "40000-0", "90000-0", groups)


def test_a_backlog_is_what_is_delivered_and_what_is_not() -> None:
    found = backlog(stream(GROUP), "g", NOW)
    assert (found.lag, found.pending, found.pending_id) == (7, 3, "50000-0")
    assert (found.undelivered_s, found.pending_s, found.unfinished_s) == (30.0, 50.0, 50.0)


def test_before_there_is_a_group_all_of_the_stream_waits() -> None:
    found = backlog(stream(GROUP), "another", NOW)
    assert (found.lag, found.pending, found.unfinished_s) == (10, 0, 60.0)
    assert backlog(None, "g", NOW).lag == 0


@pytest.mark.parametrize(
    ("before", "now", "seconds", "rate"),
    [(10, 30, 2.0, 10.0), (30, 10, 2.0, 0.0), (None, 10, 2.0, None), (1, 2, 0.0, None)],
)
def test_a_rate_is_never_negative_and_may_be_unknown(before: Any, now: Any, seconds: float, rate: float | None) -> None:
    assert per_s(before, now, seconds) == rate


def sample(at: float, finished: int) -> Sample:
    return Sample(at, {"worker-0": finished}, (0,) * (len(LATENCY_MS) + 1), None, {"likes": 2 * finished})


def test_rates_without_a_sample_are_known_to_be_unknown() -> None:
    rates = Rates()
    assert (rates.finished_per_s(), rates.appended_per_s(), rates.latest()) == (0.0, None, {})
    assert rates.latency_below(0.5) == "no entry lately"
    rates.add(sample(1.0, 10))
    rates.add(sample(3.0, 30))
    assert rates.finished_per_s() == rates.finished_per_s("worker-0") == 10.0


def test_what_was_done_before_the_monitor_began_is_in_no_rate() -> None:
    """A monitor that SIGHUP replaced finds the totals of years on the board."""
    rates = Rates()
    assert rates.since_last_told() == 0.0
    assert rates.written() == []
    rates.add(sample(100.0, 1_000_000))
    assert rates.since_last_told() == 0.0
    rates.add(sample(104.0, 1_000_040))
    assert rates.since_last_told() == 10.0
    assert rates.since_last_told() == 0.0
    [likes] = rates.written()
    assert (likes.table, likes.per_s, likes.last_hour) == ("likes", 20.0, 80)


def test_a_stream_is_full_in_what_its_growth_says() -> None:
    rates = Rates()
    for at in range(WINDOW // 2 - 1):
        rates.add_length(at, 10 * at)
        assert rates.full_s(1_000, None, None) == math.inf  # too few to tell
    rates.add_length(WINDOW // 2 - 1, 10 * (WINDOW // 2 - 1))
    assert rates.full_s(1_000, None, None) == (1_000 - 290) / 10
    assert rates.full_s(1_000, 5_800, 2_900) == (580 - 290) / 10  # in bytes first
