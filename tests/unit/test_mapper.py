"""Records to rows, collection by collection. Reference: the state law, docs/invariants.md.

Ids such as W20 or T44 are the predecessors' bugs (docs/bugs.md) that the case shows to be absent.
"""

# ruff: noqa: DTZ001 - naive UTC is the contract

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import libipld
import pytest

from fastworker.errors import Reason
from fastworker.event import Commit, Drop, Op
from fastworker.event.entry import decode_entry, encode_json, encode_native
from fastworker.simulator.cbor import encode_record
from fastworker.table import control, schema
from fastworker.table.batch import Change, Mapped
from fastworker.table.derive import mentioned, quoted_post, thread_gate_row
from fastworker.table.mapper import SELF_ONLY, TEXT_BYTES_MAX, map_commit

REPO = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
OTHER = "did:plc:bbbbbbbbbbbbbbbbbbbbbbbb"
REV = "3kabcdefghij2"
RKEY = "3kabcdefghi22"
CID = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"
BLOB = "bafkreigxxxkul4e5rjz4fokqgn6iehoxbcqeztmxjbtwq2c6j7e44ybyay"
SEQ = 1_234_567_890
TIME = datetime(2024, 6, 1, 12)
WRITTEN = datetime(2024, 6, 1, 11, 59, 59, 500000)
ENTRY_MS = 1_717_250_400_123  # 2024-06-01T14:00:00.123

POST_URI = f"at://{OTHER}/app.bsky.feed.post/3kpost"
REF = {"uri": POST_URI, "cid": CID}
CREATED = {"createdAt": "2024-06-01T11:59:59.500Z"}
STAMP = (TIME, str(SEQ), REV)
IMAGE = {"$type": "blob", "ref": {"$link": BLOB}, "mimeType": "image/jpeg", "size": 1234}


def commit(*ops: Op, **changed: Any) -> Commit:
    fields: dict[str, Any] = {
        "seq": SEQ,
        "repo": REPO,
        "rev": REV,
        "time": "2024-06-01T12:00:00.000Z",
        "ops": list(ops),
        "drops": [],
    }
    return Commit(**{**fields, **changed})


def create(collection: str, record: Any, rkey: str = RKEY, cid: str | None = CID) -> Op:
    return Op("create", collection, rkey, cid, None, record)


def mapped(collection: str, record: dict[str, Any], rkey: str = RKEY) -> Mapped:
    return map_commit(commit(create(collection, record, rkey)), ENTRY_MS)


def row_of(collection: str, record: dict[str, Any], rkey: str = RKEY) -> dict[str, Any]:
    """The one row that the record becomes, by column; references may be left out."""
    found = mapped(collection, record, rkey)
    assert {drop.reason for drop in found.drops} <= {Reason.BAD_REFERENCE}
    (change,) = found.changes
    assert change.row is not None
    return dict(zip(change.table.columns, change.row, strict=True))


def drop_of(collection: str, record: dict[str, Any], rkey: str = RKEY) -> Reason:
    found = mapped(collection, record, rkey)
    assert found.changes == []
    assert found.dids == [REPO]
    (drop,) = found.drops
    assert drop.collection == collection
    return drop.reason


def uri_of(collection: str, rkey: str = RKEY) -> str:
    return f"at://{REPO}/{collection}/{rkey}"


# Every collection, whole

LABELER_DEFAULT: dict[str, Any] = {"labelValues": [], "labelValueDefinitions": []}
WHOLE: list[tuple[str, dict[str, Any], str, dict[str, Any], list[str]]] = [
    (
        "app.bsky.feed.post",
        {
            "text": "hi @bob",
            "langs": ["en", "pt-BR"],
            "reply": {"parent": REF, "root": {"uri": POST_URI + "x", "cid": "rootcid"}},
            "embed": {"$type": "app.bsky.embed.record", "record": REF},
            "facets": [{"index": {"byteStart": 3, "byteEnd": 7}, "features": []}],
            "tags": ["one"],
            **CREATED,
        },
        "posts",
        {
            "cid": CID,
            "author_did": REPO,
            "text": "hi @bob",
            "langs": ["en", "pt-BR"],
            "parent_uri": POST_URI,
            "parent_cid": CID,
            "root_uri": POST_URI + "x",
            "root_cid": "rootcid",
            "embed": {"$type": "app.bsky.embed.record", "record": REF},
            "facets": [{"index": {"byteStart": 3, "byteEnd": 7}, "features": []}],
            "tags": ["one"],
            "created_at": WRITTEN,
            "indexed_at": WRITTEN,
            "commit_time": TIME,
            "commit_seq": str(SEQ),
            "commit_rev": REV,
        },
        [],
    ),
    *[
        (
            f"app.bsky.feed.{name}",
            {"subject": REF, "via": {"uri": POST_URI, "cid": CID}, **CREATED},
            f"{name}s",
            {
                "user_did": REPO,
                "post_uri": POST_URI,
                "subject_cid": CID,
                "via": {"uri": POST_URI, "cid": CID},
                "created_at": WRITTEN,
                "commit_time": TIME,
                "commit_seq": str(SEQ),
                "commit_rev": REV,
            },
            [],
        )
        for name in ("like", "repost")
    ],
    *[
        (
            f"app.bsky.graph.{name}",
            {"subject": OTHER, **CREATED},
            f"{name}s",
            {
                subject[0]: REPO,
                subject[1]: OTHER,
                "created_at": WRITTEN,
                "commit_time": TIME,
                "commit_seq": str(SEQ),
                "commit_rev": REV,
            },
            [OTHER],
        )
        for name, subject in {
            "follow": ("follower_did", "following_did"),
            "block": ("blocker_did", "blocked_did"),
        }.items()
    ],
    (
        "app.bsky.bookmark",
        {"subject": REF, **CREATED},
        "bookmarks",
        {"user_did": REPO, "post_uri": POST_URI, "created_at": WRITTEN},
        [],
    ),
    (
        "app.bsky.graph.list",
        {
            "name": "Friends",
            "purpose": "app.bsky.graph.defs#curatelist",
            "description": "mine",
            "avatar": IMAGE,
            **CREATED,
        },
        "lists",
        {
            "cid": CID,
            "creator_did": REPO,
            "name": "Friends",
            "purpose": "app.bsky.graph.defs#curatelist",
            "description": "mine",
            "avatar_url": BLOB,
            "created_at": WRITTEN,
        },
        [],
    ),
    (
        "app.bsky.graph.listitem",
        {"list": f"at://{REPO}/app.bsky.graph.list/3klist", "subject": OTHER, **CREATED},
        "list_items",
        {
            "cid": CID,
            "list_uri": f"at://{REPO}/app.bsky.graph.list/3klist",
            "subject_did": OTHER,
            "created_at": WRITTEN,
        },
        [OTHER],
    ),
    (
        "app.bsky.graph.listblock",
        {"subject": f"at://{OTHER}/app.bsky.graph.list/3klist", **CREATED},
        "list_blocks",
        {"blocker_did": REPO, "list_uri": f"at://{OTHER}/app.bsky.graph.list/3klist", "created_at": WRITTEN},
        [],
    ),
    (
        "app.bsky.feed.generator",
        {"did": "did:web:feed.test", "displayName": "Cats", "description": "meow", "avatar": IMAGE, **CREATED},
        "feed_generators",
        {
            "cid": CID,
            "creator_did": REPO,
            "did": "did:web:feed.test",
            "display_name": "Cats",
            "description": "meow",
            "avatar_url": BLOB,
            "created_at": WRITTEN,
        },
        [],
    ),
    (
        "app.bsky.graph.starterpack",
        {
            "name": "Start",
            "description": "here",
            "list": f"at://{REPO}/app.bsky.graph.list/3klist",
            "feeds": [{"uri": "at://feed/one"}, {"uri": 5}, "odd", {"uri": "at://feed/two"}],
            **CREATED,
        },
        "starter_packs",
        {
            "cid": CID,
            "creator_did": REPO,
            "name": "Start",
            "description": "here",
            "list_uri": f"at://{REPO}/app.bsky.graph.list/3klist",
            "feeds": ["at://feed/one", "at://feed/two"],
            "created_at": WRITTEN,
        },
        [],
    ),
    (
        "app.bsky.labeler.service",
        {"policies": {"labelValues": ["spam"]}, **CREATED},
        "labeler_services",
        {"cid": CID, "creator_did": REPO, "policies": {"labelValues": ["spam"]}, "created_at": WRITTEN},
        [],
    ),
    (
        "com.atproto.label.label",
        {"src": OTHER, "uri": POST_URI, "val": "porn", "neg": True, "cts": "2024-06-01T11:59:59.500Z"},
        "labels",
        {"src": OTHER, "subject": POST_URI, "val": "porn", "neg": True, "created_at": WRITTEN},
        [],
    ),
    (
        "app.bsky.graph.verification",
        {"subject": OTHER, "handle": "Bob.Test", "displayName": "Bob", **CREATED},
        "verifications",
        {
            "cid": CID,
            "subject_did": OTHER,
            "handle": "bob.test",
            "verified_at": WRITTEN,
            "created_at": WRITTEN,
        },
        [],
    ),
    (
        "com.example.thing",
        {"deep": {"$link": CID}, **CREATED},
        "generic_records",
        {
            "cid": CID,
            "author_did": REPO,
            "record_type": "com.example.thing",
            "record": {"deep": {"$link": CID}, **CREATED},
            "created_at": WRITTEN,
        },
        [],
    ),
    (
        "app.bsky.feed.threadgate",
        {
            "post": uri_of("app.bsky.feed.post"),
            "allow": [{"$type": "app.bsky.feed.threadgate#mentionRule"}],
            "hiddenReplies": [POST_URI],
            **CREATED,
        },
        "fastworker.gates",
        {
            "kind": "thread",
            "post_uri": uri_of("app.bsky.feed.post"),
            "owner_did": REPO,
            "rules": {"allow": [{"$type": "app.bsky.feed.threadgate#mentionRule"}], "hiddenReplies": [POST_URI]},
            "created_at": WRITTEN,
        },
        [],
    ),
    (
        "app.bsky.feed.postgate",
        {
            "post": uri_of("app.bsky.feed.post"),
            "embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}],
            "detachedEmbeddingUris": [POST_URI],
            **CREATED,
        },
        "fastworker.gates",
        {
            "kind": "post",
            "post_uri": uri_of("app.bsky.feed.post"),
            "owner_did": REPO,
            "rules": {
                "embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}],
                "detachedEmbeddingUris": [POST_URI],
            },
            "created_at": WRITTEN,
        },
        [],
    ),
    (
        "app.bsky.actor.profile",
        {"displayName": "Al", "description": "me", "avatar": IMAGE, "banner": IMAGE, "pinnedPost": REF},
        "fastworker.profiles",
        {
            "did": REPO,
            "display_name": "Al",
            "description": "me",
            "avatar_url": BLOB,
            "banner_url": BLOB,
            "profile_record": {
                "displayName": "Al",
                "description": "me",
                "avatar": IMAGE,
                "banner": IMAGE,
                "pinnedPost": REF,
            },
            "pinned_post": REF,
        },
        [],
    ),
]


def rkey_of(collection: str) -> str:
    return "self" if collection in SELF_ONLY else RKEY


def plain(table: schema.Table, row: tuple[Any, ...]) -> dict[str, Any]:
    """A row by column, its JSON read."""
    return {
        column: json.loads(value) if kind == "jsonb" and value is not None else value
        for column, kind, value in zip(table.columns, table.types, row, strict=True)
    }


@pytest.mark.parametrize("with_type", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize(("collection", "record", "table", "expected", "users"), WHOLE, ids=[w[0] for w in WHOLE])
def test_whole_record(
    collection: str, record: dict[str, Any], table: str, expected: dict[str, Any], users: list[str], with_type: bool
) -> None:
    """W18, W19: names, dates and blobs of lexicon JSON arrive; a record without `$type` is taken for its collection."""
    if with_type:
        record = {"$type": collection, **record}
    found = mapped(collection, record, rkey_of(collection))
    assert found.drops == []
    assert found.dids == [REPO, *users]
    (change,) = found.changes
    assert change.row is not None
    assert (change.uri, change.repo, change.rkey) == (
        uri_of(collection, rkey_of(collection)),
        REPO,
        rkey_of(collection),
    )
    assert (change.rev, change.seq, change.op_index, change.cid) == (REV, SEQ, 0, CID)
    assert change.table.name == table
    row = plain(change.table, change.row)
    assert row.pop("uri") == change.uri
    for column in ("record", "profile_record"):
        if with_type and column in row:
            assert row[column].pop("$type") == collection
    assert row == expected


def test_every_collection_of_the_contract_has_a_case() -> None:
    assert {case[0] for case in WHOLE} == {*schema.COLLECTIONS, "com.example.thing"}


@pytest.mark.parametrize("collection", [*schema.COLLECTIONS, "com.example.thing"])
@pytest.mark.parametrize("bad_type", ["app.bsky.feed.other", 5, None, "APP.BSKY.FEED.POST"])
def test_another_type_is_dropped(collection: str, bad_type: Any) -> None:
    """T51: `$type` cannot make a record act as another collection's, which no delete could undo."""
    record = next(case[1] for case in WHOLE if case[0] == collection)
    assert drop_of(collection, {**record, "$type": bad_type}, rkey_of(collection)) == Reason.TYPE_MISMATCH


@pytest.mark.parametrize("collection", [*schema.COLLECTIONS, "com.example.thing"])
def test_update_is_create(collection: str) -> None:
    """T15, T16, W11: an update brings the whole record."""
    record = next(case[1] for case in WHOLE if case[0] == collection)
    op = create(collection, record, rkey_of(collection))
    update = Op("update", op.collection, op.rkey, op.cid, None, record)
    assert map_commit(commit(update), ENTRY_MS) == map_commit(commit(op), ENTRY_MS)


@pytest.mark.parametrize("collection", [*schema.COLLECTIONS, "com.example.thing"])
def test_delete(collection: str) -> None:
    """T18, T19, T20, W30: every collection's records can be deleted."""
    rkey = rkey_of(collection)
    found = map_commit(commit(Op("delete", collection, rkey)), ENTRY_MS)
    table = schema.COLLECTIONS.get(collection, schema.GENERIC_RECORDS)
    assert found.changes == [Change(table, uri_of(collection, rkey), REPO, rkey, REV, SEQ, 0, None, None)]
    assert (found.dids, found.drops) == ([REPO], [])


# The commit


def test_a_commit_without_ops_makes_its_author_known() -> None:
    assert map_commit(commit(), ENTRY_MS) == Mapped([], [REPO], [])


def test_drops_found_before_are_passed_on() -> None:
    before = Drop(Reason.MISSING_BLOCK, "app.bsky.feed.post", "x")
    event = commit(create("app.bsky.feed.like", {}), drops=[before])
    found = map_commit(event, ENTRY_MS)
    assert [drop.reason for drop in found.drops] == [Reason.MISSING_BLOCK, Reason.BAD_RECORD]
    assert event.drops == [before]


def test_one_bad_record_never_costs_the_commit() -> None:
    like, follow = {"subject": REF, **CREATED}, {"subject": OTHER, **CREATED}
    found = map_commit(
        commit(
            create("app.bsky.feed.like", like, "1"),
            create("app.bsky.feed.like", {"subject": 5}, "2"),
            create("app.bsky.graph.follow", follow, "3"),
            Op("create", "app.bsky.feed.like", "4", CID, b"\xff", None),
            Op("delete", "app.bsky.feed.like", "5"),
        ),
        ENTRY_MS,
    )
    assert [(change.rkey, change.op_index) for change in found.changes] == [("1", 0), ("3", 2), ("5", 4)]
    assert found.drops[0] == Drop(Reason.BAD_RECORD, "app.bsky.feed.like", "subject")
    assert [drop.reason for drop in found.drops] == [Reason.BAD_RECORD, Reason.BAD_CBOR]
    assert found.dids == [REPO, OTHER]


@pytest.mark.parametrize("form", ["block", "json", "reader"])
def test_a_commit_of_too_many_values_costs_only_the_records_that_hold_them(form: str) -> None:
    """Two million empty arrays fit a commit, and would take ten seconds: the loop has no turn meanwhile."""
    many: list[list[Any]] = [[] for _ in range(60_000)]
    records: list[dict[str, Any]] = [{"a": many}, {"a": many}, {"a": 1}, {"a": many * 2}, {"a": many[:39_000]}]
    ops = [
        create("com.example.thing", {"$type": "com.example.thing", **record}, f"r{n}")
        for n, record in enumerate(records)
    ]
    event = commit(*ops)
    if form != "json":
        blocks = [libipld.encode_dag_cbor(op.record) for op in ops]
        event = commit(
            *[Op(op.action, op.collection, op.rkey, op.cid, block) for op, block in zip(ops, blocks, strict=True)]
        )
    fields = dict((encode_native if form == "block" else encode_json)(event) or ())
    decoded = decode_entry(fields)
    assert isinstance(decoded, Commit)
    result = map_commit(decoded, ENTRY_MS)
    assert [change.rkey for change in result.changes] == ["r0", "r2", "r4"]
    assert [drop.reason for drop in result.drops] == [Reason.OVERSIZED] * 2


@pytest.mark.parametrize("value", [b"\x00\x01", base64.b32decode(BLOB[1:].upper() + "======")])
@pytest.mark.parametrize(
    ("collection", "record"),
    [
        ("app.bsky.feed.post", {"text": "p", "embed": "HERE"}),
        ("app.bsky.feed.post", {"text": "p", "embed": {"$type": "app.bsky.embed.record", "record": "HERE"}}),
        ("app.bsky.feed.post", {"text": "p", "embed": {"$type": "app.bsky.embed.images", "images": ["HERE"]}}),
        (
            "app.bsky.feed.post",
            {
                "text": "p",
                "embed": {"$type": "app.bsky.embed.recordWithMedia", "media": "HERE", "record": {"record": REF}},
            },
        ),
        ("app.bsky.feed.post", {"text": "p", "reply": "HERE", "facets": ["HERE"], "langs": ["HERE"]}),
        ("app.bsky.labeler.service", {"policies": "HERE"}),
        ("app.bsky.actor.profile", {"avatar": "HERE", "pinnedPost": "HERE"}),
    ],
)
def test_a_link_or_bytes_in_place_of_an_object_is_the_same_in_every_form(
    collection: str, record: dict[str, Any], value: bytes
) -> None:
    def filled(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {name: filled(one) for name, one in inner.items()}
        if isinstance(inner, list):
            return [filled(one) for one in inner]
        return value if inner == "HERE" else inner

    block = libipld.encode_dag_cbor(filled({"$type": collection, **record, **CREATED}))
    rkey = "self" if "post" not in collection else RKEY
    event = commit(Op("create", collection, rkey, CID, block))
    rows = []
    for encode in (encode_native, encode_json):
        decoded = decode_entry(dict(encode(event) or ()))
        assert isinstance(decoded, Commit)
        found = map_commit(decoded, ENTRY_MS)
        assert found.drops == []
        rows.append([plain(change.table, change.row) for change in found.changes if change.row is not None])
    assert rows[0] == rows[1] != []


def test_a_record_from_its_block() -> None:
    """In DAG-CBOR, links are bytes: they become CIDs, in columns and in JSON."""
    raw = base64.b32decode(BLOB[1:].upper() + "======")  # libipld writes bytes that are a CID as a link
    blob = {"$type": "blob", "ref": raw, "mimeType": "image/jpeg", "size": 1}
    embed = {"$type": "app.bsky.embed.images", "images": [{"alt": "", "image": blob}]}
    profile = {"$type": "app.bsky.actor.profile", "avatar": blob}
    post = {"$type": "app.bsky.feed.post", "text": "p", "embed": embed, **CREATED}
    found = map_commit(
        commit(
            Op("create", "app.bsky.actor.profile", "self", CID, libipld.encode_dag_cbor(profile)),
            Op("create", "app.bsky.feed.post", RKEY, CID, libipld.encode_dag_cbor(post)),
        ),
        ENTRY_MS,
    )
    assert found.drops == []
    rows = [plain(change.table, change.row) for change in found.changes if change.row is not None]
    assert rows[0]["avatar_url"] == BLOB
    assert rows[0]["profile_record"]["avatar"]["ref"] == {"$link": BLOB}
    assert rows[1]["embed"]["images"][0]["image"]["ref"] == {"$link": BLOB}


@pytest.mark.parametrize(
    ("time", "commit_time", "created_at"),
    [
        ("2024-06-01T12:00:00.000Z", TIME, TIME),
        pytest.param(None, None, datetime(2024, 6, 1, 14, 0, 0, 123000), id="no-time"),
        pytest.param("soon", None, datetime(2024, 6, 1, 14, 0, 0, 123000), id="bad-time"),
        pytest.param("2024-06-01T14:00:00+02:00", TIME, TIME, id="offset"),
    ],
)
def test_without_a_date_a_record_has_its_commits_time_else_its_entrys(
    time: str | None, commit_time: datetime | None, created_at: datetime
) -> None:
    """T41: an unparsable `createdAt` costs no record, of whatever kind."""
    ops = [
        create("app.bsky.feed.post", {"text": "", "createdAt": "garbage"}),
        create("com.example.thing", {"createdAt": 5}),
        create("com.atproto.label.label", {"uri": POST_URI, "val": "x", "createdAt": "2020-01-01T00:00:00Z"}),
    ]
    found = map_commit(commit(*ops, time=time), ENTRY_MS)
    assert len(found.changes) == 3
    for change in found.changes:
        assert change.row is not None
        assert change.row[change.table.index("created_at")] == created_at
    post = found.changes[0]
    assert post.row is not None
    assert post.row[post.table.index("commit_time")] == commit_time


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        pytest.param("2024-06-01T20:59:59.5+09:00", WRITTEN, id="W20-offset"),
        pytest.param("2030-01-01T00:00:00Z", TIME + timedelta(minutes=2), id="future"),
        pytest.param("1814-01-01T00:00:00Z", datetime(1970, 1, 1), id="before-1970"),
        pytest.param("0000-01-01T00:00:00Z", datetime(1970, 1, 1), id="year-0"),
    ],
)
def test_dates_of_a_post(written: str, expected: datetime) -> None:
    row = row_of("app.bsky.feed.post", {"text": "x", "createdAt": written})
    assert row["created_at"] == row["indexed_at"] == expected


def test_verified_at_of_its_own() -> None:
    record = {"subject": OTHER, "handle": "b.test", "createdAt": "2024-01-01T00:00:00Z"}
    collection = "app.bsky.graph.verification"
    assert row_of(collection, {**record, "verifiedAt": "2024-02-01T00:00:00Z"})["verified_at"] == datetime(2024, 2, 1)
    assert row_of(collection, {**record, "verifiedAt": "2099-02-01"})["verified_at"] == TIME + timedelta(minutes=2)
    assert row_of(collection, {**record, "verifiedAt": "?"})["verified_at"] == datetime(2024, 1, 1)


def test_a_commit_at_the_end_of_time() -> None:
    event = commit(create("app.bsky.feed.post", {"text": "", **CREATED}), time="9999-12-31T23:59:59.999999Z")
    (change,) = map_commit(event, ENTRY_MS).changes
    assert change.row is not None
    assert change.row[change.table.index("created_at")] == WRITTEN


def test_versions_that_are_missing() -> None:
    found = map_commit(commit(create("app.bsky.feed.like", {"subject": REF}), seq=None, rev=None), ENTRY_MS)
    (change,) = found.changes
    assert change.row is not None
    assert (change.seq, change.rev, change.row[-2:]) == (None, None, (None, None))


# Required members


@pytest.mark.parametrize(
    ("collection", "record"),
    [
        ("app.bsky.feed.like", {}),
        pytest.param("app.bsky.feed.like", {"subject": POST_URI}, id="W23-like-subject-text"),
        ("app.bsky.feed.like", {"subject": None}),
        ("app.bsky.feed.like", {"subject": {"cid": CID}}),
        ("app.bsky.feed.like", {"subject": {"uri": 5}}),
        ("app.bsky.feed.like", {"subject": {"uri": "https://bsky.app/post"}}),
        ("app.bsky.feed.like", {"subject": {"uri": "at://alice.test/app.bsky.feed.post/1"}}),
        ("app.bsky.feed.like", {"subject": {"uri": "at://did:plc:/app.bsky.feed.post/1"}}),
        ("app.bsky.feed.like", {"subject": {"uri": POST_URI + " x"}}),
        ("app.bsky.feed.like", {"subject": {"uri": POST_URI + "\x00"}}),
        ("app.bsky.feed.repost", {"subject": [REF]}),
        ("app.bsky.bookmark", {"subject": POST_URI}),
        ("app.bsky.bookmark", {"subject": {}}),
        ("app.bsky.graph.follow", {"subject": "alice.test"}),
        pytest.param("app.bsky.graph.follow", {"subject": {"did": OTHER}}, id="T47-follow-subject-object"),
        ("app.bsky.graph.block", {}),
        ("app.bsky.graph.list", {"purpose": "x"}),
        ("app.bsky.graph.list", {"name": "x"}),
        pytest.param("app.bsky.graph.list", {"name": "x", "purpose": None}, id="T47-purpose-null"),
        ("app.bsky.graph.listitem", {"list": uri_of("app.bsky.graph.list")}),
        ("app.bsky.graph.listitem", {"subject": OTHER}),
        ("app.bsky.graph.listitem", {"subject": OTHER, "list": "at://alice.test/app.bsky.graph.list/1"}),
        ("app.bsky.graph.listblock", {"subject": OTHER}),
        ("app.bsky.graph.listblock", {"subject": "at://alice.test/app.bsky.graph.list/1"}),
        pytest.param("app.bsky.feed.generator", {"displayName": "x"}, id="T47-did-missing"),
        ("app.bsky.feed.generator", {"did": "x", "displayName": "x"}),
        ("app.bsky.feed.generator", {"did": OTHER}),
        ("app.bsky.graph.starterpack", {}),
        ("com.atproto.label.label", {"val": "x"}),
        ("com.atproto.label.label", {"uri": "", "val": "x"}),
        ("com.atproto.label.label", {"uri": POST_URI}),
        ("com.atproto.label.label", {"uri": POST_URI, "val": 1}),
        ("app.bsky.graph.verification", {"handle": "x.test"}),
        ("app.bsky.graph.verification", {"subject": OTHER}),
    ],
)
def test_bad_record(collection: str, record: dict[str, Any]) -> None:
    assert drop_of(collection, {**record, **CREATED}) == Reason.BAD_RECORD


@pytest.mark.parametrize(
    ("collection", "record", "rkey"),
    [
        ("app.bsky.feed.like", {"subject": {"uri": POST_URI + "x" * 512}}, RKEY),
        ("app.bsky.feed.like", {"subject": {"uri": "at://did:web:" + "x" * 255 + "/c/r"}}, RKEY),
        ("app.bsky.feed.like", {"subject": REF}, "x" * 512),
        ("app.bsky.feed.post", {"reply": {"parent": {"uri": POST_URI + "x" * 512}}}, RKEY),
        ("app.bsky.feed.post", {"reply": {"root": {"uri": POST_URI + "x" * 512}}}, RKEY),
        ("app.bsky.graph.follow", {"subject": "did:web:" + "x" * 248}, RKEY),
        ("app.bsky.graph.list", {"name": "x", "purpose": "x" * 65}, RKEY),
        ("app.bsky.graph.starterpack", {"name": "x", "list": POST_URI + "x" * 512}, RKEY),
        ("com.atproto.label.label", {"uri": "x" * 513, "val": "x"}, RKEY),
        ("com.atproto.label.label", {"uri": "x", "val": "x" * 129}, RKEY),
        ("com.atproto.label.label", {"uri": "x", "val": "x", "src": "did:web:" + "x" * 248}, RKEY),
        ("a." + "b" * 254, {}, "r"),
    ],
)
def test_identifiers_that_exceed_their_column(collection: str, record: dict[str, Any], rkey: str) -> None:
    """W22: no value too long reaches PostgreSQL, and no identifier is cut."""
    assert drop_of(collection, record, rkey) == Reason.TOO_LONG


@pytest.mark.parametrize(
    ("collection", "record", "rkey"),
    [
        ("app.bsky.feed.like", {"subject": {"uri": POST_URI + "x" * (512 - len(POST_URI))}}, RKEY),
        ("app.bsky.feed.like", {"subject": REF}, "x" * (512 - len(uri_of("app.bsky.feed.like", "")))),
        ("app.bsky.graph.follow", {"subject": "did:web:" + "x" * 247}, RKEY),
        ("app.bsky.graph.list", {"name": "x", "purpose": "x" * 64}, RKEY),
        ("com.atproto.label.label", {"uri": "x" * 512, "val": "x" * 128}, RKEY),
        ("a." + "b" * 253, {}, "r"),
    ],
)
def test_identifiers_that_just_fit(collection: str, record: dict[str, Any], rkey: str) -> None:
    row_of(collection, record, rkey)


def test_an_uri_too_long_cannot_be_deleted_either() -> None:
    found = map_commit(commit(Op("delete", "app.bsky.feed.like", "x" * 512)), ENTRY_MS)
    assert found == Mapped([], [REPO], [Drop(Reason.TOO_LONG, "app.bsky.feed.like", "uri")])


def test_a_repository_whose_did_fits_no_column() -> None:
    found = map_commit(commit(Op("delete", "a.b.c", "r"), repo="did:web:" + "x" * 248), ENTRY_MS)
    assert found == Mapped([], [], [Drop(Reason.TOO_LONG, "a.b.c", "repo")])


def test_a_cid_too_long() -> None:
    found = map_commit(commit(create("com.example.thing", {}, cid="b" * 256)), ENTRY_MS)
    assert found == Mapped([], [REPO], [Drop(Reason.TOO_LONG, "com.example.thing", "cid")])


def test_no_cid_is_an_empty_one() -> None:
    """The predecessor's reader can leave a CID empty; the column takes no null."""
    (change,) = map_commit(commit(create("com.example.thing", {}, cid=None)), ENTRY_MS).changes
    assert change.cid is None
    assert change.row is not None
    assert change.row[1] == ""


# Optional members: one bad field never costs the record


@pytest.mark.parametrize("bad", [None, 5, True, 1.5, [], {}, [1], {"a": 1}, "text"], ids=repr)
def test_bad_optional_members(bad: Any) -> None:
    """W23, T47: whatever stands where an optional member belongs, the record is stored without it."""
    post = row_of(
        "app.bsky.feed.post",
        dict.fromkeys(("text", "langs", "reply", "embed", "facets", "tags", "createdAt"), bad),
    )
    array = json.dumps(bad, separators=(",", ":")) if isinstance(bad, list) else None
    assert post["text"] == (bad if isinstance(bad, str) else "")
    assert (post["langs"], post["facets"], post["tags"]) == (array, array, array or "[]")
    assert (post["parent_uri"], post["parent_cid"], post["root_uri"], post["root_cid"]) == (None,) * 4
    assert post["embed"] == (json.dumps(bad, separators=(",", ":")) if isinstance(bad, dict) else None)
    assert post["created_at"] == TIME

    like = row_of("app.bsky.feed.like", {"subject": {"uri": POST_URI, "cid": bad}, "via": bad})
    assert like["subject_cid"] == (bad if isinstance(bad, str) else None)
    assert like["via"] == (json.dumps(bad, separators=(",", ":")) if isinstance(bad, dict) else None)

    text = bad if isinstance(bad, str) else None
    profile = row_of(
        "app.bsky.actor.profile",
        dict.fromkeys(("displayName", "description", "avatar", "banner", "pinnedPost"), bad),
        "self",
    )
    assert [profile[c] for c in ("display_name", "description", "avatar_url", "banner_url")] == [text] * 4
    assert profile["pinned_post"] is None

    labeler = row_of("app.bsky.labeler.service", {"policies": bad}, "self")
    assert json.loads(labeler["policies"]) == (bad if isinstance(bad, dict) else LABELER_DEFAULT)

    pack = row_of("app.bsky.graph.starterpack", {"name": "x", "list": bad, "feeds": bad, "description": bad})
    assert (pack["list_uri"], pack["feeds"], pack["description"]) == (None, "[]", text)

    label = row_of("com.atproto.label.label", {"uri": POST_URI, "val": "x", "src": bad, "neg": bad})
    assert (label["src"], label["neg"]) == (REPO, bad is True)

    gate = row_of("app.bsky.feed.threadgate", {"allow": bad, "hiddenReplies": bad})
    assert json.loads(gate["rules"]) == {
        "allow": bad if isinstance(bad, list) else None,
        "hiddenReplies": bad if isinstance(bad, list) else [],
    }
    gate = row_of("app.bsky.feed.postgate", {"embeddingRules": bad, "detachedEmbeddingUris": bad})
    kept = bad if isinstance(bad, list) else []
    assert json.loads(gate["rules"]) == {"embeddingRules": kept, "detachedEmbeddingUris": kept}


@pytest.mark.parametrize("feeds", [{}, {"feeds": None}, {"feeds": []}], ids=["missing", "null", "empty"])
def test_starter_pack_without_feeds(feeds: dict[str, Any]) -> None:
    """W17: the column takes no null."""
    assert row_of("app.bsky.graph.starterpack", {"name": "x", **feeds})["feeds"] == "[]"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"parent": None, "root": REF}, (None, None, POST_URI, CID)),
        ({"parent": REF, "root": {"uri": "at://alice.test/c/r", "cid": CID}}, (POST_URI, CID, None, None)),
        ({"parent": {"uri": POST_URI}, "root": {"cid": CID}}, (POST_URI, None, None, None)),
        ({"parent": {"uri": POST_URI, "cid": "x" * 256}}, (POST_URI, None, None, None)),
        ({"parent": {"uri": POST_URI, "cid": {"$link": CID}}}, (POST_URI, None, None, None)),
    ],
)
def test_reply(reply: Any, expected: tuple[str | None, ...]) -> None:
    row = row_of("app.bsky.feed.post", {"text": "", "reply": reply})
    assert (row["parent_uri"], row["parent_cid"], row["root_uri"], row["root_cid"]) == expected


def test_names_are_cut_at_a_character() -> None:
    """W22: PostgreSQL counts characters, not bytes."""
    long = "\N{WHITE SMILING FACE}" * 300
    assert row_of("app.bsky.actor.profile", {"displayName": long}, "self")["display_name"] == long[:255]
    assert row_of("app.bsky.graph.list", {"name": long, "purpose": "x"})["name"] == long[:255]
    assert row_of("app.bsky.graph.starterpack", {"name": long})["name"] == long[:255]
    assert row_of("app.bsky.feed.generator", {"did": OTHER, "displayName": long})["display_name"] == long[:255]
    assert row_of("app.bsky.graph.verification", {"subject": OTHER, "handle": "\u0130" * 255})["handle"][:1] == "i"
    assert len(row_of("app.bsky.graph.verification", {"subject": OTHER, "handle": "\u0130" * 255})["handle"]) == 255
    assert row_of("app.bsky.actor.profile", {"description": long}, "self")["description"] == long


DIRTY = "a\x00b\ud800c"


def test_text_that_postgresql_cannot_hold() -> None:
    """T48, W21: NUL and lone surrogates are cleaned, in text and in JSON, also in keys; they cost no record."""
    rows = [
        row_of(
            "app.bsky.feed.post",
            {
                "text": DIRTY,
                "langs": [DIRTY],
                "tags": [DIRTY],
                "facets": [{DIRTY: DIRTY}],
                "embed": {"$type": "x", DIRTY: {DIRTY: [DIRTY]}},
                "reply": {"parent": {"uri": POST_URI, "cid": DIRTY}},
            },
        ),
        row_of("app.bsky.feed.like", {"subject": {"uri": POST_URI, "cid": DIRTY}, "via": {"uri": DIRTY}}),
        row_of("app.bsky.graph.list", {"name": DIRTY, "purpose": DIRTY, "description": DIRTY, "avatar": DIRTY}),
        row_of("app.bsky.feed.generator", {"did": OTHER, "displayName": DIRTY, "avatar": {"cid": DIRTY}}),
        row_of("app.bsky.graph.starterpack", {"name": DIRTY, "feeds": [{"uri": DIRTY}]}),
        row_of("app.bsky.labeler.service", {"policies": {DIRTY: DIRTY}}, "self"),
        row_of("com.atproto.label.label", {"uri": OTHER, "val": DIRTY, "src": DIRTY}),
        row_of("app.bsky.graph.verification", {"subject": OTHER, "handle": DIRTY}),
        row_of("com.example.thing", {DIRTY: DIRTY}),
        row_of("app.bsky.feed.threadgate", {"allow": [{"$type": DIRTY}]}),
        row_of("app.bsky.actor.profile", {"displayName": DIRTY, "avatar": {"ref": DIRTY}}, "self"),
    ]
    for row in rows:
        for value in row.values():
            if isinstance(value, str):
                value.encode()
                assert "\x00" not in value
                assert "\\u0000" not in value
                assert "\\ud800" not in value
    assert rows[0]["text"].startswith("ab")
    assert rows[0]["text"].endswith("c")


# Blobs and embeds


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (IMAGE, BLOB),
        ({"ref": BLOB}, BLOB),
        ({"ref": {"$link": BLOB}, "cid": "other"}, BLOB),
        pytest.param({"cid": BLOB, "mimeType": "image/png"}, BLOB, id="before-2023"),
        (BLOB, BLOB),
        ({"ref": {"$link": 5}}, None),
        ({"ref": {}}, None),
        ({"ref": 5}, None),
        ({}, None),
        ("", None),
        ([BLOB], None),
    ],
)
def test_blob(blob: Any, expected: str | None) -> None:
    assert row_of("app.bsky.actor.profile", {"avatar": blob}, "self")["avatar_url"] == expected


GOOD, BAD = {"alt": "a", "image": IMAGE}, {"alt": "b", "image": {"mimeType": "image/png"}}
QUOTE = {"$type": "app.bsky.embed.record", "record": REF}


def _images(*images: Any) -> dict[str, Any]:
    return {"$type": "app.bsky.embed.images", "images": list(images)}


def _external(**members: Any) -> dict[str, Any]:
    return {"$type": "app.bsky.embed.external", "external": {"uri": "https://x.y", **members}}


def _video(**members: Any) -> dict[str, Any]:
    return {"$type": "app.bsky.embed.video", "video": IMAGE, **members}


def _with_media(media: Any, record: Any = QUOTE) -> dict[str, Any]:
    return {"$type": "app.bsky.embed.recordWithMedia", "record": record, "media": media}


@pytest.mark.parametrize(
    ("embed", "expected"),
    [
        pytest.param(_images(GOOD), _images(GOOD), id="images"),
        pytest.param(_images(BAD, GOOD, "odd"), _images(GOOD), id="images-some"),
        pytest.param(_images(BAD), None, id="images-none"),
        pytest.param(_images(), None, id="images-empty"),
        pytest.param({"$type": "app.bsky.embed.images", "images": {}}, None, id="images-object"),
        pytest.param(_external(), _external(), id="external"),
        pytest.param(_external(thumb=IMAGE), _external(thumb=IMAGE), id="external-thumb"),
        pytest.param(_external(thumb={}), _external(), id="external-bad-thumb"),
        pytest.param(_external(thumb=None), _external(), id="external-null-thumb"),
        pytest.param(
            {"$type": "app.bsky.embed.external", "external": 5},
            {"$type": "app.bsky.embed.external", "external": 5},
            id="external-odd",
        ),
        pytest.param(_video(), _video(), id="video"),
        pytest.param(_video(thumbnail=IMAGE), _video(thumbnail=IMAGE), id="video-thumbnail"),
        pytest.param(_video(thumbnail=""), _video(), id="video-bad-thumbnail"),
        pytest.param(QUOTE, QUOTE, id="record"),
        pytest.param(_with_media(_images(GOOD)), _with_media(_images(GOOD)), id="with-media"),
        pytest.param(_with_media(_images(BAD, GOOD)), _with_media(_images(GOOD)), id="with-media-some"),
        pytest.param(_with_media(_images(BAD)), QUOTE, id="with-media-none"),
        pytest.param(_with_media(None), QUOTE, id="with-media-null"),
        pytest.param(_with_media(_external(thumb=5)), _with_media(_external()), id="with-media-external"),
        pytest.param(_with_media(_images(BAD), record=None), None, id="with-nothing"),
        pytest.param(_with_media(_images(GOOD), record=5), _with_media(_images(GOOD), record=5), id="with-odd-record"),
        pytest.param({"$type": "com.example.new", "x": [1]}, {"$type": "com.example.new", "x": [1]}, id="unknown"),
        pytest.param({"images": [BAD]}, {"images": [BAD]}, id="untyped"),
    ],
)
def test_embed(embed: Any, expected: Any) -> None:
    found = row_of("app.bsky.feed.post", {"text": "", "embed": embed})["embed"]
    assert (None if found is None else json.loads(found)) == expected


def test_a_mended_embed_leaves_the_record_alone() -> None:
    record = {"text": "", "embed": _with_media(_images(BAD, GOOD))}
    before = json.dumps(record)
    row_of("app.bsky.feed.post", record)
    assert json.dumps(record) == before


# Gates, lists, labels, profiles


@pytest.mark.parametrize(
    ("record", "allow"),
    [({}, None), ({"allow": None}, None), ({"allow": "all"}, None), ({"allow": []}, [])],
    ids=["T44-missing", "null", "odd", "empty"],
)
def test_allow_of_a_thread_gate(record: dict[str, Any], allow: Any) -> None:
    """T44: no `allow` is everyone, an empty one is nobody."""
    rules = json.loads(row_of("app.bsky.feed.threadgate", record)["rules"])
    assert rules == {"allow": allow, "hiddenReplies": []}


@pytest.mark.parametrize("collection", ["app.bsky.feed.threadgate", "app.bsky.feed.postgate"])
@pytest.mark.parametrize("post", [POST_URI, uri_of("app.bsky.feed.post", "other"), {}, None], ids=repr)
def test_a_gate_rules_over_its_own_post_only(collection: str, post: Any) -> None:
    assert row_of(collection, {})["post_uri"] == uri_of("app.bsky.feed.post")
    assert drop_of(collection, {"post": post}) == Reason.GATE_MISMATCH


def test_nobody_puts_people_on_another_accounts_list() -> None:
    record = {"list": f"at://{OTHER}/app.bsky.graph.list/1", "subject": OTHER}
    assert drop_of("app.bsky.graph.listitem", record) == Reason.NOT_OWNER
    longer = {"list": f"at://{REPO}x/app.bsky.graph.list/1", "subject": OTHER}
    assert drop_of("app.bsky.graph.listitem", longer) == Reason.NOT_OWNER


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"uri": POST_URI, "val": "x"}, (REPO, POST_URI, "x", False)),
        ({"did": OTHER, "val": "x", "src": OTHER}, (OTHER, OTHER, "x", False)),
        ({"uri": OTHER, "did": REPO, "val": "x", "neg": 1}, (REPO, OTHER, "x", False)),
    ],
)
def test_label(record: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """T21, W27: the record's own URI, source and time."""
    row = row_of("com.atproto.label.label", record)
    assert (row["src"], row["subject"], row["val"], row["neg"]) == expected
    assert row["uri"] == uri_of("com.atproto.label.label")


@pytest.mark.parametrize("collection", sorted(SELF_ONLY))
def test_records_of_which_there_is_one_are_self(collection: str) -> None:
    """No other rkey overwrites a profile, and an account is one labeler."""
    assert drop_of(collection, {"displayName": "x"}, "other") == Reason.BAD_PATH
    assert row_of(collection, {"displayName": "x"}, "self")["uri"].endswith("/self")


def _quote(uri: str, cid: str = CID) -> dict[str, Any]:
    return {"$type": "app.bsky.embed.record", "record": {"uri": uri, "cid": cid}}


def _facet(*features: dict[str, Any]) -> dict[str, Any]:
    return {"index": {"byteStart": 0, "byteEnd": 1}, "features": list(features)}


NOT_URIS = [POST_URI + "\0y", POST_URI + "\ud800", "at://did:plc:has space/app.bsky.feed.post/3x", "at://", "u", ""]
NOT_DIDS = ["did:", "did:plc:has space", OTHER + "\0", "\0" + OTHER, OTHER + "\udfff", "", "alice.test"]
MENTION = {"$type": "app.bsky.richtext.facet#mention", "did": OTHER}
LINK = {"$type": "app.bsky.richtext.facet#link", "uri": "https://a.test/ odd \u00e9"}
PHOTO = {"$type": "app.bsky.embed.images", "images": [{"image": IMAGE, "alt": ""}]}


def lossy_row_of(collection: str, record: dict[str, Any], rkey: str = RKEY) -> dict[str, Any]:
    """The row of a record of which something is left out, which is counted once."""
    found = mapped(collection, record, rkey)
    assert [drop.reason for drop in found.drops] == [Reason.BAD_REFERENCE]
    found.drops[0].detail.encode()
    return row_of(collection, record, rkey)


@pytest.mark.parametrize("uri", NOT_URIS)
def test_a_uri_that_is_none_is_left_out(uri: str) -> None:
    """Never mended: without its NUL it would name another record. What is left of the record stays."""

    def post(**members: Any) -> dict[str, Any]:
        return lossy_row_of("app.bsky.feed.post", {"text": "x", **members})

    assert post(embed=_quote(uri))["embed"] is None
    with_media = {"$type": "app.bsky.embed.recordWithMedia", "record": {"record": {"uri": uri, "cid": CID}}}
    assert json.loads(post(embed={**with_media, "media": PHOTO})["embed"]) == PHOTO
    assert post(embed={**with_media, "media": None})["embed"] is None
    assert post(reply={"parent": {"uri": uri}, "root": REF})["parent_uri"] is None
    assert post(reply={"parent": REF, "root": {"uri": uri}})["root_uri"] is None
    assert lossy_row_of("app.bsky.feed.like", {"subject": REF, "via": {"uri": uri, "cid": CID}})["via"] is None
    pack = lossy_row_of("app.bsky.graph.starterpack", {"name": "x", "list": uri, "feeds": [{"uri": uri}, REF]})
    assert (pack["list_uri"], json.loads(pack["feeds"])) == (None, [POST_URI])
    rule = {"$type": "app.bsky.feed.threadgate#listRule"}
    gate = lossy_row_of(
        "app.bsky.feed.threadgate", {"allow": [{**rule, "list": uri}], "hiddenReplies": [uri, POST_URI]}
    )
    assert json.loads(gate["rules"]) == {"allow": [rule], "hiddenReplies": [POST_URI]}
    gate = lossy_row_of("app.bsky.feed.postgate", {"detachedEmbeddingUris": [uri, POST_URI]})
    assert json.loads(gate["rules"])["detachedEmbeddingUris"] == [POST_URI]
    assert lossy_row_of("app.bsky.actor.profile", {"pinnedPost": {"uri": uri}}, "self")["pinned_post"] is None
    for collection in ("app.bsky.feed.like", "app.bsky.feed.repost", "app.bsky.bookmark"):
        assert drop_of(collection, {"subject": {"uri": uri, "cid": CID}}) == Reason.BAD_RECORD
    if uri != "u":  # a label may be about anything that is one word
        assert drop_of("com.atproto.label.label", {"uri": uri, "val": "x"}) == Reason.BAD_RECORD


@pytest.mark.parametrize("did", NOT_DIDS)
def test_a_did_that_is_none_is_left_out(did: str) -> None:
    bad = {**MENTION, "did": did}
    facets = [_facet(bad), _facet(LINK, bad), _facet(MENTION), "odd", {"features": 5}]
    row = lossy_row_of("app.bsky.feed.post", {"text": "x", "facets": facets})
    assert json.loads(row["facets"]) == [_facet(LINK), _facet(MENTION), "odd", {"features": 5}]
    if did:
        assert lossy_row_of("com.atproto.label.label", {"uri": POST_URI, "val": "x", "src": did})["src"] == REPO
    assert drop_of("app.bsky.graph.follow", {"subject": did}) == Reason.BAD_RECORD
    assert drop_of("app.bsky.feed.generator", {"did": did, "displayName": "x"}) == Reason.BAD_RECORD


@pytest.mark.parametrize("cid", [CID + "\0", CID[:9] + "\ud800" + CID[9:], "has space", "\u00e9"])
def test_a_cid_that_is_none_is_left_out(cid: str) -> None:
    row = lossy_row_of("app.bsky.feed.post", {"text": "x", "embed": _quote(POST_URI, cid)})
    assert json.loads(row["embed"]) == {"$type": "app.bsky.embed.record", "record": {"uri": POST_URI}}
    row = lossy_row_of("app.bsky.feed.post", {"text": "x", "reply": {"parent": {"uri": POST_URI, "cid": cid}}})
    assert (row["parent_uri"], row["parent_cid"]) == (POST_URI, None)
    assert lossy_row_of("app.bsky.feed.like", {"subject": {"uri": POST_URI, "cid": cid}})["subject_cid"] is None
    for blob in (cid, {"cid": cid}, {"ref": {"$link": cid}}, {"ref": cid}):
        assert lossy_row_of("app.bsky.graph.list", {"name": "x", "purpose": "x", "avatar": blob})["avatar_url"] is None
        images = [{"image": blob, "alt": ""}, {"image": IMAGE, "alt": ""}]
        row = lossy_row_of("app.bsky.feed.post", {"text": "x", "embed": {**PHOTO, "images": images}})
        assert json.loads(row["embed"]) == PHOTO


@pytest.mark.parametrize("text", [POST_URI, OTHER, CID, "https://a.test/x"])
def test_no_array_or_object_has_a_mended_identifier(text: str) -> None:
    """Wherever jsonb makes us clean a text: an identifier that would be another one is left out with its member."""
    for bad in (text + "\0", "\0" + text, text[:8] + "\ud800" + text[8:]):
        row = lossy_row_of("com.example.thing", {"a": bad, "b": [bad, "x\0y", text], "c": {"d": bad}})
        assert json.loads(row["record"]) == {"b": ["xy", text], "c": {}}
        row = lossy_row_of("app.bsky.actor.profile", {"displayName": "x", "any": bad}, "self")
        assert json.loads(row["profile_record"]) == {"displayName": "x"}
        row = lossy_row_of("app.bsky.feed.post", {"text": "x", "tags": [bad, "t"], "langs": [bad]})
        assert (json.loads(row["tags"]), json.loads(row["langs"])) == (["t"], [])
    external = {"$type": "app.bsky.embed.external", "external": {"uri": "https://a.test/\0", "title": "t"}}
    assert lossy_row_of("app.bsky.feed.post", {"text": "x", "embed": external})["embed"] is None
    facet = _facet({**LINK, "uri": "https://a.test/\0"})
    assert lossy_row_of("app.bsky.feed.post", {"text": "x", "facets": [facet]})["facets"] == "[]"


def test_what_old_rows_hold_is_matched_too() -> None:
    """Rows of an earlier release, or of another writer, had their identifiers mended or not looked at."""
    for uri in ("at://did:plc:has space/app.bsky.feed.post/3x", "at://did:/app.bsky.feed.post/3x", POST_URI + "\u00e9"):
        assert quoted_post(json.dumps(_quote(uri))) is None
    assert quoted_post(json.dumps(_quote(POST_URI, "has space"))) == (POST_URI, None)
    assert mentioned(json.dumps([_facet({**MENTION, "did": did}) for did in ("did:", "did:plc:has space", OTHER)])) == [
        OTHER
    ]


def test_text_is_cut_before_its_tsvector_is_too_long() -> None:
    """At a character, by its bytes; only what no client writes."""
    long = "\N{WHITE SMILING FACE}" * TEXT_BYTES_MAX
    cut = long[: TEXT_BYTES_MAX // 3]
    for collection, record, member in (
        ("app.bsky.actor.profile", {}, "description"),
        ("app.bsky.graph.list", {"name": "x", "purpose": "x"}, "description"),
        ("app.bsky.graph.starterpack", {"name": "x"}, "description"),
        ("app.bsky.feed.generator", {"did": OTHER, "displayName": "x"}, "description"),
        ("app.bsky.feed.post", {}, "text"),
    ):
        assert row_of(collection, {**record, member: long}, rkey_of(collection))[member] == cut
        assert row_of(collection, {**record, member: cut + "x"}, rkey_of(collection))[member] == cut + "x"


@pytest.mark.parametrize("others", [[], ["mention"]])
@pytest.mark.parametrize("rule", ["app.bsky.feed.threadgate#followerRule", "com.example#ruleOfTomorrow"])
def test_a_rule_without_a_column_is_kept_but_is_no_row(rule: str, others: list[str]) -> None:
    """Three columns that are false would shut out those whom it lets in."""
    allow = [{"$type": rule}, *({"$type": f"app.bsky.feed.threadgate#{name}Rule"} for name in others)]
    (change,) = mapped("app.bsky.feed.threadgate", {"allow": allow}).changes
    assert change.row is not None
    assert json.loads(change.row[4])["allow"] == allow
    assert thread_gate_row(change.row) is None


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({}, None),  # everyone may reply
        ({"allow": None}, None),
        ({"allow": "mention"}, None),
        ({"allow": []}, (False, False, False, "[]")),  # nobody
        ({"allow": [{"$type": "app.bsky.feed.threadgate#mentionRule"}]}, (True, False, False, "[]")),
        ({"allow": [{"$type": "app.bsky.feed.threadgate#followingRule"}]}, (False, True, False, "[]")),
    ],
)
def test_who_may_reply(record: dict[str, Any], columns: tuple[Any, ...] | None) -> None:
    (change,) = mapped("app.bsky.feed.threadgate", record).changes
    assert change.row is not None
    row = thread_gate_row(change.row)
    assert (None if row is None else row[2:6]) == columns


@pytest.mark.parametrize(
    ("pinned", "expected"),
    [
        (REF, REF),
        ({**REF, "$type": "com.atproto.repo.strongRef"}, REF),
        ({"uri": POST_URI}, {"uri": POST_URI, "cid": None}),
        ({"uri": "at://alice.test/c/r", "cid": CID}, None),
        (POST_URI, None),
    ],
)
def test_pinned_post(pinned: Any, expected: Any) -> None:
    found = row_of("app.bsky.actor.profile", {"pinnedPost": pinned}, "self")["pinned_post"]
    assert (None if found is None else json.loads(found)) == expected


def test_mentions_are_left_to_the_facets() -> None:
    """T35: nothing is read out of the text."""
    row = row_of("app.bsky.feed.post", {"text": "mail me: a@b.test.", "facets": []})
    assert row["facets"] == "[]"


MEDIA = {"$type": "app.bsky.embed.recordWithMedia", "media": {"$type": "app.bsky.embed.images", "images": []}}
QUOTES = [
    {"$type": "app.bsky.feed.post", "text": "a quote", "createdAt": "2026-01-01T00:00:00Z", "embed": MEDIA | {"record": quoted}}
    for quoted in ({"record": {"uri": "at://did:plc:a/app.bsky.feed.post/1", "cid": "no"}}, {"record": "x"}, {})
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each member of each object and array, as who holds it and its name."""
    for name, member in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        if name == "$link":
            continue
        yield value, name
        if isinstance(member, dict | list):
            yield from places(member)


def comparable(mapped: Mapped) -> Any:
    """Members of JSON in the order of their names."""
    rows = [
        [json.loads(one) if str(one)[:1] in ("{", "[") else one for one in change.row or ()]
        for change in mapped.changes
    ]
    return rows, sorted(mapped.dids), [(drop.reason, drop.collection) for drop in mapped.drops]


def test_a_link_and_bytes_make_the_same_rows_in_every_form() -> None:
    """As JSON they are objects. Whatever member is one by mistake: the form of the stream changes no row."""
    known = [(name, control._record(name, control.FULL, TIME, is_full=True, wide=False)) for name in schema.COLLECTIONS]
    looked = 0
    for (collection, template), odd in itertools.product(
        known + [("app.bsky.feed.post", record) for record in QUOTES], ({"$bytes": "AAEC"}, {"$link": BLOB})
    ):
        rkey, record = "self" if collection in SELF_ONLY else RKEY, json.loads(json.dumps(template))
        for holder, name in list(places(record)):
            before, holder[name] = holder[name], odd
            ops = (create(collection, record, rkey), Op("create", collection, rkey, CID, encode_record(record)))
            as_json, as_block = (comparable(map_commit(commit(op), ENTRY_MS)) for op in ops)
            assert as_json == as_block, (collection, name, odd)
            holder[name] = before
            looked += 1
    assert looked > 200
