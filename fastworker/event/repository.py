"""Whole repositories: a CAR as `getRepo` sends it, walked complete from the commit's tree.

No order of blocks is promised, duplicates and blocks of others may be there, and a file that is cut exactly between
two blocks looks sound: so a repository counts only when the walk from `data` finds every node and every record, with
keys in order and in their layers. What is walked is the tree, each node once, whatever the file holds besides.

Memory is bounded: a file of up to 16 MB is held, of a larger one only an index with one integer per block (64 bits of
its hash, its offset and its size), and blocks are read when the walk comes to them. Raises Unproved and OSError.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from fastworker.event.car import (
    BLOCK_BYTES_MAX,
    HEADER_BYTES_MAX,
    RECORD_CID,
    RECORD_CID_BYTES,
    read_header,
    read_varint,
)
from fastworker.event.proof import (
    LAYER_MAX,
    Flaw,
    SignedCommit,
    Unproved,
    check_blocks,
    is_cid,
    layer_of,
    read_commit,
    read_entries,
)
from fastworker.event.syntax import is_nsid, is_rkey

IN_MEMORY_MAX: Final = 16 * 1024 * 1024
FILE_BYTES_MAX: Final = 1 << 30
BLOCKS_MAX: Final = 8_000_000
_PIECE: Final = 1 << 20
_HEAD: Final = 16 * 1024  # a header, and a commit
_SIZE_BITS: Final = 24
_AT_BITS: Final = 40
_REST_BITS: Final = _SIZE_BITS + _AT_BITS
_SIZE_MASK: Final = (1 << _SIZE_BITS) - 1
_AT_MASK: Final = (1 << _AT_BITS) - 1

_Visit = tuple[bytes, int | None, bytes | None]
"""Of a node: its CID, its layer, None. Of an entry: its key, None, its value."""


class TreeRecord(NamedTuple):
    """One record. `block` None: the tree names it by something that is no CID of a record."""

    collection: str
    rkey: str
    cid: bytes
    block: bytes | None


def read_head(path: Path) -> tuple[SignedCommit, int]:
    """The commit and the size of a CAR, of which no more is read: hosts send the commit first. Nothing else of it is
    known to be whole. Raises Unproved and OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            root, at = read_header(head := file.read(_HEAD))
            length, start = read_varint(head, at)
        except (IndexError, ValueError) as error:
            raise Unproved(Flaw.BAD_CAR, str(error)[:200]) from None
    content = start + RECORD_CID_BYTES
    block = head[content : start + length]
    if head[start:content] == root == RECORD_CID + sha256(block).digest():
        return read_commit(block), size
    with Repository(path) as repository:  # in another order
        return repository.commit, size


class Repository:
    """An open CAR: `commit` is there at once, `records` walks. A context manager (it holds the file open).

    `bad_paths`: keys that are no path of a record, counted by the walk; nothing can be stored of them.
    """

    def __init__(self, path: Path, *, bytes_max: int = FILE_BYTES_MAX, in_memory_max: int = IN_MEMORY_MAX) -> None:
        self.path = path
        self.bad_paths = 0
        self._held: bytes | None = None  # the file, while it is small
        self._blocks: dict[bytes, bytes] = {}  # of a small one, by CID
        self._walked: list[TreeRecord] | None = None  # of a small one that was checked
        self._file = path.open("rb", buffering=0)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            if self.size > bytes_max:
                raise Unproved(Flaw.TOO_LARGE, f"a repository of {self.size} bytes")  # noqa: TRY301 - closes, too
            if self.size <= in_memory_max:
                self._held = self._file.read()
            root, self._index = self._read_index()
            if self._held is not None:
                self._held = b""  # its blocks are known
            block = self._block(root, "the commit block")
            self.commit: SignedCommit = read_commit(block)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def records(self) -> Iterator[TreeRecord]:
        """Every record, in key order. What comes after an error is unknown, so nothing may be done before the end."""
        if self._walked is not None:
            return iter(self._walked)
        return self._walk()

    def check(self) -> None:
        """The whole walk, to know that it has an end: before anything is done with the records."""
        if self._held is not None:
            self._walked = list(self._walk())
            return
        for _ in self._walk():
            pass

    def _walk(self) -> Iterator[TreeRecord]:
        self.bad_paths = 0
        before = prefix = b""
        collection = ""
        blocks = self._blocks
        pending: list[_Visit] = [(self.commit.data, None, None)]
        while pending:
            name, layer, value = pending.pop()
            if value is None:
                pending += reversed(self._parts(name, layer))
                continue
            # mutant: keys that do not ascend
            if not name > before:
                raise Unproved(Flaw.BAD_TREE, "keys that do not ascend")
            before = name
            if not prefix or not name.startswith(prefix):  # a collection has many records in a row
                prefix, collection = _collection_of(name)
            rkey = name[len(prefix) :].decode("latin-1")
            if not collection or not is_rkey(rkey):
                self.bad_paths += 1
                continue
            block = blocks.get(value)
            if block is None and is_cid(value):
                block = self._block(value, f"{collection}/{rkey}")
            yield TreeRecord(collection, rkey, value, block)

    def _parts(self, cid: bytes, layer: int | None) -> list[_Visit]:
        """A node's subtrees and entries, in order. `layer` None: the top, whose keys say it."""
        left, entries = read_entries(self._block(cid, "a node of the tree"))
        is_top = layer is None
        if layer is None:
            layer = layer_of(entries[0][0]) if entries else 0
        if not 0 <= layer <= LAYER_MAX:
            raise Unproved(Flaw.TOO_DEEP, "a tree that is too deep")
        # mutant: an empty node in a tree
        if not entries and (left is None) is not is_top:  # an empty node is a bridge, or the whole of an empty tree
            raise Unproved(Flaw.BAD_TREE, "an empty node")
        parts: list[_Visit] = [] if left is None else [(left, layer - 1, None)]
        for key, value, after, _ in entries:
            # mutant: a key in another layer
            if layer_of(key) != layer:
                raise Unproved(Flaw.BAD_TREE, "a key in the wrong layer")
            parts.append((key, None, value))
            if after is not None:
                parts.append((after, layer - 1, None))
        return parts

    def _block(self, cid: bytes, what: str) -> bytes:
        """Of a file it is hashed again: the index knows 64 bits of the CID, and the file may have changed."""
        block = self._blocks.get(cid)
        if block is not None:
            return block
        if self._held is None and is_cid(cid):
            digest = int.from_bytes(cid[4:12], "big")
            index = self._index
            number = bisect_left(index, digest << _REST_BITS)
            while number < len(index) and index[number] >> _REST_BITS == digest:
                where, size = index[number] >> _SIZE_BITS & _AT_MASK, index[number] & _SIZE_MASK
                block = self._read(where, size)
                if sha256(block).digest() == cid[4:]:
                    return block
                number += 1
        raise Unproved(Flaw.MISSING_BLOCK, what)

    def _read(self, at: int, size: int) -> bytes:
        if self._held is not None:
            return self._held[at : at + size]
        return os.pread(self._file.fileno(), size, at)

    def _read_index(self) -> tuple[bytes, list[int]]:
        """(root, one integer per block: 64 bits of its hash, where it is, its size), sorted, each block once. Nothing
        but the root of a file that is held: its blocks are known then."""
        try:
            root, position = read_header(self._read(0, HEADER_BYTES_MAX + 16))
            index: list[int] = []
            if self._held is not None:
                self._blocks = check_blocks(self._held, position, only_records=False)
                return root, index
            piece = self._read(position, _PIECE)
            base = position  # of the piece in the file
            while position < self.size:
                at = position - base
                if len(piece) - at < BLOCK_BYTES_MAX + 64 and base + len(piece) < self.size:
                    base, piece, at = position, self._read(position, BLOCK_BYTES_MAX + _PIECE), 0
                size, start = read_varint(piece, at)
                if size > BLOCK_BYTES_MAX:
                    raise Unproved(Flaw.TOO_LARGE, f"a block of {size} bytes")
                if base + start + size > self.size:
                    raise IndexError  # noqa: TRY301 - as where the length itself is cut
                if size >= RECORD_CID_BYTES and piece.startswith(RECORD_CID, start):
                    content = start + RECORD_CID_BYTES
                    digest = piece[start + 4 : content]
                    if sha256(piece[content : start + size]).digest() != digest:
                        raise Unproved(Flaw.BAD_HASH, "a block is not what its CID says")
                    number = int.from_bytes(digest[:8], "big")
                    index.append((number << _AT_BITS | base + content) << _SIZE_BITS | size - RECORD_CID_BYTES)
                    if len(index) > BLOCKS_MAX:
                        raise Unproved(Flaw.TOO_LARGE, f"more than {BLOCKS_MAX} blocks")
                position = base + start + size
        except IndexError:
            raise Unproved(Flaw.BAD_CAR, "the file ends inside a block") from None
        except ValueError as error:
            raise Unproved(Flaw.BAD_CAR, str(error)[:200]) from None
        index.sort()
        return root, index


def _collection_of(key: bytes) -> tuple[bytes, str]:
    """How all keys of its collection begin, and the collection; nothing where it is none."""
    before, slash, _ = key.partition(b"/")
    collection = before.decode("latin-1")
    return (before + slash, collection) if slash and is_nsid(collection) else (b"", "")
