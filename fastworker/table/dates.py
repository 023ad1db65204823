"""Text to a moment: whatever a client wrote as a date, as naive UTC (the contract's columns are `timestamp`).

A date is what `datetime.fromisoformat` reads (no offset means UTC, an offset is converted, digits below a microsecond
are cut) or one of the near misses that clients write and other parsers take: spaces around it, lower-case `t` and `z`,
one digit where two belong, 24:00, a leap second (it is the next second), year 0, JavaScript's expanded years (a sign
and six digits). A moment outside the years that Python knows is the nearest inside: dates are clamped anyway.
Everything else is no date; the callers have the event's moment.
"""

# ruff: noqa: DTZ001, DTZ901 - naive UTC is the contract

from __future__ import annotations

import re
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

EPOCH = datetime(1970, 1, 1)
SKEW = timedelta(minutes=2)  # how far a record may be dated after its commit (state law, Dates)
BEHIND = timedelta(days=4)  # how far a commit may be dated before it was received: relays replay three days
_ENTRY_MS_MAX = 253_402_300_799_999  # 9999-12-31T23:59:59.999: stream ids may be made up by hand

# What repeats is possessive: it never gives back, or a date of many spaces would cost their square.
_NEAR_MISS = re.compile(
    r"\s*+(\d{4}|[+-]\d{6})-(\d{1,2})-(\d{1,2})"
    r"(?:(?:[Tt_]|\s++)(\d{1,2}):(\d{1,2})(?::(\d{1,2})(?:[.,](\d*+))?)?)?"
    r"\s*+(?:[Zz]|([+-])(\d{1,2}):?(\d\d)?)?\s*+",
    re.ASCII,
)


def parse_date(text: str) -> datetime | None:
    """The moment as naive UTC, None if the text is no date. Never raises."""
    # Nearly every date is 2024-01-01T00:00:00.000Z: without its Z it is read in a third of the time.
    if len(text) == 24 and text[23] == "Z":
        try:
            moment = datetime.fromisoformat(text[:23])
        except ValueError:
            return _near_miss(text)
        if moment.tzinfo is None:  # else there was an offset in front of the Z
            return moment
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return _near_miss(text)
    offset = moment.utcoffset()
    moment = moment.replace(tzinfo=None)
    return moment if offset is None else _shifted(moment, -offset)


def _near_miss(text: str) -> datetime | None:
    found = _NEAR_MISS.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second, fraction, sign, offset_hour, offset_minute = found.groups("0")
    offset = timedelta(hours=int(offset_hour), minutes=int(offset_minute))
    time = timedelta(hours=int(hour), minutes=int(minute), seconds=int(second))
    is_time = (int(hour) < 24 or time == timedelta(hours=24)) and int(minute) < 60 and int(second) <= 60
    if not is_time or int(offset_hour) > 23 or int(offset_minute) > 59:
        return None
    in_year = int(year)
    is_known = 1 <= in_year <= 9999
    try:  # the calendar repeats every 400 years
        midnight = datetime(in_year if is_known else 2000 + in_year % 400, int(month), int(day))
    except ValueError:
        return None
    if not is_known:
        return datetime.max if in_year > 0 else datetime.min
    time += timedelta(microseconds=int(fraction[:6].ljust(6, "0")))
    return _shifted(midnight, time + offset if sign == "-" else time - offset)


def _shifted(moment: datetime, by: timedelta) -> datetime:
    try:
        return moment + by
    except OverflowError:
        return datetime.max if by > timedelta() else datetime.min


def date_or(value: Any, otherwise: datetime, happened: datetime) -> datetime:
    """A record's date: what it says, or `otherwise` if that is no date; never before 1970 nor after what the records of
    a commit that happened then may say."""
    moment = (parse_date(value) if type(value) is str else None) or otherwise
    if EPOCH <= moment <= happened:  # nearly every one
        return moment
    return max(EPOCH, min(moment, latest_date(happened)))


def entry_moment(entry_ms: int) -> datetime:
    """The moment of a stream id (milliseconds since 1970)."""
    return EPOCH + timedelta(milliseconds=min(max(entry_ms, 0), _ENTRY_MS_MAX))


def moment_of(told: datetime | None, entry_ms: int) -> datetime:
    """When an event happened: the time it tells, which is a claim of its host, where that is near the time at which it
    was received; else that."""
    received, earliest, latest = _believed(entry_ms)
    # mutant: the moment of the entry ignored
    return told if told is not None and earliest <= told <= latest else received


@lru_cache(16)  # a busy stream has many entries of one millisecond
def _believed(entry_ms: int) -> tuple[datetime, datetime, datetime]:
    received = entry_moment(entry_ms)
    return received, _shifted(received, -BEHIND), latest_date(received)


def latest_date(happened: datetime) -> datetime:
    """The end of what the records of a commit that happened then may say."""
    return _shifted(happened, SKEW)
