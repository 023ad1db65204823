"""A worker in the predecessor's style on the same stream: plain SQL, one statement after another, with its bugs.

What makes it a foreign writer (predecessor contract, 5.4 and 5.9): no versions; the first row of a URI stays; counters
move whether or not a row did, and only where an aggregate is; updates are ignored; nothing is derived beyond feed
items; whatever PostgreSQL refuses is lost; everything is acknowledged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime

import asyncpg

from fastworker.testing.histories import Event, Record

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
    """Applies events in the neutral form of `testing.histories`."""

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
