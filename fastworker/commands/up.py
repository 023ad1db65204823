"""The two ways to run it all: `worker` on servers of the operator's, `up` with embedded ones and the reader too.

Both are one supervisor. What must be known before anything is forked (servers there, schema complete) is asked here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec

from fastworker.commands.check import preflight
from fastworker.config import Config
from fastworker.edge import tracing
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.errors import ConfigError, ExitCode
from fastworker.monitor.monitor import run_monitor
from fastworker.monitor.page import settle_port
from fastworker.monitor.view import MonitorSettings
from fastworker.process.board import Heartbeats, Slot, State
from fastworker.process.child import run_child
from fastworker.process.children import ChildSpec
from fastworker.process.supervisor import Supervisor
from fastworker.process.wards import Server
from fastworker.reader.resume import read_and_resume
from fastworker.reader.start import Start, begin_at
from fastworker.reader.stats import ReaderSettings
from fastworker.redact import redact
from fastworker.store.migrate import migrate
from fastworker.sync.resolver import ResolverSettings, run_resolver
from fastworker.worker.worker import WorkerSettings, processes_max, shrunk, worker_child

log = logging.getLogger(__name__)


class ServiceOptions(msgspec.Struct, frozen=True):
    """What a supervisor runs. `reader` None: the reader is another service; `resolver`: of handles."""

    worker: WorkerSettings
    monitor: MonitorSettings
    reader: ReaderSettings | None = None
    resolver: ResolverSettings | None = None
    memory_max_bytes: int | None = None
    notify_socket: str | None = None


def supervise(plan: ServiceOptions, servers: Sequence[Server] = ()) -> ExitCode:
    """Fork, and return when all is over. `servers`: started again when they end."""
    heartbeats = Heartbeats()
    worker = shrunk(plan.worker)
    specs = [
        worker_child(worker),
        ChildSpec("monitor", partial(_monitor_main, plan.monitor, plan.resolver, heartbeats)),
    ]
    if plan.reader is not None:
        specs.append(ChildSpec("reader", partial(_reader_main, plan.reader, worker.database_url)))
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
        memory_max_bytes=plan.memory_max_bytes,
        workers_max=max(worker.processes, processes_max(worker)),
        notify_socket=plan.notify_socket,
        servers=servers,
    ).run()


def _monitor_main(
    settings: MonitorSettings, resolver: ResolverSettings | None, heartbeats: Heartbeats, slot: Slot
) -> int:
    async def main(slot: Slot, stopping: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            if resolver is not None:
                tasks.create_task(run_resolver(resolver, stopping))
            await run_monitor(settings, heartbeats, stopping, on_ready=lambda: slot.set(ready=1, state=State.RUNNING))

    return run_child(slot, main)


def _reader_main(settings: ReaderSettings, database_url: str, slot: Slot) -> int:
    async def main(slot: Slot, stopping: asyncio.Event) -> None:
        slot.set(ready=1, state=State.RUNNING)
        await read_and_resume(settings, stopping, database_url=database_url)

    return run_child(slot, main)


def run_worker(
    config: Config, plan: ServiceOptions, start: Start | None = None, servers: Sequence[Server] = ()
) -> ExitCode:
    """`fastworker worker`, and its reader from `start` on. Raises FastworkerError for what an operator has to mend."""
    if plan.worker.tracing:
        tracing.require()
    plan = _with_port(plan)
    # asyncio's own loop: uvloop would leave the threads that resolve names behind, and we fork.
    asyncio.run(preflight(config, database_url=plan.worker.database_url))
    if start is not None and plan.reader is not None:
        asyncio.run(begin_at(plan.reader, start, database_url=plan.worker.database_url))
    return supervise(plan, servers)


def up(config: Config, make_plan: Callable[[Config], ServiceOptions], start: Start | None = None) -> ExitCode:
    """`fastworker up`. `make_plan` turns the configuration, its URLs filled in, into settings."""
    with ExitStack() as stack:
        config, servers = stack.enter_context(_with_servers(config))
        plan = _with_port(make_plan(config))
        for name in asyncio.run(migrate(plan.worker.database_url)):
            log.info("Schema: applied %s", name)
        _say_how_to_connect(config, plan)
        return run_worker(config, plan, start, servers)


def _with_port(plan: ServiceOptions) -> ServiceOptions:
    monitor = msgspec.structs.replace(plan.monitor, http=settle_port(plan.monitor.http))
    return msgspec.structs.replace(plan, monitor=monitor)


@contextmanager
def _with_servers(config: Config) -> Iterator[tuple[Config, list[Server]]]:
    """The configuration with a running embedded server's URL in place of each one that was not set; the servers."""
    servers: list[Server] = []
    wants_postgres, wants_redis = config.database_url is None, "REDIS_URL" not in config.given
    with ExitStack() as stack:
        if wants_postgres or wants_redis:
            home = _home(config)
            stack.enter_context(_only_one(home))
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


def home_path(config: Config) -> Path | None:
    """FASTWORKER_HOME or its default; None where there is no home directory."""
    try:
        if config.home is not None:
            return Path(config.home).expanduser()
        data = os.path.expandvars("$XDG_DATA_HOME")
        return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "fastworker"
    except RuntimeError:
        return None


def _home(config: Config) -> Path:
    """FASTWORKER_HOME, made if it is not there."""
    home = home_path(config)
    if home is None:
        raise ConfigError("There is no home directory: set FASTWORKER_HOME")
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"FASTWORKER_HOME: {home} cannot be made: {error.strerror or error}") from error
    return home.absolute()


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


def _say_how_to_connect(config: Config, plan: ServiceOptions) -> None:
    """For people, on standard output: the log has everything else."""
    http = plan.monitor.http
    where = f"http://{http.host}:{http.port}/" if http.port else "off"
    words = (
        f"relay       {', '.join(config.relay_urls)}\n"
        f"tables      psql '{redact(plan.worker.database_url)}'\n"
        f"stream      REDIS_URL='{redact(config.redis_url)}' fastworker status --watch\n"
        f"status page {where}\n"
    )
    with contextlib.suppress(OSError):  # nobody may be there to read it
        os.write(1, words.encode())
