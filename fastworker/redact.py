"""Secrets out of text, and what a terminal would obey: one rule each, for logs, refusals and whatever quotes others."""

from __future__ import annotations

import re
from typing import Final

_USERINFO: Final = re.compile(r"(://[^:/?#@\s]*):\S*@")
_OPTION: Final = re.compile(r"(?i)(\w*(?:password|passwd|token|secret)(?:=|['\"]\s?:\s?)['\"]?)[^&\s'\"]+")


# C0 and C1 controls, line and paragraph separators, marks that turn the direction of text, halves of pairs
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """The text on one line, with what is no character of it as an escape such as \\n or \\x1b."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def printable_lines(text: str, indent: str = "") -> str:
    """A traceback or other lines of ours: each of them printable."""
    return "\n".join(indent + printable(line) for line in text.split("\n"))


def printable_json(text: str) -> str:
    """JSON that means the same; an encoder escapes no more than the controls below the space."""
    return _CONTROL.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def redact(text: str) -> str:
    """The text with the passwords of its URLs and options as `***`; right for malformed URLs too."""
    return _OPTION.sub(r"\1***", _USERINFO.sub(r"\1:***@", text))
