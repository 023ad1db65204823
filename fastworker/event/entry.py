"""Stream entries: every form that lies on the stream to the event it carries, and back.

    native   one field `n`: format version (one byte), then the event as a msgpack array (msgspec)
    frame    `f`: the raw frame; `relay`: the host it came from
    json     `type`, `data`, `seq`: lexicon JSON, or the dialect of the predecessor's reader

Any of them may have one field more, `at`: the milliseconds at which the event was received, where the entry's id is
younger (a retried dead letter) or means nothing (a recording). Who does not know it ignores it.

Who counts what: a frame that cannot be read at all is the reader's to count; ops that were dropped
travel with their commit in every form (`drops`, an extra member of the JSON) and are counted by the
worker, once, with the ack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Account, Commit, Drop, Event, Identity, Op, Record
from fastworker.event.cbor import DEPTH_MAX, VALUES_MAX
from fastworker.event.dialect import lexicon_record
from fastworker.event.frame import SEQ_END, account_of, decode_frame, detail_of, identity_of, time_of
from fastworker.event.record import TOO_MANY_VALUES, json_bytes, load_record, nesting_exceeds, too_heavy, values_within
from fastworker.event.syntax import is_did, is_tid, split_path

Fields = list[tuple[bytes, bytes]]

NATIVE_VERSION = 1
_CID_MAX = 100  # characters; "at most 100 bytes" (AT Protocol, data model)

_native_encoder = msgspec.msgpack.Encoder()
_native_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def decode_entry(fields: Mapping[bytes, bytes]) -> Event:
    """The event of one stream entry, whatever its form. Raises InvalidEvent, and nothing else whatever the bytes."""
    native = fields.get(b"n")
    if native is not None:
        return _decode_native(native)
    frame = fields.get(b"f")
    if frame is not None:
        relay = fields.get(b"relay")
        event = decode_frame(frame, relay.decode("utf-8", "replace") if relay else None)
        if isinstance(event, Event):
            return event
        raise InvalidEvent(Reason.UNKNOWN_KIND, type(event).__name__)
    kind = fields.get(b"type")
    data = fields.get(b"data")
    if kind is None or data is None:
        raise InvalidEvent(Reason.BAD_ENTRY, f"fields: {', '.join(repr(name)[:40] for name in list(fields)[:8])}")
    return _decode_json(kind, data, _decimal(fields.get(b"seq", b"")))


def received_ms(entry_id: str, fields: Mapping[bytes, bytes]) -> int:
    """When the event was received, in milliseconds since 1970: as the entry says, else as its id does."""
    at = fields.get(b"at")
    return int(at) if at is not None and at.isdigit() and len(at) <= 15 else int(entry_id.partition("-")[0])


def encode_native(event: Event) -> Fields:
    """Record blocks stay as they came from the CAR; the worker decodes those that it stores."""
    return [(b"n", bytes((NATIVE_VERSION,)) + _native_encoder.encode(event))]


def encode_frame_entry(data: bytes, relay: str | None) -> Fields:
    return [(b"f", data), (b"relay", relay.encode())] if relay else [(b"f", data)]


def encode_json(event: Event) -> Fields | None:
    """Lexicon JSON, None for #sync, which old readers of the stream do not know.

    Field order is the contract's: old consumers decode by position. They ignore the members `rev`,
    `time`, `relay`, `drops` and `status`, which let our worker store what they cannot.
    """
    if isinstance(event, Commit):
        kind, data = b"commit", _commit_members(event)
    elif isinstance(event, Identity):
        kind, data = b"identity", {"did": event.did, "handle": event.handle}
    elif isinstance(event, Account):
        kind, data = b"account", {"did": event.did, "active": event.active}
        if event.status is not None:
            data["status"] = event.status
    else:
        return None
    if event.time is not None:
        data["time"] = event.time
    if event.relay is not None:
        data["relay"] = event.relay
    return [
        (b"type", kind),
        (b"data", orjson.dumps(data)),
        (b"seq", b"" if event.seq is None else str(event.seq).encode()),
    ]


def _commit_members(commit: Commit) -> dict[str, Any]:
    ops: list[dict[str, Any]] = []
    drops = list(commit.drops)
    heavy = too_heavy(commit.ops)
    for place, op in enumerate(commit.ops):
        if place in heavy:
            drops.append(Drop(Reason.OVERSIZED, op.collection, detail_of(f"{op.rkey}: {TOO_MANY_VALUES}")))
            continue
        member: dict[str, Any] = {"action": op.action, "path": f"{op.collection}/{op.rkey}"}
        if op.action != "delete":
            try:
                record = json_bytes(load_record(op), op.block)
            except InvalidEvent as error:
                drops.append(Drop(error.reason, op.collection, detail_of(f"{op.rkey}: {error.detail}")))
                continue
            member["cid"] = op.cid or ""
            member["record"] = orjson.Fragment(record)
        ops.append(member)
    data: dict[str, Any] = {"repo": commit.repo, "ops": ops}
    if commit.rev is not None:
        data["rev"] = commit.rev
    if drops:
        data["drops"] = [[drop.reason, drop.collection, drop.detail] for drop in drops]
    return data


def _decode_native(data: bytes) -> Event:
    if data[:1] != b"\x01":
        raise InvalidEvent(Reason.UNKNOWN_FORMAT, f"version {data[0]}" if data else "empty")
    try:
        return _native_decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidEvent(Reason.BAD_NATIVE, detail_of(str(error))) from None


def _decode_json(kind: bytes, data: bytes, seq: int | None) -> Event:
    body = _load_json(data)
    if type(body) is not dict:
        raise InvalidEvent(Reason.BAD_ENTRY, "data is not an object")
    relay = body.get("relay")
    if type(relay) is not str:
        relay = None
    if kind == b"commit":
        may_be_deep = data.count(b"{") + data.count(b"[") > DEPTH_MAX
        return _json_commit(body, seq, relay, may_be_deep=may_be_deep, may_be_heavy=len(data) > 2 * VALUES_MAX)
    if kind == b"identity":
        return identity_of(_did(body, "did"), body.get("handle"), seq, body.get("time"), relay)
    if kind == b"account":
        active = body.get("active")
        if type(active) is not bool:
            raise InvalidEvent(Reason.BAD_ENTRY, "active is not a boolean")
        return account_of(_did(body, "did"), active, body.get("status"), seq, body.get("time"), relay)
    raise InvalidEvent(Reason.UNKNOWN_TYPE, detail_of(kind.decode("utf-8", "replace")))


def _json_commit(
    body: dict[str, Any], seq: int | None, relay: str | None, *, may_be_deep: bool, may_be_heavy: bool
) -> Commit:
    repo = _did(body, "repo")
    entries = body.get("ops")
    if type(entries) is not list:
        raise InvalidEvent(Reason.BAD_ENTRY, "ops is not a list")
    rev = body.get("rev")
    if type(rev) is not str or not is_tid(rev):
        rev = None
        if seq is None:
            raise InvalidEvent(Reason.NO_VERSION, "neither rev nor seq")
    ops: list[Op] = []
    drops = _json_drops(body["drops"]) if "drops" in body else []
    left = VALUES_MAX
    for entry in entries:
        if type(entry) is not dict:
            drops.append(Drop(Reason.BAD_ACTION, "", "an op is not an object"))
            continue
        path = entry.get("path")
        names = split_path(path) if type(path) is str else None
        if names is None:
            drops.append(Drop(Reason.BAD_PATH, "", detail_of(path)))
            continue
        collection, rkey = names
        action = entry.get("action")
        if action == "delete":
            ops.append(Op("delete", collection, rkey))
        elif action not in ("create", "update"):
            drops.append(Drop(Reason.BAD_ACTION, collection, detail_of(action)))
        else:
            record = entry.get("record")
            if type(record) is not dict:
                drops.append(Drop(Reason.BAD_RECORD, collection, f"{detail_of(path)}: no record"))
            elif may_be_heavy and (count := values_within(record, left)) > left:
                drops.append(Drop(Reason.OVERSIZED, collection, detail_of(f"{rkey}: {TOO_MANY_VALUES}")))
            elif may_be_deep and nesting_exceeds(record, DEPTH_MAX):
                drops.append(Drop(Reason.TOO_DEEP, collection, detail_of(path)))
            else:
                left -= count if may_be_heavy else 0
                if type(record.get("py_type")) is str:
                    record = lexicon_record(record)
                ops.append(Op(action, collection, rkey, _cid(entry.get("cid")), None, record))
    return Commit(seq, repo, rev, time_of(body.get("time")), ops, drops, relay)


def _json_drops(members: Any) -> list[Drop]:
    """What our reader dropped. From anyone else the member means nothing."""
    try:
        return msgspec.convert(members, list[Drop])
    except (msgspec.ValidationError, UnicodeEncodeError):  # a lone surrogate
        return []


def _cid(cid: Any) -> str | None:
    """The TypeScript reader writes an empty text where it has none."""
    return cid if type(cid) is str and 0 < len(cid) <= _CID_MAX and cid.isascii() and cid.isalnum() else None


def _did(body: Record, member: str) -> str:
    did = body.get(member)
    if type(did) is not str:
        raise InvalidEvent(Reason.BAD_ENTRY, f"no {member}")
    if not is_did(did):
        raise InvalidEvent(Reason.BAD_DID, detail_of(did))
    return did


def _decimal(seq: bytes) -> int | None:
    """`seq` is empty on identity and account entries of the TypeScript reader."""
    if not seq.isdigit() or len(seq) > 16:
        return None
    value = int(seq)
    return value if 0 < value < SEQ_END else None


def _load_json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except ValueError:
        pass
    # orjson refuses what other writers let through: lone surrogates, NaN, numbers beyond a double.
    try:
        return json.loads(data.decode("utf-8", "surrogatepass"), parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(Reason.BAD_JSON, detail_of(str(error))) from None


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
