"""The floor: COPY (binary, one connection) of a run's final rows into the same empty, indexed tables."""

from __future__ import annotations

import io
import time

import asyncpg

_TABLES = "SELECT relname FROM pg_stat_user_tables WHERE schemaname = 'public' ORDER BY relname"


async def floor_s(url: str) -> float:
    """Seconds. The tables are emptied and filled again."""
    connection = await asyncpg.connect(url)
    try:
        tables = [row[0] for row in await connection.fetch(_TABLES)]
        data = {}
        for table in tables:
            out = io.BytesIO()
            await connection.copy_from_query(f'SELECT * FROM public."{table}"', output=out, format="binary")
            if len(out.getvalue()) > 40:  # more than the header
                data[table] = out.getvalue()
        await connection.execute(f"TRUNCATE {', '.join(f'public.{table}' for table in tables)} CASCADE")
        await connection.execute("CHECKPOINT")
        start = time.perf_counter()
        for table, rows in data.items():
            await connection.copy_to_table(table, schema_name="public", source=io.BytesIO(rows), format="binary")
        return time.perf_counter() - start
    finally:
        await connection.close()
