"""Dead letters: look at them, give them back to the stream, throw them away.

A retry appends what the entry was; the version guard and the horizon make it safe at any later time. Letters of the
predecessor (without our fields) and of our reader (a raw frame in base64) are understood too.
"""

from __future__ import annotations

import base64
import binascii
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
import orjson
from rich.table import Table

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, InvalidEvent, Reason, counted
from fastworker.event import Commit, ErrorFrame, Event, Frame, Info, Unknown, account_of
from fastworker.event.entry import decode_entry, encode_frame_entry, encode_json, encode_native
from fastworker.event.frame import decode_frame
from fastworker.event.record import json_bytes, load_record
from fastworker.redact import printable
from fastworker.stream.admin import RedisAdmin, open_redis
from fastworker.stream.consumer import original_fields
from fastworker.stream.letters import Letter, line_of, reason_of
from fastworker.stream.parts import Fields
from fastworker.terminal import Terminal, write_json

PIECE = 100
REASONS = (*Reason, "deliveries")


def check_id(letter_id: str) -> None:
    """Raises ConfigError for what cannot be the id of a letter."""
    if not re.fullmatch(r"\d{1,20}(-\d{1,20})?", letter_id, re.ASCII):
        raise ConfigError(f"{letter_id!r} is not the id of a dead letter: `fastworker dlq list` shows them")


def check_reason(reason: str | None) -> None:
    """Raises ConfigError for what no letter is set aside for."""
    if reason is not None and reason not in REASONS:
        raise ConfigError(f"--reason {reason}: the reasons are {', '.join(REASONS)}")


class Wanted(msgspec.Struct, frozen=True):
    """Which letters a command is about: those named, those of a reason, or all."""

    ids: frozenset[str] = frozenset()
    reason: str | None = None
    all: bool = False

    def check(self) -> None:
        """Raises ConfigError."""
        check_reason(self.reason)
        for letter_id in self.ids:
            check_id(letter_id)

    def has(self, letter_id: str, letter: Fields) -> bool:
        return self.all or letter_id in self.ids or (self.reason is not None and self.reason == reason_of(letter))


def _from_reader(letter: Fields) -> bool:
    return letter.get(b"consumer") == b"reader" and not letter.get(b"origId")


async def _letters(admin: RedisAdmin) -> AsyncIterator[tuple[str, Fields]]:
    """All letters there are at the start, in pieces: those written meanwhile do not keep it going."""
    left, after = await admin.letters.count(), None
    while left > 0:
        piece = await admin.letters.page(after=after, count=PIECE)
        if not piece:
            return
        for letter in piece:
            yield letter
        after, left = piece[-1][0], left - len(piece)


def _open(config: Config) -> Any:
    return open_redis(config.redis_url, config.stream_key, client_name="fastworker-dlq")


async def list_letters(config: Config, *, reason: str | None, limit: int, as_json: bool) -> ExitCode:
    """The oldest `limit` letters, and the count of each reason. Raises ConfigError."""
    check_reason(reason)
    counts: Counter[str] = Counter()
    lines: list[Letter] = []
    async with _open(config) as admin:
        async for letter_id, letter in _letters(admin):
            counts[reason_of(letter)] += 1
            if len(lines) < limit and reason in (None, reason_of(letter)):
                lines.append(line_of(letter_id, letter))
    if as_json:
        for line in lines:
            write_json(msgspec.json.encode(line))
        return ExitCode.DONE
    console = Terminal()
    if not counts:
        console.print("No dead letters.")
        return ExitCode.DONE
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    for name in ("id", "set aside at", "reason", "form", "error"):
        table.add_column(name, no_wrap=name != "error", overflow="fold")
    for line in lines:
        table.add_row(line.id, line.set_aside_at, line.reason, line.form, line.error)
    console.print(table)
    total = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    console.print(f"{counted(sum(counts.values()), 'dead letter')}: {total}")
    return ExitCode.DONE


async def show_letter(config: Config, letter_id: str) -> ExitCode:
    """One letter with what can be understood of it, as JSON; NO when there is none of this id. Raises ConfigError."""
    check_id(letter_id)
    async with _open(config) as admin:
        letter = await admin.letters.one(letter_id)
    if letter is None:
        sys.stderr.write(f"There is no dead letter {letter_id}.\n")
        return ExitCode.NO
    shown: dict[str, Any] = msgspec.to_builtins(line_of(letter_id, letter))
    try:
        shown["event"] = _readable(_event(letter))
    except (InvalidEvent, ValueError) as error:
        shown["not_understood"] = str(error)
        shown["data"] = _raw(letter.get(b"data", b""))
    write_json(orjson.dumps(shown, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str))
    return ExitCode.DONE


async def retry_letters(config: Config, wanted: Wanted) -> ExitCode:
    """Back to the stream. NO when one of them cannot go back, or a named one is not there. Raises ConfigError."""
    wanted.check()
    found: set[str] = set()
    retried = 0
    refused: list[str] = []
    async with _open(config) as admin:
        async for letter_id, letter in _letters(admin):
            if not wanted.has(letter_id, letter):
                continue
            found.add(letter_id)
            try:
                fields = _entry(letter, config.stream_format)
            except (InvalidEvent, ValueError) as error:
                refused.append(f"{letter_id}: {error}")
                continue
            retried += await admin.letters.retry(letter_id, fields, _account(letter))
    sys.stdout.write(f"{counted(retried, 'dead letter')} went back to {config.stream_key}.\n")
    return _end(wanted, found, refused)


async def purge_letters(config: Config, wanted: Wanted) -> ExitCode:
    """Raises ConfigError."""
    wanted.check()
    found: list[str] = []
    async with _open(config) as admin:
        async for letter_id, letter in _letters(admin):
            if wanted.has(letter_id, letter):
                found.append(letter_id)
        purged = 0
        for at in range(0, len(found), PIECE):
            purged += await admin.letters.purge(found[at : at + PIECE])
    sys.stdout.write(f"{counted(purged, 'dead letter is', 'dead letters are')} gone.\n")
    return _end(wanted, set(found), [])


def _end(wanted: Wanted, found: set[str], refused: list[str]) -> ExitCode:
    refused += [f"{letter_id}: there is no such dead letter" for letter_id in sorted(wanted.ids - found)]
    for line in refused:
        sys.stderr.write(printable(line) + "\n")
    return ExitCode.NO if refused else ExitCode.DONE


def _frame_of(letter: Fields) -> Event:
    """The event in a frame that the reader could not read; a later release may."""
    try:
        data = base64.b64decode(letter.get(b"data", b""), validate=True)
    except binascii.Error as error:
        raise ValueError(f"its data is not base64: {error}") from None
    frame: Frame = decode_frame(data, None)
    if isinstance(frame, Info | ErrorFrame | Unknown):
        raise InvalidEvent(Reason.UNKNOWN_KIND, f"a frame of kind {type(frame).__name__} has nothing to store")
    return frame


def _event(letter: Fields) -> Event:
    if _from_reader(letter):
        return _frame_of(letter)
    return decode_entry(original_fields(letter))


def _account(letter: Fields) -> str:
    """Whose event it is; empty: nobody can tell."""
    try:
        return account_of(_event(letter))
    except (InvalidEvent, ValueError):
        return ""


def _entry(letter: Fields, form: Literal["json", "native", "frame"]) -> Fields:
    """The fields to append. What the reader set aside never was an entry: it becomes one of the configured form."""
    if not _from_reader(letter):
        return original_fields(letter) | _received(letter)
    event = _frame_of(letter)
    if form == "frame":
        return dict(encode_frame_entry(base64.b64decode(letter[b"data"]), None))
    fields = encode_native(event) if form == "native" else encode_json(event)
    if fields is None:
        raise ValueError("a #sync event is not put on a JSON stream")
    return dict(fields)


def _received(letter: Fields) -> Fields:
    """When the first entry was received: by its new id it would look young, to the rule of dates and to the horizon."""
    at = letter.get(b"at") or letter.get(b"origId", b"").partition(b"-")[0]
    return {b"at": at} if at.isdigit() else {}


def _readable(event: Event) -> dict[str, Any]:
    """The event as JSON, records decoded."""
    shown: dict[str, Any] = {"kind": type(event).__name__.lower()}
    if not isinstance(event, Commit):
        return {**shown, **msgspec.structs.asdict(event)}
    ops = []
    for op in event.ops:
        one: dict[str, Any] = {"action": op.action, "path": f"{op.collection}/{op.rkey}", "cid": op.cid}
        if op.action != "delete":
            try:
                record = load_record(op)
                one["record"] = orjson.Fragment(json_bytes(record, op.block))
            except InvalidEvent as error:
                one["not_understood"] = str(error)
        ops.append(one)
    drops = [msgspec.to_builtins(drop) for drop in event.drops]
    return shown | {
        "seq": event.seq,
        "repo": event.repo,
        "rev": event.rev,
        "time": event.time,
        "ops": ops,
        "drops": drops,
    }


def _raw(data: bytes) -> str | dict[str, str]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"$bytes": base64.b64encode(data).decode()}
