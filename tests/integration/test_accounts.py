"""`FASTWORKER_ACCOUNTS`: only the records of some accounts are kept, and the choice may change while everything runs."""

# ruff: noqa: F811 - fixtures of another file
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from fastworker.errors import ConfigError, Reason
from fastworker.event import Commit, Op
from fastworker.store import chosen_accounts
from fastworker.store.chosen_accounts import read_accounts
from fastworker.store.store import Store
from fastworker.table.chosen import choose_accounts, is_account_left_out
from fastworker.table.mapper import map_commit
from tests.integration.test_repairs import Scene, scene  # noqa: F401 - a fixture
from tests.services import Service

AUTHORS = (
    "SELECT DISTINCT author_did FROM posts UNION SELECT DISTINCT user_did FROM likes "
    "UNION SELECT DISTINCT follower_did FROM follows"
)


@pytest.fixture
def everybody_again() -> Iterator[None]:
    yield
    choose_accounts(None)


async def authors(pg: asyncpg.Connection) -> set[str]:
    return {row[0] for row in await pg.fetch(AUTHORS)}


async def test_a_worker_keeps_the_records_of_a_file(
    scene: Scene,
    services: Callable[..., Service],
    pg: asyncpg.Connection,
    tmp_path: Path,
    redis_url: str,
    postgres_url: str,
) -> None:
    first = scene.network.world.account(0).did
    file = tmp_path / "accounts"
    file.write_text(f"# one of them\n{first}\n")
    scene.client.xgroup_create("firehose:events", "firehose-processors", "0", mkstream=True)
    worker = services(
        "worker",
        REDIS_URL=redis_url,
        DATABASE_URL=postgres_url,
        FASTWORKER_PROCESSES="1",
        FASTWORKER_HTTP_PORT="off",
        FASTWORKER_ACCOUNTS=str(file),
    )
    scene.happen(400)
    await scene.finished()
    assert await authors(pg) == {first}
    counted = scene.client.hgetall("fastworker:ledger")
    assert int(counted[b"drop:filtered_account"]) > 100
    assert worker.process.poll() is None


async def test_whom_somebody_follows(pg: asyncpg.Connection, postgres_url: str, everybody_again: None) -> None:
    await pg.execute(
        "INSERT INTO follows (uri, follower_did, following_did, created_at) "
        "VALUES ('at://did:plc:a/app.bsky.graph.follow/1', 'did:plc:a', 'did:plc:b', now())"
    )
    store = await Store.connect(postgres_url)
    assert await read_accounts("follows-of:did:plc:a,did:plc:x", store.followed) == 3
    await store.close()
    post = Op("create", "app.bsky.feed.post", "1", "bafyrei", b"\xa0")
    gone = Op("delete", "app.bsky.feed.post", "1", None, None)
    for did, reasons in (("did:plc:b", 0), ("did:plc:c", 1)):
        mapped = map_commit(Commit(1, did, "3k", None, [post], []), 0)
        assert [drop.reason for drop in mapped.drops].count(Reason.FILTERED_ACCOUNT) == reasons
        assert mapped.dids == ([] if reasons else [did])
        assert [one.row for one in map_commit(Commit(1, did, "3k", None, [gone], []), 0).changes] == [None]


async def test_a_file_that_changes(
    tmp_path: Path, everybody_again: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def nobody(_: object) -> list[str]:
        return []

    monkeypatch.setattr(chosen_accounts, "READ_S", 0.01)
    file = tmp_path / "accounts"
    file.write_text("did:plc:a\n")
    await read_accounts(str(file), nobody)
    assert is_account_left_out("did:plc:b")
    reading = asyncio.create_task(chosen_accounts.keep_reading(str(file), nobody))
    async with asyncio.timeout(20):
        file.write_text("did:plc:b\n")
        while is_account_left_out("did:plc:b"):
            await asyncio.sleep(0.01)
        file.write_text("nobody\n")
        while "is not read again" not in caplog.text:
            await asyncio.sleep(0.01)
    assert not is_account_left_out("did:plc:b")
    reading.cancel()
    await asyncio.wait([reading])


async def test_a_file_that_is_none(tmp_path: Path, everybody_again: None) -> None:
    async def nobody(_: object) -> list[str]:
        return []

    file = tmp_path / "accounts"
    file.write_text("did:plc:a\nnobody\n")
    with pytest.raises(ConfigError, match="'nobody' is not a DID"):
        await read_accounts(str(file), nobody)
    with pytest.raises(ConfigError, match="cannot be read"):
        await read_accounts(str(tmp_path / "none"), nobody)
