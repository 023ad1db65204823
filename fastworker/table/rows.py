"""Rows by name: where each column is in a row tuple. `row[POST.root_uri]`, never `row[7]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastworker.table import schema
from fastworker.table.schema import Table


class Positions:
    """The columns of one table as attributes; each is its position in the row tuples of that table.

    Made from the schema, so a column that is added or moved there is moved here. An unknown name is an AttributeError.
    """

    def __init__(self, table: Table) -> None:
        for number, column in enumerate(table.columns):  # one by one: such attributes are the fastest
            setattr(self, column, number)

    if TYPE_CHECKING:  # at run time such a method would make each access three times as slow

        def __getattr__(self, name: str) -> int: ...


POST = Positions(schema.POSTS)
LIKE = Positions(schema.LIKES)
REPOST = Positions(schema.REPOSTS)
FOLLOW = Positions(schema.FOLLOWS)
BOOKMARK = Positions(schema.BOOKMARKS)
GATE = Positions(schema.GATES)
LABEL = Positions(schema.LABELS)
PROFILE = Positions(schema.PROFILES)
FEED_ITEM = Positions(schema.FEED_ITEMS)
NOTIFICATION = Positions(schema.NOTIFICATIONS)


def own_cid(table: Table, row: tuple[Any, ...]) -> str | None:
    """The record's CID, where its table has a column for it."""
    return row[table.index("cid")] if "cid" in table.columns else None
