"""Identifier syntax against the protocol's own vectors, and the edges that they leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastworker.event.syntax import is_did, is_handle, is_nsid, is_rkey, is_tid, split_path

CHECKS = {"did": is_did, "handle": is_handle, "nsid": is_nsid, "recordkey": is_rkey, "tid": is_tid}


def _vectors(real_data: Path, name: str) -> list[str]:
    text = (real_data / "interop" / "syntax" / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line and not line.startswith("# ") and line != "#"]


@pytest.mark.real_data
@pytest.mark.parametrize("kind", CHECKS)
def test_interop_vectors(kind: str, real_data: Path) -> None:
    check = CHECKS[kind]
    valid, invalid = _vectors(real_data, f"{kind}_syntax_valid"), _vectors(real_data, f"{kind}_syntax_invalid")
    assert valid
    assert invalid
    assert [line for line in valid if not check(line)] == []
    assert [line for line in invalid if check(line)] == []


@pytest.mark.parametrize("check", CHECKS.values())
@pytest.mark.parametrize("text", ["", "\n", "did:plc:a\n", "a.b.c\n", "3jzfcijpj2z2a\n", "\ud800", "é", "a.b.\0c"])
def test_nothing_beside_the_text_is_let_through(check: Any, text: Any) -> None:
    assert not check(text)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("app.bsky.feed.post/3jzfcijpj2z2a", ("app.bsky.feed.post", "3jzfcijpj2z2a")),
        ("app.bsky.actor.profile/self", ("app.bsky.actor.profile", "self")),
        ("com.example.thing/a:b.c~d_e-f", ("com.example.thing", "a:b.c~d_e-f")),
        ("app.bsky.feed.post", None),
        ("app.bsky.feed.post/", None),
        ("app.bsky.feed.post/a/b", None),
        ("app.bsky.feed.post/.", None),
        ("app.bsky.feed.post/..", None),
        ("app.bsky.feed.post/a b", None),
        ("app.bsky.feed.post/\ud800", None),
        ("app.bsky.feed.post/" + "a" * 512, ("app.bsky.feed.post", "a" * 512)),
        ("app.bsky.feed.post/" + "a" * 513, None),
        ("post/abc", None),
        ("/abc", None),
        ("", None),
    ],
)
def test_split_path(path: str, names: tuple[str, str] | None) -> None:
    assert split_path(path) == names
