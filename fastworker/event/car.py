"""CARv1 framing: walk it, keep the wanted blocks, decode nothing.

Most of a commit's CAR is MST nodes, which the firehose consumer has no use for. Neither the CAR
header nor the roots are read: a block is what its CID says, so the hash decides, not the framing.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from hashlib import sha256

RECORD_CID = b"\x01\x71\x12\x20"
"""CIDv1, dag-cbor, sha-256, 32 bytes: how every CID of a record begins."""
RECORD_CID_BYTES = 36


def select_blocks(car: bytes, wanted: AbstractSet[bytes]) -> tuple[dict[bytes, bytes], bool]:
    """The wanted blocks by CID, and whether the framing was sound as far as it was read.

    `wanted` holds CIDs as 36 raw bytes. The walk ends when all are found. Blocks before a break are
    kept. Blocks are not verified: see `is_block_of`. Never raises.
    """
    found: dict[bytes, bytes] = {}
    missing = len(wanted)
    end = len(car)
    position = 0
    in_header = True
    while missing:
        if position == end:
            return found, not in_header  # an empty file has not even a header
        size = car[position]
        position += 1
        if size > 127:
            size &= 127
            shift = 7
            while True:
                if position == end or shift > 28:  # 2**35 bytes: no length, and no endless varint
                    return found, False
                byte = car[position]
                position += 1
                size |= (byte & 127) << shift
                if byte < 128:
                    break
                shift += 7
        stop = position + size
        if not size or stop > end:
            return found, False
        if in_header:
            in_header = False
        else:
            cid = car[position : position + RECORD_CID_BYTES]
            if cid in wanted and cid not in found and size >= RECORD_CID_BYTES:
                found[cid] = car[position + RECORD_CID_BYTES : stop]
                missing -= 1
        position = stop
    return found, True


def is_block_of(cid: bytes, block: bytes) -> bool:
    """Whether the block's bytes are those that a record's CID names."""
    return sha256(block).digest() == cid[4:]
