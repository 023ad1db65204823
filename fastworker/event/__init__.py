"""Bytes to ops (floor 0, pure): frames, CARs, stream entries, records.

These structs are the meanings that every floor above shares. Nothing here knows a clock, a socket,
a logger or the environment.

The four events, Op and Drop are also the layout of the native stream form (event/entry.py), field by
field in this order: a new field goes to the end and has a default, anything else is a new format version.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fastworker.errors import Reason

Action = Literal["create", "update", "delete"]
Record = dict[str, Any]


class Op(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One operation of a commit on the record `at://<repo>/<collection>/<rkey>`.

    `cid` is the record's CID as base32 text (`bafyrei...`), None for a delete.
    A create or update carries its record in one of two ways, never both:
    `block` is the record's DAG-CBOR (frame and native forms), decoded only if it is stored;
    `record` is the record as lexicon JSON (`{"$link"}`, `{"$bytes"}`; JSON forms).
    """

    action: Action
    collection: str
    rkey: str
    cid: str | None = None
    block: bytes | None = None
    record: Record | None = None


class Drop(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """An op that is not stored, or not whole (`bad_reference`), and why.

    `detail` is for a person (a path, a member), at most 200 characters.
    """

    reason: Reason
    collection: str = ""
    detail: str = ""


class Commit(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="c"):
    """`#commit`: ops in commit order. `rev` and `time` are None in the predecessor's JSON form."""

    seq: int | None
    repo: str
    rev: str | None
    time: str | None
    ops: list[Op]
    drops: list[Drop]
    relay: str | None = None


class Identity(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="i"):
    """`#identity`: `handle` None means that the handle must be resolved again."""

    seq: int | None
    did: str
    handle: str | None
    time: str | None
    relay: str | None = None


class Account(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="a"):
    """`#account`: `status` is an open set (takendown, suspended, deleted, deactivated, ...)."""

    seq: int | None
    did: str
    active: bool
    status: str | None
    time: str | None
    relay: str | None = None


class Sync(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="s"):
    """`#sync`: the repository's state was replaced; recorded for repair, never on a JSON stream."""

    seq: int | None
    did: str
    rev: str | None
    time: str | None
    relay: str | None = None


class Info(msgspec.Struct, frozen=True, gc=False):
    """`#info` (no seq): `OutdatedCursor` is the only name today."""

    name: str
    message: str | None = None


class ErrorFrame(msgspec.Struct, frozen=True, gc=False):
    """An error frame (op -1), after which the relay closes: `FutureCursor`, `ConsumerTooSlow`."""

    error: str
    message: str | None = None


class Unknown(msgspec.Struct, frozen=True, gc=False):
    """A kind that this release does not know: counted and skipped. `seq` still moves the cursor."""

    kind: str
    seq: int | None = None


Event = Commit | Identity | Account | Sync
Frame = Event | Info | ErrorFrame | Unknown


def account_of(event: Event) -> str:
    """DID of the account that it is about."""
    return event.repo if isinstance(event, Commit) else event.did
