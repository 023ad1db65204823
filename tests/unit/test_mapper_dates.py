"""Dates: whatever a client wrote, as naive UTC. Reference: state law, Dates"""

# ruff: noqa: DTZ001, DTZ901 - naive UTC is the contract

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastworker.table.dates import EPOCH, date_or, entry_moment, latest_date, moment_of, parse_date

NOON = datetime(2024, 6, 1, 12)
LATEST = NOON + timedelta(minutes=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1985-04-12T23:20:50.123Z", datetime(1985, 4, 12, 23, 20, 50, 123000)),
        ("1985-04-12T23:20:50Z", datetime(1985, 4, 12, 23, 20, 50)),
        ("1985-04-12T23:20:50.1Z", datetime(1985, 4, 12, 23, 20, 50, 100000)),
        ("1985-04-12T23:20:50,123456789012Z", datetime(1985, 4, 12, 23, 20, 50, 123456)),
        pytest.param("1985-04-12T23:20:50." + "9" * 5_000 + "Z", datetime(1985, 4, 12, 23, 20, 50, 999999), id="long"),
        pytest.param("2026-01-01T00:00:00+09:00", datetime(2025, 12, 31, 15), id="W20-offset-is-converted"),
        ("2026-01-01T00:00:00.000-07:00", datetime(2026, 1, 1, 7)),
        ("2026-01-01T00:00:00+0130", datetime(2025, 12, 31, 22, 30)),
        ("2026-01-01T00:00:00", datetime(2026, 1, 1)),
        ("2026-01-01", datetime(2026, 1, 1)),
        ("2026-01-01 10:20", datetime(2026, 1, 1, 10, 20)),
        ("2026-01-01t10:20z", datetime(2026, 1, 1, 10, 20)),
        (" 2026-01-01T10:20:30.5Z\n", datetime(2026, 1, 1, 10, 20, 30, 500000)),
        ("2024-02-29T00:00:00.000Z", datetime(2024, 2, 29)),
        ("20260101T102030Z", datetime(2026, 1, 1, 10, 20, 30)),
        ("2026-1-2t3:04:05 -1:30", datetime(2026, 1, 2, 4, 34, 5)),
        ("2026-01-01_00:00:0.5Z", datetime(2026, 1, 1, 0, 0, 0, 500000)),
        ("2026-01-01T24:00:00.000Z", datetime(2026, 1, 2)),
        ("2026-01-01T24:00:01Z", None),
        pytest.param("2016-12-31T23:59:60.000Z", datetime(2017, 1, 1), id="leap-second"),
        pytest.param("2016-12-31T23:59:60.500+00:00", datetime(2017, 1, 1, 0, 0, 0, 500000), id="leap-second-fraction"),
        ("2016-12-31T23:59:61Z", None),
        ("2016-12-31T23:60:00Z", None),
        pytest.param("0001-01-01T00:00:00.000Z", datetime.min, id="year-1"),
        pytest.param("0000-01-01T00:00:00.000Z", datetime.min, id="year-0"),
        pytest.param("0000-02-29T00:00:00+01:00", datetime.min, id="year-0-leap-day"),
        ("0000-13-01T00:00:00.000Z", None),
        pytest.param("0001-01-01T00:00:00+23:00", datetime.min, id="before-year-1"),
        pytest.param("9999-12-31T23:59:59-23:00", datetime.max, id="after-year-9999"),
        pytest.param("9999-12-31T24:00:00Z", datetime.max, id="after-year-9999-midnight"),
        pytest.param("10000-01-01T00:00:00Z", None, id="year-10000"),
        pytest.param("+012026-01-01T00:00:00Z", datetime.max, id="expanded-year"),
        pytest.param("+002026-01-01T01:00:00+01:00", datetime(2026, 1, 1), id="expanded-year-of-ours"),
        pytest.param("-000001-12-31T23:00:00.000Z", datetime.min, id="before-year-0"),
        pytest.param("+000000-02-29T00:00:00Z", datetime.min, id="expanded-year-0-leap-day"),
        pytest.param("+012345-02-29T00:00:00Z", None, id="expanded-year-no-leap-day"),
        pytest.param("-12026-01-01T00:00:00Z", None, id="five-digits"),
        pytest.param("2024-01-01" + " " * 200_000 + "x", None, id="spaces-without-end"),
        pytest.param(" " * 200_000 + "2024-01-01" + " " * 200_000, datetime(2024, 1, 1), id="spaces-around"),
        ("2023-02-29T00:00:00.000Z", None),
        ("2026-13-01T00:00:00.000Z", None),
        ("2026-01-01T00:00:00+24:00", None),
        pytest.param("20260101T00:00:00+01:00Z", None, id="offset-before-the-Z"),
        pytest.param("2026-01-01T00:00:0+01:00", datetime(2025, 12, 31, 23), id="one-digit-second-and-offset"),
        pytest.param("\uff12\uff10\uff12\uff16-01-01", None, id="other-digits"),
        pytest.param("2026-01-01T00:00:00.\ud80000Z", None, id="surrogate"),
        ("yesterday", None),
        ("", None),
    ],
)
def test_parse(text: str, expected: datetime | None) -> None:
    found = parse_date(text)
    assert found == expected
    assert found is None or found.tzinfo is None


@given(st.text() | st.text(alphabet="0123456789-+:.TZtz ,_W", max_size=30))
def test_any_text_is_a_naive_moment_or_no_date(text: str) -> None:
    moment = parse_date(text)
    assert moment is None or moment.tzinfo is None


@given(st.from_regex(r"\A[0-3][0-9]{3}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-6][0-9]\.[0-9]{3}Z\Z"))
def test_the_common_form_reads_as_any_other(text: str) -> None:
    """24 characters with a Z take a short cut: it must read what the whole grammar reads."""
    assert parse_date(text) == parse_date(text.replace("Z", "000Z"))


@given(st.datetimes(timezones=st.timezones(), min_value=datetime(2, 1, 1)) | st.datetimes(min_value=datetime(2, 1, 1)))
def test_iso_round_trip(moment: datetime) -> None:
    moment = min(moment, datetime(9998, 1, 1, tzinfo=moment.tzinfo))
    offset = moment.utcoffset() or timedelta()
    assert parse_date(moment.isoformat()) == moment.replace(tzinfo=None) - offset


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-06-01T11:00:00Z", datetime(2024, 6, 1, 11)),
        ("2024-06-01T12:02:00Z", LATEST),
        ("2024-06-01T12:02:00.000001Z", LATEST),
        ("9999-12-31T23:59:59Z", LATEST),
        ("1969-12-31T23:59:59Z", EPOCH),
        ("0000-01-01T00:00:00Z", EPOCH),
        ("garbage", NOON),
        (None, NOON),
        (1717243200000, NOON),
        ({"$date": 1}, NOON),
        (b"2024", NOON),
    ],
)
def test_record_dates_are_clamped(value: object, expected: datetime) -> None:
    assert date_or(value, NOON, NOON) == expected


def test_a_commit_before_1970_does_not_date_its_records_there() -> None:
    old = datetime(1600, 1, 1)
    assert date_or("2024-06-01T11:00:00Z", old, old) == EPOCH
    assert date_or(None, old, old) == EPOCH


@pytest.mark.parametrize(
    ("entry_ms", "expected"),
    [
        (1_717_243_200_123, datetime(2024, 6, 1, 12, 0, 0, 123000)),
        (-1, EPOCH),
        (2**64 - 1, datetime(9999, 12, 31, 23, 59, 59, 999000)),
    ],
)
def test_entry_moment(entry_ms: int, expected: datetime) -> None:
    assert entry_moment(entry_ms) == expected


@pytest.mark.parametrize(
    ("told", "is_believed"),
    [
        (NOON, True),
        (NOON + timedelta(minutes=2), True),
        (NOON + timedelta(minutes=2, microseconds=1), False),
        (NOON - timedelta(days=4), True),
        (NOON - timedelta(days=4, microseconds=1), False),
        (datetime.min, False),
        (datetime.max, False),
        (None, False),
    ],
)
def test_the_time_that_an_event_tells_is_a_claim(told: datetime | None, *, is_believed: bool) -> None:
    assert moment_of(told, 1_717_243_200_000) == (told if is_believed else NOON)


@pytest.mark.parametrize("entry_ms", [0, 2**64])
def test_moments_at_the_ends_of_time(entry_ms: int) -> None:
    for told in (datetime.min, datetime.max, None):
        assert moment_of(told, entry_ms) in (told, entry_moment(entry_ms))


def test_latest_date() -> None:
    assert latest_date(NOON) == LATEST
    assert latest_date(datetime.max) == datetime.max
