"""Lua scripts (stream/lua): what must not come apart is one script.

A line `-- include NAME` stands for the text of another file. The first lines of a script say what it takes as KEYS and
ARGV.

Redis looks at the user's rights command by command, so a script could end in the middle, and each attempt after it
would do the first half again: one more letter, the same entries appended once more. So each asks first, of all commands
that it may run. Before Redis 7.0 nobody can ask: there it tries those that add something, with arguments that are
wrong, and is told first if it may not. Not the others: tried at `maxmemory`, they would let what follows pass.
"""

from __future__ import annotations

import hashlib
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
else
  local key = KEYS[1] or ''
  local function may(...)
    local done = redis.pcall(...)
    return not string.find(type(done) == 'table' and done.err or '', "The user executing the script can't", 1, true)
  end
  local refused = nil
%s  if refused then
    return redis.error_reply("NOPERM this user has no permissions to run the '" .. refused .. "' command")
  end
end
"""
# Each is refused for its arguments, after the user's rights were looked at, and is itself refused at maxmemory.
_WRONG = {
    "XADD": "'no id', 'a', 'b'",
    "SET": "'', 'no such option'",
    "HSET": "'a', 'b', 'c'",
    "HINCRBY": "'a', 'no number'",
}


@cache
def script(name: str) -> str:
    text = _text(name)
    called = sorted({"|".join(words) for words in _CALLED.findall(text)})
    tries = [
        f"  if not may('{command}', key, {wrong}) then refused = '{command.lower()}' end\n"
        for command, wrong in _WRONG.items()
        if f"{command}|" in called
    ]
    return _ASK % (" ".join(called), "".join(tries)) + text


def command_at(sha: str, line: int) -> str | None:
    """What the script with this checksum calls in this line, in capitals. Redis 6.2 names no command, but the line."""
    lines = _by_checksum().get(sha, [])
    found = _CALLED.search(lines[line - 1]) if 0 < line <= len(lines) else None
    return " ".join(filter(None, found.groups())) if found else None


@cache
def _by_checksum() -> dict[str, list[str]]:
    files = resources.files("fastworker.stream").joinpath("lua").iterdir()
    texts = [script(file.name.removesuffix(".lua")) for file in files]
    return {hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(): text.split("\n") for text in texts}


@cache
def _text(name: str) -> str:
    text = resources.files("fastworker.stream").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return _INCLUDE.sub(lambda found: _text(found[1]), text)
