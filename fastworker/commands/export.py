"""`fastworker export DID`: an account's records as they are stored, JSON lines, for a person or another tool.

Rows of the tables, not the records themselves: what the mapper leaves out is not there. In the order of their URIs.
"""

from __future__ import annotations

import sys
from typing import Final

import orjson

from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, Unreachable
from fastworker.event.syntax import is_did
from fastworker.store.migrate import check as check_schema
from fastworker.store.stored import open_stored
from fastworker.table.schema import TABLES

_JSON: Final = {
    table.name: frozenset(c for c, kind in zip(table.columns, table.types, strict=True) if kind == "jsonb")
    for table in TABLES
}


async def export(database_url: str, did: str) -> ExitCode:
    """DONE, or NO when nothing is stored of the account."""
    if not is_did(did):
        raise ConfigError(f"{did[:100]!r} is not a DID, such as did:plc:ewvi7nxzyoun6zhxrhs64oiz")
    if problems := await check_schema(database_url):
        raise Unreachable("\n".join(problems))
    count = 0
    try:
        async with open_stored(database_url) as stored:
            async for table, row in stored.rows(did):
                json_columns = _JSON.get(table, frozenset())
                values = {
                    name: orjson.Fragment(value) if name in json_columns and value is not None else value
                    for name, value in row.items()
                }
                sys.stdout.buffer.write(orjson.dumps({"table": table, **values}) + b"\n")
                count += 1
    except StoreUnavailable as error:
        raise Unreachable(str(error)) from error
    sys.stdout.flush()
    return ExitCode.DONE if count else ExitCode.NO
