"""A worker in the predecessor's style on the same stream: plain SQL, one statement after another, with its bugs.

`python -m tests.rig.foreign` runs one on REDIS_URL and DATABASE_URL until it is told to stop: for rehearsing a
migration, and for the tests of one.

What makes it a foreign writer: no versions; the first row of a URI stays; counters
move whether or not a row did, and only where an aggregate is; updates are ignored; nothing is derived beyond feed
items; whatever PostgreSQL refuses is lost; everything is acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tests.rig.histories import Event, Record

_INSERT = "INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT (uri) DO NOTHING"
_COUNTER = {
    "app.bsky.feed.like": ("likes", "like_count"),
    "app.bsky.feed.repost": ("reposts", "repost_count"),
    "app.bsky.bookmark": ("bookmarks", "bookmark_count"),
}
_PAIRS = {
    "app.bsky.graph.follow": ("follows", "follower_did", "following_did"),
    "app.bsky.graph.block": ("blocks", "blocker_did", "blocked_did"),
}
_DELETES = {
    "app.bsky.feed.post": "posts",
    "app.bsky.graph.follow": "follows",
    "app.bsky.graph.block": "blocks",
    "app.bsky.graph.list": "lists",
}


class Foreign:
    """Applies events in the neutral form of `rig.histories`."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection

    async def apply(self, event: Event) -> None:
        if event["kind"] == "identity":
            if event["handle"]:
                await self._try("UPDATE users SET handle = $2 WHERE did = $1", event["did"], event["handle"])
        elif event["kind"] == "commit":
            for op in event["ops"]:
                await self._op(event["repo"], op)

    async def _op(self, repo: str, op: Record) -> None:
        collection, _, _ = op["path"].partition("/")
        uri = f"at://{repo}/{op['path']}"
        if op["action"] == "delete":
            await self._delete(collection, uri)
        elif isinstance(op.get("record"), Mapping) and op["record"].get("$type") == collection:
            await self._user(repo)
            with contextlib.suppress(KeyError, TypeError):  # a record that it does not understand is lost
                await self._create(repo, collection, uri, op["cid"], op["record"])

    async def _create(self, repo: str, collection: str, uri: str, cid: str, record: Record) -> None:
        now = datetime.now(UTC).replace(tzinfo=None)
        if collection in _COUNTER:
            table, column = _COUNTER[collection]
            subject = record["subject"]["uri"]
            await self._insert(table, uri=uri, user_did=repo, post_uri=subject, created_at=now)
            await self._try(f"UPDATE post_aggregations SET {column} = {column} + 1 WHERE post_uri = $1", subject)
        elif collection in _PAIRS:
            table, one, other = _PAIRS[collection]
            await self._user(record["subject"])
            await self._insert(table, **{"uri": uri, one: repo, other: record["subject"], "created_at": now})
        elif collection == "app.bsky.feed.post":
            await self._insert("posts", uri=uri, cid=cid, author_did=repo, text=record["text"], created_at=now)
            await self._try("INSERT INTO post_aggregations (post_uri) VALUES ($1) ON CONFLICT DO NOTHING", uri)
            await self._insert(
                "feed_items",
                uri=uri,
                post_uri=uri,
                originator_did=repo,
                type="post",
                sort_at=now,
                cid=cid,
                created_at=now,
            )
        elif collection == "app.bsky.graph.list":
            await self._insert(
                "lists",
                uri=uri,
                cid=cid,
                creator_did=repo,
                name=record["name"],
                purpose=record["purpose"],
                created_at=now,
            )
        elif collection == "app.bsky.actor.profile":
            await self._try("UPDATE users SET display_name = $2 WHERE did = $1", repo, record["displayName"])

    async def _delete(self, collection: str, uri: str) -> None:
        if collection in _COUNTER:
            table, column = _COUNTER[collection]
            subject = await self._connection.fetchval(f"SELECT post_uri FROM {table} WHERE uri = $1", uri)
            if subject is not None:
                await self._try(f"DELETE FROM {table} WHERE uri = $1", uri)
                await self._try(
                    f"UPDATE post_aggregations SET {column} = greatest(0, {column} - 1) WHERE post_uri = $1", subject
                )
        elif collection in _DELETES:
            await self._try(f"DELETE FROM {_DELETES[collection]} WHERE uri = $1", uri)

    async def _user(self, did: str) -> None:
        await self._try("INSERT INTO users (did, handle) VALUES ($1, 'handle.invalid') ON CONFLICT DO NOTHING", did)

    async def _insert(self, table: str, **values: object) -> None:
        numbers = ", ".join(f"${n}" for n in range(1, len(values) + 1))
        await self._try(_INSERT.format(table=table, columns=", ".join(values), values=numbers), *values.values())

    async def _try(self, statement: str, *arguments: object) -> None:
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.DataError):  # as it does: logged, and acknowledged
            await self._connection.execute(statement, *arguments)


class OldWorker:
    """Its pipelines: each reads a few entries, applies one after the other, acknowledges each whatever became of it.

    What it held when it is stopped stays pending, and nobody of its kind will look at it again.
    """

    def __init__(
        self,
        redis_url: str,
        database_url: str,
        *,
        consumer_id: str = "python-worker",
        pipelines: int = 5,
        batch: int = 10,
        stream_key: str = "firehose:events",
        group: str = "firehose-processors",
    ) -> None:
        self._redis_url = redis_url
        self._database_url = database_url
        self._names = [f"{consumer_id}-{n}" for n in range(pipelines)]
        self._batch = batch
        self._key = stream_key
        self._group = group
        self.handled: set[str] = set()
        """Stream ids that it acknowledged."""
        self.stopping = False
        """Set: each pipeline ends after what it holds. (The predecessor itself is only ever cut off.)"""

    async def run(self) -> None:
        """Until it is stopped or cancelled."""
        async with Redis.from_url(self._redis_url, socket_timeout=60) as redis, asyncio.TaskGroup() as tasks:
            with contextlib.suppress(ResponseError):  # the group is there
                await redis.xgroup_create(self._key, self._group, id="0", mkstream=True)
            for name in self._names:
                tasks.create_task(self._pipeline(redis, name))

    async def _pipeline(self, redis: Redis, name: str) -> None:
        connection = await asyncpg.connect(self._database_url, timeout=10)
        try:
            foreign = Foreign(connection)
            while not self.stopping:
                found: Any = await redis.xreadgroup(self._group, name, {self._key: ">"}, count=self._batch, block=100)
                for entry_id, fields in found[0][1] if found else ():
                    await foreign.apply(event_of(list(fields.values())))
                    await redis.xack(self._key, self._group, entry_id)
                    self.handled.add(entry_id.decode())
        finally:
            connection.terminate()


def event_of(values: Sequence[bytes]) -> Event:
    """The neutral event of a JSON entry. Decoded by position, as old consumers do."""
    kind, data, seq = values[:3]
    event = json.loads(data)
    return {"kind": kind.decode(), "seq": int(seq or 0), **event}


async def main() -> None:
    """Until SIGTERM or SIGINT."""
    worker = OldWorker(
        os.environ.get("REDIS_URL", "redis://localhost:6379"),
        os.environ["DATABASE_URL"],
        consumer_id=os.environ.get("CONSUMER_ID", "python-worker"),
    )
    running = asyncio.create_task(worker.run())
    sys.stdout.write("An old worker is at work. SIGTERM cuts it off.\n")
    sys.stdout.flush()

    def cut_off() -> None:
        worker.stopping = True
        running.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, cut_off)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    sys.stdout.write(f"{len(worker.handled):,} entries acknowledged\n")


if __name__ == "__main__":
    asyncio.run(main())
