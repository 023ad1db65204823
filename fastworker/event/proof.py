"""What a commit proves about itself: the signed commit block, and the undoing of its ops in the tree.

A `#commit` frame is a claim of its relay. The account's signature covers the commit block, which names the root of
the Merkle search tree after the commit (`data`), which by hashes covers every record. The list `ops` is covered by
nothing: undo its ops in the tree, and the root before (`prevData`) must come out. The chain of `since` and `prevData`
from commit to commit is its keeper's business; `seq` and `time` are covered by nothing at all.

Pure, bounded and linear: what is not loaded by way of the tree costs its hash and no more. Source: atproto.com/specs
(repository, sync). Raises Unproved and nothing else.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from hashlib import sha256
from itertools import accumulate
from struct import Struct
from typing import Any, Final, TypeGuard

import libipld
import msgspec

from fastworker.event.car import (
    BLOCK_BYTES_MAX,
    RECORD_CID,
    RECORD_CID_BYTES,
    is_block_of,
    read_header,
    read_varint,
    select_blocks,
)
from fastworker.event.frame import BLOCKS_BYTES_MAX, OPS_MAX
from fastworker.event.syntax import is_did, is_tid, split_path

COMMIT_BYTES_MAX: Final = 10_000
NODE_ENTRIES_MAX: Final = 10_000  # keys can be mined, so that one node holds them all
LAYER_MAX: Final = 64  # by chance a key of this layer is one of 2**128
KEY_BYTES_MAX: Final = 1_024
LINK: Final = b"\xd8\x2a\x58\x25\x00"  # CBOR before a CID of 36 bytes
_FORM: Final = Struct("7s 32s 5s 13s 6s 64s 14s 32s 15s")  # of a plain commit block
_BETWEEN: Final = (b"\xa6cdidx ", b"crevm", b"csigX@", b"ddata" + LINK + RECORD_CID, b"dprev\xf6gversion\x03")
_FIVE: Final = b"\xa5"  # a map of so many members: without `sig`
_SIG_AT, _SIG_END = 57, 127
_NODE: Final = b"\xa2ae"  # how every node begins
_BRIDGE: Final = b"\xa2ae\x80al"  # a node without keys, up to its subtree
_ONE: Final = b"\xa2ae\x81"  # a node of one key
_VALUE: Final = b"av" + LINK
_SUBTREE: Final = (b"at", b"al")

Blocks = Mapping[bytes, bytes]
IsSigned = Callable[[bytes, bytes], bool]
"""Whether a signature (64 bytes) is the account's under these bytes."""


class Verdict(StrEnum):
    """What the proofs say of a commit. The values are labels of metrics; docs/proofs.md says what each gets."""

    __hash__ = str.__hash__  # the enum's own is a call of Python, at each look into a set or a dict

    OK = "ok"
    FIRST = "first"  # nothing is known of the account yet
    REPLAY = "replay"  # not newer than what is known
    LEGACY = "legacy"  # no prevData, as hosts before sync 1.1 wrote it: the ops cannot be undone
    UNVERIFIED = "unverified"  # the account's key is not known yet
    BREAK = "break"  # it does not follow what is known, or it is too big to say what it did
    BAD_COMMIT = "bad_commit"  # the commit block is missing, broken, or another account's or revision's
    INVERSION = "inversion"  # the ops are not what happened between the two trees
    BAD_SIGNATURE = "bad_signature"
    FUTURE_REV = "future_rev"  # more than five minutes ahead


class Flaw(StrEnum):
    """Why something is not proved. The values are names of metrics."""

    BAD_CAR = "bad_car"  # the framing is broken, or it ends early
    BAD_HASH = "bad_hash"  # a block is not what its CID says
    BAD_COMMIT = "bad_commit"  # the commit block is none, or another than the message says
    BAD_SIGNATURE = "bad_signature"
    BAD_TREE = "bad_tree"  # keys out of order or in the wrong layer, or a node that is none
    MISSING_BLOCK = "missing_block"
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    INVERSION = "inversion"  # the ops are not what happened between the two trees


class Unproved(Exception):
    def __init__(self, flaw: Flaw, detail: str) -> None:
        super().__init__(f"{flaw}: {detail}")
        self.flaw = flaw
        self.detail = detail


class SignedCommit(msgspec.Struct, frozen=True, gc=False):
    """`signed`: the bytes under the signature, which is the block without its member `sig`."""

    did: str
    rev: str
    data: bytes
    signature: bytes
    signed: bytes


def read_commit(block: bytes) -> SignedCommit:
    """The signed bytes are cut out of the block: encoding them again could make others."""
    if (plain := _plain(block)) is not None:
        return plain
    if len(block) > COMMIT_BYTES_MAX:
        raise Unproved(Flaw.TOO_LARGE, f"a commit block of {len(block)} bytes")
    commit = _decode(block, Flaw.BAD_COMMIT)
    at = block.find(b"csigX@")
    if at < 0 or type(commit) is not dict or not 0xA1 <= block[0] <= 0xB7:
        raise Unproved(Flaw.BAD_COMMIT, "no map with a signature of 64 bytes")
    signed = bytes((block[0] - 1,)) + block[1:at] + block[at + 70 :]
    signature: bytes = block[at + 6 : at + 70]
    if commit.pop("sig", None) != signature or _decode(signed, Flaw.BAD_COMMIT) != commit:
        raise Unproved(Flaw.BAD_COMMIT, "the signature is not where it belongs")
    did, rev, data = commit.get("did"), commit.get("rev"), commit.get("data")
    if commit.get("version") != 3 or type(commit["version"]) is not int:
        raise Unproved(Flaw.BAD_COMMIT, "not a commit of version 3")
    if type(did) is not str or not is_did(did) or type(rev) is not str or not is_tid(rev) or not is_cid(data):
        raise Unproved(Flaw.BAD_COMMIT, "did, rev or data is none")
    if LINK + data not in block:
        raise Unproved(Flaw.BAD_COMMIT, "data is no link")
    return SignedCommit(did, rev, data, signature, signed)


def _plain(block: bytes) -> SignedCommit | None:
    """A commit block as every host writes that of a `did:plc`, read by the places of its members: what decoding
    would find. None: it has another form."""
    if len(block) != _FORM.size:
        return None
    a, name, b, moment, c, signature, d, digest, e = _FORM.unpack(block)
    if (a, b, c, d, e) != _BETWEEN:
        return None
    did, rev = name.decode("latin-1"), moment.decode("latin-1")
    if not is_did(did) or not is_tid(rev):
        raise Unproved(Flaw.BAD_COMMIT, "did or rev is none")
    return SignedCommit(did, rev, RECORD_CID + digest, signature, _FIVE + block[1:_SIG_AT] + block[_SIG_END:])


class Link(msgspec.Struct, frozen=True, gc=False):
    """Where a commit stands in its account's chain: what it says of the state before, and the root after it.

    `data` None: the message does not hold the commit that it names, of this account and revision. `is_undone`: the
    message does not say what was before; undoing its ops did.
    """

    since: str | None
    before: bytes | None
    data: bytes | None
    is_too_big: bool
    is_undone: bool = False


def read_link(payload: Mapping[str, Any], repo: str, rev: str) -> Link:
    """Of a decoded `#commit` payload. Checks the commit block's hash, not its signature. Never raises."""
    since, before, car, cid = (
        payload.get("since"),
        payload.get("prevData"),
        payload.get("blocks"),
        payload.get("commit"),
    )
    data = None
    if type(car) is bytes and type(cid) is bytes:
        try:
            commit = libipld.decode_dag_cbor(_block_of(car, cid))
        except (ValueError, RecursionError, MemoryError):
            commit = None
        # mutant: a commit of another account
        if type(commit) is dict and commit.get("did") == repo and commit.get("rev") == rev:
            data = commit.get("data")
    return Link(
        since if type(since) is str else None,
        before if type(before) is bytes and len(before) == RECORD_CID_BYTES else None,
        data if type(data) is bytes and len(data) == RECORD_CID_BYTES else None,
        payload.get("tooBig") is True,
    )


def read_sync(payload: Mapping[str, Any], did: str, rev: str) -> bytes | None:
    """The tree's root in a decoded `#sync` payload, whose CAR has the commit as its root. Never raises."""
    try:
        commit, _ = read_header(payload["blocks"])
    except (KeyError, TypeError, IndexError, ValueError):
        return None
    return read_link({**payload, "commit": commit}, did, rev).data


def _block_of(car: bytes, cid: bytes) -> bytes:
    """The block of this CID in a CAR, empty if it is not there. The hash decides, not the framing."""
    # Found without a walk: its length is before the CID, in two bytes as a rule.
    at = car.rfind(cid)
    if at > 1:
        block = car[at + RECORD_CID_BYTES : at + (car[at - 1] << 7) + (car[at - 2] & 127)]
        if sha256(block).digest() == cid[4:]:
            return block
    block = select_blocks(car, {cid})[0].get(cid, b"")
    return block if is_block_of(cid, block) else b""


def is_cid(value: Any) -> TypeGuard[bytes]:
    """Whether it is the CID of a block of a repository: version 1, DAG-CBOR, SHA-256."""
    return isinstance(value, bytes) and len(value) == RECORD_CID_BYTES and value.startswith(RECORD_CID)


def _decode(block: bytes, flaw: Flaw) -> Any:
    try:
        return libipld.decode_dag_cbor(block)
    except (ValueError, RecursionError, MemoryError) as error:
        raise Unproved(flaw, str(error)[:200]) from None


def read_blocks(car: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """(first root, blocks by CID) of a message's CAR, every block checked. A block may be there twice."""
    if len(car) > BLOCKS_BYTES_MAX:
        raise Unproved(Flaw.TOO_LARGE, f"blocks of {len(car)} bytes")
    try:
        root, position = read_header(car)
        return root, check_blocks(car, position, only_records=True)
    except (IndexError, ValueError):
        raise Unproved(Flaw.BAD_CAR, "the CAR is broken or ends early") from None


def check_blocks(car: bytes, position: int, *, only_records: bool) -> dict[bytes, bytes]:
    """The blocks from there on, by CID, each checked. Others than those of records and of the tree are a flaw, or
    passed over. Raises Unproved, and IndexError where the CAR is cut."""
    blocks: dict[bytes, bytes] = {}
    end = len(car)
    while position < end:
        size = car[position]
        if size < 128:
            position += 1
        elif (high := car[position + 1]) < 128:  # nearly every block is 128 bytes to 16 KB
            size += (high << 7) - 128
            position += 2
        else:
            size, position = read_varint(car, position)
        stop = position + size
        if size > BLOCK_BYTES_MAX:
            raise Unproved(Flaw.TOO_LARGE, f"a block of {size} bytes")
        if stop > end:
            raise IndexError
        content = position + RECORD_CID_BYTES
        cid = car[position:content]
        block = car[content:stop]
        if cid == RECORD_CID + sha256(block).digest():
            blocks[cid] = block
        elif only_records or (size >= RECORD_CID_BYTES and cid.startswith(RECORD_CID)):
            raise Unproved(Flaw.BAD_HASH, "a block is not what its CID says")
        position = stop
    return blocks


def prove_commit(payload: Mapping[str, Any], is_signed: IsSigned) -> Verdict:
    """The whole of a decoded `#commit` payload: envelope, hashes, signature, ops."""
    commit = prove_signature(payload, is_signed)
    root, blocks = read_blocks(payload["blocks"])
    if root != payload["commit"]:
        raise Unproved(Flaw.BAD_COMMIT, "the CAR has another root")
    return prove_ops(payload, commit, blocks)


def prove_signature(payload: Mapping[str, Any], is_signed: IsSigned) -> SignedCommit:
    """The commit block is there, is what the envelope says, and the account signed it."""
    car, cid = payload.get("blocks"), payload.get("commit")
    block = _block_of(car, cid) if isinstance(car, bytes) and is_cid(cid) else b""
    if not block:
        raise Unproved(Flaw.MISSING_BLOCK, "no commit block")
    commit = read_commit(block)
    if commit.did != payload.get("repo") or commit.rev != payload.get("rev"):
        raise Unproved(Flaw.BAD_COMMIT, "it is another account's or another revision's")
    if not is_signed(commit.signature, commit.signed):
        raise Unproved(Flaw.BAD_SIGNATURE, "not signed with the account's key")
    return commit


def proved_paths(payload: Mapping[str, Any], commit: SignedCommit) -> frozenset[str]:
    """Where the ops as a whole are not proved: the paths at which the signed tree holds what the op says.

    Each is true by itself; what happened besides is not known.
    """
    root, blocks = commit.data, _sound_blocks(payload["blocks"])
    ops = payload.get("ops")
    proved = set()
    for op in ops[:OPS_MAX] if type(ops) is list else ():
        path = op.get("path") if type(op) is dict else None
        if type(path) is not str or split_path(path) is None:
            continue
        cid = None if op.get("action") == "delete" else op.get("cid")
        with suppress(Unproved):
            if (cid is not None or op.get("action") == "delete") and find(blocks, root, path.encode()) == cid:
                proved.add(path)
    return frozenset(proved)


def _sound_blocks(car: bytes) -> dict[bytes, bytes]:
    """Of a CAR that may be broken: the blocks before the break that are what their CIDs say."""
    blocks: dict[bytes, bytes] = {}
    with suppress(IndexError):
        size, position = read_varint(car, 0)
        position += size
        while position < len(car):
            size, position = read_varint(car, position)
            cid, block = car[position : position + RECORD_CID_BYTES], car[position + RECORD_CID_BYTES : position + size]
            position += size
            if is_cid(cid) and is_block_of(cid, block):
                blocks[cid] = block
    return blocks


Step = tuple[str, bytes, bytes | None, bytes | None]
"""(action, path, cid, prev) of an op."""


def prove_ops(payload: Mapping[str, Any], commit: SignedCommit, blocks: Blocks) -> Verdict:
    """The ops are all that happened between `prevData` and the commit's tree."""
    steps = _steps(payload.get("ops"))
    before = payload.get("prevData")
    if before is None:
        for action, path, cid, _ in steps:
            if find(blocks, commit.data, path) != (None if action == "delete" else cid):
                raise Unproved(Flaw.INVERSION, f"{path.decode()} is not what the tree says")
        return Verdict.LEGACY
    if any((prev is None) != (action == "create") for action, _, _, prev in steps):
        raise Unproved(Flaw.INVERSION, "an op without its prev, or a create with one")
    if len(steps) == 1 and steps[0][0] != "delete" and _invert_one(blocks, commit.data, steps[0]) == before:
        return Verdict.OK
    if invert(blocks, commit.data, steps) != before:
        raise Unproved(Flaw.INVERSION, "the ops do not lead from prevData to data")
    return Verdict.OK


def root_before(payload: Mapping[str, Any], commit: SignedCommit, blocks: Blocks) -> bytes | None:
    """Of a commit without `prevData`: the root from which its ops lead to the commit's tree, whoever says what it was.
    None where the message does not hold enough to say it."""
    with suppress(Unproved):
        steps = _steps(payload.get("ops"))
        if all((prev is None) == (action == "create") for action, _, _, prev in steps):
            return invert(blocks, commit.data, steps)
    return None


def _steps(ops: Any) -> list[Step]:
    if type(ops) is not list or len(ops) > OPS_MAX:
        raise Unproved(Flaw.TOO_LARGE if type(ops) is list else Flaw.INVERSION, "ops are not a list of at most 200")
    steps: list[Step] = []
    for op in ops:
        action, path = (op.get("action"), op.get("path")) if type(op) is dict else (None, None)
        if action not in ("create", "update", "delete") or type(path) is not str or split_path(path) is None:
            raise Unproved(Flaw.INVERSION, "an op without action or path")
        cid, prev = op.get("cid"), op.get("prev")
        if not (cid is None if action == "delete" else is_cid(cid)) or not (prev is None or is_cid(prev)):
            raise Unproved(Flaw.INVERSION, f"{path}: no CID of a record")
        steps.append((action, path.encode(), cid, prev))
    # mutant: two ops on one path
    if len({step[1] for step in steps}) != len(steps):
        raise Unproved(Flaw.INVERSION, "two ops on one path")
    return steps


# The tree


class Node:
    """One node, loaded: `len(below) == len(keys) + 1`; `below` holds None, a CID that is not loaded, or a Node.

    `shared[i]`: how many bytes keys[i] has in common with the key before; -1 where that must be found out again.
    """

    __slots__ = ("below", "keys", "layer", "shared", "values")

    def __init__(
        self,
        layer: int,
        keys: list[bytes],
        values: list[bytes],
        below: list[bytes | Node | None],
        shared: list[int],
    ) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values
        self.below = below
        self.shared = shared


def layer_of(key: bytes) -> int:
    """Half the number of leading zero bits of the key's hash."""
    return (256 - int.from_bytes(sha256(key).digest(), "big").bit_length()) >> 1


def read_entries(block: bytes) -> tuple[bytes | None, list[tuple[bytes, bytes, bytes | None, int]]]:
    """(subtree before all keys, [(key, value, subtree after it, shared bytes)]) of a node; keys strictly ascend."""
    node = _decode(block, Flaw.BAD_TREE)
    entries = node.get("e") if type(node) is dict else None
    if type(entries) is not list or len(node) != 2:
        raise Unproved(Flaw.BAD_TREE, "a block that is no node")
    if len(entries) > NODE_ENTRIES_MAX:
        raise Unproved(Flaw.TOO_LARGE, f"a node of {len(entries)} entries")
    left = node.get("l")
    if left is not None and not is_cid(left):
        raise Unproved(Flaw.BAD_TREE, "a subtree that is no CID")
    found = []
    before = b""
    try:
        for entry in entries:
            shared, tail, after = entry["p"], entry["k"], entry["t"]
            key = before[:shared] + tail
            if type(shared) is not int or not 0 <= shared <= len(before) or not key > before:
                raise Unproved(Flaw.BAD_TREE, "keys that do not ascend")
            if len(key) > KEY_BYTES_MAX:
                raise Unproved(Flaw.TOO_LARGE, f"a key of {len(key)} bytes")
            if after is not None and not is_cid(after):
                raise Unproved(Flaw.BAD_TREE, "a subtree that is no CID")
            value = entry["v"]
            if not isinstance(value, bytes):
                raise Unproved(Flaw.BAD_TREE, "an entry without a value")
            found.append((key, value, after, shared))
            before = key
    except (KeyError, TypeError, IndexError):
        raise Unproved(Flaw.BAD_TREE, "an entry that is none") from None
    return left, found


def _load(blocks: Blocks, cid: bytes, layer: int | None) -> Node:
    block = blocks.get(cid)
    if block is None:
        raise Unproved(Flaw.MISSING_BLOCK, "a node of the tree")
    left, entries = read_entries(block)
    if layer is None:
        layer = layer_of(entries[0][0]) if entries else 0
    if not 0 <= layer <= LAYER_MAX:
        raise Unproved(Flaw.TOO_DEEP, f"a node of layer {layer}")
    if not entries:
        return Node(layer, [], [], [left], [])
    keys, values, after, shared = (list(part) for part in zip(*entries, strict=True))
    return Node(layer, keys, values, [left, *after], shared)


def _below(blocks: Blocks, node: Node, at: int) -> Node | None:
    below = node.below[at]
    if isinstance(below, bytes):
        below = node.below[at] = _load(blocks, below, node.layer - 1)
    return below


def find(blocks: Blocks, root: bytes, path: bytes) -> bytes | None:
    """The CID that the tree holds at a path."""
    node: Node | None = _load(blocks, root, None)
    while node is not None:
        at = bisect_left(node.keys, path)
        if at < len(node.keys) and node.keys[at] == path:
            return node.values[at]
        node = _below(blocks, node, at)
    return None


def invert(blocks: Blocks, root: bytes, steps: list[Step]) -> bytes:
    """The root before the steps: deletes are undone first, then the others by path. Raises Unproved."""
    tree: Node | None = _load(blocks, root, None)
    for action, path, cid, prev in sorted(steps, key=lambda step: (step[0] != "delete", step[1])):
        if action == "create":
            tree, old = _remove(blocks, tree, path)
        else:
            assert prev is not None
            tree, old = _put(blocks, tree, path, prev)
        if old != cid:
            raise Unproved(Flaw.INVERSION, f"{path.decode()} is not what the tree says")
    while tree is not None and not tree.keys:  # the top of a tree has keys, unless it is empty
        tree = _below(blocks, tree, 0)
    return _seal(Node(0, [], [], [None], []) if tree is None else tree)


def _invert_one(blocks: Blocks, root: bytes, step: Step) -> bytes | None:
    """The same for one new or changed record, which nearly every commit is; None where it does not come out this way.

    Whatever it makes of the tree differs from it by this one record only, so where the result is `prevData` nothing
    else has changed. Few nodes are decoded: the record's own, and those that become one without it. Above them only
    the link is another one.
    """
    action, path, cid, prev = step
    nodes = [(name, block) for name, block in blocks.items() if block.startswith(_NODE)]
    ends = list(accumulate(len(block) for _, block in nodes))
    whole = b"".join([block for _, block in nodes])  # searched at once
    if cid is None or (at := whole.find(_VALUE + cid)) < 0:
        return None
    old, block = nodes[bisect_right(ends, at)]
    if old == root and block.startswith(_ONE):
        return None  # another node becomes the top
    try:
        new = _taken_out(blocks, block, path, cid, prev if action == "update" else None)
    except (KeyError, TypeError, IndexError, ValueError, RecursionError, StopIteration):
        return None
    for _ in range(LAYER_MAX):
        if old == root:
            return new
        link = LINK + old
        at = whole.find(link)
        holder = bisect_right(ends, at)
        if at < 0 or whole.rfind(link) != at or whole[at - 2 : at] not in _SUBTREE or at + len(link) > ends[holder]:
            return None
        old, block = nodes[holder]
        if new is not None:
            new = _cid(block.replace(link, LINK + new))
        elif len(block) > len(_BRIDGE) + len(link):  # else a bridge to nothing, which goes too
            new = _cid(block.replace(link, b"\xf6"))
    return None


def _taken_out(blocks: Blocks, block: bytes, path: bytes, cid: bytes | None, prev: bytes | None) -> bytes | None:
    """The CID of a node without this entry, or with its value before; None: nothing is left of it.

    Raises KeyError and the like where it is not encoded as it must be, or not there.
    """
    node: Any = libipld.decode_dag_cbor(block)
    entries, left = node["e"], node["l"]
    at = next(n for n, entry in enumerate(entries) if entry["v"] == cid)
    taken = entries[at]
    if _key_at(entries, at) != path:
        raise KeyError
    before, after = entries[at - 1] if at else None, entries[at + 1] if at + 1 < len(entries) else None
    written = b"".join(_entry(one) for one in (before, taken, after) if one is not None)
    head = _NODE + _head(0x80, len(entries))
    start = block.index(written, len(head))
    end = start + len(written)
    if prev is not None:
        changed = [before, {**taken, "v": prev}, after]
        return _cid(block[:start] + b"".join(_entry(one) for one in changed if one is not None) + block[end:])
    joined = _joined(blocks, left if before is None else before["t"], taken["t"])
    if len(entries) == 1:
        return None if joined is None else _cid(_BRIDGE + LINK + joined)
    kept = b"" if before is None else _entry({**before, "t": joined})
    if after is not None:
        shared = min(taken["p"], after["p"])  # with the key before both
        kept += _entry({**after, "p": shared, "k": path[shared : after["p"]] + after["k"]})
    rest = block[end:]
    if before is None:
        rest = rest[: -len(_left(left))] + _left(joined)
    return _cid(_NODE + _head(0x80, len(entries) - 1) + block[len(head) : start] + kept + rest)


def _joined(blocks: Blocks, low: bytes | None, high: bytes | None) -> bytes | None:
    """Two subtrees between which a key was, as one."""
    if low is None or high is None:
        return high if low is None else low
    first, second = libipld.decode_dag_cbor(blocks[low]), libipld.decode_dag_cbor(blocks[high])
    some, more = first["e"], second["e"]
    lower = _inner(blocks[low], first)
    higher = _inner(blocks[high], second)
    middle = _joined(blocks, some[-1]["t"] if some else first["l"], second["l"])
    if some:
        last = _entry(some[-1])
        lower = lower[: lower.rindex(last)] + _entry({**some[-1], "t": middle})
    if more and some:
        shared = common_prefix(_key_at(some, len(some) - 1), more[0]["k"])
        moved = _entry(more[0])
        higher = _entry({**more[0], "p": shared, "k": more[0]["k"][shared:]}) + higher[len(moved) :]
    left = first["l"] if some else middle
    return _cid(_NODE + _head(0x80, len(some) + len(more)) + lower + higher + _left(left))


def _inner(block: bytes, node: dict[str, Any]) -> bytes:
    """The entries of a node, as they are encoded."""
    return block[len(_NODE) + len(_head(0x80, len(node["e"]))) : -len(_left(node["l"]))]


def _key_at(entries: list[dict[str, Any]], at: int) -> bytes:
    key = b""
    for entry in entries[: at + 1]:
        key = key[: entry["p"]] + entry["k"]
    return key


def _entry(entry: dict[str, Any]) -> bytes:
    """DAG-CBOR of one entry of a node."""
    tail: bytes = entry["k"]
    after: bytes | None = entry["t"]
    link = b"\xf6" if after is None else LINK + after
    value: bytes = entry["v"]
    return b"".join((b"\xa4ak", _head(0x40, len(tail)), tail, b"ap", _head(0, entry["p"]), b"at", link, _VALUE, value))


def _left(left: bytes | None) -> bytes:
    return b"al\xf6" if left is None else b"al" + LINK + left


def _cid(block: bytes) -> bytes:
    return RECORD_CID + sha256(block).digest()


def _remove(blocks: Blocks, node: Node | None, key: bytes) -> tuple[Node | None, bytes | None]:
    """(what is left, the value that was there)."""
    if node is None:
        return None, None
    at = bisect_left(node.keys, key)
    if at < len(node.keys) and node.keys[at] == key:
        old: bytes | None = node.values[at]
        joined = _merge(blocks, node.below[at], node.below[at + 1], node.layer - 1)
        del node.keys[at], node.values[at], node.shared[at]
        node.below[at : at + 2] = [joined]
        if at < len(node.keys):
            node.shared[at] = -1
    else:
        node.below[at], old = _remove(blocks, _below(blocks, node, at), key)
    return (None if not node.keys and node.below[0] is None else node), old


def _put(blocks: Blocks, node: Node | None, key: bytes, value: bytes) -> tuple[Node, bytes | None]:
    """(the tree with the key, the value that was there)."""
    layer = layer_of(key)
    if layer > LAYER_MAX:
        raise Unproved(Flaw.TOO_DEEP, f"a key of layer {layer}")
    if node is None:
        return Node(layer, [key], [value], [None, None], [0]), None
    if layer > node.layer:
        low, high = _split(blocks, node, key, node.layer)
        below = [_lift(low, node.layer, layer - 1), _lift(high, node.layer, layer - 1)]
        return Node(layer, [key], [value], below, [0]), None
    return node, _put_below(blocks, node, key, value, layer)


def _put_below(blocks: Blocks, node: Node, key: bytes, value: bytes, layer: int) -> bytes | None:
    at = bisect_left(node.keys, key)
    if layer == node.layer:
        if at < len(node.keys) and node.keys[at] == key:
            old, node.values[at] = node.values[at], value
            return old
        low, high = _split(blocks, node.below[at], key, node.layer - 1)
        node.keys.insert(at, key)
        node.values.insert(at, value)
        node.shared.insert(at, -1)
        if at + 1 < len(node.keys):
            node.shared[at + 1] = -1
        node.below[at : at + 1] = [low, high]
        return None
    below = _below(blocks, node, at)
    if below is None:
        node.below[at] = _lift(Node(layer, [key], [value], [None, None], [0]), layer, node.layer - 1)
        return None
    return _put_below(blocks, below, key, value, layer)


_Subtree = bytes | Node | None


def _merge(blocks: Blocks, low: _Subtree, high: _Subtree, layer: int) -> _Subtree:
    if low is None or high is None:
        return high if low is None else low
    left = _load(blocks, low, layer) if isinstance(low, bytes) else low
    right = _load(blocks, high, layer) if isinstance(high, bytes) else high
    middle = _merge(blocks, left.below[-1], right.below[0], layer - 1)
    return Node(
        layer,
        left.keys + right.keys,
        left.values + right.values,
        [*left.below[:-1], middle, *right.below[1:]],
        [*left.shared, *([-1] if right.keys else []), *right.shared[1:]],
    )


def _split(blocks: Blocks, tree: _Subtree, key: bytes, layer: int) -> tuple[_Subtree, _Subtree]:
    """What is below the key and what is above it."""
    if tree is None:
        return None, None
    node = _load(blocks, tree, layer) if isinstance(tree, bytes) else tree
    at = bisect_left(node.keys, key)
    if at < len(node.keys) and node.keys[at] == key:
        raise Unproved(Flaw.BAD_TREE, "a key in the wrong layer")
    low, high = _split(blocks, node.below[at], key, layer - 1)
    left = Node(layer, node.keys[:at], node.values[:at], [*node.below[:at], low], node.shared[:at])
    shared = node.shared[at:]
    if shared:
        shared[0] = -1
    right = Node(layer, node.keys[at:], node.values[at:], [high, *node.below[at + 1 :]], shared)
    return (left if left.keys or low is not None else None), (right if right.keys or high is not None else None)


def _lift(tree: _Subtree, layer: int, to: int) -> _Subtree:
    """Nodes without keys bridge the layers between."""
    while tree is not None and layer < to:
        layer += 1
        tree = Node(layer, [], [], [tree], [])
    return tree


def _seal(node: Node) -> bytes:
    """The CID of a tree of which some nodes are loaded."""
    links = [_seal(below) if isinstance(below, Node) else below for below in node.below]
    entries = []
    before = b""
    for key, value, link, shared in zip(node.keys, node.values, links[1:], node.shared, strict=True):
        entries.append((key, value, link, common_prefix(before, key) if shared < 0 else shared))
        before = key
    return _cid(_encode(links[0], entries))


def common_prefix(left: bytes, right: bytes) -> int:
    size = min(len(left), len(right))
    differing = int.from_bytes(left[:size], "big") ^ int.from_bytes(right[:size], "big")
    return size - ((differing.bit_length() + 7) >> 3)


def _encode(left: bytes | None, entries: list[tuple[bytes, bytes, bytes | None, int]]) -> bytes:
    """DAG-CBOR of a node."""
    parts = [b"\xa2ae", _head(0x80, len(entries))]
    for key, value, after, shared in entries:
        tail = key[shared:]
        parts += (b"\xa4ak", _head(0x40, len(tail)), tail, b"ap", _head(0, shared), b"at")
        parts += (b"\xf6av" if after is None else LINK + after + b"av", LINK, value)
    parts += (b"al", b"\xf6" if left is None else LINK + left)
    return b"".join(parts)


def _head(major: int, count: int) -> bytes:
    if count < 24:
        return _HEADS[major | count]
    if count < 256:
        return bytes((major | 24, count))
    return bytes((major | 25,)) + count.to_bytes(2, "big")


_HEADS: Final = [bytes((number,)) for number in range(256)]
