"""Stream entries: every form to the same event and back, and what is wrong with an entry, by reason."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import orjson
import pytest

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Account, Commit, Drop, Identity, Op, Sync
from fastworker.event.entry import (
    NATIVE_VERSION,
    decode_entry,
    encode_frame_entry,
    encode_json,
    encode_native,
)
from fastworker.event.record import json_text, load_record
from fastworker.simulator.cbor import cid_of, cid_text, encode

DID = "did:plc:wq4aajammjtxdomz3e23667t"
REV = "3mptbypluud2a"
TIME = "2026-07-04T14:38:07.517Z"
RECORD = {
    "$type": "app.bsky.feed.post",
    "text": "héllo 😀",
    "embed": {"ref": {"$link": cid_text(b"\x01\x55\x12\x20" + bytes(32))}, "raw": {"$bytes": "AQI"}},
    "n": 1.0,
}
BLOCK = encode(RECORD)
CID = cid_text(cid_of(BLOCK))
COMMIT = Commit(
    7,
    DID,
    REV,
    TIME,
    [Op("create", "app.bsky.feed.post", "1", CID, BLOCK), Op("delete", "app.bsky.feed.like", "2")],
    [Drop(Reason.BAD_HASH, "app.bsky.feed.like", "app.bsky.feed.like/3")],
    "bsky.network",
)


def commit_of(fields: dict[bytes, bytes]) -> Commit:
    event = decode_entry(fields)
    assert isinstance(event, Commit)
    return event


def entry(kind: str, data: Any, seq: str = "7") -> dict[bytes, bytes]:
    text = data if type(data) is bytes else json.dumps(data).encode()
    return {b"type": kind.encode(), b"data": text, b"seq": seq.encode()}


def reason_of(fields: dict[bytes, bytes]) -> Reason:
    with pytest.raises(InvalidEvent) as caught:
        decode_entry(fields)
    return caught.value.reason


# -- the forms ---------------------------------------------------------------------------------------------

EVENTS = [
    COMMIT,
    Commit(1, DID, REV, None, [], []),
    Identity(8, DID, "alice.test", TIME, "bsky.network"),
    Identity(8, DID, None, None),
    Account(9, DID, active=False, status="takendown", time=TIME, relay="bsky.network"),
    Account(9, DID, active=True, status=None, time=TIME),
    Sync(10, DID, REV, TIME, "bsky.network"),
]


@pytest.mark.parametrize("event", EVENTS)
def test_native_comes_back_as_it_was(event: Any) -> None:
    ((name, _),) = fields = encode_native(event)
    assert name == b"n"
    assert decode_entry(dict(fields)) == event


@pytest.mark.parametrize("event", EVENTS[1:-1])
def test_json_comes_back_as_it_was(event: Any) -> None:
    fields = encode_json(event)
    assert fields is not None
    assert [name for name, _ in fields] == [b"type", b"data", b"seq"]
    assert decode_entry(dict(fields)) == event


def test_json_of_a_commit() -> None:
    """Extra members beside the contract's; raw UTF-8; the record as lexicon JSON; drops travel to the worker's count."""
    fields = dict(encode_json(COMMIT) or ())
    assert (fields[b"type"], fields[b"seq"]) == (b"commit", b"7")
    assert "héllo 😀".encode() in fields[b"data"]
    assert json.loads(fields[b"data"]) == {
        "repo": DID,
        "ops": [
            {"action": "create", "path": "app.bsky.feed.post/1", "cid": CID, "record": RECORD},
            {"action": "delete", "path": "app.bsky.feed.like/2"},
        ],
        "rev": REV,
        "drops": [["bad_hash", "app.bsky.feed.like", "app.bsky.feed.like/3"]],
        "time": TIME,
        "relay": "bsky.network",
    }
    event = commit_of(fields)
    assert event.ops[0] == Op("create", "app.bsky.feed.post", "1", CID, None, RECORD)
    assert (event.seq, event.repo, event.rev, event.time, event.drops, event.relay) == (
        COMMIT.seq, DID, REV, TIME, COMMIT.drops, "bsky.network"
    )  # fmt: skip


def test_json_has_no_sync() -> None:
    assert encode_json(Sync(10, DID, REV, TIME)) is None


def test_json_of_a_record_that_does_not_decode() -> None:
    commit = Commit(7, DID, REV, TIME, [Op("create", "a.b.c", "1", CID, b"\xff"), COMMIT.ops[1]], [])
    event = commit_of(dict(encode_json(commit) or ()))
    assert event.ops == [COMMIT.ops[1]]
    assert [(drop.reason, drop.collection) for drop in event.drops] == [(Reason.BAD_CBOR, "a.b.c")]


def test_json_of_a_record_that_jsonb_does_not_take() -> None:
    """Whichever form it came by, it becomes the same JSON."""
    commit = Commit(
        7, DID, REV, TIME, [Op("create", "a.b.c", "1", CID, encode({"t": "a\0b\ud800", "n": -(2**64)}))], []
    )
    texts = set()
    for fields in (encode_native(commit), encode_json(commit)):
        (op,) = commit_of(dict(fields or ())).ops
        texts.add(repr(json.loads(json_text(load_record(op), op))))
    assert len(texts) == 1
    assert json.loads(json_text(load_record(op), op)) == {"t": "ab", "n": -(2.0**64)}


def test_native_layout_is_pinned() -> None:
    """What release N - 1 wrote, release N reads: a change here is a new NATIVE_VERSION."""
    assert NATIVE_VERSION == 1
    assert encode_native(Identity(8, "did:a:b", None, "t", "r"))[0][1] == b"\x01\x96\xa1i\x08\xa7did:a:b\xc0\xa1t\xa1r"
    commit = Commit(7, "d", None, None, [Op("delete", "c", "k")], [Drop(Reason.BAD_CAR, "c", "x")], None)
    assert msgspec.msgpack.decode(encode_native(commit)[0][1][1:]) == [
        "c", 7, "d", None, None, [["delete", "c", "k", None, None, None]], [["bad_car", "c", "x"]], None,
    ]  # fmt: skip
    assert msgspec.msgpack.decode(encode_native(Account(1, "d", True, None, None))[0][1][1:])[0] == "a"
    assert msgspec.msgpack.decode(encode_native(Sync(1, "d", None, None))[0][1][1:]) == ["s", 1, "d", None, None, None]


def test_frame_form() -> None:
    data = encode({"op": 1, "t": "#identity"}) + encode({"seq": 5, "did": DID, "time": TIME})
    assert encode_frame_entry(data, None) == [(b"f", data)]
    assert decode_entry(dict(encode_frame_entry(data, "bsky.network"))) == Identity(5, DID, None, TIME, "bsky.network")
    assert decode_entry(dict(encode_frame_entry(data, None))) == Identity(5, DID, None, TIME)
    assert reason_of({b"f": b"\xff"}) is Reason.BAD_FRAME
    assert reason_of({b"f": encode({"op": 1, "t": "#info"}) + encode({"name": "x"})}) is Reason.UNKNOWN_KIND


@pytest.mark.parametrize(
    ("native", "reason"),
    [
        (b"", Reason.UNKNOWN_FORMAT),
        (b"\x02\x90", Reason.UNKNOWN_FORMAT),
        (b"\x01", Reason.BAD_NATIVE),
        (b"\x01\x90", Reason.BAD_NATIVE),
        (b"\x01\xc0", Reason.BAD_NATIVE),
        (b"\x01\x96\xa1z\x08\xa1d\xc0\xc0\xc0", Reason.BAD_NATIVE),
        (b"\x01" + b"\x91" * 100_000, Reason.BAD_NATIVE),
        (b"\x01\x96\xa1i\x08\xa1d\xdd\xff\xff\xff\xff", Reason.BAD_NATIVE),
        (encode_native(COMMIT)[0][1][:-1], Reason.BAD_NATIVE),
        (encode_native(COMMIT)[0][1] + b"\xc0", Reason.BAD_NATIVE),
        (encode_native(COMMIT)[0][1].replace(b"create", b"crxate"), Reason.BAD_NATIVE),
        (encode_native(COMMIT)[0][1].replace(b"bad_hash", b"bad_hush"), Reason.BAD_NATIVE),
    ],
)
def test_native_that_is_none(native: bytes, reason: Reason) -> None:
    assert reason_of({b"n": native}) is reason


# -- the JSON of others ------------------------------------------------------------------------------------


def commit_json(*ops: Any, **members: Any) -> dict[bytes, bytes]:
    seq = members.pop("seq", "7")
    return entry("commit", {"repo": DID, "ops": list(ops)} | members, seq)


def test_the_predecessors_commit() -> None:
    event = decode_entry(
        commit_json(
            {"action": "create", "path": "app.bsky.feed.post/1", "cid": CID, "record": RECORD},
            {"action": "update", "path": "app.bsky.feed.post/2", "cid": "", "record": {}},
            {"action": "delete", "path": "app.bsky.feed.post/3"},
        )
    )
    assert event == Commit(
        7,
        DID,
        None,
        None,
        [
            Op("create", "app.bsky.feed.post", "1", CID, None, RECORD),
            Op("update", "app.bsky.feed.post", "2", None, None, {}),
            Op("delete", "app.bsky.feed.post", "3"),
        ],
        [],
    )


@pytest.mark.parametrize("seq", ["", "0", "-1", "x", "9007199254740992", "1" * 400, "1.0", " 7", "٧"])
def test_a_commit_without_any_version(seq: str) -> None:
    assert reason_of(commit_json(seq=seq)) is Reason.NO_VERSION
    assert reason_of(commit_json(seq=seq, rev="x")) is Reason.NO_VERSION
    assert decode_entry(commit_json(seq=seq, rev=REV)).seq is None


def test_fields_may_be_missing() -> None:
    assert decode_entry({b"type": b"identity", b"data": b'{"did":"did:a:b"}'}) == Identity(None, "did:a:b", None, None)
    assert reason_of({}) is Reason.BAD_ENTRY
    assert reason_of({b"type": b"commit"}) is Reason.BAD_ENTRY
    assert reason_of({b"data": b"{}", b"seq": b"1"}) is Reason.BAD_ENTRY
    assert reason_of({b"\xff": b""}) is Reason.BAD_ENTRY


OP = {"action": "create", "path": "app.bsky.feed.post/1", "cid": CID, "record": {"$type": "app.bsky.feed.post"}}


@pytest.mark.parametrize(
    ("op", "reason", "collection"),
    [
        (None, Reason.BAD_ACTION, ""),
        ([], Reason.BAD_ACTION, ""),
        ({}, Reason.BAD_PATH, ""),
        (OP | {"path": None}, Reason.BAD_PATH, ""),
        (OP | {"path": "x"}, Reason.BAD_PATH, ""),
        (OP | {"path": "app.bsky.feed.post/\ud800"}, Reason.BAD_PATH, ""),
        (OP | {"action": None}, Reason.BAD_ACTION, "app.bsky.feed.post"),
        (OP | {"action": {}}, Reason.BAD_ACTION, "app.bsky.feed.post"),
        (OP | {"action": "CREATE"}, Reason.BAD_ACTION, "app.bsky.feed.post"),
        (OP | {"record": None}, Reason.BAD_RECORD, "app.bsky.feed.post"),
        (OP | {"record": "text"}, Reason.BAD_RECORD, "app.bsky.feed.post"),
        ({k: v for k, v in OP.items() if k != "record"}, Reason.BAD_RECORD, "app.bsky.feed.post"),
    ],
)
def test_a_bad_op_is_dropped_alone(op: Any, reason: Reason, collection: str) -> None:
    event = commit_of(commit_json(OP, op, OP))
    assert len(event.ops) == 2
    assert [(drop.reason, drop.collection) for drop in event.drops] == [(reason, collection)]
    assert msgspec.msgpack.encode(event.drops)  # their details are text that travels


@pytest.mark.parametrize("cid", [None, 5, "", "x y", "é", "a" * 101, {"$link": CID}])
def test_an_odd_cid_never_costs_the_op(cid: Any) -> None:
    assert commit_of(commit_json(OP | {"cid": cid})).ops[0].cid is None


def test_depth() -> None:
    deep: Any = 1
    for _ in range(200):
        deep = {"a": deep}
    event = commit_of(commit_json(OP, OP | {"record": deep}, OP | {"record": {"a": [[1]] * 300}}))
    assert len(event.ops) == 2
    assert [drop.reason for drop in event.drops] == [Reason.TOO_DEEP]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"a\\ud800"', "a\ud800"),
        (b'"\\ud83d\\ude00"', "😀"),
        (b"NaN", None),
        (b"-Infinity", None),
        (b"1e400", None),
        (b"100000000000000000000", 1e20),
    ],
)
def test_json_that_orjson_refuses(text: bytes, value: Any) -> None:
    data = b'{"repo":"%s","ops":[{"action":"create","path":"a.b.c/1","cid":"","record":{"v":%s}}]}' % (
        DID.encode(),
        text,
    )
    (op,) = commit_of(entry("commit", data)).ops
    clean = value.replace("\ud800", "") if type(value) is str else value
    assert json.loads(json_text(op.record, op)) == {"v": clean}


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        ("commit", b"", Reason.BAD_JSON),
        ("commit", b"{", Reason.BAD_JSON),
        ("commit", b"\xff\xfe", Reason.BAD_JSON),
        ("commit", b"[" * 100_000, Reason.BAD_JSON),
        ("commit", b'{"a":' * 100_000, Reason.BAD_JSON),
        ("commit", b"1" * 100_000 + b"x", Reason.BAD_JSON),
        ("commit", b"[]", Reason.BAD_ENTRY),
        ("commit", b"null", Reason.BAD_ENTRY),
        ("commit", {}, Reason.BAD_ENTRY),
        ("commit", {"repo": 5, "ops": []}, Reason.BAD_ENTRY),
        ("commit", {"repo": "alice", "ops": []}, Reason.BAD_DID),
        ("commit", {"repo": DID}, Reason.BAD_ENTRY),
        ("commit", {"repo": DID, "ops": {}}, Reason.BAD_ENTRY),
        ("commit", {"repo": DID, "ops": "ops"}, Reason.BAD_ENTRY),
        ("identity", {}, Reason.BAD_ENTRY),
        ("identity", {"did": "x"}, Reason.BAD_DID),
        ("account", {"did": DID}, Reason.BAD_ENTRY),
        ("account", {"did": DID, "active": 1}, Reason.BAD_ENTRY),
        ("account", {"active": True}, Reason.BAD_ENTRY),
        ("sync", {"did": DID}, Reason.UNKNOWN_TYPE),
        ("Commit", {"did": DID}, Reason.UNKNOWN_TYPE),
        ("\udcff", {"did": DID}, Reason.UNKNOWN_TYPE),
    ],
)
def test_json_that_is_no_event(kind: str, data: Any, reason: Reason) -> None:
    text = data if type(data) is bytes else orjson.dumps(data)
    fields = {b"type": kind.encode("utf-8", "surrogateescape"), b"data": text, b"seq": b"7"}
    assert reason_of(fields) is reason


def test_identity_and_account_of_the_typescript_reader() -> None:
    """No seq, and the DID where there is no handle."""
    assert decode_entry(entry("identity", {"did": DID, "handle": DID}, "")) == Identity(None, DID, None, None)
    assert decode_entry(entry("identity", {"did": DID, "handle": "Bob.Test"}, "")) == Identity(
        None, DID, "bob.test", None
    )
    assert decode_entry(entry("account", {"did": DID, "active": True}, "")) == Account(None, DID, True, None, None)
    odd = {"did": DID, "active": False, "status": 5, "time": [], "relay": {}}
    assert decode_entry(entry("account", odd, "9")) == Account(9, DID, False, None, None)


@pytest.mark.parametrize("drops", [None, 5, [5], [["new_reason"]], {}, [[]]])
def test_drops_of_anyone_else(drops: Any) -> None:
    assert commit_of(commit_json(drops=drops)).drops == []
