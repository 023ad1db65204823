"""Redis keys are a fixed interface: workers of other releases, readers before ours and the API know them by name."""

from __future__ import annotations

import inspect
import re
from importlib import resources

from redis.crc import key_slot

from fastworker.commands.grants import COMMANDS
from fastworker.stream import admin, consumer, database, feed, letters, members, skipped
from fastworker.stream import slot as reader_slot
from fastworker.stream.keys import CLUSTERED, USUAL, Keys, has_slots, in_slot, slot, stream_of
from fastworker.stream.limits import PARTITIONS_MAX
from fastworker.stream.scripts import script

FOR_ALL = {"cluster:metrics", "firehose:status", "firehose:recent_events"}
"""Of the server: the API and the readers before ours know them by these names."""


def names(keys: Keys) -> set[str]:
    own = {one for one in vars(keys).values() if isinstance(one, str)}
    return own - FOR_ALL | {keys.consumer_lease("w-0"), keys.cursor_of("a.test")}


def test_the_usual_stream_and_group() -> None:
    assert names(USUAL) == {
        "firehose:events",
        "firehose:dead-letters",
        "firehose:stream:recreate-lock",
        "fastworker:consumer",
        "fastworker:consumer:w-0",
        "fastworker:consumers",
        "fastworker:cursor",
        "fastworker:cursor:a.test",
        "fastworker:database",
        "fastworker:finished",
        "fastworker:gaps",
        "fastworker:given",
        "fastworker:go-back",
        "fastworker:held",
        "fastworker:history",
        "fastworker:ledger",
        "fastworker:marks",
        "fastworker:members",
        "fastworker:owners",
        "fastworker:partitions",
        "fastworker:reader",
        "fastworker:reader:stats",
        "fastworker:reads",
        "fastworker:relay",
        "fastworker:relays",
        "fastworker:repair",
        "fastworker:repairs",
        "fastworker:status:worker",
        "fastworker:tail",
        "fastworker:tellers",
        "fastworker:unverified",
    }
    assert stream_of("firehose:python_cursor") == "fastworker:stream-of:firehose:python_cursor"


def test_others_have_their_own() -> None:
    other = Keys("staging:events", "mine")
    assert not names(other) & names(USUAL)
    assert other.ledger == "fastworker:ledger:staging:events"
    assert other.cursor_of("a.test") == "fastworker:cursor:staging:events:a.test"
    assert other.consumer_lease("w-0") == "fastworker:consumer:staging:events:w-0"
    assert other.held == "fastworker:held:staging:events:mine"
    assert Keys(group="mine").consumers == "fastworker:consumers:mine"
    assert Keys(group="mine").ledger == USUAL.ledger
    assert (other.metrics, other.status, other.recent) == (USUAL.metrics, USUAL.status, USUAL.recent)


def test_the_slot_of_a_key_is_what_the_servers_say() -> None:
    assert slot("123456789") == 0x31C3  # the specification's own example
    for key in (
        "",
        "foo",
        "foo{}{bar}",
        "foo{{bar}}zap",
        "foo{bar}{zap}",
        "{firehose}:events",
        "a{b",
        "a}b{c}",
        "\u00e9{\u00e9}",
    ):
        assert slot(key) == key_slot(key.encode()), key


def test_on_a_cluster_all_keys_of_a_partition_share_a_slot() -> None:
    stream, cursor = CLUSTERED
    slots = set()
    for partition in range(PARTITIONS_MAX):
        moved = in_slot(cursor, partition)
        every = {*names(Keys(stream, "mine", partition)), moved, stream_of(moved)}
        (one,) = {slot(key) for key in every}
        slots.add(one)
    assert len(slots) > PARTITIONS_MAX - 3  # two may meet
    assert Keys(stream, partition=7).stream == "{firehose:7}:events"
    assert in_slot("a{b}{c}", 12) == "a{b:12}{c}"
    assert in_slot(cursor, 0) == cursor
    assert in_slot("cursor", 2) == "cursor:2"  # on a server that is no cluster
    assert [has_slots(name) for name in (stream, "a{}", "a{b", "{}{a}")] == [True, False, False, False]


def test_a_partition_with_a_slot_is_a_stream_by_itself() -> None:
    """So that everything which its scripts change is where it is."""
    stream, _ = CLUSTERED
    first, third = Keys(stream, "mine"), Keys(stream, "mine", 3)
    assert not {*names(first)} & {*names(third)}
    assert {*names(third)} == {*names(Keys(in_slot(stream, 3), "mine"))}
    assert third.partition == 3


def test_a_partition_has_its_own_of_what_belongs_to_its_entries() -> None:
    second = Keys(partition=1)
    assert second.stream == "firehose:events:1"
    own = {
        *[
            "stream",
            "partition",
            "_consumer_lease",
            "consumers",
            "held",
            "given",
            "reads",
            "tellers",
            "database",
            "recreate_lock",
        ],
        *["tail", "marks", "finished"],
    }
    assert {name for name in vars(second) if vars(second)[name] != vars(USUAL)[name]} == own
    other = Keys("staging:events", "mine", 2)
    assert other.consumers == "fastworker:consumers:staging:events:2:mine"
    assert other.ledger == Keys("staging:events", "mine").ledger


def test_every_script_is_used_and_whole() -> None:
    modules = (admin, consumer, database, feed, letters, members, reader_slot, skipped)
    used = re.findall(r'script\("(\w+)"\)', "".join(map(inspect.getsource, modules)))
    included = {
        name
        for one in resources.files("fastworker.stream").joinpath("lua").iterdir()
        for name in re.findall(r"^-- include (\w+)$", one.read_text("utf-8"), re.MULTILINE)
    }
    files = {one.name.removesuffix(".lua") for one in resources.files("fastworker.stream").joinpath("lua").iterdir()}
    assert files == {*used, *included}
    assert all("-- include" not in script(name) for name in used)


def test_what_scripts_call_is_granted() -> None:
    """A role of least rights runs them: Redis refuses a whole script for one command that its user may not call."""
    granted = {command.partition("|")[0] for commands in COMMANDS.values() for command in commands}
    lua = resources.files("fastworker.stream").joinpath("lua").iterdir()
    called = {name.lower() for one in lua for name in re.findall(r"redis\.p?call\('(\w+)'", one.read_text("utf-8"))}
    assert len(called) > 20
    assert called <= granted
