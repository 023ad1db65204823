"""Bytes to rows on one core: each stream form, a raw frame being one of them, by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libipld
import msgspec
import orjson

from bench.corpus import entries
from fastworker.errors import InvalidEvent
from fastworker.event import Commit
from fastworker.event.car import is_block_of, select_blocks
from fastworker.event.entry import decode_entry
from fastworker.event.record import load_record
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit

ENTRY_MS = 1_790_000_000_000


def decode(folder: Path, form: str, events: int) -> dict[str, Any]:
    """Events per second of all three stages; microseconds per event of each, and of what is inside them."""
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
    figures = {
        "events/s": count / (end - start),
        "entry to event us": (after_decode - start) / count * 1e6,
        "event to rows us": (after_map - after_decode) / count * 1e6,
        "rows to batch us": (end - after_map) / count * 1e6,
    }
    commits = [event for event in decoded if isinstance(event, Commit)]
    for name, work in _within(form, found, commits).items():
        start = time.process_time()
        work()
        figures[f"  of it: {name} us"] = (time.process_time() - start) / count * 1e6
    return figures


def _within(form: str, found: list[dict[bytes, bytes]], commits: list[Commit]) -> dict[str, Callable[[], object]]:
    """The parts of the stages that have a name, each measured by itself."""
    if form == "json":
        return {"parsing JSON": lambda: [orjson.loads(fields[b"data"]) for fields in found]}
    records = [op for commit in commits for op in commit.ops if op.block is not None]

    def load() -> None:
        for op in records:
            try:
                load_record(op)
            except InvalidEvent:
                continue

    parts: dict[str, Callable[[], object]] = {"decoding records": load}
    if form == "native":
        envelope = msgspec.msgpack.Decoder()
        return {"envelope without types": lambda: [envelope.decode(fields[b"n"][1:]) for fields in found], **parts}
    frames = [fields[b"f"] for fields in found]
    payloads = [libipld.decode_dag_cbor_multi(frame)[1] for frame in frames]
    cars = [
        (payload["blocks"], {op["cid"] for op in payload["ops"] if op["cid"]})
        for payload in payloads
        if "blocks" in payload and "ops" in payload
    ]
    picked = [block for car, wanted in cars for block in select_blocks(car, wanted)[0].items()]
    return {
        "header and payload": lambda: [libipld.decode_dag_cbor_multi(frame) for frame in frames],
        "walking the CAR": lambda: [select_blocks(car, wanted) for car, wanted in cars],
        "hashing blocks": lambda: [is_block_of(cid, block) for cid, block in picked],
        **parts,
    }
