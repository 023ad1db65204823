"""Each rule of readiness, one fact away from being well."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from fastworker.monitor.readiness import Facts, Process, Refused, Watch, postgres_away, readiness
from fastworker.process.board import Heartbeats, State, now_ms

WELL = Facts(processes=[Process(name="worker-0"), Process(name="worker-1"), Process(name="monitor", is_worker=False)])


def with_worker(**facts: Any) -> Facts:
    changed = msgspec.structs.replace(WELL.processes[0], **facts)
    return msgspec.structs.replace(WELL, processes=[changed, *WELL.processes[1:]])


def test_well() -> None:
    assert readiness(WELL) == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (with_worker(turned_s=7.0), "worker-0: its loop has not turned for 7 s"),
        (with_worker(state=State.WAITING_FOR_STORE, error="gone"), "worker-0 waits for PostgreSQL: gone"),
        (with_worker(state=State.WAITING_FOR_STREAM), "worker-0 waits for Redis: no error yet"),
        (with_worker(store_s=7.0), "worker-0: PostgreSQL has not answered for 7 s"),
        (with_worker(held_s=61.0), "worker-0 has held an entry for 61 s$"),
        (with_worker(held_s=61.0, locked="PID 7"), "worker-0 has held an entry for 61 s: PID 7"),
        (with_worker(maintained_s=61.0, maintain_error="denied"), "nothing that is owed was looked after .*: denied"),
        (with_worker(ready=False, started_s=21.0, error="slow"), "worker-0 is not ready after 21 s: slow"),
        (Facts(), "no worker process is ready"),
        (msgspec.structs.replace(WELL, missing=1, missing_s=21.0), "1 processes are missing for 21 s"),
        (msgspec.structs.replace(WELL, crashes=3), "processes ended by themselves 3 times"),
        (msgspec.structs.replace(WELL, redis_s=7.0, redis_error="refused"), "Redis was not read for 7 s: refused"),
        (msgspec.structs.replace(WELL, reader=["the reader has not reported yet"]), "the reader has not reported"),
        (msgspec.structs.replace(WELL, standstill_s=9.0), "entries wait, but none was finished for 9 s"),
        (msgspec.structs.replace(WELL, pending_id="1-1", pending_s=121.0), "the entry 1-1 is not settled for 121 s"),
        (msgspec.structs.replace(WELL, behind_s=301.0, behind_before_s=250.0), "is 301 s old, and gets no younger"),
        (
            msgspec.structs.replace(WELL, behind_s=301.0),
            "is 301 s old, and whether it gets younger is known 30 s after",
        ),
        (msgspec.structs.replace(WELL, finished=500, set_aside=10), "10 of the last 500 entries were set aside"),
        (msgspec.structs.replace(WELL, owed=7, owed_s=61.0), "^7 counters .* are owed, the oldest for 61 s"),
        (msgspec.structs.replace(WELL, clocks="PostgreSQL's clock is off"), "PostgreSQL's clock is off"),
    ],
)
def test_each_rule_speaks_alone(facts: Facts, words: str) -> None:
    [reason] = readiness(facts)
    assert re.search(words, reason)


def test_a_worker_that_waits_for_a_redis_that_answers_others_is_told_of() -> None:
    refused, one = (
        Refused(),
        Process(name="worker-0", state=State.WAITING_FOR_STREAM, error="StreamUnavailable: no XACK"),
    )
    assert [refused.look([one], now) for now in (1.0, 6.9, 7.1)] == ["", "", "StreamUnavailable: no XACK"]
    assert refused.look([msgspec.structs.replace(one, state=State.RUNNING)], 8.0) == ""
    assert refused.look([one], 9.0) == ""


@pytest.mark.parametrize(
    "facts",
    [
        with_worker(turned_s=5.0, store_s=5.0, held_s=50.0, maintained_s=50.0),
        with_worker(ready=False, started_s=5.0),
        with_worker(store_s=60.0, judged_by_answer=False),
        msgspec.structs.replace(WELL, missing=1, missing_s=5.0, crashes=2, standstill_s=5.0),
        msgspec.structs.replace(WELL, pending_id="1-1", pending_s=60.0),
        msgspec.structs.replace(WELL, behind_s=9_000.0, behind_before_s=9_050.0),  # a backlog is worked off
        msgspec.structs.replace(WELL, finished=2_000, set_aside=15),
        msgspec.structs.replace(WELL, finished=9, set_aside=9),
        msgspec.structs.replace(WELL, owed=7, owed_s=9.0),
    ],
)
def test_what_is_no_reason(facts: Facts) -> None:
    assert readiness(facts) == []


def test_what_time_tells() -> None:
    board = Heartbeats(4)
    slots = [board[0], board[1]]
    for n, slot in enumerate(slots):
        slot.open(f"worker-{n}")
        slot.set(ready=1, state=State.RUNNING)
    watch = Watch()

    def look(now: float, **facts: Any) -> list[str]:
        watch.look(now, board.snapshot(), missing=board.missing, crashes=board.crashes, **facts)
        return readiness(watch.facts(now, board.snapshot(), now_ms(), board.missing))

    assert look(0.0) == []
    now = now_ms()
    slots[0].set(debts=3, debts_since_ms=now - 90_000, debts_at_ms=now - 10_000)
    assert "3 counters" in look(0.1)[0]
    slots[1].set(debts=1, debts_put_back=1, debts_at_ms=now)
    assert look(0.2) == [], "by the newest look"
    board.crashes = 1
    assert look(1.0) == []
    board.crashes = 2
    assert look(20.0) == []
    board.crashes = 3
    assert "3 times" in look(40.0)[0]
    assert look(182.0) == [], "the first one is forgotten"

    board.missing = 1
    assert look(300.0) == []
    assert "missing" in look(321.0)[0]
    board.missing = 0
    assert look(322.0) == []

    slots[0].add(committed=5_000)
    assert look(400.0, is_work=True, pending_id="7-0") == []
    assert "none was finished for 9 s" in look(409.0, is_work=True, pending_id="7-0")[0]
    slots[0].add(committed=1)
    assert look(410.0, is_work=True, pending_id="7-0") == []
    slots[1].add(committed=1)
    assert "7-0 is not settled for 121 s" in look(521.0, is_work=True, pending_id="7-0")[0]
    slots[1].add(committed=1)
    assert look(522.0, is_work=True, pending_id="8-0") == []

    assert "whether it gets younger" in look(600.0, behind_s=400.0)[0], "the looks before are too long ago"
    assert "gets no younger" in look(640.0, behind_s=440.0)[0]
    assert look(680.0, behind_s=300.0) == []

    slots[1].add(set_aside=50)
    assert "50 of the last 50" in look(700.0)[0]
    assert look(770.0) == []


@pytest.mark.parametrize(
    ("facts", "away"),
    [
        ({}, None),
        ({"state": State.WAITING_FOR_STORE, "error": "refused"}, "refused"),
        ({"store_s": 7.0, "has_bad_news": True}, "it does not answer"),
        ({"store_s": 7.0}, None),  # a machine that stood still: nobody has asked yet
        ({"store_s": 5.0, "has_bad_news": True}, None),
        ({"state": State.WAITING_FOR_STREAM, "store_s": 7.0, "has_bad_news": True}, None),
        ({"store_s": 7.0, "has_bad_news": True, "error": "StreamUnavailable: refused"}, None),
        ({"maintained_s": 61.0, "maintain_error": "PostgreSQL refuses a statement of maintenance"}, None),
        ({"state": State.WAITING_FOR_STORE, "turned_s": 7.0}, None),
        ({"state": State.WAITING_FOR_STORE, "ready": False}, None),
        ({"state": State.WAITING_FOR_STORE, "is_worker": False}, None),
    ],
)
def test_postgres_is_away_for_the_log(facts: dict[str, object], away: str | None) -> None:
    assert postgres_away(msgspec.structs.replace(WELL.processes[0], **facts)) == away
