"""Lua scripts (stream/lua): what must not come apart is one script.

A line `-- include NAME` stands for the text of another file. The first lines of a script say what it takes as KEYS and
ARGV.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_INCLUDE = re.compile(r"^-- include (\w+)\n", re.MULTILINE)


@cache
def script(name: str) -> str:
    text = resources.files("fastworker.stream").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return _INCLUDE.sub(lambda found: script(found[1]), text)
