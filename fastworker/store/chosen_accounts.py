"""`FASTWORKER_ACCOUNTS`: whose records are kept, by a file or by whom some accounts follow; read again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from fastworker.errors import ConfigError, StoreUnavailable
from fastworker.event.syntax import is_did
from fastworker.table.chosen import choose_accounts

log = logging.getLogger(__name__)

READ_S: Final = 30.0
FOLLOWS: Final = "follows-of:"

Followed = Callable[[Sequence[str]], Awaitable[list[str]]]


async def read_accounts(chosen: str, followed: Followed) -> int:
    """From now on only these are kept; how many they are. Raises ConfigError, and what `followed` raises."""
    if chosen.startswith(FOLLOWS):
        roots = chosen.removeprefix(FOLLOWS).split(",")
        dids = frozenset((*roots, *await followed(roots)))
    else:
        dids = _of_file(Path(chosen))
    choose_accounts(dids)
    return len(dids)


async def keep_reading(chosen: str, followed: Followed) -> None:
    """For as long as it runs. What cannot be read leaves the choice as it is."""
    why = ""
    while True:
        await asyncio.sleep(READ_S)
        try:
            await read_accounts(chosen, followed)
            why = ""
        except (ConfigError, StoreUnavailable) as error:
            if str(error) != why:
                why = str(error)
                log.warning("FASTWORKER_ACCOUNTS is not read again: %s", why)


def _of_file(path: Path) -> frozenset[str]:
    """One a line; what follows a `#` is a remark."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"FASTWORKER_ACCOUNTS: {path} cannot be read: {error}") from None
    dids = {did for line in lines if (did := line.partition("#")[0].strip())}
    if wrong := next((did for did in dids if not is_did(did)), None):
        raise ConfigError(f"FASTWORKER_ACCOUNTS: {path}: {wrong[:100]!r} is not a DID")
    return frozenset(dids)
