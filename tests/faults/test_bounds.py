"""Nothing in the product can wait for a peer without a bound: every await on a socket, and what ends it.

The list is made from the source: each `await` of the product is put into one class by what it calls. A call that
no class knows fails the test: whoever adds one says here what bounds it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import fastworker
from fastworker.stream import client as redis_client
from fastworker.stream.consumer import WorkerStream
from fastworker.worker import flush, pipeline

ROOT = Path(fastworker.__file__).parent
ROOMS = ("commands", "edge", "monitor", "process", "reader", "store", "stream", "sync", "worker")

# what is awaited -> what bounds it. First match counts.
CLASSES: tuple[tuple[str, str], ...] = (
    # waits for ourselves
    (r"^asyncio\.(sleep|wait|gather|to_thread)\(", "our own tasks and threads; nothing of a peer's"),
    (r"^(pause|backoff\.wait)\(", "given seconds"),
    (r"^self\._(wake|room|idle|news|flowing|passing)\.wait\(|^stop(ping)?\.wait\(", "our own event"),
    (r"^news\.wait_for\(", "the steps of our other connections, which end with those"),
    (r"^(task|writing|reading|self\._producer|sender|_task|stopped)$", "our own task"),
    (r"^asyncio\.get_running_loop\(\)\.create_future\(", "only in the simulated relay"),
    # provers: processes of ours at the other end of a socket pair
    (r"^asyncio\.(create_subprocess_exec|open_connection)\(", "a prover's start: inside asyncio.timeout(START_S)"),
    (r"^reader\.readexactly\(", "a prover's answer: whoever asked kills one that answers nobody for ANSWER_S"),
    # Redis: connect() gives every client a socket timeout
    (r"^(cast\('Any', )?(self\._?redis|admin\.redis|self\._client|redis|pipe|client|redis_client|node|(part|first)\.redis)\.\w+\(", "Redis: SOCKET_TIMEOUT_S of the client"),
    (r"^self\._(ack|set_aside|lease|renew|release|claim|ack_ghosts|append|retry_letter|script)\(", "Redis: a script, SOCKET_TIMEOUT_S"),
    (r"^self\._xreadgroup\(", "Redis: BLOCK is less than SOCKET_TIMEOUT_S"),
    (r"^(self\._\w+|_\w+|retry|append)\(keys=", "Redis: a script, SOCKET_TIMEOUT_S"),
    (r"^self\.(check_health|connect_check_health)\(|^self\._writer\.drain\(", "Redis: SOCKET_TIMEOUT_S of the connection"),
    (r"^self\.(send_command|(read|parse)_response)\(|^connection\.send_command\(", "Redis: SOCKET_TIMEOUT_S of the connection"),
    # PostgreSQL: every connection has a command_timeout
    (r"^asyncpg\.(connect|create_pool)\(", "PostgreSQL: timeout and command_timeout, see the next test"),
    (r"^(self\._?)?(connection|conn|db|pool|pg|_cursor|transaction)\.\w+\(|^execute\(|^fetch\(", "PostgreSQL: command_timeout of the connection"),
    (r"^(_MENDERS\[check\.mend\]|once|self\.on_step|self\._repaired|self\._others)\(", "our own coroutine, chosen at run time"),
    (r"^outage\.sent\(.* if plan\.outage else stopping\.wait\(\)$", "our own event; the demonstration's own servers"),
    (r"^redis\.connection_pool\.disconnect", "closes transports without waiting for the peer"),
    (r"^stack\.enter_async_context\(", "our own context managers; the pool with its timeout"),
    (r"^self\._pools\.close\(|^self\.(apart|flushes)\.close\(", "PostgreSQL: inside asyncio.timeout(5)"),
    # HTTP and WebSocket: every session has a ClientTimeout
    (r"^(self\._)?session\.(close|ws_connect|get)\(|^response\.\w+\(|^\w+\.content\.\w+\(", "HTTP: ClientTimeout of the session"),
    (r"^self\._socket\.receive\(", "the relay: SilenceWatch and TCP keepalive (reader/follow.py)"),
    (r"^(self\._socket|connection|subscription)\.close\(", "WebSocket: CLOSE_TIMEOUT_S"),
    (r"^(runner|site|self\._runner|app_runner|socket)\.\w+\(", "our own HTTP server: shutdown_timeout; clients wait, not we"),
    (r"^dns\.asyncresolver|^resolver\.\w+\(|^self\._resolver\.\w+\(", "DNS: lifetime of the query"),
)  # fmt: skip


def own_coroutines() -> set[str]:
    names = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AsyncFunctionDef):
                names.add(node.name)
    return names


def _called(value: ast.expr) -> str:
    function = value.func if isinstance(value, ast.Call) else value
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def awaits() -> list[tuple[str, int, str, str]]:
    found = []
    for folder in ROOMS:
        for path in sorted((ROOT / folder).glob("*.py")):
            found += [
                (f"{folder}/{path.name}", node.lineno, ast.unparse(node.value), _called(node.value))
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Await)
            ]
    return found


def test_every_wait_has_a_bound() -> None:
    own = own_coroutines()
    unknown = []
    classes: Counter[str] = Counter()
    for file, line, text, called in awaits():
        why = next((why for pattern, why in CLASSES if re.match(pattern, text)), None)
        if why is None and called in own | CALLBACKS:
            why = "our own coroutine: its waits are in this list"
        if why is None:
            unknown.append(f"{file}:{line}: await {text}")
        else:
            classes[why] += 1
    assert not unknown, "waits whose bound nobody has named:\n" + "\n".join(unknown)
    assert sum(count for why, count in classes.items() if why.startswith(("Redis", "PostgreSQL"))) > 100


# Arguments that are coroutine functions of ours.
CALLBACKS = {"act", "main", "attempt", "work", "apply", "transaction", "_fallback_seq", "_last_finished", "_note_floor", "check_schema",
    "store_floor", "told",
}  # fmt: skip


def calls() -> dict[str, list[tuple[str, ast.Call]]]:
    """Name -> file and call."""
    found = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        if {"simulator", "law"}.intersection(path.parts) or path.name == "demo.py":
            continue  # simulations on servers of their own
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                found[ast.unparse(node.func)].append((str(path.relative_to(ROOT)), node))
    return found


def test_every_connection_is_made_with_timeouts() -> None:
    all_calls = calls()
    made = all_calls["asyncpg.connect"] + all_calls["asyncpg.create_pool"]
    assert len(made) >= 3
    for file, call in made:
        given = {keyword.arg for keyword in call.keywords}
        assert given >= {"timeout", "command_timeout"}, f"{file}:{call.lineno}"
    sessions = all_calls["aiohttp.ClientSession"]
    assert len(sessions) >= 2
    for file, call in sessions:
        assert "timeout" in {keyword.arg for keyword in call.keywords}, f"{file}:{call.lineno}"
    for name in (
        "Redis",
        "Redis.from_url",
        "redis.Redis",
        "redis.Redis.from_url",
        "ConnectionPool.from_url",
        "Redis.from_pool",
        "QuickRedis",
        "QuickRedis.from_pool",
        "QuickRedis.from_url",
    ):
        for file, call in all_calls[name]:
            # cluster.py's ask who has a slot, ANSWER_S at most
            assert file in ("stream/client.py", "stream/cluster.py"), (
                f"{file}:{call.lineno} makes a client of its own: use connect()"
            )


def test_the_bounds_fit_into_each_other() -> None:
    assert (
        redis_client.connect("redis://x").connection_pool.connection_kwargs["socket_timeout"]
        == redis_client.SOCKET_TIMEOUT_S
    )
    assert pipeline.BLOCK_MS / 1000 < redis_client.SOCKET_TIMEOUT_S / 2
    assert flush.ATTEMPT_S > 90  # the store's command_timeout: the edge speaks first
    assert WorkerStream.read.__doc__
