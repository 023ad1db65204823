"""How many bytes a record takes in PostgreSQL, with what follows from it and all indexes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastworker.table.schema import TABLES

ROW_BYTES: Final = 1_900.0
"""Where the tables hold too few to tell (docs/history.md has what was measured)."""
ROWS_MIN: Final = 20_000
_SIZES: Final = """
SELECT sum(pg_total_relation_size(oid)) FILTER (WHERE relnamespace = 'public'::regnamespace OR relname IN (
        'versions', 'twins', 'gates', 'profiles'))::float8
    / nullif(sum(reltuples) FILTER (WHERE oid = ANY($1::text[]::regclass[]) AND reltuples > 0), 0),
    sum(reltuples) FILTER (WHERE oid = ANY($1::text[]::regclass[]) AND reltuples > 0)
FROM pg_class WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'fastworker'::regnamespace)
"""


async def row_bytes(rows: Callable[..., Awaitable[Any]]) -> float:
    """As the tables here have it, by the statistics of PostgreSQL. `rows`: fetches a statement's rows."""
    found = (await rows(_SIZES, [table.qualified for table in TABLES]))[0]
    return float(found[0]) if found[1] is not None and found[1] >= ROWS_MIN else ROW_BYTES
