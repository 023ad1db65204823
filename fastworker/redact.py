"""Secrets out of text: one rule for log lines, refusals, statuses and whatever quotes an error."""

from __future__ import annotations

import re
from typing import Final

_USERINFO: Final = re.compile(r"(://[^:/?#@\s]*):\S*@")
_OPTION: Final = re.compile(r"(?i)(\w*(?:password|passwd|token|secret)(?:=|['\"]\s?:\s?)['\"]?)[^&\s'\"]+")


def redact(text: str) -> str:
    """The text with the passwords of its URLs and options as `***`; right for malformed URLs too."""
    return _OPTION.sub(r"\1***", _USERINFO.sub(r"\1:***@", text))
