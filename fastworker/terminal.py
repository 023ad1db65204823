"""Output for people: strings are shown as they are, whoever wrote them.

No markup, no emoji codes, and nothing that a terminal would obey: every string and text that reaches the console passes
here. JSON goes out with escapes, so that it means the same and is as harmless.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fastworker.redact import printable, printable_json


class Terminal(Console):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text) and (plain := printable(renderable.plain)) != renderable.plain:
            renderable = Text(plain, style=renderable.style)
        return super().render(renderable, options)


def write_json(data: bytes) -> None:
    """One JSON value on standard output, and a line break."""
    sys.stdout.write(printable_json(data.decode()) + "\n")
    sys.stdout.flush()
