"""An outage in the log: its beginning, each minute of it, its end, and nothing else."""

from __future__ import annotations

import logging

import pytest

from fastworker.process.outage import Outage, span


def test_an_outage_is_one_line_at_its_beginning_one_each_minute_and_one_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now = 1_000.0
    outage = Outage("PostgreSQL", clock=lambda: now)
    for second in range(200):
        now = 1_000.0 + second
        away = 10 <= second < 195
        outage.look("connection refused" if away else None, f"{second:,} entries wait, full in 2.0 h")
    assert caplog.messages == [
        "PostgreSQL is away: connection refused",
        "PostgreSQL away for 60 s, 70 entries wait, full in 2.0 h",
        "PostgreSQL away for 2 min, 130 entries wait, full in 2.0 h",
        "PostgreSQL away for 3 min, 190 entries wait, full in 2.0 h",
        "PostgreSQL is back after 3 min",
    ]
    outage.look("again")
    assert caplog.messages[-1] == "PostgreSQL is away: again"


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ("PostgreSQL", "StoreUnavailable: PostgreSQL: canceling statement due to lock timeout (SQLSTATE 55P03)."),
        ("Redis", "StreamUnavailable: Redis refuses XACK: a right is missing"),
    ],
)
def test_a_server_that_says_why_not_is_not_away(caplog: pytest.LogCaptureFixture, server: str, why: str) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    outage = Outage(server, clock=lambda: now)
    outage.look(why)
    now = 61.0
    outage.look(why, "70 entries wait")
    outage.look(None)
    assert caplog.messages == [
        f"{server} refuses: {why}",
        f"{server} refuses for 61 s, 70 entries wait",
        f"{server} goes on after 61 s",
    ]
    outage.look("terminating connection due to administrator command (SQLSTATE 57P01)")
    assert caplog.messages[-1].startswith(f"{server} is away: terminating")


def test_an_outage_ends_with_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Not because the process that waited was replaced, and its successor says nothing yet."""
    caplog.set_level(logging.INFO)
    now = 1_000.0
    outage = Outage("PostgreSQL", clock=lambda: now)
    for second, why, answered_at in ((1, None, 1_000), (2, "refused", 1_000), (30, None, 0), (70, None, 0),
                                     (80, None, 1_079), (90, None, 1_079)):  # fmt: skip
        now = 1_000.0 + second
        outage.look(why, answered_at=answered_at)
    assert caplog.messages == [
        "PostgreSQL is away: refused",
        "PostgreSQL away for 68 s",
        "PostgreSQL is back after 78 s",
    ]


def test_spans_are_for_people() -> None:
    assert [span(n) for n in (0.4, 119, 120, 7_199, 9_000, 400_000)] == [
        "0 s",
        "119 s",
        "2 min",
        "120 min",
        "2.5 h",
        "5 d",
    ]
