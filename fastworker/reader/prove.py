"""One commit proved with its account's key, as far as the level asks. Pure; also what prover processes do all day."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from fastworker.event.proof import (
    Flaw,
    Unproved,
    Verdict,
    prove_ops,
    prove_signature,
    proved_paths,
    read_blocks,
    root_before,
)

if TYPE_CHECKING:
    from fastworker.sync.keys import Key

PARSED_MAX: Final = 20_000


class KeysOf(Protocol):
    def key(self, did: str) -> str | None:
        """The account's multikey, empty where its document shows none; None: not known yet."""

    def changed(self, did: str) -> None:
        """It may be another one."""


class Proof(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """`is_bad_commit`: there is no signature to check. `proved` None: all that was asked for is; else the paths of
    the ops that the signed tree proves one by one, none where nothing is signed. `before`: where the message does not
    say what the root was before its ops, what it must have been."""

    is_signed: bool
    is_bad_commit: bool = False
    proved: frozenset[str] | None = None
    before: bytes | None = None


_WHOLE: Final = Proof(is_signed=True)
_UNSIGNED: Final = Proof(is_signed=False)
_BAD_COMMIT: Final = Proof(is_signed=False, is_bad_commit=True, proved=frozenset())


def prove(payload: Mapping[str, Any], multikey: str, *, full: bool) -> Proof:
    """Of a decoded `#commit` payload. Never raises for what it holds."""
    try:
        commit = prove_signature(payload, _no_key if not multikey else _key(multikey).is_signed)
    except Unproved as error:
        return _UNSIGNED if error.flaw is Flaw.BAD_SIGNATURE else _BAD_COMMIT
    if not full:
        return _WHOLE
    try:
        root, blocks = read_blocks(payload["blocks"])
        if root != payload["commit"]:
            raise Unproved(Flaw.BAD_COMMIT, "the CAR has another root")  # noqa: TRY301 - as the others
        if prove_ops(payload, commit, blocks) is Verdict.LEGACY:
            return Proof(is_signed=True, before=root_before(payload, commit, blocks))
    except Unproved:
        return Proof(is_signed=True, proved=proved_paths(payload, commit))
    return _WHOLE


@lru_cache(PARSED_MAX)
def _key(multikey: str) -> Key:
    from fastworker.sync.keys import key_of  # noqa: PLC0415 - the chain needs no curves

    try:
        return key_of(multikey)
    except ValueError:
        return _NoKey()


class _NoKey:
    def is_signed(self, signature: bytes, message: bytes) -> bool:  # noqa: ARG002 - as Key
        return False


def _no_key(_signature: bytes, _message: bytes) -> bool:
    return False
