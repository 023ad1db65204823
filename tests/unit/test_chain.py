"""What is known of each account, and whether a commit follows it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libipld
import pytest

from fastworker.event.proof import Link, Verdict, read_link, read_sync
from fastworker.reader import chain as chain_module
from fastworker.reader.chain import Chain
from fastworker.simulator.cbor import cid_of
from fastworker.simulator.repo import Clock, Repo, tid

DID, OTHER = "did:plc:" + "a" * 24, "did:web:b.test"
SIZE = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    chain = Chain(tmp_path / "chain", SIZE)
    yield chain
    chain.close()


def root(number: int) -> bytes:
    return cid_of(b"%d" % number)


def rev(number: int) -> str:
    return tid(1_780_000_000_000_000 + number)


def link(since: int | None, before: int | None, data: int | None, *, is_too_big: bool = False) -> Link:
    return Link(
        None if since is None else rev(since),
        None if before is None else root(before),
        None if data is None else root(data),
        is_too_big,
    )


def step(chain: Chain, number: int, since: int | None, before: int | None, did: str = DID) -> Verdict:
    verdict, broke = chain.follow(did, rev(number), link(since, before, number))
    assert (broke is not None) == (verdict is Verdict.BREAK)
    return verdict


def test_commits_that_follow(chain: Chain) -> None:
    assert step(chain, 1, None, 0) is Verdict.FIRST
    assert step(chain, 2, 1, 1) is Verdict.OK
    assert step(chain, 3, 2, 2) is Verdict.OK
    assert step(chain, 1, None, 0, OTHER) is Verdict.FIRST
    assert step(chain, 4, 3, 3) is Verdict.OK
    assert step(chain, 2, 1, 1, OTHER) is Verdict.OK


def test_commits_that_do_not(chain: Chain) -> None:
    step(chain, 1, None, 0)
    assert step(chain, 3, 2, 2) is Verdict.BREAK, "one is lost"
    assert step(chain, 2, 1, 1) is Verdict.REPLAY, "it comes late"
    assert step(chain, 3, 2, 2) is Verdict.REPLAY
    assert step(chain, 4, 3, 3) is Verdict.OK
    assert step(chain, 5, 4, 99) is Verdict.BREAK, "another tree"
    assert step(chain, 6, 99, 5) is Verdict.BREAK, "another revision"
    assert step(chain, 7, None, 6) is Verdict.BREAK, "as if it were the account's first"
    assert step(chain, 8, 7, 7) is Verdict.OK


def test_commits_of_old_hosts(chain: Chain) -> None:
    step(chain, 1, None, None)
    assert step(chain, 2, 1, None) is Verdict.LEGACY
    assert step(chain, 3, None, None) is Verdict.LEGACY
    assert step(chain, 5, 4, None) is Verdict.BREAK
    assert step(chain, 6, 5, 5) is Verdict.OK, "its host is a new release"


def test_a_commit_that_is_too_big(chain: Chain) -> None:
    assert chain.follow(DID, rev(1), link(None, None, None, is_too_big=True)) == (Verdict.BREAK, None)
    assert step(chain, 2, 1, 1) is Verdict.FIRST
    verdict, broke = chain.follow(DID, rev(3), link(2, 2, None, is_too_big=True))
    assert verdict is Verdict.BREAK
    assert broke
    assert step(chain, 4, 3, 77) is Verdict.OK, "its tree is not known: only the revision is compared"
    assert step(chain, 5, 4, 99) is Verdict.BREAK


def test_a_sync_is_followed(chain: Chain) -> None:
    step(chain, 1, None, 0)
    chain.replace(DID, rev(5), root(5))
    chain.replace(DID, rev(4), root(4))
    assert step(chain, 6, 5, 5) is Verdict.OK
    chain.replace(OTHER, rev(1), root(1))
    assert step(chain, 2, 1, 1, OTHER) is Verdict.OK


def test_it_survives_a_kill(tmp_path: Path) -> None:
    killed = os.fork()
    if not killed:
        step(Chain(tmp_path / "chain", SIZE), 1, None, 0)
        os.kill(os.getpid(), 9)
    assert os.waitpid(killed, 0)[1] == 9
    chain = Chain(tmp_path / "chain", SIZE)
    assert step(chain, 2, 1, 1) is Verdict.OK
    chain.close()


def test_a_break_is_known_until_its_repair_is_on_the_way(tmp_path: Path) -> None:
    """Else a crash between the two would make a replay of it, and nobody would ever know."""
    chain = Chain(tmp_path / "chain", SIZE)
    step(chain, 1, None, 0)
    _, broke = chain.follow(DID, rev(3), link(2, 2, 3))
    assert step(chain, 4, 3, 3) is Verdict.OK
    chain.close()
    chain = Chain(tmp_path / "chain", SIZE)
    _, again = chain.follow(DID, rev(3), link(2, 2, 3))
    assert broke
    assert again
    assert step(chain, 4, 3, 3) is Verdict.OK
    chain.settled([again])
    chain.close()
    chain = Chain(tmp_path / "chain", SIZE)
    assert step(chain, 3, 2, 2) is Verdict.REPLAY
    assert step(chain, 5, 4, 4) is Verdict.OK
    _, first = chain.follow(DID, rev(7), link(6, 6, 7))
    _, second = chain.follow(DID, rev(9), link(8, 8, 9))
    assert first
    assert second
    chain.settled([first])  # the second one's repair is not on its way yet
    chain.forget_breaks()
    assert step(chain, 9, 8, 8) is Verdict.BREAK
    chain.close()


def test_another_boot_trusts_only_what_was_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(tmp_path / "chain", SIZE)
    step(chain, 1, None, 0)
    chain.close()
    monkeypatch.setattr(chain_module, "_boot", lambda: b"another")
    chain = Chain(tmp_path / "chain", SIZE)
    assert step(chain, 2, 1, 1) is Verdict.OK
    monkeypatch.setattr(chain_module, "_boot", lambda: b"a third")  # the power went
    os.close(chain._file or 0)
    chain = Chain(tmp_path / "chain", SIZE)
    assert step(chain, 3, 2, 2) is Verdict.FIRST
    chain.close()


def test_another_size_and_foreign_contents_begin_empty(tmp_path: Path) -> None:
    path = tmp_path / "chain"
    path.write_bytes(b"something else" * 1_000)
    for size in (SIZE, 2 * SIZE):
        chain = Chain(path, size)
        assert step(chain, 1, None, 0) is Verdict.FIRST
        chain.close()
    assert path.stat().st_size == 2 * SIZE + 4096
    assert path.stat().st_blocks * 512 >= 2 * SIZE, "a full disk would kill the process at a write"


@pytest.mark.parametrize("why", ["nowhere", "held", "no folder"])
def test_without_a_place_it_is_kept_in_memory(why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = Chain(tmp_path / "held", SIZE)
    (tmp_path / "file").touch()
    path = {"nowhere": None, "held": tmp_path / "held", "no folder": tmp_path / "file" / "chain"}[why]
    with caplog.at_level(logging.WARNING):
        chain = Chain(path, 64 << 20)
    assert len(caplog.records) == (path is not None)
    assert len(chain._map) < 17 << 20
    assert step(chain, 1, None, 0) is Verdict.FIRST
    chain.release_pages()
    assert step(chain, 2, 1, 1) is Verdict.OK
    chain.close()
    held.close()


def test_a_full_set_forgets_the_oldest(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "chain", 128)  # one set
    dids = [f"did:web:{n}.test" for n in range(5)]
    for number, did in enumerate(dids[:4]):
        assert step(chain, 10 - number, None, 0, did) is Verdict.FIRST
    assert step(chain, 20, None, 0, dids[4]) is Verdict.FIRST
    for number, did in enumerate(dids[:3]):
        assert step(chain, 30, 10 - number, 10 - number, did) is Verdict.OK
    assert step(chain, 30, 20, 20, dids[4]) is Verdict.OK
    assert step(chain, 30, 7, 7, dids[3]) is Verdict.FIRST
    chain.close()


def test_pages_are_given_back_and_nothing_is_lost(chain: Chain) -> None:
    for number in range(200):
        step(chain, 1, None, 0, f"did:web:{number}.test")
    chain.release_pages()
    for number in range(200):
        assert step(chain, 2, 1, 1, f"did:web:{number}.test") is Verdict.OK


def test_what_a_message_says_of_its_place() -> None:
    repo = Repo(DID, Clock())
    first = payload_of(repo.commit([("create", "a.b.c/1", {"$type": "a.b.c"})]).data)
    before = repo.rev
    second = payload_of(repo.commit([("create", "a.b.c/2", {"$type": "a.b.c"})]).data)
    found = read_link(second, DID, second["rev"])
    assert (found.since, found.before) == (before, read_link(first, DID, first["rev"]).data)
    assert found.data is not None
    sync = payload_of(repo.sync().data)
    assert read_sync(sync, DID, sync["rev"]) == found.data
    assert read_sync(sync, OTHER, sync["rev"]) is None
    assert read_link(second, OTHER, second["rev"]).data is None
    assert read_link(second, DID, first["rev"]).data is None
    assert read_link({**second, "blocks": b""}, DID, second["rev"]).data is None
    assert read_link({**second, "commit": first["commit"]}, DID, second["rev"]).data is None
    changed = second["blocks"].replace(b"crevm" + second["rev"].encode(), b"crevm" + first["rev"].encode())
    assert read_link({**second, "blocks": changed}, DID, first["rev"]).data is None, "its hash is another one"
    odd: Any
    for odd in (None, 5, b"", "x", [], {}):
        found = read_link(dict.fromkeys(("blocks", "commit", "since", "prevData", "tooBig"), odd), DID, "x")
        assert found.data is None
        assert read_sync({"blocks": odd}, DID, "x") is None
    assert read_sync({}, DID, "x") is None


def payload_of(frame: bytes) -> dict[str, Any]:
    payload: dict[str, Any] = libipld.decode_dag_cbor_multi(frame)[1]
    return payload


def test_a_boot_is_told_where_its_id_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hardened service does not see /proc/sys: the moment of the boot stands for its id."""

    def hidden(_: Path) -> bytes:
        raise FileNotFoundError

    now = [1_800_000_000.0]
    monkeypatch.setattr(Path, "read_bytes", hidden)
    monkeypatch.setattr("fastworker.reader.chain.time.time", lambda: now[0])
    monkeypatch.setattr("fastworker.reader.chain.time.clock_gettime", lambda _: now[0] - 1_000_000_000.5)
    one = chain_module._boot()
    now[0] += 86_400
    assert chain_module._boot() == one
    monkeypatch.setattr("fastworker.reader.chain.time.clock_gettime", lambda _: 60.0)
    assert chain_module._boot() != one
