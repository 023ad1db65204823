"""The Merkle search tree of a repository, persistent: an edit copies the path and shares the rest.

Nodes are never changed after they are made, so a thousand accounts can start from one tree, a commit costs the nodes
of its path, and "the blocks of this commit" are simply the nodes that have no CID yet. Source: the repository
specification of atproto (fanout 4: a key's layer is half the number of leading zero bits of its SHA-256).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from fastworker.simulator.cbor import DAG_CBOR, LINK, head

Entry = tuple[bytes, bytes, bytes, bytes]
"""(key, CID of the value, CBOR of the entry before and after the link of its subtree). The third depends on the key
before."""


class Node:
    """`entries` in key order with the subtrees around them: `len(subtrees) == len(entries) + 1`.

    Every subtree is exactly one layer below (a node without entries bridges a gap). `cid` is None until the node is
    encoded for the first time, `link` is its CBOR.
    """

    __slots__ = ("cid", "entries", "layer", "link", "subtrees")

    def __init__(self, layer: int, entries: tuple[Entry, ...], subtrees: tuple[Node | None, ...]) -> None:
        self.layer = layer
        self.entries = entries
        self.subtrees = subtrees
        self.cid: bytes | None = None
        self.link = b""

    def encode(self) -> bytes:
        """DAG-CBOR of the node; the subtrees must have their CIDs."""
        first, *rest = self.subtrees
        parts = [b"\xa2ae", head(4, len(self.entries))]
        for (_, _, before, after), subtree in zip(self.entries, rest, strict=True):
            parts += (before, b"\xf6" if subtree is None else subtree.link, after)
        parts += (b"al", b"\xf6" if first is None else first.link)
        return b"".join(parts)


EMPTY = Node(0, (), (None,))


def layer_of(key: bytes) -> int:
    return (256 - int.from_bytes(hashlib.sha256(key).digest(), "big").bit_length()) // 2


def common_prefix(left: bytes, right: bytes) -> int:
    size = min(len(left), len(right))
    differing = int.from_bytes(left[:size], "big") ^ int.from_bytes(right[:size], "big")
    return size - (differing.bit_length() + 7) // 8


def _entry(previous: bytes, key: bytes, value: bytes) -> Entry:
    shared = common_prefix(previous, key)
    before = b"\xa4ak" + head(2, len(key) - shared) + key[shared:] + b"ap" + head(0, shared) + b"at"
    return (key, value, before, b"av" + LINK + value)


def _node(layer: int, entries: tuple[Entry, ...], subtrees: tuple[Node | None, ...], *seams: int) -> Node | None:
    """A node of these parts, None if nothing is left. `seams`: entries whose predecessor may be another one now."""
    if not entries and subtrees[0] is None:
        return None
    for at in seams:
        if at < len(entries):
            entry = _entry(entries[at - 1][0] if at else b"", *entries[at][:2])
            entries = (*entries[:at], entry, *entries[at + 1 :])
    return Node(layer, entries, subtrees)


def _lift(node: Node | None, layer: int) -> Node | None:
    while node is not None and node.layer < layer:
        node = Node(node.layer + 1, (), (node,))
    return node


def _split(node: Node | None, key: bytes) -> tuple[Node | None, Node | None]:
    """What is below `key` and what is above; a side that has everything is the node itself."""
    if node is None:
        return None, None
    at = bisect_left(node.entries, (key,))
    subtree = node.subtrees[at]
    low, high = _split(subtree, key)
    if high is None and at == len(node.entries) and low is subtree:
        return node, None
    if low is None and at == 0 and high is subtree:
        return None, node
    return (
        _node(node.layer, node.entries[:at], (*node.subtrees[:at], low)),
        _node(node.layer, node.entries[at:], (high, *node.subtrees[at + 1 :]), 0),
    )


def _merge(low: Node | None, high: Node | None) -> Node | None:
    if low is None or high is None:
        return high if low is None else low
    return _node(
        low.layer,
        low.entries + high.entries,
        (*low.subtrees[:-1], _merge(low.subtrees[-1], high.subtrees[0]), *high.subtrees[1:]),
        len(low.entries),
    )


def put(root: Node, key: bytes, value: bytes) -> Node:
    """The tree with `key` bound to the CID `value`."""
    layer = layer_of(key)
    if not root.entries and root.subtrees[0] is None:
        return Node(layer, (_entry(b"", key, value),), (None, None))
    if layer > root.layer:
        low, high = _split(root, key)
        return Node(layer, (_entry(b"", key, value),), (_lift(low, layer - 1), _lift(high, layer - 1)))
    return _put(root, key, value, layer)


def _put(node: Node, key: bytes, value: bytes, layer: int) -> Node:
    entries, subtrees = node.entries, node.subtrees
    at = bisect_left(entries, (key,))
    if layer < node.layer:
        below = subtrees[at]
        if below is None:
            grown = _lift(Node(layer, (_entry(b"", key, value),), (None, None)), node.layer - 1)
        else:
            grown = _put(below, key, value, layer)
        return Node(node.layer, entries, (*subtrees[:at], grown, *subtrees[at + 1 :]))
    if at < len(entries) and entries[at][0] == key:
        replaced = _entry(entries[at - 1][0] if at else b"", key, value)
        return Node(node.layer, (*entries[:at], replaced, *entries[at + 1 :]), subtrees)
    low, high = _split(subtrees[at], key)
    entry = _entry(entries[at - 1][0] if at else b"", key, value)
    grown = _node(
        node.layer, (*entries[:at], entry, *entries[at:]), (*subtrees[:at], low, high, *subtrees[at + 1 :]), at + 1
    )
    assert grown is not None
    return grown


def remove(root: Node, key: bytes) -> Node:
    """The tree without `key`, which must be in it."""
    left = _remove(root, key)
    while left is not None and not left.entries and left.subtrees[0] is not None:
        left = left.subtrees[0]
    return EMPTY if left is None else left


def _remove(node: Node, key: bytes) -> Node | None:
    entries, subtrees = node.entries, node.subtrees
    at = bisect_left(entries, (key,))
    if at < len(entries) and entries[at][0] == key:
        joined = _merge(subtrees[at], subtrees[at + 1])
        return _node(node.layer, entries[:at] + entries[at + 1 :], (*subtrees[:at], joined, *subtrees[at + 2 :]), at)
    below = subtrees[at]
    if below is None:
        raise KeyError(key)
    return _node(node.layer, entries, (*subtrees[:at], _remove(below, key), *subtrees[at + 1 :]))


def get(root: Node, key: bytes) -> bytes | None:
    node: Node | None = root
    while node is not None:
        at = bisect_left(node.entries, (key,))
        if at < len(node.entries) and node.entries[at][0] == key:
            return node.entries[at][1]
        node = node.subtrees[at]
    return None


def items(node: Node | None) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) in key order."""
    if node is None:
        return
    yield from items(node.subtrees[0])
    for (key, value, _, _), subtree in zip(node.entries, node.subtrees[1:], strict=True):
        yield key, value
        yield from items(subtree)


def seal(root: Node) -> bytes:
    """The root's CID, for callers who do not want the blocks."""
    return blocks(root, ())[0]


def blocks(root: Node, keys: Iterable[bytes]) -> tuple[bytes, dict[bytes, bytes]]:
    """(root CID, blocks of a commit that touched `keys`): the root, the new nodes, the proofs that cover the keys.

    A covering proof is the path to the key and to its neighbours: what a consumer needs in order to undo the op and
    arrive at `prevData` (sync 1.1).
    """
    found: dict[bytes, bytes] = {}
    root_cid = _seal(root, found)
    if not found:
        found[root_cid] = root.encode()
    for key in keys:
        _prove(root, key, found)
    return root_cid, found


def all_blocks(root: Node) -> dict[bytes, bytes]:
    """Every node of a sealed tree, by CID."""
    assert root.cid is not None
    found = {root.cid: root.encode()}
    for subtree in root.subtrees:
        if subtree is not None:
            found |= all_blocks(subtree)
    return found


def _seal(node: Node, found: dict[bytes, bytes]) -> bytes:
    if node.cid is None:
        for subtree in node.subtrees:
            if subtree is not None and subtree.cid is None:
                _seal(subtree, found)
        data = node.encode()
        node.cid = DAG_CBOR + hashlib.sha256(data).digest()
        node.link = LINK + node.cid
        found[node.cid] = data
    return node.cid


def _prove(root: Node, key: bytes, found: dict[bytes, bytes]) -> None:
    def take(node: Node) -> None:
        cid = node.cid
        assert cid is not None
        if cid not in found:
            found[cid] = node.encode()

    node: Node | None = root
    while node is not None:
        take(node)
        at = bisect_left(node.entries, (key,))
        if at < len(node.entries) and node.entries[at][0] == key:
            before, after = node.subtrees[at], node.subtrees[at + 1]
            while before is not None:
                take(before)
                before = before.subtrees[-1]
            while after is not None:
                take(after)
                after = after.subtrees[0]
            return
        node = node.subtrees[at]
