"""The two ways to run it all: `worker` on servers of the operator's, `up` with embedded ones and the reader too.

Both are one supervisor. What must be known before anything is forked (servers there, schema complete) is asked here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec

from fastworker.commands.check import preflight
from fastworker.config import WORKER_PORT, Config, asks_for_history
from fastworker.edge import tracing
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.errors import ConfigError, ExitCode
from fastworker.monitor.monitor import run_monitor
from fastworker.monitor.page import HttpSettings, http_of, settle_port
from fastworker.process.board import Heartbeats, Slot, State
from fastworker.process.child import run_child
from fastworker.process.children import ChildSpec
from fastworker.process.priority import give_way
from fastworker.process.supervisor import Supervisor
from fastworker.process.wards import Server
from fastworker.reader.levels import require_curves
from fastworker.reader.resume import read_and_resume
from fastworker.reader.start import Start, begin_at
from fastworker.redact import redact
from fastworker.store.migrate import migrate
from fastworker.stream.limits import PARTITIONS_MAX
from fastworker.sync.resolver import ResolverSettings, run_resolver
from fastworker.worker.worker import processes_max, shrunk, worker_child

log = logging.getLogger(__name__)


def supervise(
    config: Config, http: HttpSettings, *, with_reader: bool, notify_socket: str | None, servers: Sequence[Server] = ()
) -> ExitCode:
    """Fork, and return when all is over. `servers`: started again when they end."""
    heartbeats = Heartbeats()
    worker = shrunk(config)
    specs = [
        worker_child(worker),
        ChildSpec("monitor", partial(_monitor_main, config, http, heartbeats, with_reader)),
    ]
    if config.sync and (why := _no_sync()) is None:
        specs.append(ChildSpec("syncer", partial(_syncer_main, config)))
    elif config.sync:
        log.warning("FASTWORKER_SYNC: nothing is repaired and sampled: %s", why)
    if len(specs) == 2 and asks_for_history(config):
        log.warning("BACKFILL_DAYS and FASTWORKER_BACKFILL have no effect: what would fetch it does not run")
    if with_reader:
        specs.append(ChildSpec("reader", partial(_reader_main, config)))
    log.info(
        "Starting %d processes with %d pipelines each on %s as %s",
        worker.processes,
        worker.pipelines,
        worker.stream_key,
        worker.consumer_id,
    )
    return Supervisor(
        specs,
        heartbeats,
        memory_max_bytes=config.memory_max_bytes,
        workers_max=max(worker.processes, processes_max(worker)),
        notify_socket=notify_socket,
        servers=servers,
    ).run()


def _no_sync() -> str | None:
    """Why there can be no syncer."""
    try:
        import fastworker.sync.keys  # noqa: F401, PLC0415 - needs the extra `verify`
    except ConfigError as error:
        return str(error)
    return None


def _syncer_main(config: Config, slot: Slot) -> int:
    from fastworker.sync.syncer import run_syncer  # noqa: PLC0415 - needs the extra `verify`

    async def main(slot: Slot, stopping: asyncio.Event) -> None:
        give_way()
        slot.set(ready=1, state=State.RUNNING)
        await run_syncer(config, stopping)

    return run_child(slot, main)


def _monitor_main(config: Config, http: HttpSettings, heartbeats: Heartbeats, with_reader: bool, slot: Slot) -> int:
    async def main(slot: Slot, stopping: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            if config.resolve_handles:
                resolver = ResolverSettings(config.require_database_url("worker"), config.plc_url)
                tasks.create_task(run_resolver(resolver, stopping))
            await run_monitor(
                config,
                http,
                heartbeats,
                stopping,
                with_reader=with_reader,
                on_ready=lambda: slot.set(ready=1, state=State.RUNNING),
            )

    return run_child(slot, main)


def _reader_main(config: Config, slot: Slot) -> int:
    async def main(slot: Slot, stopping: asyncio.Event) -> None:
        slot.set(ready=1, state=State.RUNNING)
        await read_and_resume(config, stopping)

    return run_child(slot, main)


def run_worker(
    config: Config,
    *,
    notify_socket: str | None = None,
    with_reader: bool = False,
    start: Start | None = None,
    http: HttpSettings | None = None,
    servers: Sequence[Server] = (),
) -> ExitCode:
    """`fastworker worker`, and its reader from `start` on. Raises FastworkerError for what an operator has to mend."""
    if config.tracing:
        tracing.require()
    http = http or settle_port(http_of(config, WORKER_PORT))
    # asyncio's own loop: uvloop would leave the threads that resolve names behind, and we fork.
    asyncio.run(preflight(config, "worker"))
    if start is not None:
        asyncio.run(begin_at(config, start))
    return supervise(config, http, with_reader=with_reader, notify_socket=notify_socket, servers=servers)


def up(config: Config, *, notify_socket: str | None = None, start: Start | None = None) -> ExitCode:
    """`fastworker up`: with embedded servers in place of each URL that was not set."""
    require_curves(config)
    if "FASTWORKER_STREAM_FORMAT" not in config.given:
        config = msgspec.structs.replace(config, stream_format="native")
    if "FASTWORKER_STREAM_PARTITIONS" not in config.given and config.stream_format == "native":
        config = msgspec.structs.replace(config, partitions=min(config.processes, PARTITIONS_MAX))
    config.require_form()
    with ExitStack() as stack:
        config, servers = stack.enter_context(_with_servers(config))
        http = settle_port(http_of(config, WORKER_PORT))
        database_url = config.require_database_url("up")
        for name in asyncio.run(migrate(database_url)):
            log.info("Schema: applied %s", name)
        _say_how_to_connect(config, http, database_url)
        return run_worker(
            config, notify_socket=notify_socket, with_reader=True, start=start, http=http, servers=servers
        )


@contextmanager
def _with_servers(config: Config) -> Iterator[tuple[Config, list[Server]]]:
    """The configuration with a running embedded server's URL in place of each one that was not set; the servers."""
    servers: list[Server] = []
    wants_postgres, wants_redis = config.database_url is None, "REDIS_URL" not in config.given
    with ExitStack() as stack:
        if wants_postgres or wants_redis:
            home = _home(config)
            _make(home)
            stack.enter_context(_only_one(home))
            config = msgspec.structs.replace(config, home=str(home))
            if wants_redis:
                log.info("Starting the embedded Valkey in %s", home / "redis")
                server = stack.enter_context(EmbeddedRedis(home / "redis"))
                servers.append(server)
                config = msgspec.structs.replace(config, redis_url=server.url)
            if wants_postgres:
                log.info("Starting the embedded PostgreSQL in %s", home / "postgres")
                postgres = stack.enter_context(EmbeddedPostgres(home / "postgres"))
                servers.append(postgres)
                config = msgspec.structs.replace(config, database_url=postgres.url)
        yield config, servers


def with_servers_of_home(config: Config) -> Config:
    """The URLs of the embedded servers in FASTWORKER_HOME, whether or not they run, for those that are not set."""
    home = _home(config)
    if "REDIS_URL" not in config.given:
        config = msgspec.structs.replace(config, redis_url=EmbeddedRedis(home / "redis").url)
    if config.database_url is None:
        config = msgspec.structs.replace(config, database_url=EmbeddedPostgres(home / "postgres").url)
    return config


def _home(config: Config) -> Path:
    """FASTWORKER_HOME, or where it is when it is not set."""
    if config.home is not None:
        home = Path(config.home).expanduser()
    else:
        try:
            data = os.path.expandvars("$XDG_DATA_HOME")
            home = (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "fastworker"
        except RuntimeError as error:
            raise ConfigError("There is no home directory: set FASTWORKER_HOME") from error
    return home.absolute()


def _make(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"FASTWORKER_HOME: {home} cannot be made: {error.strerror or error}") from error


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the directory: two would feed one stream from two readers, and share the servers' files."""
    try:
        fd = os.open(home / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"FASTWORKER_HOME: {home} cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another `fastworker up` runs in {home}: stop it, or set FASTWORKER_HOME to another directory"
            ) from None
        yield
    finally:
        os.close(fd)


def _say_how_to_connect(config: Config, http: HttpSettings, database_url: str) -> None:
    """For people, on standard output: the log has everything else."""
    where = f"http://{http.host}:{http.port}/" if http.port else "off"
    words = (
        f"relay       {', '.join(config.relay_urls)}\n"
        f"tables      psql '{redact(database_url)}'\n"
        f"stream      REDIS_URL='{redact(config.redis_url)}' fastworker status --watch\n"
        f"status page {where}\n"
    )
    with contextlib.suppress(OSError):  # nobody may be there to read it
        os.write(1, words.encode())
