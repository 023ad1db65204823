"""Every command that README.md and docs/*.md print is run here, or says what it needs that is not here.

A fenced block of the language `sh` is a script; its blocks run one after the other, page by page, on servers of the page's
own; what a block exports holds for the following ones. Words after `sh`:

    exit=N | exit=any      another exit code than 0
    service=NAME           one command that goes on running until the page ends or a block stops it
    stop=NAME              ends that service; with `needs=docker` in place of the block's own command
    needs=docker | systemd | network not run (with service=NAME: that service is started again, as it was first)
    needs=TOOL             run where TOOL is installed
    tested-in=PATH         run by that file

Anything else that looks like a command fails here, with its line. Options of commands that are only mentioned in a
sentence are checked against the command line's own.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import click
import pytest
import redis

from fastworker.cli import cli
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from tests.rig.histories import random_history, to_entry
from tests.runs import usually

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("**/*.md"))),
]
NOT_YET: dict[str, str] = {}
"""Pages whose commands nobody runs yet -> why."""
ABSENT = {
    "docker": "no Docker engine here",
    "systemd": "no system to install into",
    "network": "no package index or live relay in a test",
}
COMMANDS = (
    r"fastworker|\./scripts/|scripts/|python3? -m|pip|docker|docker-compose|redis-cli|psql|pg_\w+|curl|export|"
    r"systemctl|journalctl|py-spy|apt|apt-get|sudo|kill|promtool|tail|grep"
)
LOOKS_LIKE_ONE = re.compile(rf"^\s*\$? ?(?:[A-Z_]+=\S+ )*(?:{COMMANDS})(?:\s|$)")
STANDS_FOR = {
    "redis://redis:6379": "REDIS_URL",
    "redis://localhost:6379": "REDIS_URL",
    "postgresql://postgres:password@db:5432/atproto": "DATABASE_URL",
}
"""Addresses in the pages -> of what they are the place."""
PRESETS = sorted(path.name for path in (ROOT / "docs/env").glob("*.env"))
READY = re.compile(r"at work|ready|connect|HTTP on|^RELAY_URL=|entries|waiting", re.IGNORECASE | re.MULTILINE)
"""Not the first log line, which names the settings before the process has its signal handlers."""


class Block(NamedTuple):
    page: str
    line: int
    text: str
    words: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Line(NamedTuple):
    """One outside of `sh` blocks. `is_code`: it is indented, or in another block."""

    number: int
    text: str
    is_code: bool


def parts(page: str) -> Iterator[Block | Line]:
    fence: re.Match[str] | None = None
    body: list[str] = []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if fence is None:
            fence = re.fullmatch(r"```(.*)", line)
            body, start = [], number
            if fence is None:
                yield Line(number, line, line.startswith("    "))
        elif line == "```":
            language, *words = fence[1].split() or [""]
            if language == "sh":
                told = dict(word.partition("=")[::2] for word in words)
                yield Block(page, start, "\n".join(body), told)
            else:
                yield from (Line(n, text, is_code=True) for n, text in enumerate(body, start + 1))
            fence = None
        else:
            body.append(line)
    assert fence is None, f"{page}: a block does not end"


def blocks(page: str) -> list[Block]:
    return [part for part in parts(page) if isinstance(part, Block)]


class Shell:
    """Runs the blocks of one page: a folder, an environment that they change, services."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._folder = folder
        self._env = folder / "environment"
        self.exported = env
        self._services: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._first: dict[str, str] = {}

    def _bash(self, text: str) -> list[str]:
        load = f"set -a; [ ! -f {self._env} ] || . {self._env}; set +a\n"
        return ["bash", "-c", f"set -euo pipefail\n{load}{text}"]

    def run(self, block: Block) -> None:
        text = block.text
        for address, name in STANDS_FOR.items():
            text = text.replace(address, self.exported[name])
        needs, service, stop = (block.words.get(word) for word in ("needs", "service", "stop"))
        if stop is not None:
            self.stop(stop, block.place)
        if needs in ABSENT:
            if service is not None:
                self._start(service, self._first[service], block.place)
            return
        if needs is not None and shutil.which(needs) is None:
            return
        if service is not None:
            self._start(service, text, block.place)
            return
        ends = f"\n( export -p | sed 's/^declare -x //' | grep -E '^[A-Z_]+=' ) >{self._env}.new; mv {self._env}.new {self._env}\n"
        done = subprocess.run(
            self._bash(text + ends),
            cwd=self._folder,
            env=self.exported,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=100,
            check=False,
        )
        wanted = block.words.get("exit", "0")
        said = done.stdout.decode(errors="replace")
        assert wanted in ("any", str(done.returncode)), f"{block.place}: exit code {done.returncode}\n{said}"
        assert "Traceback" not in said, f"{block.place}\n{said}"

    def _start(self, name: str, text: str, place: str) -> None:
        assert name not in self._services, f"{place}: {name} runs already"
        self._first.setdefault(name, text)
        log = self._folder / f"{name}-{time.monotonic_ns()}.log"
        with log.open("wb") as out:
            assignments, command = re.fullmatch(r"((?:[A-Z_]+=\S+ )*)(.+)", text.strip()).groups()  # type: ignore[union-attr]
            process = subprocess.Popen(
                self._bash(f"export FW_SERVICE=1 {assignments}\nexec {command}"),
                cwd=self._folder,
                env=self.exported,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._services[name] = process, log
        end = time.monotonic() + 60
        while not READY.search(log.read_text(errors="replace")):
            assert process.poll() is None, f"{place}: {name} ended\n{log.read_text(errors='replace')}"
            assert time.monotonic() < end, f"{place}: {name} is not ready\n{log.read_text(errors='replace')}"
            time.sleep(0.05)

    def stop(self, name: str, place: str) -> None:
        assert name in self._services, f"{place}: no service {name} runs"
        process, log = self._services.pop(name)
        assert process.poll() is None, f"{place}: {name} had ended\n{log.read_text(errors='replace')}"
        process.send_signal(signal.SIGTERM)
        said = f"{place}: {name}\n"
        assert process.wait(40) in (0, 130), said + log.read_text(errors="replace")

    def end(self) -> None:
        for name in reversed(list(self._services)):
            self.stop(name, "at the end")

    def kill(self) -> None:
        for process, _ in self._services.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def tools(servers_dir: Path) -> Path:
    """A folder for PATH with the servers' own tools under the names that pages use."""
    folder = servers_dir / "bin"
    folder.mkdir()
    postgres = EmbeddedPostgres(servers_dir / "x").programs
    for tool in ("psql", "pg_dump", "pg_restore", "pg_basebackup"):
        (folder / tool).symlink_to(postgres / tool)
    (folder / "redis-server").symlink_to(EmbeddedRedis(servers_dir / "y")._binary)
    (folder / "fastworker").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fastworker "$@"\n')
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    for script in ("fastworker", "python"):
        (folder / script).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def servers(servers_dir: Path) -> Iterator[tuple[EmbeddedPostgres, EmbeddedRedis]]:
    with (
        EmbeddedPostgres(servers_dir / "documented-pg", durable=False, port=free_port()) as postgres,
        EmbeddedRedis(servers_dir / "documented-redis", port=0) as server,
    ):
        yield postgres, server


@pytest.fixture
def shell(tools: Path, servers: tuple[EmbeddedPostgres, EmbeddedRedis]) -> Iterator[Shell]:
    """Empty servers, an empty folder, and nobody else at the default ports."""
    postgres, server = servers
    folder = Path(tempfile.mkdtemp(prefix="fw-docs-"))
    folder.chmod(0o755)
    for name in ("scripts", "docs", "fastworker"):
        (folder / name).symlink_to(ROOT / name)
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    for statement in ("DROP DATABASE IF EXISTS atproto WITH (FORCE)", "CREATE DATABASE atproto"):
        subprocess.run([tools / "psql", postgres.url_of("postgres"), "-qc", statement], check=True, capture_output=True)
    shell = Shell(
        folder,
        {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "COLUMNS": "100",
            "REDIS_URL": server.url,
            "DATABASE_URL": postgres.url,
            "RELAY_URL": "ws://127.0.0.1:2470",
            "FASTWORKER_RESOLVE_HANDLES": "off",
            "FASTWORKER_SYNC": "off",
        },
    )
    with (Path(tempfile.gettempdir()) / f"fastworker-docs-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield shell
            shell.end()
        finally:
            shell.kill()
            shutil.rmtree(folder)


LONG = ("docs/migration.md", "docs/troubleshooting.md")  # half a minute of both cores, each; what they tell has tests


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.extended) if page in LONG else page
        for page in PAGES
        if page not in NOT_YET and blocks(page)
    ],
)
def test_the_commands_of_a_page(page: str, shell: Shell) -> None:
    for block in blocks(page):
        if "tested-in" not in block.words:
            shell.run(block)


@pytest.mark.timeout(300)
def test_the_run_script() -> None:
    """`./scripts/run` of README.md."""
    done = subprocess.run(
        [ROOT / "scripts/run", "--events", "500"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout.lower()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NOT_YET])
def test_no_command_hides(page: str) -> None:
    hidden = [
        f"{page}:{part.number}: {part.text}"
        for part in parts(page)
        if isinstance(part, Line) and part.is_code and LOOKS_LIKE_ONE.match(part.text)
    ]
    assert not hidden, "put these into an `sh` block, see tests/e2e/test_docs.py:\n" + "\n".join(hidden)


@pytest.mark.parametrize("page", PAGES)
def test_words_of_blocks(page: str) -> None:
    known = {"exit", "service", "stop", "needs", "tested-in"}
    for block in blocks(page):
        assert set(block.words) <= known, block.place
        if "tested-in" in block.words:
            there = (ROOT / block.words["tested-in"]).read_text()
            words = [word for word in block.text.split() if word not in ("python", "-m")]
            command = words[0].removeprefix("./").partition("=")[0]
            assert command in there, f"{block.place}: {block.words['tested-in']} does not run {command}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_mentioned_exist(page: str) -> None:
    """`fastworker NAME --option` inside a sentence, a table or a block."""
    text = (ROOT / page).read_text()
    mentioned = re.findall(r"`(fastworker [^`\n]+)`", text)
    mentioned += [line for block in blocks(page) for line in block.text.splitlines() if line.startswith("fastworker ")]
    for mention in mentioned:
        words = shlex.split(re.split(r" [|&><;#]|\.\.\.|\|\|", mention)[0])[1:]
        group: click.Command = cli
        while isinstance(group, click.Group) and words and not words[0].startswith("-"):
            assert words[0] in group.commands or words[0].isupper(), f"{page}: {mention}"
            if words[0].isupper():
                break
            group = group.commands[words.pop(0)]
        known = {option for parameter in group.params for option in parameter.opts} | {"--help", "--version", "-h"}
        for word in words:
            if word.strip("[]").startswith("-"):
                assert word.strip("[]").partition("=")[0] in known, f"{page}: {mention}"


def queries(page: str) -> list[str]:
    return re.findall(r"^```sql\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


async def test_queries_of_the_cookbook(pg: asyncpg.Connection[Any]) -> None:
    """Each can run, and has an index to use: no table is read whole where PostgreSQL may choose."""
    found = queries("docs/cookbook.md")
    assert len(found) > 8
    for query in sorted(found, key=lambda text: not text.startswith("CREATE INDEX")):
        if query.startswith("CREATE INDEX"):
            await pg.execute(query.replace(" CONCURRENTLY", ""))
            continue
        text = re.sub(r"(?<!:):(viewer|root)\b", "'did:plc:' || repeat('a', 24)", query)
        async with pg.transaction():
            await pg.execute("SET LOCAL enable_seqscan = off")
            plan = "\n".join(row[0] for row in await pg.fetch(f"EXPLAIN {text}"))
        assert "Seq Scan" not in plan, plan


@pytest.mark.timeout(300)
@pytest.mark.parametrize("preset", usually(PRESETS, "low-memory.env"))
def test_a_preset_runs(preset: str, shell: Shell) -> None:
    """Sourced as it is, but for the addresses: a worker starts with it, stores, says what it made of it, and drains."""
    lines = (ROOT / "docs/env" / preset).read_text()
    for address, name in STANDS_FOR.items():
        lines = lines.replace(address, shell.exported[name])
    values = dict(line.split("=", 1) for line in lines.splitlines() if line and not line.startswith("#"))
    env = {**shell.exported, **values, "RELAY_URL": shell.exported["RELAY_URL"], "FASTWORKER_HTTP_PORT": "0"}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastworker", *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)

    assert run("migrate").returncode == 0
    with redis.Redis.from_url(env["REDIS_URL"]) as client:
        for event in random_history(4, 300).events:
            client.xadd("firehose:events", to_entry(event))
        worker = subprocess.Popen(
            [sys.executable, "-m", "fastworker", "worker"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + 90
            while sum(int(n) for name, n in client.hgetall("fastworker:ledger").items() if b":" not in name) < 300:
                assert worker.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            status = json.loads(run("status", "--json").stdout)["workers"]
            consumers = len(client.xinfo_consumers("firehose:events", "firehose-processors"))
            worker.send_signal(signal.SIGTERM)
            out, _ = worker.communicate(timeout=40)
        finally:
            worker.kill()
            worker.wait()
    assert worker.returncode == 0, out
    wanted = int(values.get("FASTWORKER_PROCESSES", 2)) * int(values["PARALLEL_CONSUMERS"])
    assert consumers == min(wanted, int(values["DB_POOL_SIZE"]) - 1)
    assert status == [] or status[0]["connections_max"] == int(values["DB_POOL_SIZE"])
    assert b"Traceback" not in out
