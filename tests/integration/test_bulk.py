"""`import --bulk` and `backfill --bulk`: tables equal to the model and to what the live path writes, whole after any kill."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from fastworker.crashpoint import Step
from fastworker.errors import ExitCode, StoreUnavailable
from fastworker.event.repository import read_head
from fastworker.law import compare
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.network import Network
from fastworker.simulator.repo import Repo, car_bytes
from fastworker.store.bulk import Bulk as StoredBulk
from fastworker.store.bulk import File, Load, open_bulk
from fastworker.store.migrate import migrate
from fastworker.store.rules import Rules
from fastworker.store.staged import PRIMARY
from fastworker.store.store import Store
from fastworker.sync import files
from fastworker.sync.bulk import stage_all
from fastworker.table.chosen import WHOLE
from fastworker.table.snapshot import tid_moment
from tests.integration.test_settle import Scene, batch_of, comparable, may_be_lost
from tests.runs import usually
from tests.servers import PostgresUnderTest, connected
from tests.services import Service, run

INDEXES = (
    "SELECT schemaname || '.' || tablename || ': ' || indexdef AS it FROM pg_indexes "
    "WHERE schemaname IN ('public', 'fastworker') UNION ALL "
    "SELECT conrelid::regclass || ': ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint "
    "WHERE contype IN ('p', 'u', 'f', 'x') AND connamespace IN ('public'::regnamespace, 'fastworker'::regnamespace) "
    "ORDER BY 1"
)
VERIFICATION = "app.bsky.graph.verification"
OPERATORS = (
    "CREATE INDEX theirs ON likes (created_at DESC) WHERE via IS NOT NULL; COMMENT ON INDEX theirs IS 'it''s ours'; "
    "CREATE INDEX lower_handle ON users (lower(handle)) WITH (fillfactor = 70); "
    "ALTER TABLE posts ADD CONSTRAINT posts_cid_uri UNIQUE (cid, uri) INCLUDE (author_did)"
)


async def asked(url: str, statement: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [row[0] for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def found(url: str) -> compare.Tables:
    connection = await asyncpg.connect(url)
    try:
        return await compare.dump(connection)
    finally:
        await connection.close()


class Bulk(Scene):
    """The scene of a settle, whose snapshots are loaded in bulk instead."""

    def cars(self) -> Path:
        for account in self.network.world.accounts():
            self.snapshot(account)
        return self.folder

    def load(self, **env: str) -> Any:
        return run("import", "--bulk", str(self.folder), DATABASE_URL=self.url, timeout=120, **env)

    async def differences(self) -> str:
        store = await Store.connect(self.url)
        while await store.maintain(owed_age_s=0):
            pass
        await store.close()
        return compare.report(compare.diff(self.expected(), comparable(await found(self.url))))


@pytest.fixture
async def bulk(postgres_url: str, tmp_path: Path) -> AsyncIterator[Bulk]:
    network = Network(7, accounts=14, signed=True)
    store = await Store.connect(postgres_url)
    yield Bulk(network, list(network.frames(500)), tmp_path, store, postgres_url)
    await store.close()


async def deliver(bulk: Bulk, share: int) -> None:
    """What a snapshot cannot mend, and every so manieth commit; then nobody is connected."""
    kept = [f for n, f in enumerate(bulk.frames) if not may_be_lost(f) or (share and n % share == 0)]
    for start in range(0, len(kept), 500):
        await bulk.store.write(batch_of(kept[start : start + 500]))
    while await bulk.store.maintain(owed_age_s=0):
        pass
    await bulk.store.close()


# Neither the model nor `verify` looks at the versions of cold records.
WITHOUT_VERSION = " UNION ALL ".join(
    f"SELECT t.uri::text FROM {table.qualified} AS t WHERE NOT EXISTS (SELECT FROM fastworker.versions AS v "
    'WHERE v.uri = t.uri COLLATE "C" AND v.rev IS NOT NULL AND NOT v.deleted)'
    for table in PRIMARY
    if not table.hot
)


@pytest.mark.parametrize("share", usually([0, 40, 2], 2))
async def test_it_ends_as_the_model_says(bulk: Bulk, share: int) -> None:
    """Into tables that hold little, and into some where most accounts have something already."""
    connection = await asyncpg.connect(bulk.url)
    await connection.execute(OPERATORS)
    before = [row[0] for row in await connection.fetch(INDEXES)]
    await connection.close()
    await deliver(bulk, share)
    bulk.cars()
    done = bulk.load()
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    assert "Loaded: writers may go on." in done.stdout
    assert await bulk.differences() == "no difference"
    assert await asked(bulk.url, INDEXES) == before
    assert await asked(bulk.url, "SELECT obj_description('theirs'::regclass)") == ["it's ours"]
    assert await asked(bulk.url, "SELECT count(*) FROM pg_trigger WHERE tgname = 'fastworker_loading'") == [0]
    assert await asked(bulk.url, "SELECT relname::text FROM pg_class WHERE relname LIKE 'staged%'") == []
    assert await asked(bulk.url, "SELECT count(*) FROM fastworker.bulk_repos") == [0]
    assert await asked(bulk.url, WITHOUT_VERSION) == [], "an older event would win"
    await verified(bulk.url)


async def verified(url: str) -> None:
    done = await asyncio.to_thread(run, "verify", DATABASE_URL=url, timeout=120)
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr


@pytest.mark.parametrize("share", usually([0, 30], 30))
async def test_pairs_and_records_that_come_again(postgres_url: str, tmp_path: Path, share: int) -> None:
    """Twins, churn: what is written is exactly what a settle would write, so that it finds no difference."""
    weights = dict.fromkeys(("account", "lost", "bad_block", "bad_action", "bad_path", "odd"), 0.0)
    network = Network(5, mix="adversarial", accounts=8, history=0, signed=True, weights=weights)
    store = await Store.connect(postgres_url)
    bulk = Bulk(network, list(network.frames(1_200)), tmp_path, store, postgres_url)
    if share:
        await deliver(bulk, share)
    else:  # into empty tables
        await bulk.store.close()
    bulk.cars()
    done = bulk.load()
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    assert await asked(postgres_url, "SELECT count(*) > 0 FROM fastworker.twins") == [True]
    again = run("import", "--dry-run", str(tmp_path), DATABASE_URL=postgres_url)
    assert again.returncode == ExitCode.DONE, again.stdout + again.stderr
    await verified(postgres_url)


@pytest.mark.parametrize(
    "place",
    usually(
        [
            Step.BULK_STAGING,
            Step.BULK_HELD,
            f"{Step.BULK_IN_STEP}:1",
            f"{Step.BULK_IN_STEP}:9",
            f"{Step.BULK_AFTER_STEP}:12",
            Step.BULK_RELEASED,
        ],
        Step.BULK_STAGING,
        f"{Step.BULK_IN_STEP}:9",
    ),
)
async def test_a_kill_leaves_every_table_whole(bulk: Bulk, place: str) -> None:
    before = await asked(bulk.url, INDEXES)
    await deliver(bulk, 5)
    bulk.cars()
    killed = bulk.load(FASTWORKER_CRASHPOINT=place)
    is_in_child = place == Step.BULK_STAGING
    assert killed.returncode == (ExitCode.UNREACHABLE if is_in_child else -signal.SIGKILL), killed.stdout
    async with asyncio.timeout(30):  # the server may still be at the last statement
        while await asked(
            bulk.url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fastworker-bulk'"
        ) != [0]:
            await asyncio.sleep(0.1)
    now = await asked(bulk.url, INDEXES)
    assert [one for one in now if "bulk" not in one] == [one for one in before if "bulk" not in one]
    if await asked(bulk.url, "SELECT phase FROM fastworker.bulk") == ["loading"]:
        with pytest.raises(StoreUnavailable, match="history is being loaded"):
            await write_one(bulk)
    done = bulk.load()
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    await write_one(bulk)
    assert await bulk.differences() == "no difference"
    await verified(bulk.url)


class Enough(Exception):
    """A load has come as far as it should."""


# What a crash of the server empties.
UNLOGGED = "SELECT oid::regclass::text FROM pg_class WHERE relpersistence = 'u' AND relkind = 'r'"
FEATURES = Rules().derive
PHASES = ("staging", "new", "tables", "given up")


@pytest.mark.parametrize("phase", usually(PHASES, "tables"))
@pytest.mark.parametrize("share", usually([0, 5], 5))
async def test_what_a_crash_of_the_server_took_is_staged_again(bulk: Bulk, share: int, phase: str) -> None:
    """The staging tables are empty afterwards; what was taken out of them is not loaded by the second staging either."""
    await deliver(bulk, share)
    bulk.cars()
    told: list[str] = []

    def tell(name: str, rows: int, _: float) -> None:
        told.append(name)
        if rows < 0 or len(told) > {"staging": 0, "new": 0}.get(phase, 7):
            raise Enough

    async with open_bulk(bulk.url) as state:
        await state.begin(Path(), FEATURES)
        await register(state, bulk.folder)
        await stage_all(bulk.url, FEATURES, WHOLE)
        assert not await state.is_lost()
        if phase != "staging":
            await state.hold()
            with pytest.raises(ExceptionGroup) if phase != "new" else pytest.raises(Enough):
                await Load(bulk.url, FEATURES, tell, floor=False).all()
        if phase == "given up":
            await state.give_up()
    async with connected(bulk.url) as connection:
        for name in [row[0] for row in await connection.fetch(UNLOGGED)]:
            await connection.execute(f"TRUNCATE {name}")
    if phase not in ("staging", "given up"):
        with pytest.raises(ExceptionGroup) as refused:
            await Load(bulk.url, FEATURES, lambda *_: None, floor=False).all()
        assert "has crashed" in repr(refused.value.exceptions)
    if phase == "given up":
        given_up = await asyncio.to_thread(run, "backfill", "--bulk", "--cancel", DATABASE_URL=bulk.url)
        assert "given up" in given_up.stdout, given_up.stdout + given_up.stderr
    done = await asyncio.to_thread(bulk.load)
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    assert ("staged again" in done.stdout) is (phase != "given up")
    assert await bulk.differences() == "no difference"


async def register(state: StoredBulk, folder: Path) -> None:
    files = []
    for path in folder.glob("*.car"):
        commit, size = read_head(path)
        at = tid_moment(commit.rev)
        assert at is not None
        files.append(File(commit.did, str(path), commit.rev, 0, None, at, size))
    await state.add(files)


@pytest.mark.extended
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT], ids=["killed", "immediate"])
@pytest.mark.parametrize("line", ["", "Loading", "likes: ", "post_aggregations: ", "users: "])
async def test_a_crash_of_the_server_while_it_loads(
    server_dir: Path, tmp_path: Path, how: signal.Signals, line: str
) -> None:
    """Steps do not wait for the disk (`synchronous_commit` is off), and staged rows are not in the log: whatever the
    crash takes comes again, and nothing comes twice."""
    network = Network(7, accounts=40, signed=True)
    frames = list(network.frames(2_000))
    with PostgresUnderTest(server_dir, settings={"full_page_writes": "off", "fsync": "off"}) as server:
        await migrate(server.url)
        bulk = Bulk(network, frames, tmp_path, await Store.connect(server.url), server.url)
        await deliver(bulk, 20)
        bulk.cars()
        load = Service("import", "--bulk", str(tmp_path), DATABASE_URL=server.url, PYTHONUNBUFFERED="1")
        if line:
            load.wait_for(line)
        else:  # in the midst of staging
            async with asyncio.timeout(30), connected(server.url) as connection:
                while not await connection.fetchval(
                    "SELECT count(*) FROM pg_locks WHERE relation = "
                    "to_regclass('fastworker.staged_likes') AND mode = 'RowExclusiveLock'"
                ):
                    await asyncio.sleep(0.005)
        pid = server.pid
        assert pid is not None
        os.kill(pid, how)
        server.kill()
        assert load.stop() != ExitCode.DONE
        server.start()
        done = await asyncio.to_thread(bulk.load)
        assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
        assert await bulk.differences() == "no difference"
        await verified(server.url)


async def write_one(bulk: Bulk) -> None:
    store = await Store.connect(bulk.url)
    try:
        await store.write(batch_of(bulk.frames[:1]))
    finally:
        await store.close()


async def test_it_waits_for_others_to_go_and_may_be_given_up(bulk: Bulk) -> None:
    await deliver(bulk, 10)
    bulk.cars()
    connection = await asyncpg.connect(bulk.url, server_settings={"application_name": "an API"})
    refused = bulk.load()
    assert refused.returncode == ExitCode.NO
    assert "(an API) as" in refused.stdout
    await connection.close()
    cancelled = run("backfill", "--bulk", "--cancel", DATABASE_URL=bulk.url)
    assert cancelled.returncode == ExitCode.DONE, cancelled.stdout + cancelled.stderr
    assert await asked(bulk.url, "SELECT relname::text FROM pg_class WHERE relname LIKE 'staged%'") == []
    killed = bulk.load(FASTWORKER_CRASHPOINT=f"{Step.BULK_AFTER_STEP}:6")
    assert killed.returncode == -signal.SIGKILL
    given_up = run("backfill", "--bulk", "--cancel", DATABASE_URL=bulk.url)
    assert "given up" in given_up.stdout
    await write_one(bulk)
    done = bulk.load()
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    assert await bulk.differences() == "no difference"
    await verified(bulk.url)


async def test_files_that_cannot_be_read_cost_themselves(bulk: Bulk) -> None:
    await deliver(bulk, 0)
    folder = bulk.cars()
    whole = folder / "0.car"
    (folder / "cut.car").write_bytes(whole.read_bytes()[:-40])
    (folder / "none.car").write_bytes(b"no CAR")
    done = bulk.load()
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    assert "none.car: " in done.stdout
    assert "cut.car: " in done.stdout
    assert await bulk.differences() == "no difference"


async def test_what_became_of_files_is_told_one_at_a_time(bulk: Bulk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several processes settle them: whoever is told writes it down by one connection."""
    await deliver(bulk, 0)
    monkeypatch.setattr(files, "ALONE_BYTES", 0)
    monkeypatch.setattr(files, "GROUP", 1)
    cars = [files.Car(str(path), path.stat().st_size) for path in sorted(bulk.cars().glob("*.car"))]
    told, at_once = 0, set[int]()

    async def tell(_: files.Car, __: object) -> None:
        nonlocal told
        told += 1
        await asyncio.sleep(0.05)
        at_once.add(told)
        told -= 1

    await files.settle_cars(
        files.Settings(bulk.url, "import", Rules(frozenset({"counts"})), (), dry_run=True), cars, tell
    )
    assert at_once == {1}


IMPORTS = pytest.mark.parametrize("words", [("import",), ("import", "--bulk")], ids=["live", "bulk"])
A, B = ("did:plc:" + letter * 24 for letter in "ab")
WHOSE = "SELECT split_part(uri, '/', 3) FROM verifications UNION SELECT split_part(uri, '/', 3) FROM fastworker.twins"


def verifiers(folder: Path) -> Path:
    """Two accounts that verify the same one."""
    record = {"$type": VERIFICATION, "subject": "did:plc:" + "s" * 24, "handle": "a.test", "displayName": "A"}
    for did in (A, B):
        repo = Repo(did, key=SigningKey(did))
        repo.commit([("create", f"{VERIFICATION}/3k{did[-11:]}", record)])
        (folder / f"{did[-1]}.car").write_bytes(car_bytes(*repo.export()))
    return folder


@IMPORTS
async def test_trusted_verifiers_come_first_in_history(
    postgres_url: str, tmp_path: Path, words: tuple[str, ...]
) -> None:
    env = {"DATABASE_URL": postgres_url, "FASTWORKER_TRUSTED_VERIFIERS": B}
    done = await asyncio.to_thread(run, *words, str(verifiers(tmp_path)), **env)
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    assert await asked(postgres_url, "SELECT split_part(uri, '/', 3) FROM verifications") == [B]
    assert sorted(await asked(postgres_url, WHOSE)) == [A, B]


@IMPORTS
async def test_only_chosen_accounts_are_imported(postgres_url: str, tmp_path: Path, words: tuple[str, ...]) -> None:
    (file := tmp_path / "accounts").write_text(B)
    env = {"DATABASE_URL": postgres_url, "FASTWORKER_ACCOUNTS": str(file)}
    done = await asyncio.to_thread(run, *words, str(verifiers(tmp_path)), **env)
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    assert await asked(postgres_url, WHOSE) == [B]


async def test_a_verification_that_the_database_refuses_is_told(postgres_url: str, tmp_path: Path) -> None:
    for letter, handle in (("a", "odd.test"), ("b", "b.test")):
        record = {"$type": VERIFICATION, "subject": "did:plc:" + letter * 24, "handle": handle, "displayName": "A"}
        repo = Repo("did:plc:" + letter * 24, key=SigningKey(letter))
        repo.commit([("create", f"{VERIFICATION}/3k{letter * 11}", record)])
        (tmp_path / f"{letter}.car").write_bytes(car_bytes(*repo.export()))
    async with connected(postgres_url) as connection:
        await connection.execute("ALTER TABLE verifications ADD CHECK (handle <> 'odd.test')")
    done = await asyncio.to_thread(run, "import", "--bulk", str(tmp_path), DATABASE_URL=postgres_url)
    assert done.returncode == ExitCode.NO, done.stdout + done.stderr
    assert f"at://did:plc:{'a' * 24}/{VERIFICATION}/3kaaaaaaaaaaa: " in done.stdout + done.stderr
    assert await asked(postgres_url, "SELECT split_part(uri, '/', 3) FROM verifications") == ["did:plc:" + "b" * 24]
