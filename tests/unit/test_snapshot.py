"""When a record of a snapshot was written, as far as its key tells."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from fastworker.table.snapshot import moment_of, tid_moment, tid_of

FETCHED = datetime(2026, 3, 1, 12)  # noqa: DTZ001 - naive UTC
WRITTEN = datetime(2026, 2, 1, 12)  # noqa: DTZ001


@pytest.mark.parametrize(
    ("collection", "is_keys"),
    [
        ("app.bsky.feed.post", True),
        ("app.bsky.feed.like", True),
        ("app.bsky.graph.follow", True),
        ("com.example.note", True),
        ("app.bsky.feed.threadgate", False),  # its key is that of the post, which may be years older
        ("app.bsky.feed.postgate", False),
        ("app.bsky.graph.list", False),  # is replaced under its key
        ("app.bsky.feed.generator", False),
        ("app.bsky.graph.starterpack", False),
    ],
)
def test_a_key_tells_of_records_that_have_one_of_their_own(collection: str, is_keys: bool) -> None:
    key = tid_of(WRITTEN)
    assert moment_of(collection, key, FETCHED) == (tid_moment(key) if is_keys else FETCHED)


@pytest.mark.parametrize("key", ["self", tid_of(FETCHED + timedelta(days=1)), tid_of(datetime(1999, 1, 1))])  # noqa: DTZ001
def test_a_key_that_is_none_or_not_sane_tells_nothing(key: str) -> None:
    assert moment_of("app.bsky.feed.post", key, FETCHED) == FETCHED
