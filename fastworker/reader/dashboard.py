"""The newest events, for the predecessor's dashboard (docs/compatibility.md)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Final

import orjson

from fastworker.event import Account, Commit, Event, Identity

RECENT: Final = 50
BROADCAST_PER_TICK: Final = 20


class Dashboard:
    def __init__(self) -> None:
        self.recent: deque[tuple[float, Event]] = deque(maxlen=RECENT)
        self._noted = 0  # events ever put there
        self._broadcast = 0  # of them, at the last broadcast

    def note(self, event: Event) -> None:
        self.recent.append((time.time(), event))
        self._noted += 1

    def take(self) -> tuple[bytes | None, Sequence[bytes]]:
        """The recent events, newest first, and those of them to broadcast, oldest first."""
        new = min(self._noted - self._broadcast, BROADCAST_PER_TICK)
        self._broadcast = self._noted
        shown = [orjson.dumps(_shown(at, event)) for at, event in reversed(self.recent)]
        return b"[" + b",".join(shown) + b"]", shown[:new][::-1]


def _shown(at: float, event: Event) -> dict[str, str]:
    """The dashboard's object for one event (docs/compatibility.md)."""
    clock = time.strftime("%H:%M:%S", time.gmtime(at))
    if isinstance(event, Commit):
        op = event.ops[0]
        kind, lexicon, did, action = "#commit", op.collection, event.repo, str(op.action)
    elif isinstance(event, Identity):
        action = f"\N{RIGHTWARDS ARROW} {event.handle}" if event.handle else "update"
        kind, lexicon, did = "#identity", "com.atproto.identity", event.did
    else:
        assert isinstance(event, Account)
        action = "active" if event.active else "inactive"
        kind, lexicon, did = "#account", "com.atproto.account", event.did
    return {"type": kind, "lexicon": lexicon, "did": did, "action": action, "timestamp": clock}
