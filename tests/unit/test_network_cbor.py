"""Our encoder against libipld's, and both directions against each other."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import libipld
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastworker.simulator.cbor import (
    DAG_CBOR,
    DecodeError,
    cid_bytes,
    cid_text,
    decode,
    encode,
    encode_record,
    text,
)

CIDS = st.binary(min_size=32, max_size=32).map(lambda digest: DAG_CBOR + digest)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | CIDS.map(lambda cid: {"$link": cid_text(cid)})
    | (st.binary(max_size=60) | CIDS).map(lambda raw: {"$bytes": base64.b64encode(raw).decode().rstrip("=")})
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5)
)


@given(VALUES)
def test_a_value_comes_back(value: Any) -> None:
    assert decode(encode(value)) == value


@given(VALUES)
@example(-0.0)
@example([0.0, {"x": -0.0}])
def test_both_encoders_agree(value: Any) -> None:
    assert encode_record(value) == encode(value)


@given(VALUES.filter(lambda value: "$bytes" not in repr(value) and "-0.0" not in repr(value)))
def test_libipld_reads_what_we_write_and_writes_it_again(value: Any) -> None:
    data = encode(value)
    assert libipld.encode_dag_cbor(libipld.decode_dag_cbor(data)) == data


@given(CIDS)
def test_the_text_of_a_cid_is_base32(cid: Any) -> None:
    assert cid_text(cid) == "b" + base64.b32encode(cid).decode().rstrip("=").lower()
    assert cid_bytes(cid_text(cid)) == cid


def test_bytes_that_look_like_a_cid_stay_bytes() -> None:
    raw = {"$bytes": base64.b64encode(DAG_CBOR + bytes(32)).decode()}
    assert encode_record({"x": raw})[:5] == b"\xa1ax\x58\x24"


def test_lone_surrogates_become_invalid_utf8() -> None:
    assert text("\ud83d") == b"\x63\xed\xa0\xbd"
    assert encode_record({"text": "\ud83d"}) == b"\xa1dtext\x63\xed\xa0\xbd"


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: Any) -> None:
    with contextlib.suppress(DecodeError):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xa1",
        b"\x00\x00",
        b"\xc1\x00",
        b"\xa1\x01\x02",
        b"\x62\xc3\x28",
        b"\x9f\xff",
        b"\xfb\x00",
        b"\xd8\x2a\x40",
        pytest.param(b"\x81" * 90_000, id="deep"),
    ],
)
def test_what_is_not_dag_cbor_is_refused(data: Any) -> None:
    with pytest.raises(DecodeError):
        decode(data)
