"""Real frames and real repositories through the whole path, against what others say they contain."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import libipld
import pytest

from fastworker.commands.imports import import_files
from fastworker.config import parse_config
from fastworker.errors import ExitCode
from fastworker.event.recording import FramesFile
from fastworker.law.compare import diff, dump, report
from fastworker.law.model import Model
from fastworker.simulator.network import repo_to_frames
from fastworker.simulator.repo import START_TIME, read_car
from tests.e2e.house import Form, House
from tests.integration.test_settle import comparable
from tests.runs import usually

pytestmark = pytest.mark.real_data

FRAMES = "frames/frames.bin.zst"
RECORDS = {"little.car": 278, "jetstream-repo.car": 23, "bsky.app.car": 10_640}
TABLE_OF = {
    "app.bsky.feed.post": "posts",
    "app.bsky.feed.like": "likes",
    "app.bsky.feed.repost": "reposts",
    "app.bsky.graph.follow": "follows",
    "app.bsky.graph.list": "lists",
    "app.bsky.graph.listitem": "list_items",
    "app.bsky.feed.generator": "feed_generators",
    "app.bsky.graph.starterpack": "starter_packs",
    "app.bsky.graph.verification": "verifications",
}


def moment(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at.astimezone(UTC).replace(tzinfo=None) if at.tzinfo else at


def expected(real_data: Path) -> list[dict[str, Any]]:
    lines = (real_data / "frames/expected_v1.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def seqs(frames: list[bytes]) -> list[int]:
    return [libipld.decode_dag_cbor_multi(frame)[1]["seq"] for frame in frames]


@pytest.mark.parametrize("form", ["json", "native", "frame"])
async def test_every_op_of_150_real_frames_is_the_right_row(
    real_data: Path, house: House, pg: asyncpg.Connection, form: Form
) -> None:
    frames = list(FramesFile(real_data / FRAMES, little_endian=True))
    assert len(frames) == 150
    await house.ingest(frames, form=form, last_seq=max(seqs(frames)))
    assert await house.letters() == []
    assert sum((await house.ledger()).values()) == 150
    found: Counter[str] = Counter()
    for event in expected(real_data):
        did = event["did"]
        if event["kind"] == "identity":
            assert "handle" not in event["identity"]  # so it is to be resolved
            assert await pg.fetchval("SELECT resolve_pending FROM fastworker.identities WHERE did = $1", did)
        elif event["kind"] == "account":
            row = await pg.fetchrow("SELECT active, status FROM fastworker.accounts WHERE did = $1", did)
            assert row is not None
            assert (row["active"], row["status"]) == (event["account"]["active"], event["account"].get("status"))
        else:
            await _check_commit(pg, did, event["commit"])
        found[event["kind"]] += 1
        assert await pg.fetchval("SELECT count(*) FROM users WHERE did = $1", did) == 1
    assert found == {"commit": 150, "identity": 1, "account": 1}
    # nothing but what is expected is there
    counts = {
        t: await pg.fetchval(f"SELECT count(*) FROM {t}")
        for t in ("likes", "posts", "reposts", "blocks", "follows", "generic_records")
    }
    assert counts == {"likes": 105, "posts": 17, "reposts": 15, "blocks": 1, "follows": 6, "generic_records": 2}


async def _check_commit(pg: asyncpg.Connection, did: str, commit: dict[str, Any]) -> None:
    """The row of one op as another implementation read it, field by field."""
    collection, rkey = commit["collection"], commit["rkey"]
    record: Any = commit.get("record")  # a delete has none
    uri = f"at://{did}/{collection}/{rkey}"
    table = {
        "app.bsky.feed.post": "posts",
        "app.bsky.feed.like": "likes",
        "app.bsky.feed.repost": "reposts",
        "app.bsky.graph.follow": "follows",
        "app.bsky.graph.block": "blocks",
    }.get(collection, "generic_records")
    row = await pg.fetchrow(f"SELECT * FROM {table} WHERE uri = $1", uri)
    if commit["operation"] == "delete":
        assert row is None
        assert await pg.fetchval("SELECT deleted FROM fastworker.versions WHERE uri = $1", uri)
        return
    assert row is not None, uri
    if table != "generic_records":
        assert row["commit_rev"] == commit["rev"]
    if "createdAt" in record:
        assert row["created_at"] == moment(record["createdAt"]).replace(tzinfo=None)
    if table == "posts":
        reply = record.get("reply")

        def loads(name: str) -> Any:
            return None if row[name] is None else json.loads(row[name])

        assert (row["author_did"], row["cid"], row["text"]) == (did, commit["cid"], record["text"])
        assert (loads("langs"), loads("embed"), loads("facets")) == (
            record.get("langs"),
            record.get("embed"),
            record.get("facets"),
        )
        assert loads("tags") == record.get("tags", [])
        assert row["parent_uri"] == (reply and reply["parent"]["uri"])
        assert row["root_cid"] == (reply and reply["root"]["cid"])
    elif table in ("likes", "reposts"):
        assert (row["user_did"], row["post_uri"]) == (did, record["subject"]["uri"])
        assert row["subject_cid"] == record["subject"]["cid"]
        assert (row["via"] and json.loads(row["via"])) == record.get("via")
    elif table == "follows":
        assert (row["follower_did"], row["following_did"]) == (did, record["subject"])
    elif table == "blocks":
        assert (row["blocker_did"], row["blocked_did"]) == (did, record["subject"])
    else:
        assert (row["author_did"], row["record_type"], row["cid"]) == (did, collection, commit["cid"])
        assert json.loads(row["record"]) == record


@pytest.mark.parametrize("name", usually(RECORDS, "little.car", "jetstream-repo.car"))
async def test_a_whole_real_repository(real_data: Path, house: House, pg: asyncpg.Connection, name: str) -> None:
    car = (real_data / "cars" / name).read_bytes()
    frames = list(repo_to_frames(car))
    await house.ingest(frames, form="frame", last_seq=frames[-1].seq or 0)
    assert await house.letters() == []
    model = Model()
    for frame in frames:
        assert frame.event is not None
        model.apply(frame.event)
    differences = diff(model.tables(), await dump(pg))
    assert not differences, report(differences)
    # and by collection, without the model: every record that has a good block is in its table or in the shadow
    tables: Counter[str] = Counter()
    for frame in frames:
        assert frame.event is not None
        for op in frame.event["ops"]:
            tables[op["path"].split("/")[0]] += 1
    assert sum(tables.values()) == len(frames)
    assert model.drops == {} or set(model.drops.values()) <= {"bad_record", "not_owner", "bad_path", "type_mismatch"}
    for collection, table in TABLE_OF.items():
        held = await pg.fetchval(
            f"SELECT (SELECT count(*) FROM {table}) + (SELECT count(*) FROM fastworker.twins WHERE table_name = $1)",
            table,
        )
        assert held == tables[collection], collection


@pytest.mark.parametrize("name", ["little.car", "jetstream-repo.car", "bsky.app.car"])
async def test_a_real_repository_by_import(
    real_data: Path, pg: asyncpg.Connection, postgres_url: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every record in its table, and the tables as if each had come as an event."""
    file = real_data / "cars" / name
    config = parse_config({"DATABASE_URL": postgres_url})
    assert await import_files(config, [file], asyncio.Event(), dry_run=False) == ExitCode.DONE
    assert f"1 accounts, {RECORDS[name]:,} records" in capsys.readouterr().out
    model = Model()
    ops: Counter[str] = Counter()
    for frame in repo_to_frames(file.read_bytes()):
        assert frame.event is not None
        model.apply(frame.event)
        ops.update(op["path"].split("/")[0] for op in frame.event["ops"])
    assert ops.total() == RECORDS[name]
    expected, found = comparable(model.tables()), comparable(await dump(pg))
    # A record without a date has the moment of its key, or of the snapshot; as an event it had that of the event.
    began = START_TIME.replace(tzinfo=None)
    undated = {row["uri"] for row in expected["generic_records"] if row["created_at"] >= began}
    assert len(undated) < 20
    for row in (*expected["generic_records"], *found["generic_records"]):
        if row["uri"] in undated:
            row["created_at"] = None
    differences = diff(expected, found)
    assert not differences, report(differences)
    assert await import_files(config, [file], asyncio.Event(), dry_run=True) == ExitCode.DONE  # nothing is left
    for collection, table in TABLE_OF.items():
        held = await pg.fetchval(
            f"SELECT (SELECT count(*) FROM {table}) + (SELECT count(*) FROM fastworker.twins WHERE table_name = $1)",
            table,
        )
        assert held == ops[collection], collection


def test_the_frames_are_the_recorded_ones(real_data: Path) -> None:
    """So that a changed capture is noticed here, and not as a puzzle above."""
    frames = list(FramesFile(real_data / FRAMES, little_endian=True))
    assert 4_000 < sum(map(len, frames)) / len(frames) < 7_000
    assert len({*seqs(frames)}) == 150
    assert read_car((real_data / "cars/little.car").read_bytes())
