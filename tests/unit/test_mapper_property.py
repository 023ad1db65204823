"""Any record gives rows that fit their columns, or drops; and the rows are those that the model of the state law has.

The model shares no code with the mapper: where the two differ, one of them misreads the law.
"""

# ruff: noqa: DTZ001 - naive UTC is the contract

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import libipld
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastworker.errors import Reason
from fastworker.event import Commit, Op
from fastworker.law.model import Model
from fastworker.table import schema
from fastworker.table.batch import Change
from fastworker.table.mapper import SELF_ONLY, map_commit

REPO = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
OTHER = "did:web:other.test"
CID = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"
RKEY = "3kabcdefghi22"
ENTRY_MS = 1_717_250_400_123

# What each column takes: length in characters of a varchar, and whether it takes null.
LENGTHS = {
    "purpose": 64,
    "val": 128,
    "commit_seq": 32,
    "commit_rev": 64,
    "kind": 16,
    **dict.fromkeys(("uri", "post_uri", "parent_uri", "root_uri", "list_uri", "subject"), 512),
}
NULLABLE = {
    "posts": {"langs", "parent_uri", "parent_cid", "root_uri", "root_cid", "embed", "facets"},
    "likes": {"subject_cid", "via"},
    "reposts": {"subject_cid", "via"},
    "lists": {"description", "avatar_url"},
    "feed_generators": {"description", "avatar_url"},
    "starter_packs": {"description", "list_uri"},
    "fastworker.profiles": {
        "display_name",
        "description",
        "avatar_url",
        "banner_url",
        "profile_record",
        "pinned_post",
    },
}
NULLABLE_ANYWHERE = {"commit_time", "commit_seq", "commit_rev"}


def _text(value: object) -> str:
    assert type(value) is str
    value.encode()
    assert "\x00" not in value
    return value


def _jsonb(value: object) -> None:
    text = _text(value)
    assert "\\u0000" not in text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))
    json.dumps(json.loads(text), ensure_ascii=False).encode()


def _boolean(value: object) -> None:
    assert type(value) is bool


def _timestamp(value: object) -> None:
    assert type(value) is datetime
    assert value.tzinfo is None


FITS: dict[str, Callable[[object], object]] = {
    "text": _text,
    "varchar": _text,
    "jsonb": _jsonb,
    "boolean": _boolean,
    "timestamp": _timestamp,
}


def assert_fits(change: Change) -> None:
    assert len(change.uri) <= 512
    table, row = change.table, change.row
    if row is None:
        return
    assert len(row) == len(table.columns)
    assert row[0] == change.uri
    for column, kind, value in zip(table.columns, table.types, row, strict=True):
        if value is None:
            assert column in NULLABLE.get(table.name, set()) | NULLABLE_ANYWHERE, f"{table.name}.{column} is null"
            continue
        FITS[kind](value)
        if column in {"created_at", "indexed_at", "verified_at"}:
            assert datetime(1970, 1, 1) <= value
        if kind == "varchar":
            assert len(value) <= LENGTHS.get(column, 255), f"{table.name}.{column}: {len(value)}"


# Records: shaped like the real ones, with anything anywhere.

uris = st.sampled_from(
    [
        f"at://{OTHER}/app.bsky.feed.post/3kpost",
        f"at://{REPO}/app.bsky.feed.post/{RKEY}",
        f"at://{REPO}/app.bsky.graph.list/3klist",
        f"at://{OTHER}/app.bsky.graph.list/3klist",
        f"at://{OTHER}",
        "at://alice.test/app.bsky.feed.post/3kpost",
        "at://",
        "https://x.y/z",
        f"at://{OTHER}/a b",
        f"at://{OTHER}/\x00",
        f"at://{OTHER}/" + "x" * 500,
        "at://did:web:" + "x" * 260 + "/c/r",
    ]
)
dids = st.sampled_from([REPO, OTHER, "did:plc:", "alice.test", "did:web:" + "x" * 300, OTHER + "\x00"])
cids = st.sampled_from([CID, "", "x" * 300, "\x00", "bafy\ud800"])
dates = st.sampled_from(
    [
        "2024-06-01T11:59:59.500Z",
        "2024-06-01T20:00:00+09:00",
        "2099-01-01T00:00:00Z",
        "0000-01-01T00:00:00.000Z",
        "10000-01-01T00:00:00Z",
        "2016-12-31T23:59:60Z",
        "2024-06-01T24:00:00Z",
        "1969-12-31",
        " 2024-6-1 1:02:03,5z",
        "9999-12-31T23:59:59-23:59",
        "garbage",
    ]
)
texts = st.sampled_from(["", "hello", "a\x00b", "\ud800", "\N{GRINNING FACE}" * 300, "x" * 70, "x" * 600]) | st.text()
# At most one of these keys is dirty: which of two wins that cleaning makes the same is nobody's business.
keys = st.sampled_from(["", "a", "$type", "uri", "b\x00c", "\N{GRINNING FACE}"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
refs = st.fixed_dictionaries({}, optional={"uri": uris | anything, "cid": cids | anything}) | anything
blobs = (
    st.fixed_dictionaries(
        {}, optional={"ref": st.fixed_dictionaries({"$link": cids | anything}) | anything, "cid": cids | anything}
    )
    | cids
    | anything
)
images = st.lists(st.fixed_dictionaries({}, optional={"alt": texts, "image": blobs}) | anything, max_size=3)
media = (
    st.fixed_dictionaries({"$type": st.just("app.bsky.embed.images")}, optional={"images": images | anything})
    | st.fixed_dictionaries(
        {"$type": st.just("app.bsky.embed.external")},
        optional={"external": st.fixed_dictionaries({}, optional={"thumb": blobs, "uri": texts}) | anything},
    )
    | st.fixed_dictionaries({"$type": st.just("app.bsky.embed.video")}, optional={"thumbnail": blobs, "video": blobs})
    | anything
)
embeds = (
    media
    | st.fixed_dictionaries({"$type": st.just("app.bsky.embed.record")}, optional={"record": refs})
    | st.fixed_dictionaries(
        {"$type": st.just("app.bsky.embed.recordWithMedia")},
        optional={"media": media, "record": st.fixed_dictionaries({}, optional={"record": refs}) | anything},
    )
)
arrays = st.lists(texts | refs, max_size=3) | anything
members: dict[str, st.SearchStrategy[Any]] = {
    "createdAt": dates | anything,
    "cts": dates | anything,
    "verifiedAt": dates | anything,
    "text": texts | anything,
    "name": texts | anything,
    "displayName": texts | anything,
    "description": texts | anything,
    "purpose": texts | anything,
    "handle": texts | anything,
    "val": texts | anything,
    "langs": arrays,
    "facets": arrays,
    "tags": arrays,
    "allow": arrays,
    "hiddenReplies": arrays,
    "embeddingRules": arrays,
    "detachedEmbeddingUris": arrays,
    "feeds": arrays,
    "embed": embeds,
    "reply": st.fixed_dictionaries({}, optional={"parent": refs, "root": refs}) | anything,
    "via": refs,
    "pinnedPost": refs,
    "policies": anything,
    "avatar": blobs,
    "banner": blobs,
    "src": dids | anything,
    "did": dids | anything,
    "uri": uris | anything,
    "list": uris | anything,
    "post": uris | anything,
    "neg": st.booleans() | anything,
}
BY_COLLECTION = {
    "app.bsky.feed.post": "createdAt text langs reply embed facets tags",
    "app.bsky.feed.like": "createdAt subject via",
    "app.bsky.feed.repost": "createdAt subject via",
    "app.bsky.graph.follow": "createdAt subject",
    "app.bsky.graph.block": "createdAt subject",
    "app.bsky.bookmark": "createdAt subject",
    "app.bsky.graph.list": "createdAt name purpose description avatar",
    "app.bsky.graph.listitem": "createdAt list subject",
    "app.bsky.graph.listblock": "createdAt subject",
    "app.bsky.feed.generator": "createdAt did displayName description avatar",
    "app.bsky.graph.starterpack": "createdAt name description list feeds",
    "app.bsky.labeler.service": "createdAt policies",
    "com.atproto.label.label": "cts src uri did val neg",
    "app.bsky.graph.verification": "createdAt verifiedAt subject handle",
    "app.bsky.feed.threadgate": "createdAt post allow hiddenReplies",
    "app.bsky.feed.postgate": "createdAt post embeddingRules detachedEmbeddingUris",
    "app.bsky.actor.profile": "createdAt displayName description avatar banner pinnedPost",
    "com.example.thing": "createdAt text",
}
SUBJECTS = {
    **dict.fromkeys((f"app.bsky.graph.{name}" for name in ("follow", "block", "listitem", "verification")), dids),
    "app.bsky.graph.listblock": uris,
}


@st.composite
def ops(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    """(collection, rkey, record): each member that the mapper looks at is there as a rule, mostly as it should be."""
    collection = draw(st.sampled_from(sorted(BY_COLLECTION)))
    record = draw(st.dictionaries(st.sampled_from(["x", "y\x00"]), anything, max_size=1))
    for name in BY_COLLECTION[collection].split():
        if draw(st.integers(0, 9)) == 0:
            continue
        record[name] = draw(SUBJECTS.get(collection, refs) | anything if name == "subject" else members[name])
    if draw(st.booleans()):
        record["$type"] = draw(st.sampled_from([collection] * 9 + ["app.bsky.feed.other", None]))
    rkey = draw(st.sampled_from(["self"] * 9 + [RKEY] if collection == "app.bsky.actor.profile" else [RKEY]))
    return collection, rkey, record


times = st.sampled_from([None, "2024-06-01T12:00:00.000Z", "0000-01-01T00:00:00Z", "9999-12-31T12:00:00Z", "?"])


def _map(op: tuple[str, str, dict[str, Any]], time: str | None) -> Any:
    collection, rkey, record = op
    made = Op("create", collection, rkey, CID, None, record)
    return map_commit(Commit(7, REPO, "3kabcdefghij2", time, [made], []), ENTRY_MS)


@given(ops(), times)
def test_any_record_gives_a_row_that_fits_or_a_drop(op: tuple[str, str, dict[str, Any]], time: str | None) -> None:
    found = _map(op, time)
    assert len(found.changes) + len([drop for drop in found.drops if drop.reason is not Reason.BAD_REFERENCE]) == 1
    for change in found.changes:
        assert_fits(change)
    for did in found.dids:
        assert len(did) <= 255
        assert did.startswith("did:")
    for drop in found.drops:
        assert type(drop.reason) is Reason
        assert len(drop.detail) <= 200


@given(ops())
def test_a_record_maps_alike_from_its_block(op: tuple[str, str, dict[str, Any]]) -> None:
    """Whatever DAG-CBOR can hold is mapped as its JSON is."""
    collection, rkey, record = op
    try:
        block = libipld.encode_dag_cbor(record)
    except (ValueError, OverflowError):
        return
    made = Op("create", collection, rkey, CID, block, None)
    from_block = map_commit(Commit(7, REPO, "3kabcdefghij2", None, [made], []), ENTRY_MS)
    from_json = _map(op, None)
    assert from_block.dids == from_json.dids
    assert [drop.reason for drop in from_block.drops] == [drop.reason for drop in from_json.drops]
    assert [_plain(change) for change in from_block.changes] == [_plain(change) for change in from_json.changes]


def _plain(change: Change) -> dict[str, Any]:
    assert change.row is not None
    return {
        column: json.loads(value) if kind == "jsonb" and value is not None else value
        for column, kind, value in zip(change.table.columns, change.table.types, change.row, strict=True)
    }


def _as_json(value: Any) -> Any:
    """Integers beyond 64 bits, which the data model does not know, are floats: orjson reads them so, as JavaScript does."""
    if type(value) is int and not -(2**63) <= value < 2**64:
        return float(value)
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, list) else value


@settings(max_examples=400)
@given(ops(), times)
def test_rows_are_the_models(op: tuple[str, str, dict[str, Any]], time: str | None) -> None:
    collection, rkey, record = op
    model = Model()
    path = {"action": "create", "path": f"{collection}/{rkey}", "cid": CID, "record": record}
    model.apply(
        {"kind": "commit", "seq": 7, "repo": REPO, "rev": "3kabcdefghij2", "time": time, "ops": [path]}, ENTRY_MS
    )
    found = _map(op, time)
    dropped = [str(drop.reason) for drop in found.drops if drop.reason is not Reason.BAD_REFERENCE]
    assert dropped == list(model.drops.values())
    tables = model.tables()
    assert set(found.dids) == {user["did"] for user in tables["users"]}
    for change in found.changes:
        row = _plain(change)
        if change.table in (schema.GATES, schema.PROFILES):
            continue  # tables of ours; what follows from them in public is compared with the database
        (expected,) = tables[change.table.name]
        assert row == {column: _as_json(expected[column]) for column in row}


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["bsky.app.car", "jetstream-repo.car", "little.car"])
def test_every_record_of_a_real_repository_has_its_row(real_data: Path, name: str) -> None:
    _, blocks = libipld.decode_car((real_data / "cars" / name).read_bytes())
    records = [block for block in blocks.values() if type(block) is dict and "$type" in block]
    repo = next(block["did"] for block in blocks.values() if type(block) is dict and "sig" in block)
    made = []
    for number, record in enumerate(records):
        rkey = "self" if record["$type"] in SELF_ONLY else f"{number:013}"
        if "gate" in record["$type"]:
            rkey = record["post"].rpartition("/")[2]
        made.append(Op("create", record["$type"], rkey, CID, libipld.encode_dag_cbor(record)))
    found = [
        map_commit(Commit(7, repo, None, "2026-07-04T00:00:00Z", made[start : start + 200], []), ENTRY_MS)
        for start in range(0, len(made), 200)  # ops of one commit, by the protocol
    ]
    assert len(records) > 20
    assert [drop for one in found for drop in one.drops] == []
    changes = [change for one in found for change in one.changes]
    for change, record in zip(changes, records, strict=True):
        assert_fits(change)
        assert change.table is schema.COLLECTIONS.get(record["$type"], schema.GENERIC_RECORDS)
