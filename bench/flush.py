"""The store alone: one writer, batch sizes from 1 to 10,000, and what each costs an event."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import uvloop

from bench.corpus import entries
from bench.servers import cpu_s, servers
from fastworker.edge.store import Store
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.table import derive as derived
from fastworker.table.batch import Batch
from fastworker.table.mapper import map_commit

ENTRY_MS = 1_790_000_000_000


def flush(folder: Path, *, size: int, events: int, derive: str) -> dict[str, Any]:
    batches = [Batch()]
    for fields in entries(folder, "native", events):
        event = decode_entry(fields)
        if isinstance(event, Commit):
            batches[-1].put(map_commit(event, ENTRY_MS))
        batches[-1].settle("1-1", payload_bytes=1)
        if len(batches[-1].entries) >= size:
            batches.append(Batch())
    with servers() as running:

        async def write() -> tuple[float, float]:
            store = await Store.connect(running.postgres.url, derive=derived.FULL if derive == "full" else derived.CORE)
            start, own = time.perf_counter(), time.process_time()
            for batch in batches:
                await store.write(batch)
            took = time.perf_counter() - start, time.process_time() - own
            await store.close()
            return took

        before = cpu_s(running.postgres.pid)
        seconds, own = uvloop.run(write())
        server = cpu_s(running.postgres.pid) - before
    return {
        "events/s": events / seconds,
        "ms per flush": seconds / len(batches) * 1e3,
        "writer CPU us/event": own / events * 1e6,
        "postgres CPU us/event": server / events * 1e6,
    }
