"""Records: decoding, telling links from bytes, JSON that jsonb accepts, and text that PostgreSQL can hold."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import libipld
import orjson
import pytest

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Op
from fastworker.event.cbor import DEPTH_MAX, Link, check_depth, count_values, decode
from fastworker.event.record import (
    cid_text,
    clean_text,
    json_text,
    link_text,
    load_record,
    nesting_exceeds,
    values_within,
)
from fastworker.simulator.cbor import cid_of, encode, head, text

CID = cid_of(b"some record")
BLOB = b"\x01\x55\x12\x20" + bytes(range(32))


def born_of(block: bytes) -> Op:
    return Op("create", "com.example.thing", "1", "bafy", block)


def born_of_json(record: Any) -> Op:
    return Op("create", "com.example.thing", "1", "bafy", None, record)


def roundtrip(record: Any) -> Any:
    op = born_of(encode(record))
    return json.loads(json_text(load_record(op), op))


def lexicon_link(cid: bytes) -> dict[str, str]:
    return {"$link": libipld.encode_cid(cid)}


def lexicon_bytes(content: bytes) -> dict[str, str]:
    return {"$bytes": base64.b64encode(content).rstrip(b"=").decode()}


# -- links and bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 23, 24, 34, 36, 255, 256, 65_535, 65_536])
def test_byte_strings_of_every_head(size: int) -> None:
    record = {"a": lexicon_bytes(b"\x07" * size), "b": lexicon_link(CID)}
    assert roundtrip(record) == record


def test_a_byte_string_that_looks_like_a_link() -> None:
    record = {"a": lexicon_bytes(CID), "b": [lexicon_link(BLOB)]}
    assert roundtrip(record) == record


@pytest.mark.parametrize("part", ["a", "b"])
def test_one_value_that_is_both(part: str) -> None:
    """Nothing in the decoded value tells them apart: only the exact decoder can."""
    record = {
        "a": {"x": lexicon_bytes(CID)},
        "b": {"x": lexicon_link(CID)},
        "c": [lexicon_link(CID), lexicon_bytes(CID)],
    }
    assert roundtrip(record) == record
    op = born_of(encode(record))
    found = {"a", "b"} & {key for key in ("a", "b") if json.loads(json_text(load_record(op)["c"], op)) == record["c"]}
    assert found == {"a", "b"}


def test_a_link_inside_a_byte_string_is_not_a_link() -> None:
    record = {"a": lexicon_bytes(b"\xd8\x2a\x58\x25\x00" + CID), "b": lexicon_bytes(CID)}
    assert roundtrip(record) == record


def test_heads_that_are_longer_than_need_be() -> None:
    """Not DAG-CBOR, but libipld reads it: the block holds neither pattern."""
    op = born_of(b"\xa2\x61a\xd9\x00\x2a\x59\x00\x25\x00" + CID + b"\x61b\x59\x00\x24" + BLOB)
    assert json.loads(json_text(load_record(op), op)) == {"a": lexicon_link(CID), "b": lexicon_bytes(BLOB)}


def test_a_part_that_the_mapper_has_changed() -> None:
    """It is nowhere in the block as a whole, and takes the slow path all the same."""
    record = {"a": lexicon_bytes(BLOB), "b": lexicon_link(CID)}
    op = born_of(encode({"embed": record}))
    embed = load_record(op)["embed"] | {"added": "\0"}
    assert json.loads(json_text(embed, op)) == record | {"added": ""}


@pytest.mark.parametrize(
    ("ref", "cid"),
    [
        (BLOB, libipld.encode_cid(BLOB)),
        (lexicon_link(BLOB), libipld.encode_cid(BLOB)),
        (libipld.encode_cid(BLOB), libipld.encode_cid(BLOB)),
        (BLOB.hex(), libipld.encode_cid(BLOB)),
        ("odd\0 text", "odd\0 text"),
        ("", None),
        (None, None),
        (5, None),
        ([], None),
        ({}, None),
        ({"$link": 5}, None),
        (b"", None),
        (b"\xff" * 36, None),
    ],
)
def test_link_text(ref: Any, cid: str | None) -> None:
    assert link_text(ref, born_of_json({})) == cid


# -- what jsonb does not take ------------------------------------------------------------------------


@pytest.mark.parametrize("in_json", [False, True])
@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("a\0b", "ab"),
        ("a\ud800b", "ab"),
        ("\ud83d\ude00"[:1] + "é\0", "é"),
        ("😀 \\u0000", "😀 \\u0000"),
        ({"k\0": 1, "k": 2}, {"k": 2}),
        ({"k": 2, "k\0": 1}, {"k": 2}),
        ({"\ud800k": ["\0"]}, {"k": [""]}),
        (2**63, 2**63),
        (2**64 - 1, 2**64 - 1),
        (-(2**63), -(2**63)),
        (-(2**64), -(2.0**64)),
        (float("nan"), None),
        (float("-inf"), None),
        (1.5, 1.5),
        (True, True),
        (None, None),
        ([[], {}], [[], {}]),
    ],
)
def test_json_is_cleaned(value: Any, clean: Any, in_json: bool) -> None:
    record = {"v": value, "other": "kept"}
    op = born_of_json(record) if in_json else born_of(encode(record))
    produced = json_text(load_record(op), op)
    assert json.loads(produced) == {"v": clean, "other": "kept"}
    assert produced.encode()
    for part in ("NaN", "Infinity"):
        assert part not in produced


@pytest.mark.parametrize(("number", "text"), [(2**64, "1.8446744073709552e+19"), (10**30, "1e+30"), (10**400, "null")])
def test_integers_beyond_64_bits_in_json(number: int, text: str) -> None:
    op = born_of_json({"n": number})
    assert json_text(op.record, op) == f'{{"n":{text}}}'


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("plain", "plain"),
        ("é", "é"),
        ("\0", ""),
        ("é\0", "é"),
        ("\ud800", ""),
        ("é\udfff\0x", "éx"),
        ("😀", "😀"),
        ("", ""),
    ],
)
def test_clean_text(dirty: str, clean: str) -> None:
    assert clean_text(dirty) == clean


# -- blocks that libipld refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "record"),
    [
        (b"\xa1" + text("text") + text("a\ud800"), {"text": "a\ud800"}),
        (b"\xa1\x64text\x62\xff\xfe", {"text": "\ufffd\ufffd"}),
        (b"\xa2\x61b\x01\x61a\x02", {"a": 2, "b": 1}),
        (b"\xa2\x61a\x01\x61a\x02", {"a": 2}),
        (b"\xa1\x61a\xf7", {"a": None}),
        (b"\xa1\x61a\xf9\x3e\x00", {"a": 1.5}),
        (b"\xa1\x61a\xfb\x7f\xf0" + bytes(6), {"a": float("inf")}),
    ],
)
def test_saved_by_the_tolerant_decoder(block: bytes, record: Any) -> None:
    with pytest.raises(ValueError, match="."):
        libipld.decode_dag_cbor(block)
    assert load_record(born_of(block)) == record


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (b"", Reason.BAD_CBOR),
        (b"\xa1", Reason.BAD_CBOR),
        (b"\xa1\x61a", Reason.BAD_CBOR),
        (b"\xa1\x61a\x18", Reason.BAD_CBOR),
        (b"\xa1\x01\x01", Reason.BAD_CBOR),
        (b"\xa0\xa0", Reason.BAD_CBOR),
        (b"\xbf\xff", Reason.BAD_CBOR),
        (b"\xa1\x61a\x7f\x61a\xff", Reason.BAD_CBOR),
        (b"\xa1\x61a\xc1\x01", Reason.BAD_CBOR),
        (b"\xa1\x61a\xd8\x2a\x41\x00", Reason.BAD_CBOR),
        (b"\xa1\x61a\xd8\x2a\x58\x24" + CID, Reason.BAD_CBOR),
        (b"\xa1\x61a\xd8\x2a\xd8\x2a\x58\x24" + CID, Reason.BAD_CBOR),
        (b"\xa1\x61a\xf8\x20", Reason.BAD_CBOR),
        (b"\xa1\x61a\xe0", Reason.BAD_CBOR),
        (b"\xa1\x61a\x5b\xff\xff\xff\xff\xff\xff\xff\xff", Reason.BAD_CBOR),
        (b"\xa1\x61a\x9b\x00\x00\x00\xff\xff\xff\xff\xff", Reason.BAD_CBOR),
        (b"\xa1\x61a\xbb\xff\xff\xff\xff\xff\xff\xff\xff", Reason.BAD_CBOR),
        (b"\x80", Reason.BAD_RECORD),
        (b"\xf6", Reason.BAD_RECORD),
        (b"\x61a", Reason.BAD_RECORD),
    ],
)
def test_refused(block: bytes, reason: Reason) -> None:
    with pytest.raises(InvalidEvent) as caught:
        load_record(born_of(block))
    assert caught.value.reason is reason


def test_no_record() -> None:
    with pytest.raises(InvalidEvent) as caught:
        load_record(Op("create", "a.b.c", "1"))
    assert caught.value.reason is Reason.BAD_RECORD


def test_a_link_that_is_no_cid_costs_only_itself() -> None:
    op = born_of(b"\xa2\x61a\xd8\x2a\x43\x00\x01\x02\x61b\x01")
    assert json.loads(json_text(load_record(op), op)) == {"a": None, "b": 1}


# -- depth -----------------------------------------------------------------------------------------------


def nested(levels: int, last: Any = 1) -> dict[str, Any]:
    """A record of so many containers, arrays and maps in turn."""
    value = last
    for level in range(levels):
        value = {"a": value} if (levels - level) % 2 else [value]
    record: dict[str, Any] = value
    return record


def test_depth_is_the_same_for_blocks_and_json() -> None:
    for record in (nested(DEPTH_MAX), nested(DEPTH_MAX, lexicon_link(CID)), nested(DEPTH_MAX, lexicon_bytes(CID))):
        assert not nesting_exceeds(record, DEPTH_MAX)
        assert roundtrip(record) == record
    dirty = nested(DEPTH_MAX, "\0")
    assert "\0" not in json_text(dirty, born_of_json(dirty))
    for record in (nested(DEPTH_MAX + 1), nested(DEPTH_MAX, []), nested(DEPTH_MAX, {})):
        assert nesting_exceeds(record, DEPTH_MAX)
        with pytest.raises(InvalidEvent) as caught:
            load_record(born_of(encode(record)))
        assert caught.value.reason is Reason.TOO_DEEP


@pytest.mark.parametrize(
    "block",
    [
        b"\x81" * 2_000_000,
        b"\xa1\x61a" * 600_000 + b"\x01",
        (b"\x9a" + (1_900_000).to_bytes(4, "big")) * 1000 + bytes(1_950_000),  # each level claims all that is left
    ],
)
def test_hostile_depth_is_refused_before_it_costs_anything(block: bytes) -> None:
    with pytest.raises(InvalidEvent) as caught:
        load_record(born_of(block))
    assert caught.value.reason is Reason.TOO_DEEP


def test_bytes_that_only_look_like_heads_are_no_depth() -> None:
    check_depth(
        encode({"text": "あ" * 500, "blob": lexicon_bytes(b"\x81" * 500), "many": [[1]] * 500, "last": {"a": [[]]}})
    )


def test_a_link_that_hides_depth() -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    with pytest.raises(InvalidEvent) as caught:
        json_text({"$link": deep}, born_of_json({}))
    assert caught.value.reason is Reason.TOO_DEEP


def test_values_are_counted_alike_in_blocks_and_json() -> None:
    record = {"a": [1, [], {}, "あ" * 100], "b": lexicon_link(CID), "c": {"d": lexicon_bytes(b"\x81" * 300)}, "e": None}
    for most in (0, 1, 8, 14, 15, 100):
        assert min(count_values(encode(record), most), most + 1) == min(values_within(record, most), most + 1)
    assert count_values(encode(record), 100) == 15
    assert values_within([[]] * 1_000_000, 10) == 11


# -- the exact decoder -------------------------------------------------------------------------------------


def test_links_are_told_apart() -> None:
    value = decode(encode({"a": lexicon_link(CID), "b": lexicon_bytes(CID)}))
    assert (type(value["a"]), type(value["b"])) == (Link, bytes)
    assert value["a"] == value["b"] == CID
    assert cid_text(value["a"]) == libipld.encode_cid(CID)


@pytest.mark.parametrize("number", [0, 23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**53, 2**63, 2**64 - 1])
def test_integers(number: int) -> None:
    for value in (number, -number, -1 - number):
        assert decode(encode(value)) == value == libipld.decode_dag_cbor(encode(value))
    assert decode(head(0, number)) == number


# -- real records and the protocol's vectors -------------------------------------------------------------


@pytest.mark.real_data
def test_interop_data_model(real_data: Path) -> None:
    for case in json.loads((real_data / "interop/data-model/data-model-fixtures.json").read_text()):
        block = base64.b64decode(case["cbor_base64"] + "==")
        assert cid_text(cid_of(block)) == case["cid"]
        op = born_of(block)
        assert json.loads(json_text(load_record(op), op)) == case["json"]
    for case in json.loads((real_data / "interop/data-model/data-model-valid.json").read_text()):
        assert roundtrip(case["json"]) == case["json"]


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["bsky.app.car", "little.car", "jetstream-repo.car"])
def test_every_record_of_a_real_repository(name: str, real_data: Path) -> None:
    """libipld and our own decoder agree, and the JSON is what the simulator's independent decoder says."""
    from fastworker.simulator.cbor import decode as independent
    from fastworker.simulator.repo import read_car

    _, blocks = read_car((real_data / "cars" / name).read_bytes())
    records = 0
    for cid, block in blocks.items():
        op = Op("create", "", "", cid_text(cid), block)
        record = load_record(op)
        assert decode(block) == record
        assert orjson.loads(json_text(record, op)) == independent(block)
        records += "$type" in record
    assert records > 20
