"""The pure floors, a thousand events at a time: what the micro-benchmarks time and whose instructions are counted."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libipld
import orjson

from bench.corpus import Fields, entries, prepare
from fastworker.errors import InvalidEvent
from fastworker.event import Commit
from fastworker.event.car import is_block_of, select_blocks
from fastworker.event.entry import decode_entry, encode_json, encode_native
from fastworker.event.frame import decode_frame
from fastworker.event.record import load_record
from fastworker.table import derive
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit

ENTRY_MS = 1_795_824_000_000  # 2026-11-28, as the corpus has it
COUNT = 1_000
ROUNDS = 1  # of which instructions are counted, after one that is not
SEED, EVENTS = 7, 20_000  # of the corpus
Body = Callable[[], object]


def bodies() -> dict[str, Body]:
    """By name: calls without arguments that do the same work each time."""
    folder = prepare(SEED, EVENTS)
    forms = {form: list(entries(folder, form, COUNT)) for form in ("native", "json", "frame")}
    forms["json of the predecessor"] = [_predecessor(fields) for fields in forms["json"]]
    frames = [fields[b"f"] for fields in forms["frame"]]
    payloads = [libipld.decode_dag_cbor_multi(frame)[1] for frame in frames]
    cars = [(p["blocks"], {op["cid"] for op in p["ops"] if op["cid"]}) for p in payloads if "blocks" in p]
    events = [decode_entry(fields) for fields in forms["native"]]
    commits = [event for event in events if isinstance(event, Commit)]
    parsed = [event for fields in forms["json"] if isinstance(event := decode_entry(fields), Commit)]
    ops = [op for commit in commits for op in commit.ops if op.block is not None]
    mapped = [map_commit(commit, ENTRY_MS) for commit in commits]

    def car() -> None:
        for blocks, wanted in cars:
            for cid, block in select_blocks(blocks, wanted)[0].items():
                assert is_block_of(cid, block)

    def records() -> None:
        for op in ops:
            try:
                load_record(op)
            except InvalidEvent:
                continue

    def batch() -> Batch:
        made = Batch()
        for each in mapped:
            made.put(each)
        return made

    def effects() -> derive.Effects:
        fx = derive.Effects(derive.FULL)
        for each in mapped:
            for change in each.changes:
                if change.row is not None:
                    derive.added(fx, change.table, change.row, change.cid)
        return fx

    return {
        **{f"entry to event, {form}": _decoding(found) for form, found in forms.items()},
        "frame to event": lambda: [decode_frame(frame, None) for frame in frames],
        "CAR walk and hashes": car,
        "record from DAG-CBOR": records,
        "event to rows, native": lambda: [map_commit(commit, ENTRY_MS) for commit in commits],
        "event to rows, json": lambda: [map_commit(commit, ENTRY_MS) for commit in parsed],
        "rows to batch": batch,
        "rows to derived rows": effects,
        "event to entry, native": lambda: [encode_native(event) for event in events],
        "event to entry, json": lambda: [encode_json(event) for event in events],
    }


def run_between_marks(word: str = "") -> None:
    """For `bench.instructions`: every body whose name has the word, between two calls of getppid(2); prints their names
    in this order."""
    found: dict[str, Body] = {"": lambda: None, **{name: body for name, body in bodies().items() if word in name}}
    gc.collect()
    gc.disable()
    for name, body in found.items():
        print(name, flush=True)
        body()
        os.getppid()
        for _ in range(ROUNDS):
            body()
        os.getppid()


def _decoding(found: list[Fields]) -> Body:
    return lambda: [decode_entry(fields) for fields in found]


def _predecessor(fields: Fields) -> Fields:
    """The entry as the predecessor's reader would have written it."""
    if (tests := str(Path(__file__).resolve().parent.parent / "tests")) not in sys.path:
        sys.path.append(tests)
    from sdk_dialect import predecessor  # type: ignore[import-not-found]

    data: dict[str, Any] = orjson.loads(fields[b"data"])
    for op in data.get("ops", ()):
        if "record" in op and op["record"].get("$type", "").startswith("app.bsky."):
            op["record"] = predecessor(op["record"])
    return {**fields, b"data": orjson.dumps(data)}
