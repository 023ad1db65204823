"""A table's indexes put off while many rows are loaded, and built again from the catalog's own definitions.

Both in one transaction of the caller's: a load that dies leaves the table as it was, with all of them. Also those that
an operator has made. What others hang on stays: keys that foreign keys refer to, identities of replication, indexes of
partitions, and those that are not valid.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import asyncpg


class Index(NamedTuple):
    name: str  # quoted, with its schema where that is needed
    plain: str  # quoted, without schema
    definition: str
    constraint: str | None  # quoted
    constraint_definition: str | None
    tablespace: str | None  # quoted
    comment: str | None
    constraint_comment: str | None
    stays: bool

    def drop(self, table: str) -> str:
        if self.constraint is not None:
            return f"ALTER TABLE {table} DROP CONSTRAINT {self.constraint}"
        return f"DROP INDEX {self.name}"

    def create(self, table: str) -> list[str]:
        """Statements, in order. A constraint is made from its index, so that tablespace and options come back."""
        said = [f"SET LOCAL default_tablespace = {self.tablespace or 'DEFAULT'}"]
        if self.constraint is None:
            said.append(self.definition)
        elif (kind := self._kind()) is None:  # an exclusion constraint makes its own index
            said.append(f"ALTER TABLE {table} ADD CONSTRAINT {self.constraint} {self.constraint_definition}")
        else:
            said += [
                self.definition,
                f"ALTER TABLE {table} ADD CONSTRAINT {self.constraint} {kind} USING INDEX {self.plain}{self._timing()}",
            ]
        if self.comment:
            said.append(f"COMMENT ON INDEX {self.name} IS {_literal(self.comment)}")
        if self.constraint_comment:
            said.append(f"COMMENT ON CONSTRAINT {self.constraint} ON {table} IS {_literal(self.constraint_comment)}")
        return said

    def _kind(self) -> str | None:
        said = self.constraint_definition or ""
        return next((kind for kind in ("PRIMARY KEY", "UNIQUE") if said.startswith(kind)), None)

    def _timing(self) -> str:
        said = self.constraint_definition or ""
        return "".join(f" {word}" for word in ("DEFERRABLE", "INITIALLY DEFERRED") if f" {word}" in said)


_INDEXES: Final = """
SELECT c.oid::regclass::text, quote_ident(c.relname), pg_get_indexdef(c.oid), quote_ident(k.conname),
    pg_get_constraintdef(k.oid), quote_ident(s.spcname), obj_description(c.oid, 'pg_class'),
    obj_description(k.oid, 'pg_constraint'),
    i.indisreplident OR i.indisclustered OR NOT i.indisvalid OR c.relkind <> 'i'
    OR EXISTS (SELECT FROM pg_inherits AS h WHERE h.inhrelid = c.oid)
    OR EXISTS (SELECT FROM pg_constraint AS f WHERE f.contype = 'f' AND f.confrelid = i.indrelid AND f.conindid = c.oid)
    OR (i.indisprimary AND EXISTS (SELECT FROM pg_publication_tables AS p JOIN pg_namespace AS n
        ON n.nspname = p.schemaname JOIN pg_class AS t ON t.relnamespace = n.oid AND t.relname = p.tablename
        WHERE t.oid = i.indrelid))
FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
LEFT JOIN pg_constraint AS k ON k.conindid = c.oid AND k.conrelid = i.indrelid AND k.contype IN ('p', 'u', 'x')
LEFT JOIN pg_tablespace AS s ON s.oid = c.reltablespace
WHERE i.indrelid = $1::text::regclass ORDER BY i.indisprimary DESC, c.oid
"""


async def put_off(connection: asyncpg.Connection[Any], table: str) -> list[Index]:
    """Drops what can be built again, inside the caller's transaction. Nobody else sees the table until its end."""
    await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    found = [Index(*row) for row in await connection.fetch(_INDEXES, table)]
    dropped = [index for index in found if not index.stays]
    for index in dropped:
        await connection.execute(index.drop(table))
    return dropped


async def build(connection: asyncpg.Connection[Any], table: str, indexes: list[Index]) -> None:
    for index in indexes:
        for statement in index.create(table):
            await connection.execute(statement)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
