"""A collection of ours is complete: CONTRIBUTING.md, "A new collection", has the list. Says what was forgotten."""

from __future__ import annotations

import inspect
import re
from importlib import resources

import pytest

from fastworker.law import model
from fastworker.store.audit import CHECKS
from fastworker.table import mapper
from fastworker.table.schema import COLLECTIONS, TABLES, Table
from tests.rig import histories
from tests.unit import test_mapper

OTHERWISE = {"fastworker.gates": {"thread gates", "post gates"}, "fastworker.profiles": {"profiles"}}
"""What the model calls the records of tables that only others follow from."""


def migrations() -> str:
    folder = resources.files("fastworker.store").joinpath("migrations")
    files = sorted((one for one in folder.iterdir() if one.name.endswith(".sql")), key=lambda one: one.name)
    return "\n".join(one.read_text("utf-8") for one in files)


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_a_collection_is_complete(collection: str) -> None:
    table = COLLECTIONS[collection]
    forgotten = []
    if table not in TABLES:
        forgotten.append("TABLES in table/schema.py")
    if collection not in mapper._ROWS:
        forgotten.append("_ROWS in table/mapper.py")
    names, _ = model.COLLECTIONS.get(collection, ("", None))
    if names not in OTHERWISE.get(table.name, {table.name}):
        forgotten.append("COLLECTIONS in law/model.py")
    if table.name not in OTHERWISE and table.name not in model.COLUMNS:
        forgotten.append("COLUMNS in law/model.py")
    if not any(case[0] == collection for case in test_mapper.WHOLE):
        forgotten.append("a case of WHOLE in tests/unit/test_mapper.py")
    if collection not in histories.WEIGHTS:
        forgotten.append("WEIGHTS in tests/rig/histories.py")
    if f'"{collection}"' not in inspect.getsource(histories.Author.record_of):
        forgotten.append("a case of Author.record_of in tests/rig/histories.py")
    assert not forgotten, f"{collection} is missing in: " + "; ".join(forgotten)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_table_is_complete(table: Table) -> None:
    sql = migrations()
    forgotten = []
    if not re.search(rf"CREATE TABLE (IF NOT EXISTS )?{re.escape(table.name)} \(", sql):
        forgotten.append("CREATE TABLE in a new file of store/migrations")
    columns = re.search(rf"CREATE TYPE {re.escape(table.row_type)} AS \(([^;]*)\);", sql)
    if columns is None or [part.split()[0] for part in columns[1].split(",")] != list(table.columns):
        forgotten.append(
            f"CREATE TYPE {table.row_type} in a new file of store/migrations, with the columns of the schema"
        )
    if f"forbidden.{table.name.rpartition('.')[2]}" not in {check.name for check in CHECKS}:
        forgotten.append("CHECKS in store/audit.py")
    assert not forgotten, f"{table.name} is missing in: " + "; ".join(forgotten)
