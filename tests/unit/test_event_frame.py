"""Frames: required members strictly, others leniently, and one bad op never costs its siblings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Account, Commit, Drop, ErrorFrame, Identity, Info, Sync, Unknown
from fastworker.event.frame import BLOCKS_BYTES_MAX, FRAME_BYTES_MAX, OPS_MAX, decode_frame
from fastworker.event.record import load_record
from fastworker.simulator.cbor import cid_of, cid_text, encode
from fastworker.simulator.repo import car_bytes

DID = "did:plc:wq4aajammjtxdomz3e23667t"
REV = "3mptbypluud2a"
TIME = "2026-07-04T14:38:07.517Z"
LIKE = {"$type": "app.bsky.feed.like", "createdAt": TIME, "subject": {"uri": "at://x", "cid": "y"}}
BLOCK = encode(LIKE)
CID = cid_of(BLOCK)
OTHER = encode(LIKE | {"via": 1})
CAR = car_bytes(CID, {CID: BLOCK, cid_of(OTHER): OTHER})


def link(cid: bytes) -> dict[str, str]:
    return {"$link": cid_text(cid)}


def op(action: Any = "create", path: Any = "app.bsky.feed.like/3mptbyplj5d2a", cid: Any = CID) -> dict[str, Any]:
    return {"action": action, "path": path, "cid": link(cid) if type(cid) is bytes else cid}


def frame(kind: str, payload: Any, **header: Any) -> bytes:
    return encode({"op": 1, "t": kind} | header) + encode(payload)


def commit(*ops: Any, **members: Any) -> Any:
    payload = {"seq": 7, "repo": DID, "rev": REV, "time": TIME, "ops": list(ops), "blocks": CAR} | members
    return decode_frame(frame("#commit", {k: v for k, v in payload.items() if v is not ...}))


def test_commit() -> None:
    event = commit(
        op(), op("update", "app.bsky.feed.like/2", cid_of(OTHER)), op("delete", "app.bsky.feed.post/3", None)
    )
    assert (event.seq, event.repo, event.rev, event.time, event.drops) == (7, DID, REV, TIME, [])
    assert [(o.action, o.collection, o.rkey, o.cid) for o in event.ops] == [
        ("create", "app.bsky.feed.like", "3mptbyplj5d2a", cid_text(CID)),
        ("update", "app.bsky.feed.like", "2", cid_text(cid_of(OTHER))),
        ("delete", "app.bsky.feed.post", "3", None),
    ]
    assert load_record(event.ops[0]) == LIKE
    assert event.ops[2].block is None


def test_relay_is_passed_on() -> None:
    payload = {"seq": 1, "did": DID, "time": TIME}
    assert decode_frame(frame("#identity", payload), "bsky.network") == Identity(1, DID, None, TIME, "bsky.network")


HASH = b"\x01\x71\x12\x20" + bytes(32)


@pytest.mark.parametrize(
    ("bad", "reason", "collection"),
    [
        (op(action="replace"), Reason.BAD_ACTION, "app.bsky.feed.like"),
        (op(action=None), Reason.BAD_ACTION, "app.bsky.feed.like"),
        (op(action=["create"]), Reason.BAD_ACTION, "app.bsky.feed.like"),
        (op(path="app.bsky.feed.like"), Reason.BAD_PATH, ""),
        (op(path="like/1"), Reason.BAD_PATH, ""),
        (op(path="app.bsky.feed.like/a\ud800"), Reason.BAD_PATH, ""),
        (op(path=3), Reason.BAD_PATH, ""),
        (op(path=None), Reason.BAD_PATH, ""),
        ("create", Reason.BAD_ACTION, ""),
        (None, Reason.BAD_ACTION, ""),
        (op(cid=None), Reason.BAD_HASH, "app.bsky.feed.like"),
        (op(cid=cid_text(CID)), Reason.BAD_HASH, "app.bsky.feed.like"),
        (op(cid=b"\x01\x55\x12\x20" + CID[4:]), Reason.BAD_HASH, "app.bsky.feed.like"),
        (op(cid=HASH), Reason.MISSING_BLOCK, "app.bsky.feed.like"),
    ],
)
def test_a_bad_op_is_dropped_alone(bad: Any, reason: Reason, collection: str) -> None:
    event = commit(op(path="app.bsky.feed.like/before"), bad, op(path="app.bsky.feed.like/after"))
    assert [o.rkey for o in event.ops] == ["before", "after"]
    assert [(drop.reason, drop.collection) for drop in event.drops] == [(reason, collection)]
    assert event.drops[0].detail.isprintable()


def test_a_block_that_is_not_what_its_cid_says() -> None:
    event = commit(op(), op(path="app.bsky.feed.like/2", cid=HASH), blocks=car_bytes(CID, {HASH: b"\xa0", CID: BLOCK}))
    assert [o.cid for o in event.ops] == [cid_text(CID)]
    assert event.drops == [Drop(Reason.BAD_HASH, "app.bsky.feed.like", "app.bsky.feed.like/2")]


def test_a_car_that_breaks_off() -> None:
    event = commit(op(), op(path="app.bsky.feed.like/2", cid=cid_of(OTHER)), blocks=CAR[:-1])
    assert [o.cid for o in event.ops] == [cid_text(CID)]
    assert [drop.reason for drop in event.drops] == [Reason.BAD_CAR]


@pytest.mark.parametrize("blocks", [b"", ..., None, "text", 5])
def test_no_car_at_all(blocks: Any) -> None:
    event = commit(op(), op("delete"), blocks=blocks)
    assert [o.action for o in event.ops] == ["delete"]
    assert [drop.reason for drop in event.drops] == [Reason.BAD_CAR]


@pytest.mark.parametrize(
    "members",
    [
        {"tooBig": True},
        {"rebase": True},
        {"time": ...},
        {"time": 5},
        {"time": "\ud800"},
        {"time": "x" * 99},
        {"new": [{}]},
    ],
)
def test_optional_members_never_cost_the_commit(members: dict[str, Any]) -> None:
    event = commit(op(), **members)
    assert len(event.ops) == 1
    assert event.time == (TIME if "time" not in members else None)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"seq": ...}, Reason.BAD_FRAME),
        ({"seq": 0}, Reason.BAD_FRAME),
        ({"seq": -1}, Reason.BAD_FRAME),
        ({"seq": 2**53}, Reason.BAD_FRAME),
        ({"seq": "7"}, Reason.BAD_FRAME),
        ({"seq": True}, Reason.BAD_FRAME),
        ({"seq": 7.0}, Reason.BAD_FRAME),
        ({"repo": ...}, Reason.BAD_FRAME),
        ({"repo": 5}, Reason.BAD_FRAME),
        ({"repo": "alice.test"}, Reason.BAD_DID),
        ({"repo": "did:plc:a\ud800"}, Reason.BAD_DID),
        ({"rev": ...}, Reason.BAD_FRAME),
        ({"rev": "now"}, Reason.BAD_FRAME),
        ({"ops": ...}, Reason.BAD_FRAME),
        ({"ops": {}}, Reason.BAD_FRAME),
        ({"ops": [op("delete")] * (OPS_MAX + 1)}, Reason.OVERSIZED),
        ({"blocks": bytes(BLOCKS_BYTES_MAX + 1)}, Reason.OVERSIZED),
    ],
)
def test_required_members(members: dict[str, Any], reason: Reason) -> None:
    with pytest.raises(InvalidEvent) as caught:
        commit(**members)
    assert caught.value.reason is reason


def test_limits_are_inclusive() -> None:
    event = commit(*[op("delete", f"app.bsky.feed.like/{n}") for n in range(OPS_MAX)])
    assert len(event.ops) == OPS_MAX
    assert commit(op(), blocks=CAR + bytes(BLOCKS_BYTES_MAX - len(CAR))).drops == []
    with pytest.raises(InvalidEvent) as caught:
        decode_frame(bytes(FRAME_BYTES_MAX + 1))
    assert caught.value.reason is Reason.OVERSIZED


def test_many_ops_on_one_large_block_are_bounded() -> None:
    large = encode({"text": "x" * 600_000})
    cid = cid_of(large)
    event = commit(
        *[op(path=f"app.bsky.feed.post/{n}", cid=cid) for n in range(200)], blocks=car_bytes(cid, {cid: large})
    )
    assert len(event.ops) == 3
    assert {drop.reason for drop in event.drops} == {Reason.OVERSIZED}


def test_a_payload_that_libipld_refuses_is_read_all_the_same() -> None:
    """Here a lone surrogate in a member that nobody needs; unsorted members are read too."""
    assert len(commit(op(), note="\ud800").ops) == 1
    header, payload = encode({"op": 1, "t": "#account"}), b"\xa3cseq\x05cdid" + encode(DID) + b"factive\xf5"
    assert decode_frame(header + payload) == Account(5, DID, active=True, status=None, time=None)


@pytest.mark.parametrize(
    ("handle", "known"),
    [
        ("Alice.Test", "alice.test"),
        ("handle.invalid", None),
        ("HANDLE.invalid", None),
        (DID, None),
        (None, None),
        ("", None),
        (5, None),
        ("no", None),
        ("a\0b.test", None),
        ("\ud800.test", None),
    ],
)
def test_identity(handle: Any, known: str | None) -> None:
    payload = {"seq": 5, "did": DID, "time": TIME, "handle": handle}
    assert decode_frame(frame("#identity", payload)) == Identity(5, DID, known, TIME)


def test_account() -> None:
    payload = {"seq": 5, "did": DID, "time": TIME, "active": False, "status": "take\0ndown"}
    assert decode_frame(frame("#account", payload)) == Account(5, DID, active=False, status="takendown", time=TIME)
    for odd in (None, 5, ""):
        assert decode_frame(frame("#account", payload | {"status": odd})) == Account(5, DID, False, None, TIME)
    with pytest.raises(InvalidEvent, match="active"):
        decode_frame(frame("#account", payload | {"active": 1}))


def test_other_kinds() -> None:
    assert decode_frame(frame("#sync", {"seq": 5, "did": DID, "rev": REV, "time": TIME, "blocks": CAR})) == Sync(
        5, DID, REV, TIME
    )
    assert decode_frame(frame("#info", {"name": "OutdatedCursor", "message": "m"})) == Info("OutdatedCursor", "m")
    assert decode_frame(encode({"op": -1}) + encode({"error": "FutureCursor"})) == ErrorFrame("FutureCursor")
    assert decode_frame(frame("#info", {"error": "ConsumerTooSlow", "message": 5}, op=-1)) == ErrorFrame(
        "ConsumerTooSlow"
    )
    assert decode_frame(frame("#tombstone", {"seq": 9})) == Unknown("#tombstone", 9)
    assert decode_frame(frame("#new", {"seq": "x"})) == Unknown("#new")
    assert decode_frame(encode({"op": 1}) + encode({})) == Unknown("op 1")
    assert decode_frame(frame("#commit", {"seq": 8}, op=2)) == Unknown("#commit", 8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xa0",
        encode({"op": 1, "t": "#info"}),
        frame("#info", {"name": "x"}) + b"\xa0",
        frame("#info", {"name": "x"})[:-1],
        frame("#info", []),
        encode([]) + encode({}),
        encode({}) + encode({}),
        frame("#info", {}),
        frame("#info", {}, op="1"),
        encode({"op": -1}) + encode({}),
        b"\x81" * 100_000,
        b"\x9b\x00\x00\x00\xff\xff\xff\xff\xff" * 1000,
        b"\xff" * 1000,
        b"{}",
    ],
)
def test_no_frame(data: bytes) -> None:
    with pytest.raises(InvalidEvent) as caught:
        decode_frame(data)
    assert caught.value.reason is Reason.BAD_FRAME


@pytest.mark.real_data
def test_scripted_messages(real_data: Path) -> None:
    """The relay implementation's own scenarios: life cycles, legacy commits, orders gone wrong, 42 ops in one commit."""
    kinds: set[str] = set()
    refused: list[str] = []
    for path in sorted((real_data / "frames" / "scripted").glob("*.json")):
        document = json.loads(path.read_text())
        messages = document.get("messages") or [{"frame": {"header": {"t": "#commit"}, "body": document}}]
        for message in messages:
            kind, body = message["frame"]["header"]["t"], message["frame"]["body"]
            kinds.add(kind)
            try:
                event = decode_frame(frame(kind, {name: value for name, value in body.items() if value is not None}))
            except InvalidEvent:
                assert message["drop"]  # the scenario wants it dropped
                refused.append(body["rev"])
                continue
            if isinstance(event, Commit):
                assert event.drops == []
                assert len(event.ops) == len(body["ops"])
                assert all(load_record(o)["$type"] == o.collection for o in event.ops if o.action != "delete")
    assert kinds == {"#commit", "#identity", "#account", "#sync"}
    assert refused == ["3lmxjza3nva00"]  # no TID: it has a digit that TIDs lack
