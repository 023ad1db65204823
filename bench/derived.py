"""Rows that follow from likes: made in the worker and sent, or made by one statement where the likes are stored."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import uvloop

from bench.servers import cpu_s, servers
from fastworker.store.effects import write_effects
from fastworker.store.rows import copy
from fastworker.store.store import Store
from fastworker.table import derive
from fastworker.table.batch import Row
from fastworker.table.derive import FULL, Effects
from fastworker.table.schema import LIKES

FLUSH = 2_500  # likes
FLUSHES = 24  # half of them each way, in turns
ACCOUNTS, POSTS = 20_000, 60_000
_LETTERS = "234567abcdefghijklmnopqrstuvwxyz"

# As table/derive.py has it for likes. The cid of a like's record is in its notification only, so it is sent.
BY_STATEMENT = """
WITH new AS MATERIALIZED (
    SELECT l.uri, l.user_did, l.post_uri, l.created_at, u.cid, split_part(l.post_uri, '/', 3) AS subject_did
    FROM unnest($1::varchar[], $2::varchar[]) AS u (uri, cid) JOIN public.likes AS l USING (uri)
), notes AS (
    INSERT INTO public.notifications (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
    SELECT uri || '#notification', subject_did, user_did, 'like', post_uri, cid, created_at
    FROM new WHERE subject_did <> user_did ON CONFLICT (uri) DO NOTHING
), views AS (
    INSERT INTO public.post_viewer_states AS t (post_uri, viewer_did, like_uri)
    SELECT post_uri, user_did, uri FROM new ORDER BY post_uri, user_did
    ON CONFLICT (post_uri, viewer_did) DO UPDATE SET like_uri = excluded.like_uri, updated_at = now()
)
INSERT INTO public.post_aggregations AS t (post_uri, like_count)
SELECT post_uri, count(*) FROM new GROUP BY post_uri ORDER BY post_uri
ON CONFLICT (post_uri) DO UPDATE SET like_count = t.like_count + excluded.like_count, updated_at = now()
"""


def derived(seed: int) -> dict[str, Any]:
    """CPU per like of this process and of its session in PostgreSQL, both ways. Each like is of another pair."""
    with servers() as running:
        return uvloop.run(_both_ways(running.postgres.url, seed))


async def _both_ways(url: str, seed: int) -> dict[str, Any]:
    used = {"sent": [0.0, 0.0], "by statement": [0.0, 0.0]}
    likes = _likes(random.Random(seed))
    store = await Store.connect(url)
    async with store.connection() as db:
        pid: int = db.get_server_pid()
        for way, _ in zip(itertools.cycle(used), range(FLUSHES), strict=False):
            flush = sorted(itertools.islice(likes, FLUSH))
            own, server = time.process_time(), cpu_s(pid)
            async with db.transaction():
                await copy(store.writer, db, LIKES, [row for _, _, row in flush])
                if way == "sent":
                    effects = Effects(FULL)
                    for _, cid, row in flush:
                        derive.added(effects, LIKES, row, cid)
                    await write_effects(store.writer, db, effects)
                else:
                    await db.execute(BY_STATEMENT, [uri for uri, _, _ in flush], [cid for _, cid, _ in flush])
            used[way][0] += time.process_time() - own
            used[way][1] += cpu_s(pid) - server
    await store.close()
    each = FLUSH * FLUSHES / 2 / 1e6
    return {
        f"{way}, {who} us/like": s / each
        for way, both in used.items()
        for who, s in zip(("worker", "PostgreSQL"), both, strict=True)
    }


def _likes(rng: random.Random) -> Iterator[tuple[str, str, Row]]:
    """(uri, cid, row), popular posts more often."""

    def text(length: int) -> str:
        return "".join(rng.choices(_LETTERS, k=length))

    dids = [f"did:plc:{text(24)}" for _ in range(ACCOUNTS)]
    posts = [f"at://{rng.choice(dids)}/app.bsky.feed.post/3l{text(11)}" for _ in range(POSTS)]
    now = datetime.now(UTC).replace(tzinfo=None)
    pairs: set[tuple[str, str]] = set()
    while True:
        pair = user, post = rng.choice(dids), posts[int(POSTS * rng.random() ** 3)]
        if pair not in pairs:
            pairs.add(pair)
            uri = f"at://{user}/app.bsky.feed.like/3l{text(11)}"
            values = {
                "uri": uri, "user_did": user, "post_uri": post, "subject_cid": f"bafyrei{text(52)}", "created_at": now,
                "commit_seq": str(len(pairs)), "commit_rev": f"3l{text(11)}",
            }  # fmt: skip
            yield uri, f"bafyrei{text(52)}", tuple(values.get(column) for column in LIKES.columns)
