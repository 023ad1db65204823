"""Dead letters as an operator reads them: one line of facts each, also of the predecessor's letters."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from fastworker.stream.admin import Fields, id_ms


class Letter(msgspec.Struct, frozen=True):
    """One line of `dlq list`, also its JSON."""

    id: str
    reason: str
    form: str
    type: str
    seq: str
    orig_id: str
    deliveries: str
    consumer: str
    set_aside_at: str
    bytes: int
    error: str


def _text(letter: Fields, name: bytes) -> str:
    return letter.get(name, b"").decode("utf-8", "replace")


def reason_of(letter: Fields) -> str:
    """`deliveries` for the predecessor's letters: it gave up after too many, and says nothing more."""
    return _text(letter, b"reason") or "deliveries"


def line_of(letter_id: str, letter: Fields) -> Letter:
    return Letter(
        id=letter_id,
        reason=reason_of(letter),
        form=_text(letter, b"form") or "json",
        type=_text(letter, b"type"),
        seq=_text(letter, b"seq"),
        orig_id=_text(letter, b"origId"),
        deliveries=_text(letter, b"deliveries"),
        consumer=_text(letter, b"consumer"),
        set_aside_at=_moment(letter.get(b"setAsideAt", b"")) or _moment(str(id_ms(letter_id)).encode()),
        bytes=len(letter.get(b"data", b"")),
        error=_text(letter, b"error"),
    )


def _moment(ms: bytes) -> str:
    """Empty for what is no time."""
    try:
        return datetime.fromtimestamp(int(ms) / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return ""
