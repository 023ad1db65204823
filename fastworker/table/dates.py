"""Text to a moment: whatever a client wrote as a date, as naive UTC (the contract's columns are `timestamp`).

A date is RFC 3339 with what other parsers forgive: a space or `t` for the `T`, a lower-case `z`, a comma for the point,
an offset without its colon, no offset (it means UTC), no seconds, no time, spaces around it. Digits below a microsecond
are cut. Everything else is no date, and so is what Python cannot represent (year 0, a leap second, an offset that leads
out of its years): the callers have the commit's time for those.
"""

# ruff: noqa: DTZ001, DTZ901 - naive UTC is the contract

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

EPOCH = datetime(1970, 1, 1)
SKEW = timedelta(minutes=2)  # how far a record may be dated after its commit (state law, Dates)
_ENTRY_MS_MAX = 253_402_300_799_999  # 9999-12-31T23:59:59.999: stream ids may be made up by hand

_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)"
    r"(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?(?:[Zz]|([+-])(\d\d):?(\d\d))?)?",
    re.ASCII,
)


def parse_date(text: str) -> datetime | None:
    """The moment as naive UTC, None if the text is no date. Never raises."""
    # Nearly every date is 2024-01-01T00:00:00.000Z, which fromisoformat reads in a quarter of the time. It also takes
    # week dates, compact forms, any separator and (from Python 3.14) 24:00: so the shape is looked at first.
    if len(text) == 24 and text[4:20:3] == "--T::." and text[23] == "Z" and text[11:13] != "24":
        try:
            moment = datetime.fromisoformat(text[:23])
        except ValueError:
            return None
        if moment.tzinfo is None:  # else there was an offset in front of the Z
            return moment
    found = _DATE.fullmatch(text.strip())
    if found is None:
        return None
    year, month, day, hour, minute, second, fraction, sign, offset_hour, offset_minute = found.groups("0")
    offset = timedelta(hours=int(offset_hour), minutes=int(offset_minute))
    microsecond = int(fraction[:6].ljust(6, "0"))
    try:
        moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), microsecond)
        return moment + offset if sign == "-" else moment - offset
    except (ValueError, OverflowError):
        return None


def date_or(value: Any, otherwise: datetime, latest: datetime) -> datetime:
    """A record's date: what it says, or `otherwise` if that is no date; never before 1970 nor after `latest`."""
    moment = (parse_date(value) if type(value) is str else None) or otherwise
    return max(EPOCH, min(moment, latest))


def entry_moment(entry_ms: int) -> datetime:
    """The moment of a stream id (milliseconds since 1970)."""
    return EPOCH + timedelta(milliseconds=min(max(entry_ms, 0), _ENTRY_MS_MAX))


def latest_date(happened: datetime) -> datetime:
    """The end of what the records of a commit that happened then may say."""
    return happened + SKEW if happened < datetime.max - SKEW else datetime.max
