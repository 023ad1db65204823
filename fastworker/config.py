"""Configuration: environment variables to one frozen, typed value, parsed once.

Every variable is declared once, as a field of `Config`: its name, type, default, range, meaning and the
commands that use it. Parsing, the help of the commands and docs/configuration.md follow from that.
A variable of the predecessor keeps its name and meaning, names that are not ours are left alone, and a
`FASTWORKER_*` name that nobody declared refuses to start: a setting that is silently not applied is worse.

`python -m fastworker.config` prints docs/configuration.md.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from fastworker import urls
from fastworker.errors import ConfigError
from fastworker.event.syntax import is_did
from fastworker.redact import redact
from fastworker.store.rules import Rules
from fastworker.stream.keys import CLUSTERED, CURSOR, GROUP, STREAM, has_slots, in_slot, slot
from fastworker.stream.limits import ABANDONED_MS, BATCH_SIZE, DEAD_LETTERS_MAX, PARTITIONS_MAX, STREAM_LEN_MAX
from fastworker.table import derive as derived
from fastworker.table.batch import Limits

PREFIX: Final = "FASTWORKER_"
WORKER_PORT: Final = 9400
READER_PORT: Final = 9401


_MAY_BE_SECRET: Final = re.compile(r"(?i)@|://:|://[^/]*:[^/:]{6}|pass|pwd|secret|token")
"""Also a user name and something longer than a port, without the @ and the host that should follow."""


def _shown(name: str, text: str) -> str:
    """A refused value for a message; hidden whole where any part may be a password, as in a malformed URL."""
    if re.search(r"PASS|SECRET|TOKEN", name) or _MAY_BE_SECRET.search(text):
        return "'***'"
    return repr(redact(text))


# Readers of one value: text to something that msgspec checks further. ValueError says what is wrong.


def _url(*schemes: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        scheme, separator, rest = text.partition("://")
        if not separator or scheme.lower() not in schemes:
            raise ValueError(f"it must start with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        try:
            parts = urlsplit(text)
            _ = parts.port  # raises where it is not a number from 0 to 65535
        except ValueError:
            raise ValueError(f"its host or port cannot be read ({urls.ENCODE})") from None
        if not parts.hostname:
            raise ValueError("it names no host")
        if re.search(r"\s", rest):
            raise ValueError("it contains white space")
        return text

    return read


_http_url: Final = _url("https", "http")
_relay_url: Final = _url("wss", "ws", "https", "http")


def _redis_url(text: str) -> str:
    return urls.redis(text).url


def _database_url(text: str) -> str:
    return urls.postgres(text).url


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def read_collections(text: str) -> tuple[str, ...]:
    words = _words(text)
    for word in words:
        if not re.fullmatch(r"\*|[a-zA-Z*][a-zA-Z0-9*-]*(\.[a-zA-Z0-9*-]+)+", word):
            raise ValueError(f"{word!r} is not the name of a collection")
    return words


def _whose(text: str) -> str:
    """Whose history a variable may ask for. Everybody's is asked for by hand."""
    word = text.strip()
    if word.lower() in ("off", "known"):
        return word.lower()
    if word.startswith("follows-of:") and (dids := _dids(word.removeprefix("follows-of:"))):
        return "follows-of:" + ",".join(dids)
    if word.lower() == "all":
        raise ValueError("the whole network is only fetched by `fastworker backfill --all --yes`")
    raise ValueError("it is none of them")


def _accounts(text: str) -> str:
    if text.startswith("follows-of:"):
        return "follows-of:" + ",".join(_dids(text.removeprefix("follows-of:")))
    if not Path(text).is_file():
        raise ValueError("there is no such file")
    return text


def _relay_urls(text: str) -> tuple[str, ...]:
    relays = _words(text)
    if not relays:
        raise ValueError("it names no relay")
    for relay in relays:
        _relay_url(relay if "://" in relay else f"wss://{relay}")
    return relays


def _derive(text: str) -> frozenset[str]:
    named = {"full": derived.FULL, "core": derived.CORE}
    words = _words(text.lower())
    if unknown := [word for word in words if word not in derived.FULL and word not in named]:
        raise ValueError(f"{unknown[0]!r} is none of them")
    return frozenset[str]().union(*(named.get(word, frozenset({word})) for word in words))


def _dids(text: str) -> tuple[str, ...]:
    dids = tuple(dict.fromkeys(_words(text)))
    if wrong := [did for did in dids if not is_did(did)]:
        raise ValueError(f"{wrong[0]!r} is no DID")
    return dids


def _port(text: str) -> int | str:
    return text.lower() if text.lower() == "off" else _integer(text)


def _size(text: str) -> int:
    """Bytes, with the suffixes of Redis (kb, mb, gb: powers of 1024)."""
    found = re.fullmatch(r"(\d+)\s*(b|kb|mb|gb|)", text.lower())
    if not found:
        raise ValueError("it is not a size")
    unit: dict[str, int] = {"kb": 1024, "mb": 1024**2, "gb": 1024**3}
    return int(found[1]) * unit.get(found[2], 1)


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise ValueError("it is not a whole number")
    return int(text)


def _fraction(text: str) -> float:
    if not re.fullmatch(r"\d(\.\d{1,6})?", text):
        raise ValueError("it is not a number such as 0.5")
    return float(text)


def _flag(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError("it is neither on nor off")
    return words[text.lower()]


def _level(text: str) -> str:
    """The names that Python's logging has had; an old file may use any of them."""
    return {"WARN": "WARNING", "FATAL": "CRITICAL", "NOTSET": "DEBUG"}.get(text.upper(), text.upper())


_REDIS: Final = "reader worker up status check compare dlq replay repair backfill sample"
_POSTGRES: Final = "reader worker up migrate check compare verify import repair backfill sample export"
_STREAM: Final = "reader worker up status check compare dlq replay grants repair backfill sample"


def _env(
    name: str, used_by: str, meaning: str, *, read: Callable[[str], Any] | None = None, allowed: str = "", **shown: str
) -> Meta:
    """What a field's environment variable is called and means.

    `allowed` says in words what the type does not say by itself; `shown` may name the default's text.
    """
    return Meta(
        description=meaning,
        extra={"env": name, "used_by": tuple(used_by.split()), "read": read, "allowed": allowed, **shown},
    )


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The whole configuration: services and commands take it as it is, so that a default is written once, here.

    A field that is None was not set, and its meaning says what happens then.
    """

    relay_urls: Annotated[
        tuple[str, ...],
        _env(
            "RELAY_URL",
            "reader up repair backfill",
            "The relay: a host, or a full `subscribeRepos` URL. A comma-separated list is tried in order; "
            "each host has a cursor of its own.",
            read=_relay_urls,
            allowed="wss:// or ws:// URLs or bare hosts, comma-separated",
            in_file="allowed",
        ),
    ] = ("wss://bsky.network",)
    redis_url: Annotated[
        str,
        _env(
            "REDIS_URL",
            _REDIS,
            "Redis 6.2 or newer, or Valkey. `up` starts an embedded server when it is not set.",
            read=_redis_url,
            allowed="redis://, rediss:// (TLS, verified), unix://, redis+sentinel:// or redis+cluster:// URL",
            in_file="allowed",
        ),
    ] = "redis://localhost:6379"
    stream_key: Annotated[str, Meta(min_length=1), _env("REDIS_STREAM_KEY", _STREAM, "The stream of events.")] = STREAM
    cursor_key: Annotated[
        str,
        Meta(min_length=1),
        _env(
            "REDIS_CURSOR_KEY",
            "reader up status check grants repair backfill sample",
            "Where the reader keeps its relay cursor (decimal seq).",
        ),
    ] = CURSOR
    max_stream_len: Annotated[
        int,
        Meta(ge=1, le=1_000_000_000),
        _env(
            "REDIS_MAX_STREAM_LEN",
            "reader worker up replay status check",
            "Entries at which the stream is full. A full stream makes the reader wait; nothing unfinished is trimmed.",
            read=_integer,
        ),
    ] = STREAM_LEN_MAX
    dead_letter_maxlen: Annotated[
        int,
        Meta(ge=1, le=1_000_000_000),
        _env(
            "REDIS_DEAD_LETTER_MAXLEN",
            "reader worker up",
            "Entries kept in `firehose:dead-letters` (approximately).",
            read=_integer,
        ),
    ] = DEAD_LETTERS_MAX
    dead_letters_in_a_row: Annotated[
        int,
        Meta(ge=1, le=1_000_000_000),
        _env(
            "FASTWORKER_DEAD_LETTERS_IN_A_ROW",
            "worker up",
            "Entries in a row that the worker sets aside before it stops itself (exit 4), so that a bad release does "
            "not empty the stream into the dead letters. Raise it for one run to get past entries that may go there.",
            read=_integer,
        ),
    ] = 500
    group: Annotated[
        str,
        Meta(min_length=1),
        _env(
            "REDIS_CONSUMER_GROUP",
            "worker up status check compare dlq repair backfill sample",
            "The consumer group; old workers may share it.",
        ),
    ] = GROUP
    consumer_id: Annotated[
        str,
        Meta(min_length=1, max_length=200),
        _env(
            "CONSUMER_ID",
            "worker up check",
            "Consumers are called `<CONSUMER_ID>-<n>`, n leased; workers on several hosts may share it or differ. "
            "Beside an old Python worker, which calls its own the same by default, set another.",
        ),
    ] = "python-worker"
    database_url: Annotated[
        str | None,
        _env(
            "DATABASE_URL",
            _POSTGRES,
            "PostgreSQL 14 or newer. `up` starts an embedded server when it is not set. The reader may do without: it "
            "asks for its cursor there when Redis has lost it. The other commands require it.",
            read=_database_url,
            allowed="postgresql:// URL or libpq's `host=... dbname=...`; a socket directory as "
            "`postgresql:///name?host=/directory`",
            in_file="allowed",
        ),
    ] = None
    pool_size: Annotated[
        int,
        Meta(ge=1, le=10_000),
        _env(
            "DB_POOL_SIZE",
            "worker up check",
            "Most PostgreSQL connections of the whole worker, all processes together; pipelines shrink to it. One more "
            "is opened while a thread of thousands of replies is worked through.",
            read=_integer,
        ),
    ] = 8
    batch_size: Annotated[
        int,
        Meta(ge=1, le=100_000),
        _env(
            "BATCH_SIZE",
            "worker up",
            "COUNT of one XREADGROUP. A flush gathers many reads, so small values run well too.",
            read=_integer,
        ),
    ] = BATCH_SIZE
    pipelines: Annotated[
        int,
        Meta(ge=1, le=1_000),
        _env("PARALLEL_CONSUMERS", "worker up", "Pipelines (consumers) in each process.", read=_integer),
    ] = 1
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        _env("LOG_LEVEL", "*", "Least level that is logged.", read=_level),
    ] = "INFO"

    processes: Annotated[
        int, Meta(ge=1, le=128), _env("FASTWORKER_PROCESSES", "worker up", "Worker processes.", read=_integer)
    ] = 2
    stream_format: Annotated[
        Literal["json", "native", "frame"],
        _env(
            "FASTWORKER_STREAM_FORMAT",
            "reader up replay check",
            "Form of the entries that the reader writes. Old workers read `json` only; `native` is the fast one; "
            "`frame` leaves all decoding to the workers at ten times the Redis memory.",
            read=str.lower,
            default="json (up: native)",
        ),
    ] = "json"
    partitions: Annotated[
        int,
        Meta(ge=1, le=PARTITIONS_MAX),
        _env(
            "FASTWORKER_STREAM_PARTITIONS",
            "reader up check",
            "Partitions of the stream, by account, so that worker processes seldom wait for each other in PostgreSQL: "
            "one for each process. Not with `json`, which old workers read from one stream. It may be changed at any "
            "time (docs/operations.md).",
            read=_integer,
            default="1 (up: worker processes, in the form native)",
        ),
    ] = 1
    derive: Annotated[
        frozenset[str],
        _env(
            "FASTWORKER_DERIVE",
            "worker up compare verify import repair backfill sample",
            "Derived tables that are kept: all, what the predecessor's Python worker kept, or a list. "
            "A wider list applies to what is written from then on; `fastworker verify --repair` fills in the rest.",
            read=_derive,
            allowed="full, core, or a list of " + ", ".join(sorted(derived.FULL)),
            default="full",
        ),
    ] = derived.FULL
    synchronous_commit: Annotated[
        Literal["on", "keep"],
        _env(
            "FASTWORKER_SYNCHRONOUS_COMMIT",
            "worker up check verify import repair backfill",
            "`on`: where a role, a database or the server has `synchronous_commit = off`, the worker's sessions turn "
            "it on, so that a crash of PostgreSQL loses nothing that was acknowledged; any other value stays. `keep`: "
            "off stays off, too.",
            read=str.lower,
        ),
    ] = "on"
    http_port: Annotated[
        Annotated[int, Meta(ge=0, le=65_535)] | Literal["off"] | None,
        _env(
            "FASTWORKER_HTTP_PORT",
            "reader worker up health",
            "Port of /metrics, /livez, /readyz and the status page; 0 takes any free port and logs it.",
            read=_port,
            allowed="0 to 65535, or off",
            default=f"worker and up {WORKER_PORT}, reader {READER_PORT}",
        ),
    ] = None
    http_host: Annotated[
        str,
        Meta(min_length=1),
        _env(
            "FASTWORKER_HTTP_HOST",
            "reader worker up health",
            "Address that the port listens on; in a container 0.0.0.0. There is no password: keep it inside.",
        ),
    ] = "127.0.0.1"
    http_hosts: Annotated[
        tuple[str, ...],
        _env(
            "FASTWORKER_HTTP_HOSTS",
            "reader worker up",
            "More names that the status page and /status.json answer to, such as that of a Kubernetes service or an "
            "ingress (`*`: any). Without it: addresses, localhost and the host's own name, so that no web site can "
            "read them through a visitor's browser. /metrics, /livez and /readyz answer to every name.",
            read=_words,
            allowed="host names without port, comma-separated, or *",
            default="none",
        ),
    ] = ()
    home: Annotated[
        str | None,
        _env(
            "FASTWORKER_HOME",
            "reader up status check compare verify dlq replay migrate repair backfill sample import export grants",
            "Directory of the embedded servers' data, and of the reader's chain of commits. "
            "Where it is set, other commands find the servers of `up` by it, "
            "unless a URL says otherwise.",
            allowed="a directory path",
            default="$XDG_DATA_HOME/fastworker, else ~/.local/share/fastworker",
        ),
    ] = None
    verify: Annotated[
        Literal["off", "chain", "signed", "full"],
        _env(
            "FASTWORKER_VERIFY",
            "reader up",
            "What the reader asks of each commit: `chain`, that it follows the one before it; `signed`, that its "
            "account signed it; `full`, that its ops are all that happened. The last two ask FASTWORKER_PLC_URL for "
            "the accounts' keys (docs/proofs.md).",
            read=str.lower,
        ),
    ] = "chain"
    verify_processes: Annotated[
        int,
        Meta(ge=0, le=64),
        _env(
            "FASTWORKER_VERIFY_PROCESSES",
            "reader up",
            "Processes that prove commits for the reader at the levels `signed` and `full`, for catching up; 0: the "
            "reader does it.",
            read=_integer,
        ),
    ] = 0
    chain_bytes: Annotated[
        int,
        Meta(ge=64 * 1024, le=64 * 1024**3),
        _env(
            "FASTWORKER_CHAIN_BYTES",
            "reader up",
            "Size of the file in FASTWORKER_HOME that remembers the newest state of each account, 32 bytes for one. "
            "Where it cannot be written, 16mb of memory.",
            read=_size,
            allowed="bytes, or a number with kb, mb or gb; from 64kb to 64gb",
            default="128mb",
        ),
    ] = 128 * 1024 * 1024
    stream_bytes_max: Annotated[
        Annotated[int, Meta(ge=1024)] | None,
        _env(
            "FASTWORKER_STREAM_BYTES_MAX",
            "reader worker up check",
            "Memory of the stream in Redis at which it counts as full, beside REDIS_MAX_STREAM_LEN.",
            read=_size,
            allowed="bytes, or a number with kb, mb or gb",
            default="no limit",
        ),
    ] = None
    keep_s: Annotated[
        int,
        Meta(ge=0, le=31_536_000),
        _env(
            "FASTWORKER_KEEP_SECONDS",
            "reader worker up",
            "Seconds that finished entries stay on the stream, for `worker --reapply`; 0 trims them at once. Earlier "
            "when the stream is nine tenths full: give reader and worker the same value.",
            read=_integer,
        ),
    ] = 0
    ignore_groups: Annotated[
        tuple[str, ...],
        _env(
            "FASTWORKER_IGNORE_GROUPS",
            "reader worker up status check",
            "Consumer groups that trimming does not wait for (forgotten ones that hold the stream back).",
            read=_words,
            allowed="group names, comma-separated",
            default="none",
        ),
    ] = ()
    trusted_verifiers: Annotated[
        tuple[str, ...],
        _env(
            "FASTWORKER_TRUSTED_VERIFIERS",
            "worker up compare verify import repair backfill",
            "Accounts whose verifications count before all others, the first one most. An account has one row in "
            "`verifications`: theirs, else that with the lowest record key. When you change it, restart the workers "
            "and run `fastworker verify --repair`.",
            read=_dids,
            allowed="DIDs, comma-separated",
            default="none",
        ),
    ] = ()
    plc_url: Annotated[
        str,
        _env(
            "FASTWORKER_PLC_URL",
            "reader worker up repair backfill sample",
            "DID directory for resolving handles beside the stream, and for finding the hosts of accounts.",
            read=_http_url,
            allowed="https:// or http:// URL",
        ),
    ] = "https://plc.directory"
    collections: Annotated[
        tuple[str, ...],
        _env(
            "FASTWORKER_COLLECTIONS",
            "reader worker up repair backfill sample import compare",
            "Collections that are kept; records of others are left out, and counted as `filtered`. Deletes and events "
            "of accounts and handles are never left out. What is added later is fetched. See docs/history.md.",
            read=read_collections,
            allowed="NSIDs, in which * stands for anything, comma-separated",
            default="all",
        ),
    ] = ()
    accounts: Annotated[
        str | None,
        _env(
            "FASTWORKER_ACCOUNTS",
            "reader worker up repair backfill sample import",
            "Accounts whose records are kept; those of others are left out, and counted as `filtered_account`. A file "
            "of DIDs, one a line, or `follows-of:DID,...`: these and whom they follow, as far as the tables know. Read "
            "twice a minute. Deletes and events of accounts and handles are never left out. See docs/history.md.",
            read=_accounts,
            allowed="a file's path, or follows-of:DID,...",
            default="all",
        ),
    ] = None
    backfill_days: Annotated[
        Annotated[int, Meta(ge=-1, le=36_500)] | None,
        _env(
            "BACKFILL_DAYS",
            "worker up",
            "Fetch history beside the stream, once for each database: -1 all of it, N the posts, likes and reposts of "
            "N days (the graph and profiles always whole), 0 none. Of whom says FASTWORKER_BACKFILL.",
            read=_integer,
            allowed="-1, 0, or days",
            default="0",
        ),
    ] = None
    backfill: Annotated[
        str | None,
        _env(
            "FASTWORKER_BACKFILL",
            "worker up",
            "Whose history BACKFILL_DAYS is about; without it all of their history. `known`: everybody in `users`. "
            "Needs the extra `verify` and FASTWORKER_SYNC. See docs/history.md.",
            read=_whose,
            allowed="off, known, or follows-of:DID,...",
            default="known where BACKFILL_DAYS is set, else off",
        ),
    ] = None
    backfill_share: Annotated[
        float,
        Meta(ge=0.01, le=1),
        _env(
            "FASTWORKER_BACKFILL_SHARE",
            "worker up backfill",
            "Share of its time that history may write, beside the live stream; it also waits while live events are "
            "more than two seconds old. 1: all of its time.",
            read=_fraction,
            allowed="0.01 to 1",
        ),
    ] = 0.5
    sync: Annotated[
        bool,
        _env(
            "FASTWORKER_SYNC",
            "worker up",
            "Whether a process of the worker repairs accounts beside the stream: what events ask for, gaps, and what "
            "random samples find. It connects to FASTWORKER_PLC_URL and to the hosts of accounts. See docs/repair.md.",
            read=_flag,
            allowed="on or off",
            default="on",
        ),
    ] = True
    sample_per_hour: Annotated[
        int,
        Meta(ge=0, le=3600),
        _env(
            "FASTWORKER_SAMPLE_PER_HOUR",
            "worker up",
            "Random accounts that are compared with their repositories in an hour, by all workers of a database "
            "together; 0: none.",
            read=_integer,
        ),
    ] = 60
    fetch_at_once: Annotated[
        int,
        Meta(ge=1, le=32),
        _env(
            "FASTWORKER_FETCH_AT_ONCE",
            "worker up repair backfill sample",
            "Repositories that one process fetches at the same time, four of one host at most.",
            read=_integer,
        ),
    ] = 8
    resolve_handles: Annotated[
        bool,
        _env(
            "FASTWORKER_RESOLVE_HANDLES",
            "worker up verify repair backfill import",
            "Whether handles are verified over DNS and HTTPS, beside the stream (one more connection), before they are "
            "shown; off shows what the account's host claims.",
            read=_flag,
            allowed="on or off",
            default="on",
        ),
    ] = True
    memory_max_bytes: Annotated[
        Annotated[int, Meta(ge=32 * 1024 * 1024)] | None,
        _env(
            "FASTWORKER_MEMORY_MAX_BYTES",
            "worker up",
            "Anonymous resident memory at which one process is drained and replaced; once a minute at most.",
            read=_size,
            allowed="bytes, or a number with kb, mb or gb; at least 32mb",
            default="no limit",
        ),
    ] = None
    log_format: Annotated[
        Literal["human", "json"],
        _env("FASTWORKER_LOG_FORMAT", "*", "Log lines for people or for machines.", read=str.lower),
    ] = "human"
    tracing: Annotated[
        bool,
        _env(
            "FASTWORKER_TRACING",
            "worker up",
            "OpenTelemetry: a span per flush, sent as OTEL_EXPORTER_OTLP_ENDPOINT and its siblings say. Needs "
            "the extra `otel` (docs/monitoring.md).",
            read=_flag,
            allowed="on or off",
            default="off",
        ),
    ] = False
    crashpoint: Annotated[
        str | None,
        _env(
            "FASTWORKER_CRASHPOINT",
            "worker up migrate backfill import",
            "For tests: a named place at which a process kills itself.",
            allowed="a name, or name:n for the n-th time",
            default="none",
        ),
    ] = None

    # Not from the environment.
    given: frozenset[str] = frozenset()
    """Names of the variables that were set."""
    # Nor these, which are for tests.
    silence_floor_s: float = 30.0
    """No silence of a relay shorter than this ends its connection."""
    abandoned_ms: int = ABANDONED_MS
    limits: Limits = Limits()
    """Of one batch."""
    drain_s: float = 4.0
    """How long a worker that is told to stop goes on with what it has read."""
    scan_s: float = 10.0
    """Between two looks for dead consumers."""
    lease_ms: int = 15_000
    """How long a consumer's name is kept for a process that does not renew it."""
    foreign_idle_ms: int = 60_000
    """Idle for so long, pending entries of a worker without leases are claimed."""

    @property
    def rules(self) -> Rules:
        return Rules(self.derive, self.trusted_verifiers, self.resolve_handles, self.synchronous_commit)

    def require_form(self) -> None:
        """Raises ConfigError where the entries' form does not allow partitions."""
        if self.partitions > 1 and self.stream_format == "json":
            raise ConfigError(self.partitions_need_another_form)

    @property
    def partitions_need_another_form(self) -> str:
        return (
            f"FASTWORKER_STREAM_PARTITIONS={self.partitions} needs FASTWORKER_STREAM_FORMAT=native (or frame): old "
            "workers, for whom json is, read one stream only"
        )

    def require_database_url(self, command: str) -> str:
        if self.database_url is None:
            raise ConfigError(
                f"DATABASE_URL is not set: `fastworker {command}` needs a PostgreSQL URL such as "
                "postgresql://user:password@host:5432/atproto"
            )
        return self.database_url


class Variable(msgspec.Struct, frozen=True):
    """One declared environment variable. `allowed` and `default` are texts for people."""

    name: str
    field: str
    type: Any
    read: Callable[[str], Any] | None
    allowed: str
    default: str
    meaning: str
    used_by: tuple[str, ...]
    in_file: bool
    """It may be read from the file that `<name>_FILE` names."""

    def is_used_by(self, command: str) -> bool:
        return command in self.used_by or "*" in self.used_by


def _in_words(kind: Any, metas: tuple[Meta, ...]) -> str:
    if kind is int:
        low, high = (next((v for m in metas if (v := getattr(m, side)) is not None), None) for side in ("ge", "le"))
        return f"whole number from {low:,} to {high:,}" if high is not None else f"whole number, at least {low:,}"
    choices = [arg for arg in get_args(kind) if isinstance(arg, str)]
    return ", ".join(choices) if choices else "text"


def _default_in_words(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return "not set" if value is None else str(value)


def _declared() -> tuple[Variable, ...]:
    hints = get_type_hints(Config, include_extras=True)
    variables = []
    for field in msgspec.structs.fields(Config):
        hint = hints[field.name]
        metas: tuple[Meta, ...] = getattr(hint, "__metadata__", ())
        described = next((meta for meta in metas if meta.extra), None)
        if described is None or described.extra is None:
            continue  # not from the environment
        kind, extra = get_args(hint)[0], described.extra
        variables.append(
            Variable(
                name=extra["env"],
                field=field.name,
                type=hint,
                read=extra["read"],
                allowed=extra["allowed"] or _in_words(kind, metas),
                default=extra.get("default") or _default_in_words(field.default),
                meaning=described.description or "",
                used_by=extra["used_by"],
                in_file="in_file" in extra,
            )
        )
    return tuple(variables)


VARIABLES: Final = _declared()


def _value(variable: Variable, text: str) -> Any:
    try:
        return msgspec.convert(variable.read(text) if variable.read else text, variable.type)
    except msgspec.ValidationError:
        why = "it is not among what is allowed"
    except ValueError as error:
        why = redact(str(error))
    raise ConfigError(
        f"{variable.name}={_shown(variable.name, text)} is refused: {why}; allowed: {variable.allowed}"
    ) from None


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes (of a service called fastworker...) or Docker (of a link) has set this, not an operator."""
    number = r"PORT_\d+_(TCP|UDP|SCTP)"
    return any(
        re.fullmatch(rf"FASTWORKER(_[A-Z0-9]+)*_{shape}", name) and re.fullmatch(text, value)
        for shape, text in (
            ("SERVICE_HOST", r"[0-9a-fA-F.:]+"),
            (r"SERVICE_PORT(_\w+)?", r"\d+"),
            (rf"(PORT|{number})", r"(tcp|udp|sctp)://.+"),
            (rf"{number}_PROTO", r"tcp|udp|sctp"),
            (rf"{number}_PORT", r"\d+"),
            (rf"{number}_ADDR", r"[0-9a-fA-F.:]+"),
            ("NAME", r"/[^/]+/[^/]+"),
            (r"ENV_\w+", r"(?s).*"),
        )
    )


def _texts(environment: Mapping[str, str]) -> dict[str, str]:
    """What is set: without service links, the contents of files for `*_FILE`, without what is empty."""
    texts = {name: value for name, value in environment.items() if not is_service_link(name, value)}
    for variable in VARIABLES:
        if not variable.in_file or not (path := texts.pop(f"{variable.name}_FILE", "").strip()):
            continue
        if texts.get(variable.name, "").strip():
            raise ConfigError(f"{variable.name} and {variable.name}_FILE are both set: remove one of them")
        try:
            texts[variable.name] = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"{variable.name}_FILE={path!r} cannot be read: {why}") from None
        if not texts[variable.name].strip():
            raise ConfigError(f"{variable.name}_FILE={path!r} is empty")
    return {name: text.strip() for name, text in texts.items() if text.strip() or name.startswith(PREFIX)}


def read_env_file(path: Path) -> dict[str, str]:
    """Names and values of a file as `docker compose` and shells read it: quotes, comments, `export`, `${NAME}`."""
    from dotenv import dotenv_values  # noqa: PLC0415 - seldom needed
    from dotenv.parser import parse_stream  # noqa: PLC0415

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"--env-file {path} cannot be read: {why}") from None
    if broken := next((one for one in parse_stream(io.StringIO(text)) if one.error), None):
        raise ConfigError(f"--env-file {path}: line {broken.original.line} is not NAME=value")
    values = {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}
    if wrong := next((name for name, value in values.items() if not name or "=" in name or "\0" in name + value), None):
        raise ConfigError(f"--env-file {path}: {wrong!r} cannot be an environment variable")
    return values


def parse_config(environment: Mapping[str, str]) -> Config:
    """The configuration in `environment`. An empty value counts as not set (compose files write `${X:-}`).

    Raises ConfigError for an unknown FASTWORKER_* name and for a value that is not allowed.
    """
    known = {variable.name for variable in VARIABLES}
    texts = _texts(environment)
    for name in texts:
        if name.startswith(PREFIX) and name not in known:
            ours = sorted(one for one in known if one.startswith(PREFIX))
            close = difflib.get_close_matches(
                name.removeprefix(PREFIX), [one.removeprefix(PREFIX) for one in ours], n=1
            )
            hint = f"did you mean {PREFIX}{close[0]}?" if close else f"the known ones are {', '.join(ours)}"
            raise ConfigError(f"{name}={_shown(name, texts[name])} is not a setting of fastworker: {hint}")
    values = {}
    given = set()
    for variable in VARIABLES:
        if text := texts.get(variable.name, ""):
            values[variable.field] = _value(variable, text)
            given.add(variable.name)
    if "+cluster://" in values.get("redis_url", ""):
        _one_slot(values)
    return Config(**values, given=frozenset(given))


def _one_slot(values: dict[str, Any]) -> None:
    """On a Redis Cluster stream and cursor, and those of each partition, are in one slot: they have one hash tag."""
    stream, cursor = (values.setdefault(*pair) for pair in zip(("stream_key", "cursor_key"), CLUSTERED, strict=True))
    if not has_slots(stream) or slot(in_slot(stream, 1)) != slot(in_slot(cursor, 1)):
        raise ConfigError(
            f"On a Redis Cluster REDIS_STREAM_KEY={stream!r} and REDIS_CURSOR_KEY={cursor!r} need one hash tag, as in "
            f"{CLUSTERED[0]} and {CLUSTERED[1]}"
        )


def asks_for_history(config: Config) -> bool:
    """Whether BACKFILL_DAYS and FASTWORKER_BACKFILL ask for any."""
    days, whose = config.backfill_days, config.backfill
    return whose != "off" and days != 0 and not (whose is None and days is None)


def remarks(environment: Mapping[str, str]) -> list[str]:
    """What `parse_config` passed over, as sentences for the log."""
    said = []
    if links := sorted(name for name, value in environment.items() if is_service_link(name, value)):
        few = ", ".join(links[:3]) + (f" and {len(links) - 3} more" if len(links) > 3 else "")
        said.append(f"Not settings, but links to a service called fastworker: {few} (Kubernetes and Docker set them)")
    texts = _texts(environment)
    said += [
        f"{name} has no effect here: history is as fast as hosts and the live stream allow (docs/history.md)"
        for name in sorted(texts)
        if name.startswith("BACKFILL_") and name != "BACKFILL_DAYS"
    ]
    for name, read in (("DATABASE_URL", urls.postgres), ("REDIS_URL", urls.redis)):
        if (text := texts.get(name)) and (unused := read(text).unused):
            said.append(f"{name}: {', '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect here")
    return said


def markdown() -> str:
    """docs/configuration.md; a test compares them."""
    lines = [
        "# Configuration",
        "",
        "Generated by `python -m fastworker.config`; do not edit.",
        "",
        "Settings are environment variables, read once at start. The names without `FASTWORKER_` and their meaning are",
        "those of the worker that this one replaces, so its environment file starts this one unchanged. An unknown",
        "`FASTWORKER_*` name or a value out of range refuses to start (exit code 2) and says what is allowed.",
        "An empty value counts as not set.",
        "",
        f"{', '.join(f'`{one.name}_FILE`' for one in VARIABLES if one.in_file)} name files that hold the",
        "value instead (Docker and Kubernetes secrets). Options of `DATABASE_URL` and `REDIS_URL` that have no effect",
        "here are named in the log. `FASTWORKER_*` names that Kubernetes or Docker set for a service of that name are",
        "passed over.",
        "",
        "| variable | default | allowed | meaning | used by |",
        "|---|---|---|---|---|",
    ]
    for variable in VARIABLES:
        used_by = "every command" if "*" in variable.used_by else ", ".join(variable.used_by)
        lines.append(
            f"| `{variable.name}` | {variable.default} | {variable.allowed} | {variable.meaning} | {used_by} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
