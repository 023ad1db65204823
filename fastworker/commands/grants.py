"""Least privilege: what worker and reader may do in PostgreSQL and in Redis, as data.

`fastworker grants` prints it, `fastworker check` compares a role with it, and tests/integration/test_rights.py runs
both services with exactly this and shows of each single right that something needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final, Literal

from fastworker.errors import ExitCode
from fastworker.store.schema_admin import ADVISORY_LOCK, open_schema
from fastworker.stream.keys import BROADCAST, has_slots, in_slot
from fastworker.table.schema import DERIVED, TABLES, qualified

Service = Literal["worker", "reader"]

_READ: Final = ("SELECT",)
_APPEND: Final = ("SELECT", "INSERT")
_KEEP: Final = ("SELECT", "INSERT", "UPDATE")
_ALL: Final = ("SELECT", "INSERT", "UPDATE", "DELETE")

TABLE_RIGHTS: Final[Mapping[Service, Mapping[str, tuple[str, ...]]]] = {
    "worker": {
        **{table.name: _ALL for table in (*TABLES, *DERIVED)},
        "users": _KEEP,
        "user_settings": _READ,
        "label_events": ("INSERT",),  # they go with their label, by the table's own cascade
        "thread_contexts": _ALL,
        "thread_gates": _ALL,
        "post_gates": _ALL,
        "fastworker.migrations": _READ,
        "fastworker.versions": _ALL,
        "fastworker.twins": _ALL,
        "fastworker.accounts": _KEEP,
        "fastworker.account_events": _KEEP,
        "fastworker.identities": _KEEP,
        "fastworker.claims": _KEEP,
        "fastworker.recheck": _ALL,
        "fastworker.debts": ("SELECT", "INSERT", "UPDATE", "DELETE"),
        "fastworker.notes": ("SELECT", "INSERT", "DELETE"),
        "fastworker.progress": _KEEP,
        "fastworker.relays": _APPEND,
        "fastworker.horizon": ("SELECT", "UPDATE"),
        "fastworker.repairs": _ALL,
        "fastworker.refused": _KEEP,
        "fastworker.floors": _ALL,
        "fastworker.repos": _KEEP,
        "fastworker.hosts": _KEEP,
        "fastworker.sweeps": _KEEP,
        "fastworker.gaps": _KEEP,
        "fastworker.samples": ("SELECT", "INSERT", "DELETE"),
        "fastworker.backfill": ("SELECT", "UPDATE"),
        "fastworker.kept_accounts": ("SELECT", "INSERT", "DELETE"),
        "firehose_cursor": _KEEP,  # its row for the old dashboard
    },
    # It may do without PostgreSQL: only to find its place again when Redis comes back empty, to say where new
    # partitions begin, and to note what `--from` passes over.
    "reader": {"fastworker.progress": _APPEND, "fastworker.relays": _READ, "fastworker.gaps": _KEEP},
}
SEQUENCES: Final[Mapping[Service, tuple[str, ...]]] = {
    "worker": ("label_events_id_seq", "notifications_id_seq", "firehose_cursor_id_seq"),
    "reader": (),
}

_CONNECTION: Final = ("client|setname", "ping", "info", "time", "evalsha", "script|load")
# Subcommands are written with `|`. What a script calls has to be allowed, too.
COMMANDS: Final[Mapping[Service, tuple[str, ...]]] = {
    "worker": (
        *_CONNECTION,
        *("xreadgroup", "xack", "xclaim", "xpending", "xrange", "xrevrange", "xadd", "xlen", "xtrim"),
        *("xinfo|stream", "xinfo|groups", "xinfo|consumers", "xgroup|create", "xgroup|delconsumer", "xgroup|setid"),
        *("get", "set", "del", "exists", "pttl", "pexpire", "type", "multi", "exec", "memory|usage"),
        *(
            "hget",
            "hgetall",
            "hlen",
            "hvals",
            "hset",
            "hdel",
            "hincrby",
            "sadd",
            "srem",
            "smembers",
            "sismember",
            "lrange",
        ),
    ),
    "reader": (
        *_CONNECTION,
        *("xadd", "xdel", "xlen", "xtrim", "xrange", "xpending", "xack", "xclaim", "memory|usage"),
        *("xinfo|stream", "xinfo|groups", "xinfo|consumers"),
        *("get", "set", "del", "exists", "pttl", "pexpire", "type", "multi", "exec", "publish"),
        *("hget", "hgetall", "hset", "hsetnx", "hvals", "hdel", "hincrby", "sadd"),
        *("lpush", "ltrim", "rpush", "rpop", "lpop", "lindex", "llen", "lrange"),
    ),
}


def sql(service: Service, role: str) -> str:
    """Makes the role if it is not there, and gives it exactly what this release needs. `role`: a plain identifier.

    Two that change the rights on one table at the same time are refused by PostgreSQL, so it waits for whoever migrates
    or grants.
    """
    lines = [
        f"-- What `fastworker {service}` needs, and nothing else. Run it as the owner of the tables after `fastworker",
        f"-- migrate`, and again after each upgrade. A new role has no password yet: \\password {role}",
        "BEGIN;",
        f"DO $$ BEGIN PERFORM pg_advisory_xact_lock({ADVISORY_LOCK}); END $$;",
        _statements(service, role),
        "COMMIT;",
        "",
    ]
    return "\n".join(lines)


def _statements(service: Service, role: str) -> str:
    by_rights: dict[tuple[str, ...], list[str]] = {}
    for table, rights in TABLE_RIGHTS[service].items():
        by_rights.setdefault(rights, []).append(qualified(table))
    lines = [
        f"DO $$ BEGIN CREATE ROLE {role} LOGIN; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$;",
        f"DO $$ BEGIN EXECUTE format('GRANT CONNECT ON DATABASE %I TO {role}', current_database()); END $$;",
        f"GRANT USAGE ON SCHEMA public, fastworker TO {role};",
        f"REVOKE ALL ON ALL TABLES IN SCHEMA public, fastworker FROM {role};",
        f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA public, fastworker FROM {role};",
        *(f"GRANT {', '.join(rights)} ON {', '.join(tables)} TO {role};" for rights, tables in by_rights.items()),
    ]
    if service == "worker":  # everybody may, unless somebody took it away
        lines.append(f"GRANT EXECUTE ON ALL ROUTINES IN SCHEMA fastworker TO {role};")
    if sequences := SEQUENCES[service]:
        lines.append(f"GRANT USAGE ON SEQUENCE {', '.join(qualified(one) for one in sequences)} TO {role};")
    return "\n".join(lines)


def acl(service: Service, user: str, keys: tuple[str, ...] = ()) -> str:
    """A command for redis-cli. `keys`: those that are configured, which need not have the usual beginnings."""
    usual = ("firehose:*", "fastworker:*", "cluster:metrics", "cluster:metrics:*")
    others = [key for key in keys if not key.startswith(("firehose:", "fastworker:"))]
    others += [name for key in others for name in sorted({in_slot(key, "*"), f"{key}:*"})]  # of further partitions
    words = [
        "ACL SETUSER",
        user,
        "reset",
        "resetchannels",
        "on",
        ">PASSWORD",
        *(f"~{key}" for key in (*usual, *others)),
    ]
    if any(map(has_slots, keys)):
        words.append("+cluster|slots")
    if service == "reader":
        words.append(f"&{BROADCAST}")
    return " ".join([*words, *(f"+{command}" for command in COMMANDS[service])])


async def grant(database_url: str, service: Service, role: str, password: str | None) -> ExitCode:
    """What `sql` does, as the owner of the tables; the role gets the password, if there is one."""
    async with open_schema(database_url) as admin, admin.exclusive():
        await admin.grant(_statements(service, role), role, password)
    sys.stdout.write(f"{role} may do what its service needs.\n")
    return ExitCode.DONE
