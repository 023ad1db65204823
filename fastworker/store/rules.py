"""How rows are written: all who write to one database must agree on it. `Config.rules`: what the operator chose."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from fastworker.table.derive import FULL


class Rules(NamedTuple):
    """`trusted_verifiers`: DIDs; the first of them is trusted most. `verified_only`: no handle is shown that a host
    only claims. `synchronous_commit`: `on` turns it on where it is off, `keep` leaves it."""

    derive: frozenset[str] = FULL
    trusted_verifiers: tuple[str, ...] = ()
    verified_only: bool = False
    synchronous_commit: Literal["on", "keep"] = "on"


DEFAULTS: Final = Rules()
