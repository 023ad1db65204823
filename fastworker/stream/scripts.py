"""Lua scripts (stream/lua): what must not come apart is one script.

A line `-- include NAME` stands for the text of another file. The first lines of a script say what it takes as KEYS and
ARGV.

Redis looks at the user's rights command by command, so a script could end in the middle, and each attempt after it
would do the first half again: one more letter, the same entries appended once more. So each asks first, of all commands
that it may run (before Redis 7.0 nobody can ask).
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_INCLUDE = re.compile(r"^-- include (\w+)\n", re.MULTILINE)
_CALLED = re.compile(r"redis\.p?call\('([A-Z]+)'(?:(?<!XREADGROUP'), '([A-Z]+)')?")
# A key stands where commands have one: the right to it is looked at as well.
_ASK = """\
if redis.acl_check_cmd then
  local key = KEYS[1] or ''
  for command, more in string.gmatch('%s', '(%%u+)|(%%u*)') do
    local may
    if more == '' then may = redis.acl_check_cmd(command, key, key, key)
    else may = redis.acl_check_cmd(command, more, key, key) end
    if not may then
      local name = string.lower(more == '' and command or command .. '|' .. more)
      return redis.error_reply("NOPERM this user has no permissions to run the '" .. name .. "' command")
    end
  end
end
"""


@cache
def script(name: str) -> str:
    text = _text(name)
    called = sorted({"|".join(words) for words in _CALLED.findall(text)})
    return _ASK % " ".join(called) + text


@cache
def _text(name: str) -> str:
    text = resources.files("fastworker.stream").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return _INCLUDE.sub(lambda found: _text(found[1]), text)
