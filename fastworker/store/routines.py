"""SQL routines of the flush (store/sql): the one statement of what a look, a write and a look back are.

Both forms of a flush use them: step by step (store/flush.py) and as one call (store/whole.py). `fastworker migrate`
installs them each time, so they are not frozen inside a migration. Their names carry a version: a routine whose
arguments or meaning change gets a new one, and the release before it goes on with the old one beside it.

Columns are not listed in the files: `{{columns likes}}` and the like are made from the schema.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources

import msgspec

from fastworker.store import statements
from fastworker.store.schema_admin import KNOWS_FLOORS
from fastworker.table.schema import DERIVED, PROFILES, TABLES, Table

# mutant: a routine is not listed
ORDER = (
    "look",
    "look_back",
    "recount",
    "pay_apart",
    "pay_bucket",
    "put",
    "recompute",
    "pay",
    "show_handles",
    "claim_handles",
    "first",
    "change",
    "put_whole",
)  # a routine comes after those that it uses
_HOT = tuple(table for table in TABLES if table.hot)
_DERIVED = {table.name: table for table in DERIVED}


class Routine(msgspec.Struct, frozen=True):
    """One routine: the name under which it is found, and the SQL that makes it or replaces it."""

    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the SQL in hex; kept as the routine's comment."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def install(self) -> str:
        kind = "PROCEDURE" if "PROCEDURE" in self.sql else "FUNCTION"
        return f"{self.sql}\nCOMMENT ON {kind} fastworker.{self.name} IS 'sha256:{self.checksum}';"


def missing(installed: dict[str, str | None]) -> list[Routine]:
    """Those that are not there, or are not this release's. `installed`: name to comment."""
    # mutant: an installed routine is never replaced
    return [one for one in packaged() if installed.get(one.name) != f"sha256:{one.checksum}"]


@cache
def packaged() -> tuple[Routine, ...]:
    """The routines that this release calls, in the order in which they can be made."""
    return tuple(_routine(_text(name)) for name in ORDER)


def _text(name: str) -> str:
    return resources.files("fastworker.store").joinpath("sql", f"{name}.sql").read_text("utf-8")


def _filled(template: str) -> str:
    return re.sub(r"\{\{(\w+)(?: (\w+))?\}\}", _fill, template)


def _routine(template: str) -> Routine:
    sql = _filled(template)
    name = re.search(r"CREATE OR REPLACE (?:FUNCTION|PROCEDURE) fastworker\.(\w+)", sql)
    assert name is not None
    return Routine(name[1], sql)


def _fill(found: re.Match[str]) -> str:
    word, table = found[1], found[2]
    return _OF_TABLE[word](_DERIVED[table]) if table else _WORDS[word]()


def _excluded(table: Table) -> list[str]:
    return [column for column in table.columns if column not in table.key.split(", ")]


def _new_rows(table: Table) -> str:
    """A pair that is taken is not tried: where another flush is removing its row, the insert would wait for it."""
    same = " AND ".join(f"t.{column} = n.{column}" for column in table.pair)
    free = f" WHERE NOT EXISTS (SELECT FROM public.{table.name} AS t WHERE {same})" if table.pair else ""
    columns = ", ".join(table.columns)
    return f"INSERT INTO public.{table.name} ({columns}) SELECT n.* FROM unnest(new_{table.name}) AS n{free}"


def _insert_new(table: Table) -> str:
    return f"""
    IF new_{table.name} IS NOT NULL THEN
        WITH new AS ({_new_rows(table)} ON CONFLICT DO NOTHING RETURNING uri) SELECT array_agg(uri) INTO got FROM new;
        placed := placed || got;
        missing := missing + cardinality(new_{table.name}) - coalesce(cardinality(got), 0);
    END IF;"""


def _insert_whole(table: Table) -> str:
    """All of them or nothing: PostgreSQL does not look before each row, and one that is there is an error."""
    return f"""
    IF new_{table.name} IS NOT NULL THEN
        {_new_rows(table)};
        GET DIAGNOSTICS made = ROW_COUNT;
        missing := missing + cardinality(new_{table.name}) - made;
    END IF;"""


def _bound(statement: str, *names: str) -> str:
    """The statement with names, or expressions, for $1 and so on."""
    return re.sub(r"\$(\d+)", lambda found: names[int(found[1]) - 1], statement)


def _typed(statements_of: tuple[tuple[str, tuple[str, ...]], ...]) -> list[tuple[str, str]]:
    """The arguments of these statements, each once, with the types that the statements give them."""
    types: dict[str, str] = {}
    for statement, names in statements_of:
        for number, type_ in re.findall(r"\$(\d+)::([\w.]+(?:\[\])?)", statement):
            types.setdefault(names[int(number) - 1], type_)
    return list(types.items())


def _each(statements_of: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    """Each statement where its first argument is there."""
    texts = ((names[0], re.sub("^SELECT", "PERFORM", _bound(text, *names))) for text, names in statements_of)
    return "\n".join(f"    IF {name} IS NOT NULL THEN\n        {text};\n    END IF;" for name, text in texts)


def _arguments(pairs: Iterable[tuple[str, str]], mode: str = "") -> str:
    return "\n    ".join(f"{mode}{name} {type_}," for name, type_ in pairs)


def _change_arguments() -> list[tuple[str, str]]:
    types = dict(statements.key_arguments(statements.KEYS_CHANGED))
    types |= {"seen": "text[]", "no_twins": "text[]", "new_twins": "fastworker.twins[]"}
    types |= dict(statements.row_arguments("set", hot=True)) | dict(statements.row_arguments("new", hot=False))
    types |= dict(_typed(((statements.GATE, statements.GATED), *statements.OF_GATES)))
    types |= {"user_profiles": f"{PROFILES.row_type}[]", "label_events": "varchar[]"}
    return [(name, types[name]) for name in statements.CHANGE_ARGUMENTS]


def _with_pairs(table: Table) -> str:
    """What is read beside the records of `mine`: the winners and twins of their pairs, and of the pairs that they want.
    Records that are taken to be new are among them only if one of these is taken."""
    parts = ", ".join(f"split_part(pair, E'\\n', {n}) AS {c}" for n, c in enumerate(table.pair, 1))
    # Split first (OFFSET 0 keeps it so): else one half of the pair is looked up, by an index that many rows share.
    wanted = f"(SELECT {parts} FROM unnest(places) AS u (pair) OFFSET 0)"
    winners = f"ARRAY(SELECT t.uri FROM {wanted} AS p JOIN {table.qualified} AS t USING ({', '.join(table.pair)}))"
    fresh = ""
    if statements.may_be_taken(table):
        fresh = f"""
        IF {statements.has_any("fresh_uris", table)} THEN
            IF cardinality(winners) = 0 THEN
                places := NULL;
            ELSE
                mine := mine || {statements.slice_of("fresh_uris", table)};
                taken := taken || '{table.name}'::text;
            END IF;
        END IF;"""
    cids = ""
    if (statement := statements.CIDS.get(table.name)) is not None:
        keys = (
            "winners" if table.name == "reposts" else "ARRAY(SELECT u || '#notification' FROM unnest(winners) AS k (u))"
        )
        cids = f"""
        IF cardinality(winners) > 0 THEN
            cids := cids || ARRAY(SELECT c.uri || ' ' || c.cid FROM ({_bound(statement, keys)}) AS c (uri, cid)
                WHERE c.cid IS NOT NULL);
        END IF;"""
    return f"""
        places := {statements.slice_of("read_pairs", table)};
        winners := NULL;
        IF cardinality(places) > 0 THEN
            winners := {winners};
        END IF;{fresh}
        mine := mine || winners;
        IF cardinality(mine) > 0 THEN
            SELECT array_agg(w), array_agg('twin ' || w.uri || ' ' || w.xmin), array_agg(w.uri),
                array_agg(DISTINCT w.pair)
            INTO more, got, strays, places
            FROM fastworker.twins AS w WHERE w.table_name = '{table.name}' AND w.pair = ANY(places || ARRAY(
                SELECT {statements.pair_in(table)} FROM {table.qualified} AS t WHERE t.uri = ANY(mine) UNION ALL
                SELECT v.pair FROM fastworker.twins AS v WHERE v.uri = ANY(mine)));
            IF more IS NOT NULL THEN
                old_twins := old_twins || more;
                seen := seen || got;
                winners := winners || {winners};
                mine := mine || winners;
                IF EXISTS (SELECT FROM {table.qualified} AS t WHERE t.uri = ANY(strays)) THEN
                    RAISE EXCEPTION 'a record in two places' USING ERRCODE = 'FW003';
                END IF;
            END IF;
        END IF;{cids}"""


def _read_stored(table: Table) -> str:
    short = table.name.rpartition(".")[2]
    names = ("read_uris", "fresh_uris") if statements.may_be_taken(table) else ("read_uris",)
    asked = " OR ".join(statements.has_any(name, table) for name in names)
    return f"""
    IF {asked} THEN
        mine := {statements.slice_of("read_uris", table)};{_with_pairs(table) if table.pair else ""}
        IF cardinality(mine) > 0 THEN
            SELECT array_agg(ROW({statements.readable(table)})::{table.row_type}), array_agg(t.uri || ' ' || t.xmin)
            INTO old_{short}, got FROM {table.qualified} AS t WHERE t.uri = ANY(mine);
            seen := seen || got;
        END IF;
    END IF;"""


def _as_read(table: Table) -> str:
    """Locks what was read, unless it is not there as it was read, or something is there that was not."""
    there = f"(SELECT count(*) FROM {table.qualified} AS t WHERE t.uri = ANY(mine))"
    counted, twins, differs = f", {there} INTO got, there", "", "got <> there"
    if table.pair:
        counted, differs = " INTO got", "got <> there OR waiting <> as_seen"
        twins = f"""
        places := {statements.slice_of("read_pairs", table)};
        -- Under the lock of the winner. One statement, so one snapshot: a record that moves between table and twins
        -- cannot be missed.
        SELECT count(*), count(*) FILTER (WHERE 'twin ' || w.uri || ' ' || w.xmin = ANY(seen)), {there}
        INTO waiting, as_seen, there FROM fastworker.twins AS w
        WHERE (w.table_name = '{table.name}' AND w.pair = ANY(places)) OR w.uri = ANY(mine);
        held := held + as_seen;"""
    return f"""
        mine := {statements.slice_of("read_uris", table)};
        WITH free AS (
            SELECT t.uri, t.xmin FROM {table.qualified} AS t WHERE t.uri = ANY(mine)
            ORDER BY t.uri COLLATE "C" FOR UPDATE SKIP LOCKED
        -- mutant: a row that changed since it was read
        ) SELECT count(*) FILTER (WHERE f.uri || ' ' || f.xmin = ANY(seen)){counted} FROM free AS f;{twins}
        held := held + got;
        -- mutant: what is there although it was not read
        IF {differs} THEN
            RAISE EXCEPTION 'not as it was read' USING ERRCODE = 'FW001';
        END IF;
        IF {statements.has_any("gone_uris", table)} THEN
            dead := {statements.slice_of("gone_uris", table)};
            {_bound(statements.delete(table), "dead")};{_all_of("dead")}
        END IF;"""


def _all_of(rows: str) -> str:
    """What a trigger or a rule keeps without an error is told step by step."""
    return f"""
            GET DIAGNOSTICS changed = ROW_COUNT;
            IF changed <> cardinality({rows}) THEN
                RAISE EXCEPTION 'rows stay as they are' USING ERRCODE = 'FW001';
            END IF;"""


def _of_cold(each: Callable[[Table], str]) -> str:
    """One after the other, four to a condition: most flushes have records of no or one such table, and PL/pgSQL
    prepares each condition anew in each transaction."""
    cold = [table for table in TABLES if not table.hot]
    groups = [cold[at : at + 4] for at in range(0, len(cold), 4)]
    return "".join(
        f"\n    IF {statements.has_any('read_uris', some[0], some[-1])} THEN{''.join(map(each, some))}\n    END IF;"
        for some in groups
    )


def _change_hot(table: Table) -> str:
    rows = f"set_{table.name}"
    return f"""
    IF {statements.has_any("read_uris", table)} THEN{_as_read(table)}
        IF {rows} IS NOT NULL THEN
            {_bound(statements.update(table), rows)};{_all_of(rows)}
        END IF;
    END IF;"""


def _change_cold(table: Table) -> str:
    rows = f"new_{table.name.rpartition('.')[2]}"
    return f"""
    IF {statements.has_any("read_uris", table)} THEN{_as_read(table)}
        IF {rows} IS NOT NULL THEN
            changed := 0;
            IF got > 0 THEN
                {_bound(statements.update(table), rows)};
                GET DIAGNOSTICS changed = ROW_COUNT;
            END IF;
            IF changed < cardinality({rows}) THEN
                WITH made AS ({_bound(statements.insert(table), rows)}) SELECT count(*) INTO got FROM made;
                IF changed + got <> cardinality({rows}) THEN
                    RAISE EXCEPTION 'not every row is new' USING ERRCODE = 'FW001';
                END IF;
            END IF;
        END IF;
    END IF;"""


_OF_TABLE: dict[str, Callable[[Table], str]] = {
    "columns": lambda table: ", ".join(table.columns),
    "set": lambda table: ", ".join(f"{c} = excluded.{c}" for c in _excluded(table)),
    "add": lambda table: ", ".join(f"{c} = greatest(0, t.{c} + excluded.{c})" for c in _excluded(table)),
    "moves": lambda table: " OR ".join(f"excluded.{c} <> 0" for c in _excluded(table)),
}
_WORDS: dict[str, Callable[[], str]] = {
    "change_arguments": lambda: _arguments(_change_arguments()),
    "change_passed": lambda: ", ".join(f"{name} => {name}" for name in statements.CHANGE_ARGUMENTS),
    "change_hot": lambda: "".join(_change_hot(table) for table in TABLES if table.hot).removeprefix("\n"),
    "change_cold": lambda: _of_cold(_change_cold).removeprefix("\n"),
    "crowded": lambda: _bound(statements.CROWDED, "roots", "crowd"),
    "first_arguments": lambda: _arguments(_typed(statements.COMMITTED_FIRST)),
    "read_arguments": lambda: _arguments(statements.key_arguments(statements.KEYS_READ)),
    "first_statements": lambda: _each(statements.COMMITTED_FIRST),
    "gate": lambda: _bound(statements.GATE, *statements.GATED),
    "label_events": lambda: _bound(statements.LABEL_EVENTS, "label_events"),
    "of_gates": lambda: _each(statements.OF_GATES),
    "old_rows": lambda: _arguments(
        ((f"old_{table.name.rpartition('.')[2]}", f"{table.row_type}[]") for table in TABLES), "OUT "
    ),
    "profiles": lambda: _bound(statements.PROFILES, "user_profiles"),
    "read_stored": lambda: ("".join(map(_read_stored, _HOT)) + _of_cold(_read_stored)).removeprefix("\n"),
    "twins_delete": lambda: _bound(statements.TWINS_DELETE, "no_twins"),
    "twins_put": lambda: _bound(statements.TWINS_PUT, "new_twins"),
    "waiting": lambda: statements.WAITING,
    "in_two_places": lambda: statements.IN_TWO_PLACES,
    "uris_in_two_places": lambda: _bound(statements.IN_TWO_PLACES, "uris"),
    "users": lambda: _bound(statements.USERS, "new_users"),
    "beats": lambda: statements.BEATS,
    "counters": lambda: str(statements.COUNTERS),
    "joined": lambda: str(statements.JOINED_PARTS),
    "refused": lambda: statements.REFUSED_ROW,
    "insert_new_rows": lambda: "".join(map(_insert_new, _HOT)).removeprefix("\n"),
    "insert_whole_rows": lambda: "".join(map(_insert_whole, _HOT)).removeprefix("\n"),
    "is_beaten": lambda: _bound(statements.IS_BEATEN, "uris", "repos"),
    "stale_joined": lambda: statements.STALE_JOINED,
    "written": lambda: _filled(_text("written")).removesuffix("\n"),
    "written_variables": lambda: "moving varchar[];\n    are_debts boolean;\n    is_stale boolean;",
    "new_rows_arguments": lambda: "\n    ".join(f"new_{table.name} {table.row_type}[]," for table in _HOT),
    "ours": lambda: str(KNOWS_FLOORS),
    "new_rows_passed": lambda: ", ".join(f"new_{table.name} => new_{table.name}" for table in _HOT),
}
