"""Frames: the bytes of one WebSocket message to what they say.

A frame is two DAG-CBOR objects, header and payload. Only the blocks that ops name are taken out of
a commit's CAR, and each is checked against its CID; records are not decoded here.
"""

from __future__ import annotations

from typing import Any

import libipld

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Account, Commit, Drop, ErrorFrame, Frame, Identity, Info, Op, Sync, Unknown
from fastworker.event.car import RECORD_CID, RECORD_CID_BYTES, is_block_of, select_blocks
from fastworker.event.cbor import VALUES_MAX, count_values, decode_sequence
from fastworker.event.record import cid_text, clean_text
from fastworker.event.syntax import is_did, is_handle, is_tid, split_path

# The protocol's limits (lexicon com.atproto.sync.subscribeRepos). Beyond them the whole frame is refused: what a relay
# should not have passed on is kept as it came, for a person to look at, and nothing of it is half stored.
FRAME_BYTES_MAX = 5_000_000
BLOCKS_BYTES_MAX = 2_000_000
OPS_MAX = 200

SEQ_END = 2**53
"""Sequence numbers are below this and above zero, so that they are exact in every JSON reader."""
_DETAIL_MAX = 200
_TIME_MAX = 64  # characters; the longest datetime that the syntax allows


def decode_frame(data: bytes, relay: str | None = None) -> Frame:
    """What the frame says. Raises InvalidEvent (BAD_FRAME, BAD_DID, OVERSIZED).

    Required members must be there and have their type; others may be odd or absent; unknown ones are
    ignored. An op that is bad becomes a Drop in its commit, its siblings stay.
    """
    return read_frame(*open_frame(data), relay)


def open_frame(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, payload). Raises InvalidEvent (BAD_FRAME, OVERSIZED)."""
    if len(data) > FRAME_BYTES_MAX:
        raise InvalidEvent(Reason.OVERSIZED, f"a frame of {len(data)} bytes")
    try:
        objects = libipld.decode_dag_cbor_multi(data)
    except (ValueError, RecursionError, MemoryError):
        try:
            objects = decode_sequence(data, 2) if count_values(data, VALUES_MAX) <= VALUES_MAX else []
        except InvalidEvent as error:
            raise InvalidEvent(Reason.BAD_FRAME, error.detail) from None
    if len(objects) != 2:
        raise InvalidEvent(Reason.BAD_FRAME, f"{len(objects)} objects, not 2")
    header, payload = objects
    if type(header) is not dict or type(payload) is not dict:
        raise InvalidEvent(Reason.BAD_FRAME, "not two objects")
    return header, payload


def read_frame(header: dict[str, Any], payload: dict[str, Any], relay: str | None = None) -> Frame:
    """As `decode_frame`, of a frame that is open."""
    kind = header.get("t")
    operation = header.get("op")
    if operation == 1:
        if kind == "#commit":
            return _commit(payload, relay)
        if kind == "#identity":
            return identity_of(_did(payload, "did"), payload.get("handle"), _seq(payload), payload.get("time"), relay)
        if kind == "#account":
            return _account(payload, relay)
        if kind == "#sync":
            return Sync(_seq(payload), _did(payload, "did"), _rev(payload), time_of(payload.get("time")), relay)
        if kind == "#info":
            return Info(_text(payload, "name"), _optional_text(payload, "message"))
    elif operation == -1:  # it has no `t`, or one that says nothing
        return ErrorFrame(_text(payload, "error"), _optional_text(payload, "message"))
    if type(operation) is not int:
        raise InvalidEvent(Reason.BAD_FRAME, "header without op")
    seq = payload.get("seq")
    return Unknown(
        clean_text(kind)[:_DETAIL_MAX] if type(kind) is str else f"op {operation}", seq if is_seq(seq) else None
    )


def is_seq(seq: Any) -> bool:
    return type(seq) is int and 0 < seq < SEQ_END


def time_of(time: Any) -> str | None:
    """The event's time as it came, if it can be one: a bad time never costs the event."""
    return time if type(time) is str and len(time) <= _TIME_MAX and time.isascii() else None


def detail_of(value: Any) -> str:
    """For a Drop: short, and safe in a log."""
    return clean_text(value)[:_DETAIL_MAX] if type(value) is str else f"not text but {type(value).__name__}"


def identity_of(did: str, handle: Any, seq: int | None, time: Any, relay: str | None) -> Identity:
    """Handles are lower-cased. What is no handle (`handle.invalid`, a DID, nothing) must be resolved again."""
    if type(handle) is not str or not is_handle(handle) or (handle := handle.lower()) == "handle.invalid":
        handle = None
    return Identity(seq, did, handle, time_of(time), relay)


def account_of(did: str, active: bool, status: Any, seq: int | None, time: Any, relay: str | None) -> Account:
    status = (clean_text(status)[:_DETAIL_MAX] or None) if type(status) is str else None
    return Account(seq, did, active, status, time_of(time), relay)


def _commit(payload: dict[str, Any], relay: str | None) -> Commit:
    seq = _seq(payload)
    repo = _did(payload, "repo")
    rev = _rev(payload)
    entries = payload.get("ops")
    if type(entries) is not list:
        raise InvalidEvent(Reason.BAD_FRAME, "ops is not a list")
    if len(entries) > OPS_MAX:
        raise InvalidEvent(Reason.OVERSIZED, f"{len(entries)} ops")
    car = payload.get("blocks")
    if not isinstance(car, bytes):
        car = b""
    elif len(car) > BLOCKS_BYTES_MAX:
        raise InvalidEvent(Reason.OVERSIZED, f"blocks of {len(car)} bytes")
    ops: list[Op] = []
    drops: list[Drop] = []
    blocks: dict[bytes, bytes] | None = None
    is_sound = True
    bad: set[bytes] = set()
    room = BLOCKS_BYTES_MAX
    for entry in entries:
        if type(entry) is not dict:
            drops.append(Drop(Reason.BAD_ACTION, "", "an op is not an object"))
            continue
        action = entry.get("action")
        path: Any = entry.get("path")
        names = split_path(path) if type(path) is str else None
        if names is None:
            drops.append(Drop(Reason.BAD_PATH, "", detail_of(path)))
            continue
        collection, rkey = names
        if action == "delete":
            ops.append(Op("delete", collection, rkey))
            continue
        if action not in ("create", "update"):
            drops.append(Drop(Reason.BAD_ACTION, collection, detail_of(action)))
            continue
        cid = entry.get("cid")
        if not isinstance(cid, bytes) or len(cid) != RECORD_CID_BYTES or not cid.startswith(RECORD_CID):
            drops.append(Drop(Reason.BAD_HASH, collection, f"{path}: no CID of a record"))
            continue
        if blocks is None:
            blocks, is_sound = select_blocks(car, _cids(entries))
        block = blocks.get(cid)
        if block is None:
            drops.append(Drop(Reason.MISSING_BLOCK if is_sound else Reason.BAD_CAR, collection, path))
        elif len(block) > room:  # 200 ops may name one large block: that is 200 records to decode and to store
            drops.append(Drop(Reason.OVERSIZED, collection, path))
        elif cid in bad or not is_block_of(cid, block):
            bad.add(cid)  # those that are good use up the room: so no bytes are hashed often
            drops.append(Drop(Reason.BAD_HASH, collection, path))
        else:
            room -= len(block)
            ops.append(Op(action, collection, rkey, cid_text(cid), block))
    return Commit(seq, repo, rev, time_of(payload.get("time")), ops, drops, relay)


def _cids(entries: list[Any]) -> set[bytes]:
    """What the ops may want from the CAR. A CID of another length is never in it."""
    return {cid for entry in entries if type(entry) is dict and isinstance(cid := entry.get("cid"), bytes)}


def _account(payload: dict[str, Any], relay: str | None) -> Account:
    active = payload.get("active")
    if type(active) is not bool:
        raise InvalidEvent(Reason.BAD_FRAME, "active is not a boolean")
    return account_of(_did(payload, "did"), active, payload.get("status"), _seq(payload), payload.get("time"), relay)


def _seq(payload: dict[str, Any]) -> int:
    seq = payload.get("seq")
    if type(seq) is not int or not 0 < seq < SEQ_END:
        raise InvalidEvent(Reason.BAD_FRAME, "no seq")
    return seq


def _rev(payload: dict[str, Any]) -> str:
    rev = payload.get("rev")
    if type(rev) is not str or not is_tid(rev):
        raise InvalidEvent(Reason.BAD_FRAME, "rev is not a TID")
    return rev


def _did(payload: dict[str, Any], member: str) -> str:
    did = payload.get(member)
    if type(did) is not str:
        raise InvalidEvent(Reason.BAD_FRAME, f"no {member}")
    if not is_did(did):
        raise InvalidEvent(Reason.BAD_DID, detail_of(did))
    return did


def _text(payload: dict[str, Any], member: str) -> str:
    text = payload.get(member)
    if type(text) is not str:
        raise InvalidEvent(Reason.BAD_FRAME, f"no {member}")
    return clean_text(text)[:_DETAIL_MAX]


def _optional_text(payload: dict[str, Any], member: str) -> str | None:
    text = payload.get(member)
    return clean_text(text) if type(text) is str else None
