"""What people do to the servers by mistake, or think is harmless: deletes, renames, settings, older states, other clocks.

None of it may cost an event that the relay still has. Each act ends by itself, and puts back what it set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from tests.rig.stage import GROUP, KEY, Stage

ELSEWHERE = "elsewhere"
SETTINGS = (
    "synchronous_commit = off",
    "quote_all_identifiers = on",
    "timezone = 'Asia/Kathmandu'",
    "statement_timeout = '2s'",
    "lock_timeout = '1ms'",
    "default_transaction_isolation = 'serializable'",
    "DateStyle = 'German, DMY'",
    "search_path = pg_catalog",
    "jit_above_cost = 0",
)
ALTERS = (  # in the tables that are ours to write and somebody else's to change; how it is taken back
    (
        "ALTER TABLE likes ADD COLUMN chaos int NOT NULL DEFAULT 0; ALTER TABLE likes ALTER COLUMN chaos DROP DEFAULT",
        "ALTER TABLE likes DROP COLUMN IF EXISTS chaos",
    ),
    (
        "ALTER TABLE posts ADD CONSTRAINT chaos CHECK (text IS NULL) NOT VALID",
        "ALTER TABLE posts DROP CONSTRAINT IF EXISTS chaos",
    ),
    (
        "ALTER TABLE users ADD CONSTRAINT chaos CHECK (false) NOT VALID",
        "ALTER TABLE users DROP CONSTRAINT IF EXISTS chaos",
    ),
    ("ALTER TABLE follows RENAME TO followed", "ALTER TABLE IF EXISTS followed RENAME TO follows"),
)
CLOCKS = (-86_400.0, -3_600.0, 3_600.0, 864_000.0)

UPKEEP_S = 90.0
"""Within this /readyz says that what is owed is not looked after: 15 s (tests/rig/shrunk.py), on a machine that is busy."""

# How often each comes in a hundred. Those that take a server away are counted as such by the plan.
WEIGHTS = {
    "op_del": 8,
    "op_rename": 6,
    "op_rename_back": 8,
    "op_trim": 8,
    "op_pick": 6,
    "op_delconsumer": 8,
    "op_setid_end": 10,
    "op_setid_back": 6,
    "op_destroy": 6,
    "op_again": 8,
    "op_flushall": 5,
    "op_alter": 8,
    "op_setting": 10,
    "op_clock": 5,
    "op_redis_older": 4,
    "op_postgres_older": 4,
}
LATER = {"op_promote": "op_postgres_older", "op_upkeep": "op_alter"}
"""Kinds that came later take the place of some of another, so that a seed's other faults stay as they were."""
SERVERS = ("op_redis_older", "op_postgres_older", "op_promote")
UNREAD = (
    "op_del",
    "op_rename",
    "op_trim",
    "op_pick",
    "op_setid_end",
    "op_again",
)  # what matters where entries are unread


class Operator:
    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage = stage
        self._random = random.Random(f"operator {seed}")
        self._acts: dict[str, Callable[[], Awaitable[None]]] = {
            kind: getattr(self, f"_{kind.removeprefix('op_')}") for kind in (*WEIGHTS, *LATER)
        }
        self.problems: list[str] = []

    @property
    def _redis(self) -> Redis:
        return self._stage.redis

    async def act(self, kind: str) -> None:
        with contextlib.suppress(ResponseError):  # the stream or the group is not there (yet): an operator shrugs
            if kind not in UNREAD:
                await self._acts[kind]()
                return
            stopped = self._tell_all(self._stage.worker.children(), signal.SIGSTOP)
            try:
                await asyncio.sleep(1.0)  # something comes that nobody reads
                await self._acts[kind]()
            finally:
                self._tell_all(stopped, signal.SIGCONT)

    def _tell_all(self, children: list[int], number: signal.Signals) -> list[int]:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return children

    # --- Redis

    async def _del(self) -> None:
        await self._redis.delete(KEY)

    async def _rename(self) -> None:
        await self._redis.rename(KEY, ELSEWHERE)

    async def _rename_back(self) -> None:
        await self._redis.rename(KEY, ELSEWHERE)
        await self._a_while()
        await self._redis.rename(ELSEWHERE, KEY)

    async def _trim(self) -> None:
        await self._redis.xtrim(KEY, maxlen=self._random.choice((0, 1, 20)), approximate=False)

    async def _pick(self) -> None:
        """Some entries from the middle. The reader looks once a second."""
        found: Any = await self._redis.xrevrange(KEY, count=40)
        if picked := [entry_id for entry_id, _ in found[10:30]]:
            await self._redis.xdel(KEY, *picked)
            await asyncio.sleep(1.5)

    async def _delconsumer(self) -> None:
        found: Any = await self._redis.xinfo_consumers(KEY, GROUP)
        for one in found:
            await self._redis.xgroup_delconsumer(KEY, GROUP, one["name"])

    async def _setid_end(self) -> None:
        await self._redis.xgroup_setid(KEY, GROUP, "$")

    async def _setid_back(self) -> None:
        await self._redis.xgroup_setid(KEY, GROUP, "0")

    async def _destroy(self) -> None:
        await self._redis.xgroup_destroy(KEY, GROUP)

    async def _again(self) -> None:
        await self._redis.xgroup_destroy(KEY, GROUP)
        await self._redis.xgroup_create(KEY, GROUP, id="$")

    async def _flushall(self) -> None:
        await self._redis.flushall()

    async def _redis_older(self) -> None:
        await self._older(self._stage.redis_server)

    # --- PostgreSQL

    async def _alter(self) -> None:
        there, back = self._random.choice(ALTERS)
        await self.sql("SET lock_timeout = '10s'; " + there)
        await self._a_while()
        await self.sql(back)

    async def _setting(self) -> None:
        await self.sql(f"ALTER ROLE CURRENT_USER SET {self._random.choice(SETTINGS)}; " + _RECONNECT)
        await self._a_while()
        await self.sql("ALTER ROLE CURRENT_USER RESET ALL; " + _RECONNECT)

    async def _postgres_older(self) -> None:
        await self._older(self._stage.postgres)

    async def _promote(self) -> None:
        """A standby that lags takes the place of the primary, on a timeline of its own."""
        await self._older(self._stage.postgres, "standby.signal")
        await self.sql("SELECT pg_promote()")

    async def _upkeep(self) -> None:
        """What dead flushes left owed is not found, while flushes go on: that has to be told."""
        await self.sql("ALTER TABLE fastworker.notes RENAME COLUMN owed_at TO mislaid")
        try:
            async with asyncio.timeout(UPKEEP_S):
                while (said := await self._stage.says()) is not None and "looked after" not in said[1]:
                    await asyncio.sleep(0.5)
        except TimeoutError:
            self.problems.append(f"Nothing that is owed is looked after for {UPKEEP_S:g} s, and /readyz says {said}")
        finally:
            await self.sql("ALTER TABLE fastworker.notes RENAME COLUMN mislaid TO owed_at")

    # --- the machine

    async def _clock(self) -> None:
        """Of all our processes; the servers keep theirs."""
        self._stage.clock.write_text(str(self._random.choice(CLOCKS)))
        await self._a_while()
        self._stage.clock.unlink()

    # --- inside

    async def _older(self, server: EmbeddedPostgres | EmbeddedRedis, mark: str = "") -> None:
        """Its files are put back to what they were a few seconds ago; with a file of this name, if one is given."""
        copy = server.data_dir.with_suffix(".older")
        await asyncio.to_thread(_copied, server, server.files, copy)
        await self._a_while()
        if mark:
            (copy / mark).touch()
            shutil.chown(copy / mark, copy.owner(), copy.group())
        await asyncio.to_thread(_copied, server, copy, server.files)

    async def _a_while(self) -> None:
        await asyncio.sleep(self._random.uniform(0.3, 3.0))

    async def sql(self, statement: str) -> None:
        connection = await asyncpg.connect(self._stage.postgres.url, timeout=10)
        try:
            await connection.execute("RESET ALL; " + statement)
        finally:
            await connection.close(timeout=10)


_RECONNECT = "DO $$ BEGIN PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'fastworker%'; END $$"


def _copied(server: EmbeddedPostgres | EmbeddedRedis, there: Path, here: Path) -> None:
    """While it is stopped, and with owners: a server that root starts has an account of its own."""
    server.stop()
    shutil.rmtree(here, ignore_errors=True)
    subprocess.run(["cp", "-a", str(there), str(here)], check=True)
    server.start()
