"""Bytes to rows on one core: each stream form and the raw frame, by stage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.corpus import entries
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit

ENTRY_MS = 1_790_000_000_000


def decode(folder: Path, form: str, events: int) -> dict[str, Any]:
    """Microseconds per event of decoding the entry, mapping its records to rows, coalescing them."""
    found = list(entries(folder, form, events))
    start = time.process_time()
    decoded = [decode_entry(fields) for fields in found]
    after_decode = time.process_time()
    mapped = [map_commit(event, ENTRY_MS) for event in decoded if isinstance(event, Commit)]
    after_map = time.process_time()
    batch = Batch()
    for each in mapped:
        batch.put(each)
        if batch.count > 5_000:
            batch = Batch()
    end = time.process_time()
    count = len(found)
    return {
        "events/s": count / (end - start),
        "decode us": (after_decode - start) / count * 1e6,
        "map us": (after_map - after_decode) / count * 1e6,
        "batch us": (end - after_map) / count * 1e6,
    }
