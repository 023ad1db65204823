"""Records of ours that nobody refuses for their content: where PostgreSQL refuses them, its state is at fault.

They are written as every other record is, in a transaction that is rolled back. One of each kind has every member, one
has only what the lexicon asks for; both are created, changed and deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fastworker.event import Action, Commit, Op
from fastworker.table.batch import Change
from fastworker.table.mapper import map_commit
from fastworker.table.schema import COLLECTIONS, GENERIC_RECORDS, PROFILES

FULL, BARE, OTHER = (f"did:plc:fastworkercontrol{last * 7}" for last in "abc")
CID = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"
GENERIC = "invalid.fastworker.control"


class Step(NamedTuple):
    changes: list[Change]
    dids: list[str]


def steps(tables: Collection[str], at: datetime, *, wide: bool = False) -> Iterator[Step]:
    """Create, update, delete, for the kinds of these tables. `wide`: texts and keys as long as they may be."""
    known = (*COLLECTIONS.items(), (GENERIC, GENERIC_RECORDS))
    kinds = [(name, table) for name, table in known if table.name in tables]
    entry_ms = int(at.timestamp() * 1000)
    actions: tuple[Action, ...] = ("create", "update", "delete")
    for number, action in enumerate(actions):
        changes, dids = [], [FULL, BARE]
        for repo in (FULL, BARE):
            is_full = repo == FULL
            ops = []
            for name, table in kinds:
                rkey = "self" if table is PROFILES else "control" * (50 if wide and is_full else 1)
                record = None if action == "delete" else _record(name, repo, at, is_full=is_full, wide=wide)
                ops.append(Op(action, name, rkey, None if record is None else CID, record=record))
            rev = f"3kaaaaaaaaa{number + 2}a" if is_full else None
            time = _text(at) if is_full else None
            mapped = map_commit(Commit(number + 1, repo, rev, time, ops, []), entry_ms)
            changes += mapped.changes
            dids += mapped.dids
        yield Step(changes, sorted(set(dids)))


def _text(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _record(name: str, repo: str, at: datetime, *, is_full: bool, wide: bool) -> dict[str, Any]:
    """With every member; or without those that the mapper can do without."""
    text = "A record of fastworker's own, for a look whether the database takes any."
    if wide:
        text *= 30
    blob = {"$type": "blob", "ref": {"$link": CID}, "mimeType": "image/jpeg", "size": 1}
    ref = {"uri": f"at://{OTHER}/app.bsky.feed.post/3kaaaaaaaaa2a", "cid": CID}
    list_uri = f"at://{repo}/app.bsky.graph.list/control"
    needed: dict[str, dict[str, Any]] = {
        "app.bsky.feed.like": {"subject": ref},
        "app.bsky.feed.repost": {"subject": ref},
        "app.bsky.graph.follow": {"subject": OTHER},
        "app.bsky.graph.block": {"subject": OTHER},
        "app.bsky.bookmark": {"subject": ref},
        "app.bsky.graph.list": {"name": text, "purpose": "app.bsky.graph.defs#curatelist"},
        "app.bsky.graph.listitem": {"list": list_uri, "subject": OTHER},
        "app.bsky.graph.listblock": {"subject": list_uri},
        "app.bsky.feed.generator": {"did": OTHER, "displayName": text},
        "app.bsky.graph.starterpack": {"name": text},
        "com.atproto.label.label": {"uri": ref["uri"], "val": "control"},
        "app.bsky.graph.verification": {"subject": repo, "handle": "control.invalid"},
    }
    mention = {"$type": "app.bsky.richtext.facet#mention", "did": OTHER}
    rule = {"$type": "app.bsky.feed.threadgate#listRule", "list": list_uri}
    more: dict[str, dict[str, Any]] = {
        "app.bsky.feed.post": {
            "text": text,
            "langs": ["en"],
            "tags": ["control"],
            "reply": {"root": ref, "parent": ref},
            "embed": {"$type": "app.bsky.embed.record", "record": ref},
            "facets": [{"index": {"byteStart": 0, "byteEnd": 8}, "features": [mention]}],
        },
        "app.bsky.feed.like": {"via": ref},
        "app.bsky.feed.repost": {"via": ref},
        "app.bsky.graph.list": {"description": text, "avatar": blob},
        "app.bsky.feed.generator": {"description": text, "avatar": blob},
        "app.bsky.graph.starterpack": {"description": text, "list": list_uri, "feeds": [{"uri": ref["uri"]}]},
        "app.bsky.labeler.service": {"policies": {"labelValues": ["control"]}},
        "com.atproto.label.label": {"src": OTHER, "neg": True, "cts": _text(at)},
        "app.bsky.feed.threadgate": {"allow": [rule], "hiddenReplies": [ref["uri"]]},
        "app.bsky.feed.postgate": {"embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}]},
        "app.bsky.actor.profile": {
            "displayName": text,
            "description": text,
            "avatar": blob,
            "banner": blob,
            "pinnedPost": ref,
        },
        GENERIC: {"text": text},
    }
    record: dict[str, Any] = {"$type": name, **needed.get(name, {})}
    if is_full:
        record |= {"createdAt": _text(at), **more.get(name, {})}
    return record
