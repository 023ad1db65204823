"""/readyz tells the truth about an idle service too: red within ten seconds, in words, and green again by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from tests.services import Service, get, until

RED_WITHIN_S = 10.0
GREEN_WITHIN_S = 60.0


def probe(port: int) -> tuple[int, str]:
    """As an orchestrator probes: no answer within a second is no."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, f"no answer: {error}"


def until_green(*ports: int) -> None:
    until(lambda: all(probe(port) == (200, "ok\n") for port in ports), GREEN_WITHIN_S)


def until_red(port: int, words: str) -> None:
    """Within the time, and for the reason that is true."""
    ends = time.monotonic() + RED_WITHIN_S
    said: list[Any] = []
    while not re.search(words, (said := [*said, probe(port)])[-1][1]):
        assert time.monotonic() < ends, f"not {words!r} in {RED_WITHIN_S:g} s but {said[-3:]}"
        time.sleep(0.1)
    assert said[-1][0] != 200


class House:
    """Reader and worker on servers of their own, which the test may stop."""

    def __init__(self, start: Callable[..., Service], folder: Path) -> None:
        self.postgres = EmbeddedPostgres(folder / "postgres", durable=False)
        self.redis = EmbeddedRedis(folder / "redis", aof=False)
        self.postgres.start()
        self.redis.start()
        self.worker_port, self.reader_port = free_port(), free_port()
        env = {
            "REDIS_URL": self.redis.url,
            "DATABASE_URL": self.postgres.url,
            "FASTWORKER_RESOLVE_HANDLES": "off",
            "FASTWORKER_SYNC": "off",
        }
        assert start("migrate", **env).process.wait(60) == 0
        self.relay = start("relay", "--rate", "20", "--port", "0")
        url = self.relay.wait_for("RELAY_URL=(.+)")[1]
        self.worker = start("worker", FASTWORKER_HTTP_PORT=str(self.worker_port), **env)
        self.reader = start("reader", FASTWORKER_HTTP_PORT=str(self.reader_port), RELAY_URL=url, **env)
        until_green(self.worker_port, self.reader_port)

    def pid_of(self, name: str) -> int | None:
        """None while it is being replaced."""
        processes = json.loads(get(self.worker_port, "/status.json")[1])["processes"]
        return next((process["pid"] for process in processes if process["name"] == name), None)


@pytest.fixture
def house(services: Callable[..., Service], server_dir: Path) -> Iterator[House]:
    server_dir.mkdir()
    server_dir.chmod(0o755)
    made = House(services, server_dir)
    yield made
    for service in (made.worker, made.reader, made.relay):
        service.process.send_signal(signal.SIGCONT)
        service.stop()
    made.postgres.stop()
    made.redis.stop()


def test_a_server_that_stops_a_child_that_hangs_a_relay_that_falls_silent(house: House) -> None:
    house.relay.process.send_signal(signal.SIGSTOP)  # nothing comes: an idle worker has to notice by itself
    time.sleep(1)
    house.postgres.stop()
    until_red(house.worker_port, "PostgreSQL")
    assert probe(house.worker_port)[1].count("PostgreSQL has not answered") <= 2, "one sentence a process"
    house.worker.wait_for("PostgreSQL is away")
    house.postgres.start()
    house.relay.process.send_signal(signal.SIGCONT)
    until_green(house.worker_port, house.reader_port)

    house.redis.stop()
    until_red(house.worker_port, "Redis")
    until_red(house.reader_port, "Redis")
    for service in (house.worker, house.reader):
        service.wait_for("Redis is away")
    house.redis.start()
    until_green(house.worker_port, house.reader_port)

    pid = house.pid_of("worker-1")
    assert pid is not None
    house.relay.process.send_signal(signal.SIGSTOP)
    until_red(house.reader_port, "connected, but no data for")  # looked at first: it soon leaves such a relay
    os.kill(pid, signal.SIGSTOP)
    until_red(house.worker_port, "worker-1: its loop has not turned")
    house.relay.process.send_signal(signal.SIGCONT)
    until_green(house.reader_port)
    until(lambda: house.pid_of("worker-1") not in {None, pid})  # the supervisor replaces it
    until_green(house.worker_port)
    assert_the_log_tells_it_once(house)


def assert_the_log_tells_it_once(house: House) -> None:
    """Who it is at the beginning; of each outage its beginning and its end, however many processes met it."""
    for service, word in ((house.worker, "worker"), (house.reader, "reader")):
        lines = service.lines
        assert re.search(rf"\[INFO\] fastworker [\d.]+ {word} on Python 3\.\d+\.\d+; .*REDIS_URL=", lines[0]), lines[0]
        assert re.search(r"\[INFO\] (Redis|Valkey) [\d.]+ at .*, (PostgreSQL [\d.]+ at|no PostgreSQL)", lines[1]), (
            lines[1]
        )
    for server, service in (("PostgreSQL", house.worker), ("Redis", house.worker), ("Redis", house.reader)):
        told = [line for line in service.lines if re.search(rf"{server} (is|away)", line)]
        assert len(told) == 2, told
        assert f"{server} is away: " in told[0]
        assert re.search(rf"{server} is back after \d+ s", told[1])


def test_too_much_set_aside_and_a_process_that_keeps_dying(house: House) -> None:
    client = Redis.from_url(house.redis.url)
    for _ in range(20):
        client.xadd("firehose:events", {"type": "commit", "data": "{", "seq": "1"})
    client.close()
    until_red(house.worker_port, "20 of the last [0-9]+ entries were set aside: see `fastworker dlq list`")
    seen: set[Any] = set()
    for _ in range(3):
        until(lambda: house.pid_of("worker-0") not in {None, *seen})
        pid = house.pid_of("worker-0")
        assert pid is not None
        seen.add(pid)
        os.kill(pid, signal.SIGKILL)
    until_red(house.worker_port, "processes ended by themselves 3 times within 180 s")
    until(lambda: house.pid_of("worker-0") not in {None, *seen})
    [worker] = [one for one in json.loads(get(house.worker_port, "/status.json")[1])["processes"]
                if one["name"] == "worker-0"]  # fmt: skip
    assert (worker["restarts"], worker["replaced"]) == (3, 0)


@pytest.mark.extended
def test_a_server_that_hangs_and_a_monitor_that_hangs(house: House) -> None:
    redis_pid = house.redis.pid
    assert redis_pid is not None
    os.kill(redis_pid, signal.SIGSTOP)
    until_red(house.worker_port, "Redis")
    until_red(house.reader_port, "Redis")
    os.kill(redis_pid, signal.SIGCONT)
    until_green(house.worker_port, house.reader_port)

    postmaster = house.postgres.pid
    assert postmaster is not None
    hung = [postmaster, *_children_of(postmaster)]
    for pid in hung:
        assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    until_red(house.worker_port, "PostgreSQL|none was finished")
    for pid in hung:
        os.kill(pid, signal.SIGCONT)
    until_green(house.worker_port)

    monitor = house.pid_of("monitor")
    assert monitor is not None
    os.kill(monitor, signal.SIGSTOP)
    until_red(house.worker_port, "no answer")
    until_green(house.worker_port)


def _children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_quiet_relay_is_not_silent(services: Callable[..., Service], redis_url: str) -> None:
    """A frame every four seconds is its usual rate."""
    relay = services("relay", "--rate", "0.25", "--port", "0")
    url = relay.wait_for("RELAY_URL=(.+)")[1]
    reader = services("reader", FASTWORKER_HTTP_PORT="0", RELAY_URL=url, REDIS_URL=redis_url)
    port = int(reader.wait_for(r"HTTP on http://127.0.0.1:(\d+)")[1])
    until_green(port)
    ends = time.monotonic() + 9  # two of its pauses
    while time.monotonic() < ends:
        assert get(port, "/readyz") == (200, "ok\n")  # how fast it answers is not the question
        time.sleep(0.5)
