"""Snapshots against the tables: lost events are found and mended, and only the differences are written."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner

from fastworker.cli import cli
from fastworker.crashpoint import Step
from fastworker.event import Account, Commit, Identity, Op
from fastworker.event.frame import decode_frame
from fastworker.event.repository import Repository
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.simulator import mst
from fastworker.simulator.cbor import cid_text
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.network import Network
from fastworker.simulator.repo import Repo, SimFrame, account_frame, car_bytes, tid
from fastworker.simulator.world import Account as SimAccount
from fastworker.store.flush import Written
from fastworker.store.session import NO_HURRY, Time
from fastworker.store.store import Store
from fastworker.store.stored import open_stored
from fastworker.sync import settle as settle_module
from fastworker.sync.settle import Job, Settle, Settled
from fastworker.table.batch import Batch
from fastworker.table.chosen import WHOLE, Part, choose
from fastworker.table.mapper import map_commit
from fastworker.table.snapshot import Snapshot, tid_moment
from tests.services import run

HOUR = timedelta(hours=1)
UNTOUCHED = ("com.atproto.label.label", "app.bsky.bookmark")


def moment(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["time"])


def batch_of(frames: Iterable[SimFrame]) -> Batch:
    batch = Batch()
    for frame in frames:
        assert frame.event is not None
        at = moment(frame.event)
        event = decode_frame(frame.data, "sim.test")
        if isinstance(event, Commit):
            batch.put(map_commit(event, int(at.timestamp() * 1000)))
        elif isinstance(event, Identity):
            batch.put_identity(event, at)
        elif isinstance(event, Account):
            batch.put_account(event, at)
    return batch


DELETED = (
    "INSERT INTO fastworker.accounts (did, active, event_at, deleted_seq) VALUES ($1, true, now(), $2) "
    "ON CONFLICT (did) DO UPDATE SET deleted_seq = excluded.deleted_seq"
)


def may_be_lost(frame: SimFrame) -> bool:
    """What a snapshot can mend: commits of records that are no labels and bookmarks."""
    event = frame.event
    return (
        event is not None
        and event["kind"] == "commit"
        and not any(op["path"].startswith(UNTOUCHED) for op in event["ops"])
    )


class Scene:
    """A network whose events are in the tables, but for those that were lost."""

    def __init__(self, network: Network, frames: Sequence[SimFrame], folder: Path, store: Store, url: str) -> None:
        self.network = network
        self.frames = [frame for frame in frames if frame.event is not None]
        self.folder = folder
        self.store = store
        self.url = url

    async def deliver(self, lost: float, seed: int = 1) -> int:
        chance = random.Random(seed)
        kept = [frame for frame in self.frames if not may_be_lost(frame) or chance.random() >= lost]
        for start in range(0, len(kept), 500):
            await self.store.write(batch_of(kept[start : start + 500]))
        return len(self.frames) - len(kept)

    def snapshot(self, account: SimAccount, *, seq: int | None = None) -> tuple[Path, Snapshot]:
        root, blocks = account.repo.export()
        path = self.folder / f"{account.number}.car"
        path.write_bytes(car_bytes(root, blocks))
        rev = account.repo.rev or ""
        taken_at = tid_moment(rev)
        assert taken_at is not None
        return path, Snapshot(account.did, rev, self.network.clock.seq if seq is None else seq, taken_at + HOUR)

    async def settle(self, *, dry_run: bool = False, part: Part = WHOLE) -> list[Settled]:
        async with open_stored(self.url) as stored:
            settle = Settle(stored, None if dry_run else self.store)
            found = []
            for account in self.network.world.accounts():
                path, snapshot = self.snapshot(account)
                with Repository(path) as repository:
                    found.append(await settle.settle(repository, snapshot, part=part))
            return found

    def expected(self) -> compare.Tables:
        model = Model()
        for frame in self.frames:
            assert frame.event is not None
            model.apply(frame.event, int(moment(frame.event).timestamp() * 1000))
        return comparable(model.tables())


def comparable(tables: compare.Tables) -> compare.Tables:
    """Without the version of a row: a mended one has the snapshot's. Users who were only named by a lost event that
    nothing is left of are known to nobody."""
    return {
        table: [{name: value for name, value in row.items() if not name.startswith("commit_")} for row in rows]
        for table, rows in tables.items()
        if table not in ("users", "fastworker.accounts")
    }


async def differences(scene: Scene, pg: asyncpg.Connection) -> str:
    while await scene.store.maintain(owed_age_s=0):
        pass
    return compare.report(compare.diff(scene.expected(), comparable(await compare.dump(pg))))


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[Store]:
    store = await Store.connect(postgres_url)
    yield store
    await store.close()


@pytest.fixture
def scene(store: Store, postgres_url: str, tmp_path: Path) -> Scene:
    network = Network(7, accounts=14, signed=True)
    return Scene(network, list(network.frames(1_500)), tmp_path, store, postgres_url)


async def test_lost_events_are_mended(scene: Scene, pg: asyncpg.Connection) -> None:
    lost = await scene.deliver(0.4)
    assert lost > 300
    assert await differences(scene, pg) != "no difference"
    looked = await scene.settle(dry_run=True)
    found = await scene.settle()
    assert [one.differences for one in found] == [one.differences for one in looked]
    assert sum(one.missing.total() for one in found) > 100
    assert sum(one.extra.total() for one in found) > 3
    assert await differences(scene, pg) == "no difference"
    again = await scene.settle()
    assert sum(one.differences for one in again) == 0, [one.examples for one in again if one.examples]


async def test_a_record_that_makes_a_trigger_slow_holds_up_no_other(scene: Scene, pg: asyncpg.Connection) -> None:
    [uri] = [next(post["uri"] for post in scene.expected()["posts"])]
    await pg.execute(
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'late' USING ERRCODE = "
        "'57014'; END $$; CREATE TRIGGER late BEFORE INSERT ON posts FOR EACH ROW "
        f"WHEN (NEW.uri = '{uri}') EXECUTE FUNCTION late()"
    )
    found = await scene.settle()
    assert sum(one.drops["too_slow"] for one in found) == 1
    posts = {row["uri"] for row in await pg.fetch("SELECT uri FROM posts")}
    assert {post["uri"] for post in scene.expected()["posts"]} - posts == {uri}


async def test_no_more_is_written_at_once_than_it_may(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live flush that comes meanwhile is slower for as long as one of these takes."""
    sizes: list[int] = []
    write = scene.store.write

    async def watched(batch: Batch, *, read_before: datetime | None = None, time: Time = NO_HURRY) -> Written:
        sizes.append(len(batch.changes))
        return await write(batch, read_before=read_before, time=time)

    monkeypatch.setattr(scene.store, "write", watched)
    async with open_stored(scene.url) as stored:
        jobs, opened = [], []
        for account in scene.network.world.accounts():
            path, snapshot = scene.snapshot(account)
            opened.append(Repository(path))
            jobs.append(Job(opened[-1], snapshot))
        found = await Settle(stored, scene.store, at_once=9).settle_some(jobs)
        for repository in opened:
            repository.close()
    assert max(sizes) == 9
    assert sum(sizes) == sum(one.differences for one in found) > 100


async def test_a_part_of_a_repository_touches_nothing_else(scene: Scene, pg: asyncpg.Connection) -> None:
    """Neither written nor deleted; what is left is found by a whole one."""
    await scene.deliver(0.4)
    whole = await scene.settle(dry_run=True)
    of_likes = sum(one.missing["likes"] + one.different["likes"] + one.extra["likes"] for one in whole)
    likes = await scene.settle(part=Part(None, ("app.bsky.feed.l*",)))
    assert sum(one.differences for one in likes) == of_likes > 50
    tids = sorted(row[0] for row in await pg.fetch("SELECT split_part(uri, '/', 5) FROM posts"))
    middle = tids[len(tids) // 2]
    old = {row[0] for row in await pg.fetch("SELECT uri FROM posts WHERE split_part(uri, '/', 5) < $1", middle)}
    dated = await scene.settle(part=Part(middle, None))
    assert sum(one.missing["posts"] for one in dated) > 10
    assert sum(one.missing["follows"] for one in dated) > 10
    found = {row[0] for row in await pg.fetch("SELECT uri FROM posts WHERE split_part(uri, '/', 5) < $1", middle)}
    assert found == old
    left = await scene.settle()
    assert {table for one in left for table in (*one.missing, *one.extra)} <= {"posts", "reposts", "fastworker.gates"}
    assert sum(one.differences for one in left) > 10
    assert await differences(scene, pg) == "no difference"


async def test_lost_events_of_an_adversarial_network(
    store: Store, postgres_url: str, tmp_path: Path, pg: asyncpg.Connection
) -> None:
    """Twins, churn, records that come again. Without events that are not what the repository says (an action that is
    none, a block that is missing), and without records that cannot be stored where an earlier version could.

    Dates of keys that lie in the past are judged by them, as the law says for snapshots."""
    weights = dict.fromkeys(("account", "lost", "bad_block", "bad_action", "bad_path", "odd"), 0.0)
    network = Network(5, mix="adversarial", accounts=8, history=0, signed=True, weights=weights)
    scene = Scene(network, list(network.frames(1_200)), tmp_path, store, postgres_url)
    assert await scene.deliver(0.3) > 100
    assert sum(one.differences for one in await scene.settle()) > 100
    again = await scene.settle()
    assert sum(one.differences for one in again) == 0, [one.examples for one in again if one.examples]
    dates = {"created_at", "indexed_at", "sort_at", "verified_at"}
    found = compare.diff(scene.expected(), comparable(await compare.dump(pg)))
    held = {cid_text(cid) for one in network.world.accounts() for _, cid in mst.items(one.repo.root)}
    wrong = [one for one in found if one.column not in dates and _cid(one) in (None, *held)]
    assert compare.report(wrong) == "no difference"


def _cid(difference: compare.Difference) -> str | None:
    """Of the record that a missing row is of. One that the repository has no more, under a later version that cannot
    be stored (an item in another account's list), is a matter of events alone."""
    rows = [row for row in (difference.expected, difference.found) if isinstance(row, dict)]
    return rows[0].get("cid") if rows else None


async def test_a_snapshot_that_comes_late_takes_nothing_from_what_is_newer(
    scene: Scene, pg: asyncpg.Connection
) -> None:
    """Taken in the middle, settled after everything: then only what is older than it may change."""
    early = Network(7, accounts=14, signed=True)  # the same world, earlier
    list(early.frames(700))
    await scene.deliver(0)
    late = Scene(early, (), scene.folder, scene.store, scene.url)
    found = await late.settle()
    assert sum(one.records for one in found) > 200
    assert [one.examples for one in found if one.differences] == []
    assert await differences(scene, pg) == "no difference"


@pytest.mark.parametrize("order", [1, -1])
async def test_two_snapshots_of_one_account_at_once(scene: Scene, tmp_path: Path, order: int) -> None:
    """Of two files the newer one counts, whichever comes first."""
    folder = tmp_path / "early"
    folder.mkdir()
    early = Network(7, accounts=14, signed=True)  # the same world, earlier
    list(early.frames(700))
    old = Scene(early, (), folder, scene.store, scene.url)
    did = next(one.did for one in early.world.accounts() if len(one.live) > 20)
    found = [next(s.snapshot(one, seq=0) for one in s.network.world.accounts() if one.did == did) for s in (old, scene)]
    async with open_stored(scene.url) as stored:
        settle = Settle(stored, scene.store)
        with Repository(found[0][0]) as before, Repository(found[1][0]) as now:
            jobs = [Job(before, found[0][1]), Job(now, found[1][1])][::order]
            async with settle.alone([did, did]):
                await settle.settle_some(jobs)
            assert (await settle.settle(now, found[1][1])).differences == 0


@pytest.fixture(params=["small", "large"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounts are settled as if they were of that size."""
    if request.param == "large":
        monkeypatch.setattr(settle_module, "SMALL_BYTES", 0)


@pytest.mark.usefixtures("_size")
async def test_what_others_wrote(scene: Scene, pg: asyncpg.Connection) -> None:
    """Rows without a version: the API's, which may be younger than the snapshot, or what an earlier system left."""
    await scene.deliver(0)
    account = next(one for one in scene.network.world.accounts() if len(one.live) > 10)
    path, snapshot = scene.snapshot(account)
    for rkey, age in (("young", timedelta(minutes=9)), ("old", timedelta(minutes=11))):
        await pg.execute(
            "INSERT INTO posts (uri, cid, author_did, text, created_at, indexed_at) VALUES ($1, 'c', $2, '', $3, $3)",
            f"at://{account.did}/app.bsky.feed.post/{rkey}",
            account.did,
            snapshot.taken_at - age,
        )
        await pg.execute(
            "INSERT INTO lists (uri, cid, creator_did, name, purpose, created_at, indexed_at) "
            "VALUES ($1, 'c', $2, '', '', $3, $3)",
            f"at://{account.did}/app.bsky.graph.list/{rkey}",
            account.did,
            snapshot.taken_at - age,
        )
    await pg.execute(
        "INSERT INTO posts (uri, cid, author_did, text, created_at, indexed_at) "
        "VALUES ('at://did:plc:elsewhere/app.bsky.feed.post/young', 'c', $1, '', $2, $2)",
        account.did,
        snapshot.taken_at - timedelta(days=1),
    )
    async with open_stored(scene.url) as stored:
        with Repository(path) as repository:
            found = await Settle(stored, scene.store).settle(repository, snapshot)
    assert found.extra == {"posts": 1, "lists": 1}  # not the row at another authority's URI
    left = await pg.fetch("SELECT uri FROM posts WHERE cid = 'c' UNION ALL SELECT uri FROM lists WHERE cid = 'c'")
    assert sorted(row[0].rpartition("/")[2] for row in left) == ["young", "young", "young"]


async def test_equal_rows_are_written_only_where_something_would_take_them_away(
    scene: Scene, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    """Dates that were judged by another moment are no difference; a tombstone above a row's version is."""
    did = "did:plc:" + "d" * 24
    repo = Repo(did, key=SigningKey("dates"))
    hour_ago = tid(repo.clock.now_us - 3_600_000_000)
    dates = ("2099-01-01T00:00:00Z", "yesterday", "2026-07-01T00:00:00Z")
    records = [{**follow(f"{n:05}"), "createdAt": date} for n, date in enumerate(dates)]
    paths = [f"app.bsky.graph.follow/{hour_ago[:-1]}{n}" for n in range(2, 5)]
    await scene.store.write(batch_of([repo.commit([("create", *one)]) for one in zip(paths, records, strict=True)]))
    tombstone = repo.clock.tid()
    repo.commit([])
    root, blocks = repo.export()
    (tmp_path / "dates.car").write_bytes(car_bytes(root, blocks))
    taken_at = tid_moment(repo.rev or "")
    assert taken_at is not None

    async def settle() -> Settled:
        async with open_stored(scene.url) as stored:
            with Repository(tmp_path / "dates.car") as repository:
                return await Settle(stored, scene.store).settle(
                    repository, Snapshot(did, repo.rev or "", repo.clock.seq, taken_at)
                )

    assert (await settle()).examples == []
    uri = f"at://{did}/{paths[0]}"
    await pg.execute(
        "INSERT INTO fastworker.versions (uri, rev, seq, deleted, written_at) VALUES ($1, $2, 1, true, '-infinity')",
        uri,
        tombstone,
    )
    assert (await settle()).examples == [f"follows {uri} different in its tombstone"]
    assert await pg.fetchval("SELECT commit_rev FROM follows WHERE uri = $1", uri) == repo.rev
    assert (await settle()).examples == []


async def test_who_may_not_be_settled(scene: Scene, pg: asyncpg.Connection) -> None:
    account = next(one for one in scene.network.world.accounts() if len(one.live) > 10)
    path, snapshot = scene.snapshot(account)

    async def settle(**changed: Any) -> Settled:
        async with open_stored(scene.url) as stored:
            with Repository(path) as repository:
                return await Settle(stored, scene.store).settle(
                    repository, Snapshot(**{f: getattr(snapshot, f) for f in snapshot.__struct_fields__} | changed)
                )

    assert (await settle()).missing.total() > 10
    assert "older than what is stored" in ((await settle(rev="3aaaaaaaaaaaa")).refused or "")
    await pg.execute(
        "INSERT INTO fastworker.accounts (did, active, event_at, deleted_seq) VALUES ($1, true, now(), $2)",
        account.did,
        snapshot.seq,
    )
    assert (await settle()).refused is None
    assert "was deleted" in ((await settle(seq=snapshot.seq - 1)).refused or "")
    await pg.execute("INSERT INTO users (did, handle) VALUES ($1, 'x') ON CONFLICT DO NOTHING", account.did)
    await pg.execute("INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ($1, true)", account.did)
    assert "does not want" in ((await settle()).refused or "")


async def test_who_comes_back_after_a_deletion_is_settled(store: Store, pg: asyncpg.Connection) -> None:
    """Its host may still have what the deletion took away. One that was settled since, or never deleted, is not."""

    async def asked(seq: int, *, active: bool, status: str | None = None) -> list[tuple[str, int]]:
        batch = Batch()
        for did in ("did:plc:back", "did:plc:idle"):
            told = status if did.endswith("back") else status and "deactivated"
            batch.put_account(Account(seq, did, active, told, None, "sim.test"), datetime.now(UTC))
        await store.write(batch)
        return [tuple(row) for row in await pg.fetch("DELETE FROM fastworker.repairs RETURNING did, seq")]

    assert await asked(4, active=True) == []
    assert await asked(10, active=False, status="deleted") == []
    assert await asked(12, active=True) == [("did:plc:back", 12)]
    await pg.execute("INSERT INTO fastworker.floors (did, rev, seq) VALUES ('did:plc:back', '3k', 11)")
    assert await asked(13, active=True) == []
    assert await asked(14, active=False, status="deleted") == []
    assert await asked(15, active=True) == [("did:plc:back", 15)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 3, 0)])
async def test_who_is_deleted_and_comes_back_while_it_is_fetched(
    order: tuple[int, ...], store: Store, postgres_url: str, pg: asyncpg.Connection, tmp_path: Path
) -> None:
    """The deletion beats the snapshot, and what was written after it is older than the floor: who is back is settled
    once more, in whatever order that is found out."""
    did = "did:plc:" + "c" * 24
    repo = Repo(did, key=SigningKey("comes back"))
    await store.write(batch_of([repo.commit([("create", "app.bsky.graph.follow/1", follow("1"))])]))
    asked = repo.clock.seq
    events = [
        account_frame(repo.clock.tick(), did, active=False, status="deleted"),
        account_frame(repo.clock.tick(), did, active=True),
        repo.commit([("create", "app.bsky.graph.follow/2", follow("2"))]),
        repo.commit([("create", "app.bsky.graph.follow/3", follow("3"))]),
    ]
    root, blocks = repo.export()
    (tmp_path / "back.car").write_bytes(car_bytes(root, blocks))
    taken_at = tid_moment(repo.rev or "")
    assert taken_at is not None

    async def settled(seq: int) -> list[str]:
        async with open_stored(postgres_url) as stored:
            with Repository(tmp_path / "back.car") as repository:
                snapshot = Snapshot(did, repo.rev or "", seq, taken_at)
                assert (await Settle(stored, store).settle(repository, snapshot, floor=True)).refused is None
        return await held()

    async def held() -> list[str]:
        while await store.maintain(owed_age_s=0):
            pass
        return [row[0][-1] for row in await pg.fetch("SELECT uri FROM follows ORDER BY uri")]

    assert await settled(asked) == ["1", "2", "3"]
    for number in order:
        await store.write(batch_of([events[number]]))
    assert "2" not in await held()
    assert await pg.fetchval("SELECT did FROM fastworker.repairs") == did
    assert await settled(repo.clock.seq) == ["1", "2", "3"]


async def test_an_account_whose_records_are_all_gone(scene: Scene, pg: asyncpg.Connection, tmp_path: Path) -> None:
    """Thousands of rows, and a repository that holds one record: the others go, in pieces."""
    did = "did:plc:" + "g" * 24
    repo = Repo(did, key=SigningKey("gone"))
    for start in range(0, 4_200, 200):
        paths = [f"app.bsky.graph.follow/{n:05}" for n in range(start, start + 200)]
        frames = [repo.commit([("create", path, follow(path)) for path in paths])]
        await scene.store.write(batch_of(frames))
    repo.commit([("delete", f"app.bsky.graph.follow/{n:05}", None) for n in range(4_199)])
    root, blocks = repo.export()
    (tmp_path / "gone.car").write_bytes(car_bytes(root, blocks))
    async with open_stored(scene.url) as stored:
        with Repository(tmp_path / "gone.car") as repository:
            taken_at = tid_moment(repo.rev or "")
            assert taken_at is not None
            snapshot = Snapshot(did, repo.rev or "", repo.clock.seq, taken_at)
            found = await Settle(stored, scene.store).settle(repository, snapshot)
    assert (found.extra, found.records, found.written) == ({"follows": 4_199}, 1, 4_199)
    assert await pg.fetchval("SELECT count(*) FROM follows WHERE follower_did = $1", did) == 1


def follow(path: str) -> dict[str, Any]:
    subject = f"did:plc:{path[-5:].translate(str.maketrans('0123456789', 'abcdefghij')):a>24}"
    return {"$type": "app.bsky.graph.follow", "subject": subject, "createdAt": "2026-07-01T00:00:00Z"}


async def test_a_deleted_account_that_came_back_keeps_what_its_repository_holds(
    scene: Scene, pg: asyncpg.Connection
) -> None:
    """Rows that are older than the deletion, and equal, get the snapshot's version: the purge lets them be."""
    await scene.deliver(0)
    account = max(scene.network.world.accounts(), key=lambda one: len(one.live))
    path, snapshot = scene.snapshot(account)
    before = await pg.fetchval("SELECT count(*) FROM likes WHERE user_did = $1", account.did)
    assert before
    await pg.execute(
        "INSERT INTO fastworker.accounts (did, active, event_at, deleted_seq, purge_pending) VALUES ($1, true, now(), $2, "
        "true) ON CONFLICT (did) DO UPDATE SET deleted_seq = excluded.deleted_seq, purge_pending = true",
        account.did,
        snapshot.seq,
    )
    async with open_stored(scene.url) as stored:
        with Repository(path) as repository:
            found = await Settle(stored, scene.store).settle(repository, snapshot)
    assert found.different["likes"] >= before  # and those that wait in the shadow of a twin
    while await scene.store.maintain(owed_age_s=0):
        pass
    assert await pg.fetchval("SELECT count(*) FROM likes WHERE user_did = $1", account.did) == before


@pytest.mark.usefixtures("_size")
async def test_a_deletion_that_comes_while_it_is_read(
    scene: Scene, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is older than the snapshot: what it would take away is written once more."""
    await scene.deliver(0)
    account = max(scene.network.world.accounts(), key=lambda one: len(one.live))
    path, snapshot = scene.snapshot(account)
    async with open_stored(scene.url) as stored:
        holding, standing = stored.holding, stored.standing

        async def deleted() -> None:
            await pg.execute(DELETED, account.did, snapshot.seq)

        async def held(*what: Any) -> Any:
            found = await holding(*what)
            await deleted()
            return found

        @contextlib.asynccontextmanager
        async def stood(did: str) -> AsyncIterator[Any]:
            async with standing(did) as rows:
                await deleted()
                yield rows

        monkeypatch.setattr(stored, "holding", held)
        monkeypatch.setattr(stored, "standing", stood)
        with Repository(path) as repository:
            found = await Settle(stored, scene.store).settle(repository, snapshot)
    rows = await pg.fetchval("SELECT count(*) FROM likes WHERE user_did = $1", account.did)
    assert found.different["likes"] >= rows > 0  # and those that wait in the shadow of a twin


async def test_a_deletion_that_comes_before_the_floor(
    scene: Scene, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is newer than S0, and nobody knew of it at the first look: nothing is written."""
    path, snapshot = scene.snapshot(scene.network.world.accounts()[0])

    async def reach(step: Step) -> None:
        if step is Step.FLOOR_COMMITTED:
            await pg.execute(DELETED, snapshot.did, snapshot.seq + 1)

    monkeypatch.setattr(scene.store.writer, "on_step", reach)
    async with open_stored(scene.url) as stored:
        with Repository(path) as repository:
            found = await Settle(stored, scene.store).settle(repository, snapshot, floor=True)
    assert (found.refused, found.written) == ("the account was deleted, and the snapshot may be older", 0)


async def test_late_notifications_are_read(scene: Scene, pg: asyncpg.Connection) -> None:
    await scene.settle()
    assert await pg.fetchval("SELECT count(*) FROM notifications WHERE NOT is_read") > 0
    for table in ("posts", "likes", "reposts", "follows", "notifications", "fastworker.versions"):
        await pg.execute(f"DELETE FROM {table}")
    async with open_stored(scene.url) as stored:
        for account in scene.network.world.accounts():
            path, snapshot = scene.snapshot(account)
            later = Snapshot(snapshot.did, snapshot.rev, snapshot.seq, snapshot.taken_at + timedelta(days=2))
            with Repository(path) as repository:
                await Settle(stored, scene.store).settle(repository, later)
    assert await pg.fetchval("SELECT count(*) FROM notifications") > 0
    assert await pg.fetchval("SELECT count(*) FROM notifications WHERE NOT is_read") == 0


async def test_export_of_what_is_stored(scene: Scene, pg: asyncpg.Connection) -> None:
    await scene.deliver(0)
    account = max(scene.network.world.accounts(), key=lambda one: len(one.live))
    done = await asyncio.to_thread(run, "export", account.did, DATABASE_URL=scene.url)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    uris = [line["uri"] for line in lines]
    held = [f"at://{account.did}/{key.decode()}" for key, _ in mst.items(account.repo.root)]
    assert uris == [uri for uri in held if not uri.split("/")[3].startswith(UNTOUCHED)]
    embeds = {line["uri"]: line["embed"] for line in lines if line["table"] == "posts"}
    for uri, text in await pg.fetch("SELECT uri, embed FROM posts WHERE author_did = $1", account.did):
        assert embeds[uri] == json.loads(text or "null")
    nobody = await asyncio.to_thread(run, "export", "did:plc:" + "y" * 24, DATABASE_URL=scene.url)
    assert (nobody.returncode, nobody.stdout) == (1, "")


def test_import_of_files(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", scene.url)
    for account in scene.network.world.accounts():
        scene.snapshot(account)

    def importing(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["import", *args], standalone_mode=False, catch_exceptions=False)
        return int(done.return_value or 0), done.output

    code, words = importing(str(scene.folder), "--dry-run")
    assert code == 1
    assert "nothing was written" in words
    code, words = importing(str(scene.folder))
    assert code == 0, words
    assert "rows written" in words
    code, words = importing(str(scene.folder), "--dry-run")
    assert (code, "no difference" in words) == (0, True), words
    bad = scene.folder / "bad.car"
    bad.write_bytes(next(scene.folder.glob("*.car")).read_bytes()[:-1])
    code, words = importing(str(bad))
    assert code == 1
    assert "bad_car" in words


async def test_what_is_not_chosen_is_left_out(scene: Scene, pg: asyncpg.Connection) -> None:
    """It is neither written nor deleted, and a delete is taken all the same."""
    await scene.deliver(0.4)
    stored = await pg.fetchval("SELECT count(*) FROM posts")
    await pg.execute("UPDATE posts SET commit_rev = '222', commit_seq = '1' WHERE uri = (SELECT min(uri) FROM posts)")
    choose(["app.bsky.graph.*", "app.bsky.feed.like"])
    try:
        found = await scene.settle()
        assert {table for one in found for table in (*one.missing, *one.extra)} <= {
            *("likes", "follows", "blocks", "lists", "list_items", "list_blocks", "starter_packs", "verifications")
        }
        assert sum(one.drops["filtered"] for one in found) > 50
        assert sum(one.missing["likes"] for one in found) > 20
        assert await pg.fetchval("SELECT count(*) FROM posts") == stored
        kept = [frame for frame in scene.frames if frame.event and frame.event["kind"] == "commit"]
        mapped = map_commit(decode_frame(kept[0].data, "sim.test"), 0)  # type: ignore[arg-type]
        assert all(change.row is None or change.table.name in ("likes", "follows") for change in mapped.changes)
    finally:
        choose(())


async def test_a_delete_is_never_left_out() -> None:
    choose(["app.bsky.graph.*"])
    try:
        ops = [Op("delete", "app.bsky.feed.post", "3k", None, None), Op("create", "app.bsky.feed.post", "3l", "b", b"")]
        mapped = map_commit(Commit(5, "did:plc:a", "3k", None, ops, []), 0)
    finally:
        choose(())
    assert [change.rkey for change in mapped.changes] == ["3k"]
    assert [drop.reason for drop in mapped.drops] == ["filtered"]
