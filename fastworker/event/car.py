"""CARv1 framing: walk it, keep the wanted blocks, decode nothing.

Most of a commit's CAR is MST nodes, which the firehose consumer has no use for. Neither the CAR
header nor the roots are read: a block is what its CID says, so the hash decides, not the framing.
Who proves commits or reads whole repositories (event/proof.py, event/repository.py) reads the header, too.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from hashlib import sha256

import libipld

RECORD_CID = b"\x01\x71\x12\x20"
"""CIDv1, dag-cbor, sha-256, 32 bytes: how every CID of a record begins."""
RECORD_CID_BYTES = 36
HEADER_BYTES_MAX = 4_096
BLOCK_BYTES_MAX = 2 * 1024 * 1024


def select_blocks(car: bytes, wanted: AbstractSet[bytes]) -> tuple[dict[bytes, bytes], bool]:
    """The wanted blocks by CID, and whether the framing was sound as far as it was read.

    `wanted` holds CIDs as 36 raw bytes. The walk ends when all are found. Blocks before a break are
    kept. Blocks are not verified: see `is_block_of`. Never raises.
    """
    found: dict[bytes, bytes] = {}
    position = 0
    try:
        size, position = read_varint(car, 0)
        position += size  # the header
        missing = len(wanted)
        while missing:
            size = car[position]
            if size < 128:
                position += 1
            elif (high := car[position + 1]) < 128:  # nearly every block is 128 bytes to 16 KB
                size += (high << 7) - 128
                position += 2
            else:
                size, position = read_varint(car, position)
            cid = car[position : position + RECORD_CID_BYTES]
            start = position
            position += size
            if cid in wanted and size >= RECORD_CID_BYTES and cid not in found:
                if position > len(car):
                    return found, False
                found[cid] = car[start + RECORD_CID_BYTES : position]
                missing -= 1
    except IndexError:  # the end; a sound CAR ends after a block
        return found, position == len(car) > 0
    return found, True


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """An unsigned LEB128 number and where it ends. Raises IndexError where there is none."""
    number = 0
    for shift in range(0, 63, 7):
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise IndexError


def is_block_of(cid: bytes, block: bytes) -> bool:
    """Whether the block's bytes are those that a record's CID names."""
    return sha256(block).digest() == cid[4:]


def read_header(car: bytes) -> tuple[bytes, int]:
    """(first root, where the blocks begin). Raises IndexError where it is cut, ValueError where it is none."""
    size, start = read_varint(car, 0)
    if size > HEADER_BYTES_MAX:
        raise ValueError("a header of more than 4 KB")
    stop = start + size
    if stop > len(car):
        raise IndexError
    header = libipld.decode_dag_cbor(car[start:stop])
    if type(header) is not dict or header.get("version") != 1 or type(header.get("version")) is not int:
        raise ValueError("not a CAR of version 1")
    roots = header.get("roots")
    if type(roots) is not list or not roots or not isinstance(roots[0], bytes):
        raise ValueError("a CAR without a root")
    return roots[0], stop
