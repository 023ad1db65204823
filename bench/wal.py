"""Write-ahead log by table, its indexes with it: what pg_waldump reads after a full stream."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from bench.end_to_end import drain
from bench.servers import SETTINGS, servers
from fastworker.edge.embedded import EmbeddedPostgres

_KEEP = {"wal_keep_size": "8GB"}  # nothing of the run is recycled
_RECORD = re.compile(r"len \(rec/tot\): +\d+/ *(\d+),.*?rel \d+/\d+/(\d+)")
_TABLES = """
SELECT pg_relation_filenode(c.oid)::text, coalesce(of_index.relname, of_toast.relname, c.relname)::text
FROM pg_class AS c
LEFT JOIN pg_index AS i ON i.indexrelid = c.oid
LEFT JOIN pg_class AS of_index ON of_index.oid = i.indrelid
LEFT JOIN pg_class AS of_toast ON of_toast.reltoastrelid = c.oid
WHERE pg_relation_filenode(c.oid) IS NOT NULL AND c.relnamespace::regnamespace::text IN ('public', 'fastworker')
"""


def wal(folder: Path, *, form: str, events: int) -> dict[str, Any]:
    """Bytes an event, by table; `others`: catalogs, commits, checkpoints."""
    with servers(postgres_settings={**SETTINGS, **_KEEP}) as running:
        first = uvloop.run(_ask(running.postgres.url, "SELECT pg_current_wal_lsn()::text"))[0][0]
        uvloop.run(drain(running, folder, form, events, {}))
        last = uvloop.run(_ask(running.postgres.url, "SELECT pg_current_wal_flush_lsn()::text"))[0][0]
        tables = dict(uvloop.run(_ask(running.postgres.url, _TABLES)))
        found = _by_table(running.postgres, first, last, tables)
    total = sum(found.values())
    return {"WAL kB/event": total / events / 1e3} | {
        f"{table} WAL B/event": size / events for table, size in found.most_common(16)
    }


async def _ask(url: str, query: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


def _by_table(postgres: EmbeddedPostgres, first: str, last: str, tables: dict[str, str]) -> Counter[str]:
    found: Counter[str] = Counter()
    command = [
        f"{postgres.programs}/pg_waldump",
        f"--path={postgres.files}/pg_wal",
        f"--start={first}",
        f"--end={last}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as dump:
        assert dump.stdout is not None
        for line in dump.stdout:
            if record := _RECORD.search(line):
                found[tables.get(record[2], "others")] += int(record[1])
            elif size := re.search(r"/ *(\d+),", line):
                found["others"] += int(size[1])
    return found
