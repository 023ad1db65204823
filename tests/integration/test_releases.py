"""Rolling upgrades: what every earlier release wrote, stream entries and schema, is read by this one.

tests/releases/ keeps what each release wrote (make.py). Today's entries are those of the newest file: when a form
changes on purpose, its file stays as it is and the next release gets its own.
"""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard

import fastworker
from fastworker.event.entry import decode_entry, encode_json, encode_native
from fastworker.law.compare import diff, dump, report
from fastworker.law.model import Model
from fastworker.store.migrate import Migration, check, migrate, packaged
from fastworker.stream.client import connect
from tests.e2e.house import House
from tests.releases import make
from tests.servers import connected

FILES = sorted(make.FOLDER.glob("*.json.zst"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
FORMS = ("native", "json", "frame")


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(zstandard.decompress(path.read_bytes()))
    return found


def fields_of(entry: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): base64.b85decode(value) for name, value in entry.items()}


def test_this_release_has_its_file_and_writes_what_it_says() -> None:
    assert FILES[-1].name == f"{fastworker.__version__}.json.zst", "python tests/releases/make.py"
    for one in load(FILES[-1])["events"]:
        for form, encode in (("native", encode_native), ("json", encode_json)):
            if form in one["entries"]:
                fields = fields_of(one["entries"][form])
                again = encode(decode_entry(fields))
                assert dict(again or ()) == fields, f"the {form} form has changed: see tests/releases/make.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_form_is_still_decoded(path: Path) -> None:
    sorts = set()
    for one in load(path)["events"]:
        for form, entry in one["entries"].items():
            event = decode_entry(fields_of(entry))
            assert event.seq == one["event"]["seq"]
            sorts.add((form, type(event).__name__))
    assert sorts >= {(form, kind) for form in FORMS for kind in ("Commit", "Identity", "Account")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_its_migrations_are_the_first_of_ours(path: Path) -> None:
    ours = [[one.number, one.name, one.checksum] for one in packaged()]
    theirs = load(path)["migrations"]
    assert ours[: len(theirs)] == theirs, "a migration that was released is never edited: add one"


def received(event: dict[str, Any]) -> dict[bytes, bytes]:
    """What `fastworker replay` adds: these entries are old."""
    at = datetime.fromisoformat(event["time"]).timestamp() if event.get("time") else 0
    return {b"at": b"%d" % (at * 1000)} if at else {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize("form", FORMS)
async def test_its_schema_is_upgraded_and_its_entries_are_stored(
    redis_url: str, empty_postgres_url: str, path: Path, form: str
) -> None:
    """The schema of that release, then ours over it, then its entries; and all once more, over what is there."""
    release = load(path)
    known = packaged()[: len(release["migrations"])]
    await migrate(empty_postgres_url, known)
    later = (*packaged(), Migration(number=9000, name="9000_later", sql="CREATE TABLE fastworker.later (x int)"))
    assert "9000_later" in await migrate(empty_postgres_url, later)
    assert await check(empty_postgres_url, later) == []

    chosen = [one for one in release["events"] if form in one["entries"]]
    model = Model()
    for one in chosen:
        model.apply(one["event"])
    async with connect(redis_url) as client, connected(empty_postgres_url) as connection:
        house = House(client, redis_url, empty_postgres_url)
        for _ in range(2):
            await house.entries(fields_of(one["entries"][form]) | received(one["event"]) for one in chosen)
            assert await house.letters() == []
            differences = diff(model.tables(), await dump(connection))
            assert not differences, report(differences)


async def test_a_form_of_a_later_release_is_set_aside_not_lost(redis_url: str, postgres_url: str) -> None:
    """Readers go after workers in an upgrade; if not, this is what happens until the worker is upgraded, too."""
    async with connect(redis_url) as client:
        house = House(client, redis_url, postgres_url)
        await house.entries([{b"n": b"\x02" + b"whatever"}])
        (letter,) = await house.letters()
    assert (letter["reason"], letter["form"]) == ("unknown_format", "native")
