"""Errors by whose fault they are, the closed set of reasons, and the exit codes.

The type of an error decides what happens next; nobody parses messages.
"""

from __future__ import annotations

import os
import re
import ssl
from enum import IntEnum, StrEnum
from typing import Final


class ExitCode(IntEnum):
    """Exit codes of every command (fixed interface)."""

    DONE = 0
    NO = 1  # the answer is no: drift found, a check failed
    USAGE = 2  # usage or configuration
    UNREACHABLE = 3  # a dependency could not be reached at start
    STOPPED_ITSELF = 4  # dead-letter limit, FutureCursor
    BUG = 70  # our own
    INTERRUPTED = 130  # by a signal, before it was done


class Reason(StrEnum):
    """Why an op was dropped or an entry was set aside. Every member is a metric series from the start."""

    # entries (set aside whole)
    BAD_ENTRY = "bad_entry"  # the stream entry has none of the known forms
    BAD_FRAME = "bad_frame"  # not two DAG-CBOR objects, or a payload without its required members
    BAD_JSON = "bad_json"  # `data` is not JSON
    BAD_NATIVE = "bad_native"  # the native envelope does not decode
    UNKNOWN_FORMAT = "unknown_format"  # a native envelope of a format version that this release does not read
    UNKNOWN_TYPE = "unknown_type"  # the entry's `type` is none of commit, identity, account
    NO_VERSION = "no_version"  # neither rev nor seq: the state law cannot order it
    AMBIGUOUS_SEQ = "ambiguous_seq"  # no rev, and a second relay is known: seq alone orders nothing
    OLDER_THAN_TOMBSTONES = "older_than_tombstones"  # before the horizon: its delete may be forgotten
    ROW_REJECTED = "row_rejected"  # PostgreSQL refused the data
    TOO_SLOW = "too_slow"  # the database's own code did not get it done in time, three times, while others were done
    KILLS_WORKER = "kills_worker"  # three processes died while they held only this entry
    ABANDONED = "abandoned"  # at the head of a full stream, its consumer long gone
    OVERSIZED = "oversized"  # beyond the size limits of the protocol, or more values than can be decoded at a stretch
    # ops (dropped; the siblings are stored)
    BAD_DID = "bad_did"
    BAD_PATH = "bad_path"
    BAD_ACTION = "bad_action"
    BAD_CAR = "bad_car"  # the CAR framing is broken before the op's block was found
    MISSING_BLOCK = "missing_block"
    BAD_HASH = "bad_hash"  # the block's bytes are not those that the CID names
    BAD_CBOR = "bad_cbor"
    BAD_RECORD = "bad_record"  # a required member is missing or has the wrong type
    TYPE_MISMATCH = "type_mismatch"  # `$type` is not the collection
    GATE_MISMATCH = "gate_mismatch"  # a gate whose `post` is not its own rkey's post
    NOT_OWNER = "not_owner"  # a list item in another account's list
    TOO_LONG = "too_long"  # an identifier exceeds its column
    TOO_DEEP = "too_deep"
    UNPROVED_OP = "unproved_op"  # the account's signed tree does not hold it; its repair is queued
    BAD_REFERENCE = "bad_reference"  # a URI, DID or CID in the record is none: left out, the record is stored
    # commits that are not stored (FASTWORKER_VERIFY); their accounts' repairs are queued
    BAD_SIGNATURE = "bad_signature"  # not the account's, by the key that its DID document shows
    FUTURE_REV = "future_rev"  # more than five minutes ahead of our clock
    # frames and events with nothing to store
    UNKNOWN_KIND = "unknown_kind"  # a frame kind that this release does not know
    FORBIDDEN = "forbidden"  # data_collection_forbidden
    FILTERED = "filtered"  # no drop: FASTWORKER_COLLECTIONS leaves it out
    FILTERED_ACCOUNT = "filtered_account"  # no drop: FASTWORKER_ACCOUNTS leaves its account out


def how_to_install(extra: str) -> str:
    """From where this one came: the name `fastworker` on the package index is somebody else's."""
    return f'in a checkout of fastworker, pip install ".[{extra}]"; with a wheel file, pip install "FILE.whl[{extra}]"'


class FastworkerError(Exception):
    """Root of our own errors. The message is one sentence an operator can act on."""

    exit_code: ExitCode = ExitCode.BUG


class ConfigError(FastworkerError):
    """The operator's mistake: refuse to start, name the variable, the value and what is allowed."""

    exit_code = ExitCode.USAGE


class Unreachable(FastworkerError):
    """A dependency could not be reached (or is unusable, such as a missing schema) at start."""

    exit_code = ExitCode.UNREACHABLE


class StoppedItself(FastworkerError):
    """Going on would do harm: the dead-letter limit, a FutureCursor."""

    exit_code = ExitCode.STOPPED_ITSELF


class InvalidEvent(Exception):
    """The network's fault: set the entry aside with its reason. Never retried, never fatal."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


class StreamUnavailable(Exception):
    """Redis cannot serve right now: pause reading, retry with backoff."""


class StoreUnavailable(Exception):
    """PostgreSQL cannot serve right now: pause reading, retry with backoff."""


class RowRejected(Exception):
    """PostgreSQL (or the driver's encoder) refused a value: isolate the entry by halving."""


_NO_TLS: Final = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
    "UNEXPECTED_MESSAGE",
    "UNKNOWN_PROTOCOL",
)


def words_of(error: BaseException, authority: str) -> str:
    """Why a server could not be reached. `authority`: the setting that names who may sign its certificate."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is refused ({cause.verify_message}); {authority} names the authority that signed it"
            )
        if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
            return "this port does not speak TLS: is the URL's scheme or its port wrong?"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and (error.errno or 0) > 0:
        return os.strerror(error.errno)  # type: ignore[arg-type] # its own words are those of the event loop
    if isinstance(error, ConnectionError) and error.errno is None:  # a driver's words about its own calls
        return "it closed the connection"
    return re.sub(r"\[Errno -?\d+\] ", "", str(error)) or type(error).__name__


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error that is no group."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 entry`, `2 entries`: for messages."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
