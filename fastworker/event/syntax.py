"""Identifier syntax of the protocol: DID, NSID, record key, TID, handle, repository path.

On the hot path, hence compiled patterns and one small cache. Source: atproto.com/specs and the
interop vectors. Lengths are the protocol's; what exceeds a database column is the mapper's business.
"""

from __future__ import annotations

import re
from functools import lru_cache

NSID_MAX = 317
DID = r"did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]"
"""As it stands in references, of any length: the columns have their own bounds."""

_reference = re.compile(rf"at://(?:{DID}|[a-zA-Z0-9.-]+)(?:/[!-~]*)?").fullmatch
_cid = re.compile(r"[a-zA-Z0-9+=]+").fullmatch
_one_word = re.compile(r"(?:at://|https?://|did:)[!-~]+|b[a-z2-7]{50,}|Qm[1-9A-HJ-NP-Za-km-z]{44}").fullmatch

_did = re.compile(r"did:[a-z]+:[a-zA-Z0-9._:%-]{0,2040}[a-zA-Z0-9._-]", re.ASCII).fullmatch
_nsid = re.compile(
    r"[a-zA-Z](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+"
    r"\.[a-zA-Z][a-zA-Z0-9]{0,62}",
    re.ASCII,
).fullmatch
_rkey = re.compile(r"[A-Za-z0-9._:~-]{1,512}", re.ASCII).fullmatch
_tid = re.compile(r"[234567abcdefghij][234567abcdefghijklmnopqrstuvwxyz]{12}", re.ASCII).fullmatch
_handle = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.)+[a-zA-Z](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?", re.ASCII
).fullmatch


def is_did(text: str) -> bool:
    """Any method: `did:plc` and `did:web` are the only blessed ones today, but the set is open."""
    return _did(text) is not None and len(text) <= 2048


def is_nsid(text: str) -> bool:
    return len(text) <= NSID_MAX and _is_nsid(text)


@lru_cache(maxsize=1024)  # a handful of collections is nearly all the traffic
def _is_nsid(text: str) -> bool:  # never a long text: it stays in the cache
    return _nsid(text) is not None


def is_rkey(text: str) -> bool:
    return _rkey(text) is not None and text not in (".", "..")


def is_tid(text: str) -> bool:
    return _tid(text) is not None


def is_handle(text: str) -> bool:
    return len(text) <= 253 and _handle(text) is not None


def is_reference(text: str) -> bool:
    """An at:// URI. Its authority may be a handle."""
    return _reference(text) is not None


def is_cid(text: str) -> bool:
    # Bytes are looked at by a table, texts by what Unicode knows of each character.
    return text.isascii() and (text.encode().isalnum() or _cid(text) is not None)


def reads_as_identifier(text: str) -> bool:
    """Whether a text that stands anywhere is a URI, DID or CID, so that cleaning it made another one."""
    return _one_word(text) is not None


def split_path(path: str) -> tuple[str, str] | None:
    """`collection/rkey` of a repository path, None when it is not one."""
    collection, _, rkey = path.partition("/")
    if _rkey(rkey) is None or len(collection) > NSID_MAX or not _is_nsid(collection) or rkey in (".", ".."):
        return None
    return collection, rkey
