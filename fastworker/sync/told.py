"""What the syncer tells of itself, as status, page and metrics show it (monitor/facts.py). Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class TableTruth(msgspec.Struct, frozen=True, kw_only=True):
    """How true one table is, by the samples of the last day."""

    truth: Annotated[float, Meta(description="Share of the compared rows that agree with the repositories.")]
    low: Annotated[float, Meta(description="The share of all rows is above this with 97.5 % (Wilson).")]
    compared: Annotated[int, Meta(description="Rows of repositories, and rows that should not be there.")]
    differing: Annotated[int, Meta(description="Of these missing, different or too many.")]


class Mended(msgspec.Struct, frozen=True, kw_only=True):
    """What repairs of one reason came to in the last day."""

    accounts: Annotated[int, Meta(description="Accounts settled.")]
    differences: Annotated[int, Meta(description="Rows that were missing, different or too many.")]


class RepairStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the syncer (FASTWORKER_SYNC) last told."""

    at: Annotated[float, Meta(description="When this was written, Unix time.")]
    gaps_open: Annotated[int, Meta(description="Gaps in `fastworker.gaps` that are not closed.")]
    gap_oldest_s: Annotated[float, Meta(description="Age of the oldest of them; 0: none.")]
    waiting: Annotated[int, Meta(description="Accounts that wait for a repair. Backfills are not among them.")]
    fetching: Annotated[int, Meta(description="Accounts that are being repaired.")]
    refused: Annotated[int, Meta(description="Repairs that were given up; `fastworker.repos.error` says why.")]
    oldest_s: Annotated[float, Meta(description="Seconds since the oldest repair was asked for; 0: none.")]
    mended: Annotated[dict[str, Mended], Meta(description="By the reason of the repair, of the last day.")]
    samples: Annotated[int, Meta(description="Accounts sampled in the last day.")]
    tables: Annotated[dict[str, TableTruth], Meta(description="How true each table is.")]
    hosts: Annotated[
        dict[str, float], Meta(description="Truth of all tables by group of hosts: `bsky.network` and `others`.")
    ]
    examples: Annotated[list[str], Meta(description="Some of the newest differences that samples found.")]
    resting: Annotated[list[str], Meta(description="Hosts that are left alone for a while.")]
    error: Annotated[str, Meta(description="What the syncer waits for; empty when it works.")] = ""


class HistoryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far the history that backfills ask for is (docs/history.md): of all processes that work on it together."""

    at: Annotated[float, Meta(description="When this was written, Unix time.")]
    waiting: Annotated[int, Meta(description="Accounts that wait to be fetched.")]
    fetching: Annotated[int, Meta(description="Accounts that are being fetched and written.")]
    done: Annotated[int, Meta(description="Accounts whose rows are as their repositories were.")]
    gone: Annotated[int, Meta(description="Accounts of which no host has a repository; their rows stay.")]
    refused: Annotated[int, Meta(description="Accounts that were given up; `fastworker.repos.error` says why.")]
    records: Annotated[int, Meta(description="Records of the accounts that are done.")]
    share: Annotated[float, Meta(description="Of the accounts ever asked for, those at their end: 0 to 1.")]
    accounts_per_s: Annotated[float, Meta(description="Accounts that came to their end, over the last five minutes.")]
    records_per_s: Annotated[float, Meta(description="Records compared and written, over the last five minutes.")]
    bytes_per_s: Annotated[float, Meta(description="Bytes of repositories, over the last five minutes.")]
    left_s: Annotated[
        float | None, Meta(description="Seconds left at this rate; null: nothing is left, or nobody knows.")
    ]
    lists_open: Annotated[
        int, Meta(description="Lists of accounts that are still being read: more accounts will come.")
    ]
    paused: Annotated[bool, Meta(description="`fastworker backfill --pause`: it waits until `--resume`.")]
    resting: Annotated[
        dict[str, float], Meta(description="Hosts that hold it back, and for how many seconds; the longest five.")
    ]
    resting_hosts: Annotated[int, Meta(description="How many such hosts there are.")]

    @property
    def ended(self) -> int:
        return self.done + self.gone + self.refused

    @property
    def open(self) -> int:
        return self.waiting + self.fetching
