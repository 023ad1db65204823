"""Proofs and repositories: the cost of verifying a commit, of a record of a whole repository, and of a settle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import libipld

from bench.report import Figures
from fastworker.edge.embedded import EmbeddedPostgres
from fastworker.event import proof
from fastworker.event.repository import Repository
from fastworker.simulator.keys import Curve, SigningKey
from fastworker.simulator.network import Network
from fastworker.simulator.repo import Repo, Write, car_bytes, tid
from fastworker.store.migrate import migrate
from fastworker.store.store import Store
from fastworker.store.stored import open_stored
from fastworker.sync.keys import key_of
from fastworker.sync.settle import Settle
from fastworker.table.snapshot import Snapshot, pieces, tid_moment

RECORDS_OF_A_REPO = 2_000  # more than the commits that are measured: each touches others


def proofs(curve: Curve, *, commits: int) -> Figures:
    """Microseconds per commit. Of three commits two are one new record, as on the network."""
    repos = [_grown(f"{curve} {number}", curve, RECORDS_OF_A_REPO) for number in range(4)]
    payloads = []
    for number in range(commits):
        repo = repos[number % len(repos)]
        key = repo.key
        assert isinstance(key, SigningKey)
        writes: list[Write] = [("create", _path(10_000_000 + number), _like(number))]
        if number % 3 == 2:
            writes += [("delete", _path(number), None), ("update", _path(number + 1), _like(number))]
        payload = libipld.decode_dag_cbor_multi(repo.commit(writes).data)[1]
        payloads.append((payload, key_of(key.multikey).is_signed))
    proved = [
        (payload, proof.prove_signature(payload, is_signed), proof.read_blocks(payload["blocks"])[1])
        for payload, is_signed in payloads
    ]

    return {
        "link us": _best(lambda: [proof.read_link(one, one["repo"], one["rev"]) for one, _ in payloads], commits),
        "signed us": _best(lambda: [proof.prove_signature(*one) for one in payloads], commits),
        "ops us": _best(lambda: [proof.prove_ops(*one) for one in proved], commits),
        "full us": _best(lambda: [proof.prove_commit(*one) for one in payloads], commits),
        "frame bytes": sum(len(payload["blocks"]) for payload, _ in payloads) / commits,
    }


def repositories(seed: int, *, records: int) -> Figures:
    """Microseconds per record of a file: index and walk, and what mapping adds; then records per second of a settle."""
    network = Network(seed, accounts=1, signed=True)
    while len(network.world.account(0).live) < records:
        network.step()
    repo = network.world.account(0).repo
    with TemporaryDirectory(prefix="fastworker-bench-") as folder:
        path = Path(folder) / "repo.car"
        path.write_bytes(car_bytes(*repo.export()))
        rev = repo.rev or ""
        taken_at = tid_moment(rev)
        assert taken_at is not None
        snapshot = Snapshot(repo.did, rev, network.clock.seq, taken_at)
        with Repository(path) as opened:
            count = sum(1 for _ in opened.records())
        figures: Figures = {
            "records": count,
            "bytes a record": path.stat().st_size / count,
            "walk in memory us": _best(lambda: _walk(path, 1 << 40), count),
            "walk by offsets us": _best(lambda: _walk(path, 0), count),
            "walk and map us": _best(lambda: _map(path, snapshot), count),
        }
        return figures | asyncio.run(_settle(path, snapshot, count))


async def _settle(path: Path, snapshot: Snapshot, count: int) -> Figures:
    figures = {}
    with TemporaryDirectory(prefix="fastworker-bench-") as folder, EmbeddedPostgres(Path(folder) / "pg") as postgres:
        await migrate(postgres.url)
        store = await Store.connect(postgres.url)
        async with open_stored(postgres.url) as stored:
            for name in ("first settle records/s", "settle in sync records/s"):
                started = time.perf_counter()
                with Repository(path) as opened:
                    await Settle(stored, store).settle(opened, snapshot)
                figures[name] = count / (time.perf_counter() - started)
        await store.close()
    return figures


def _walk(path: Path, in_memory_max: int) -> None:
    with Repository(path, in_memory_max=in_memory_max) as opened:
        opened.check()


def _map(path: Path, snapshot: Snapshot) -> None:
    with Repository(path) as opened:
        for _ in pieces(opened.records(), snapshot, 2_000):
            pass


def _grown(name: str, curve: Curve, size: int) -> Repo:
    repo = Repo("did:plc:" + "a" * 24, key=SigningKey(name, curve))
    for start in range(0, size, 200):
        repo.commit([("create", _path(n), _like(n)) for n in range(start, start + 200)])
    return repo


def _path(number: int) -> str:
    return f"app.bsky.feed.like/{tid(1_780_000_000_000_000 + number * 1_000_003)}"


def _like(number: int) -> dict[str, Any]:
    uri = f"at://did:plc:{'b' * 24}/app.bsky.feed.post/{number}"
    return {
        "$type": "app.bsky.feed.like",
        "subject": {"uri": uri, "cid": "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"},
        "createdAt": "2026-07-04T14:38:07.517Z",
    }


def _best(work: Callable[[], object], count: int) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best / count * 1e6
