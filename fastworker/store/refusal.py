"""Whose fault a refusal of PostgreSQL is: one row's content, the database's state, or a bug of ours.

Most SQLSTATEs say it. A constraint, a trigger or a type can be in the way of everybody's rows or of one: such an error
is in doubt, and store/blame.py asks with a row of its own (table/control.py). So is whatever code of the database's own
(the API's triggers) raises, by any SQLSTATE: it may look at what one row says.
"""

from __future__ import annotations

import re
from enum import Enum, auto

from asyncpg.exceptions import PostgresError

from fastworker.store.routines import packaged


class Whose(Enum):
    ROW = auto()  # in doubt: the row's, unless a control row is refused as well
    STATE = auto()  # waited for: somebody has to mend the database, or it mends itself
    OURS = auto()


_IN_DOUBT = ("21", "22", "23", "38", "39", "44", "54", "P0")  # classes
_IN_DOUBT_CODES = {"XX000"}  # "invalid memory alloc request size" is one of them
_STATES = {
    "2200H",  # a used-up sequence
    "22P05",  # an encoding without the character
    "23503",  # a foreign key: nobody of ours makes one that rows of ours can break
}
_BUGS = {"21000", "42601", "42P02"}
_USED_UP = {"2200H", "22P05"}  # whoever runs into them
_SERVERS = ("08", "25", "28", "3D", "40", "53", "57", "58", "F0", "XX")  # classes: whoever runs into them
_SERVERS_CODES = {"55P03"}
OUT_OF_TIME = {"57014", "55P03"}  # a statement, or its wait for a lock; the first, too, where somebody cancels it
_OUR_FUNCTIONS = {"put", "put_whole", "recompute", "newer", *(routine.name for routine in packaged())}
_CODE = re.compile(r'(?:PL/\w+ function |SQL function )"?([\w.]+)', re.ASCII)
_QUOTED = re.compile(r"[\"«„]([^\"»“]+)[\"»“]")


def whose(error: PostgresError) -> Whose:
    state = error.sqlstate or ""
    is_servers = state[:2] in _SERVERS or state in _SERVERS_CODES or state in _USED_UP
    if not is_servers and foreign_code(error):
        return Whose.ROW
    if state in _STATES:
        return Whose.STATE
    if state in _BUGS:
        return Whose.OURS
    return Whose.ROW if state[:2] in _IN_DOUBT or state in _IN_DOUBT_CODES else Whose.STATE


def sentence(error: PostgresError) -> str:
    """What is refused and what mends it, for a state."""
    what = f"PostgreSQL: {str(error).partition(chr(10))[0]} (SQLSTATE {error.sqlstate})"  # its details are of one row
    cure = _cure(error)
    return f"{what}. {cure}" if cure else what


def _cure(error: PostgresError) -> str:
    state = error.sqlstate or ""
    table, constraint, column = (_name(error, which) for which in ("table_name", "constraint_name", "column_name"))
    if state == "2200H":
        found = _QUOTED.search(str(error))
        sequence = found[1] if found else "the sequence"
        owner = sequence.removesuffix("_id_seq")
        return (
            f"The ids are used up: ALTER SEQUENCE {sequence} AS bigint; and for the column that takes them, such as "
            f"ALTER TABLE {owner} ALTER COLUMN id TYPE bigint."
        )
    if state == "22P05":
        return "The database's encoding cannot hold every character: make the database anew with ENCODING 'UTF8'."
    if state == "23502" and table and column:
        return (
            f"Ingestion writes no {column}: ALTER TABLE {table} ALTER COLUMN {column} SET DEFAULT a value, or DROP NOT "
            "NULL."
        )
    if state == "23514" and not constraint:
        return f"Make a partition of {table or 'the table'} for every row, such as a DEFAULT one."
    if state[:2] in ("23", "44") and table and constraint:
        return f"It is not ingestion's: ALTER TABLE {table} DROP CONSTRAINT {constraint}, or DROP INDEX, or loosen it."
    if state in OUT_OF_TIME:
        code = foreign_code(error)
        return f"The function {code} of this database was at work: make it quicker." if code else ""
    if code := foreign_code(error):
        return f"The function {code} of this database refuses it: mend it, or drop its trigger."
    if state in ("0A000", "428C9", "55000"):
        return "Somebody has changed this table, or published it: `fastworker check` names what is in the way."
    if state in ("22001", "42804", "42P10", "42703", "42704", "42883", "42P01", "42809"):
        return "The schema is not what ingestion needs: `fastworker check` names what differs."
    if state == "42501" and "row-level security" in str(error):
        found = _QUOTED.search(str(error))
        name = found[1] if found else "the table"
        return (
            f"Its policies would hide rows: ALTER TABLE {name} DISABLE ROW LEVEL SECURITY, or ALTER ROLE ... BYPASSRLS."
        )
    if state == "42501":
        return "The worker needs what `fastworker grants worker` prints; commands run as the owner of the tables."
    return ""


def _name(error: PostgresError, which: str) -> str | None:
    return getattr(error, which, None)


def foreign_code(error: PostgresError) -> str | None:
    """A function that is not ours and was running."""
    for name in _CODE.findall(_name(error, "context") or ""):
        if not name.startswith("fastworker.") and name not in _OUR_FUNCTIONS:
            return f"{name}()"
    return None
