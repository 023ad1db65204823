"""Micro-benchmarks of the pure floors, for `./scripts/bench --compare`: pytest-benchmark keeps and compares results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.corpus import Fields, entries, prepare
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.event.frame import decode_frame
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit

ENTRY_MS = 1_790_000_000_000
COUNT = 1_000


@pytest.fixture(scope="session")
def folder() -> Path:
    return prepare(7, 20_000)


@pytest.fixture(scope="session", params=["native", "json", "frame"])
def form(request: pytest.FixtureRequest, folder: Path) -> tuple[str, list[Fields]]:
    return request.param, list(entries(folder, request.param, COUNT))


def test_decode(benchmark: Any, form: tuple[str, list[Fields]]) -> None:
    """A thousand entries of one form to events."""
    name, found = form
    benchmark.group = f"decode {name}"
    assert len(benchmark(lambda: [decode_entry(fields) for fields in found])) == len(found)


def test_map(benchmark: Any, form: tuple[str, list[Fields]]) -> None:
    """Their records to rows, coalesced in one batch."""
    name, found = form
    benchmark.group = f"map {name}"
    commits = [event for fields in found if isinstance(event := decode_entry(fields), Commit)]

    def put() -> Batch:
        batch = Batch()
        for commit in commits:
            batch.put(map_commit(commit, ENTRY_MS))
        return batch

    assert len(benchmark(put).changes) > COUNT / 2


def test_frame(benchmark: Any, folder: Path) -> None:
    """A thousand WebSocket frames, CAR and all, to events: what the reader does."""
    frames = [fields[b"f"] for fields in entries(folder, "frame", COUNT)]
    assert len(benchmark(lambda: [decode_frame(frame, None) for frame in frames])) == len(frames)
