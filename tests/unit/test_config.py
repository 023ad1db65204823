"""Configuration: what is accepted, what is refused and in which words, and that the reference page follows the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastworker.config import VARIABLES, Config, markdown, parse_config, read_env_file, remarks
from fastworker.errors import ConfigError, ExitCode
from fastworker.redact import redact
from fastworker.table.derive import CORE, FULL

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_nothing_set_is_the_guides_defaults() -> None:
    config = parse_config({})
    assert config == Config()
    assert config.relay_urls == ("wss://bsky.network",)
    assert config.redis_url == "redis://localhost:6379"
    assert (config.stream_key, config.cursor_key) == ("firehose:events", "firehose:python_cursor")
    assert (config.group, config.consumer_id) == ("firehose-processors", "python-worker")
    assert (config.max_stream_len, config.dead_letter_maxlen) == (500_000, 10_000)
    assert (config.stream_format, config.derive, config.log_level) == ("json", FULL, "INFO")
    assert config.database_url is None


def test_the_old_workers_environment_starts_unchanged() -> None:
    """The variables of the predecessor's compose file for both Python services, with everything else that is around."""
    config = parse_config(
        {
            "RELAY_URL": "wss://bsky.network",
            "REDIS_URL": "redis://redis:6379",
            "REDIS_STREAM_KEY": "firehose:events",
            "REDIS_CURSOR_KEY": "firehose:python_cursor",
            "REDIS_MAX_STREAM_LEN": "500000",
            "REDIS_CONSUMER_GROUP": "firehose-processors",
            "CONSUMER_ID": "python-worker",
            "DATABASE_URL": "postgresql://postgres:password@db:5432/atproto",
            "DB_POOL_SIZE": "20",
            "BATCH_SIZE": "10",
            "PARALLEL_CONSUMERS": "5",
            "LOG_LEVEL": "WARNING",
            "MAX_CONCURRENT_OPS": "100",
            "SKIP_PDS_FETCHING": "true",
            "PATH": "/usr/bin",
        }
    )
    assert (config.batch_size, config.pipelines, config.pool_size, config.log_level) == (10, 5, 20, "WARNING")
    assert config.database_url == "postgresql://postgres:password@db:5432/atproto"
    assert "DB_POOL_SIZE" in config.given
    assert "PATH" not in config.given


def test_partitions_need_a_form_that_old_workers_do_not_read() -> None:
    several = parse_config({"FASTWORKER_STREAM_PARTITIONS": "4"})
    with pytest.raises(ConfigError, match=r"FASTWORKER_STREAM_PARTITIONS=4 needs FASTWORKER_STREAM_FORMAT=native"):
        several.require_form()
    parse_config({"FASTWORKER_STREAM_PARTITIONS": "4", "FASTWORKER_STREAM_FORMAT": "frame"}).require_form()
    Config().require_form()
    with pytest.raises(ConfigError, match="FASTWORKER_STREAM_PARTITIONS"):
        parse_config({"FASTWORKER_STREAM_PARTITIONS": "65"})


def test_an_empty_value_is_not_set() -> None:
    config = parse_config({"RELAY_URL": "", "BATCH_SIZE": " ", "DATABASE_URL": ""})
    assert config == Config()


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("LOG_LEVEL", "warn", "log_level", "WARNING"),
        ("FASTWORKER_HTTP_PORT", "off", "http_port", "off"),
        ("FASTWORKER_HTTP_PORT", "0", "http_port", 0),
        ("FASTWORKER_DERIVE", "full", "derive", FULL),
        ("FASTWORKER_DERIVE", "core", "derive", CORE),
        ("FASTWORKER_DERIVE", "core, quotes", "derive", CORE | {"quotes"}),
        ("FASTWORKER_STREAM_BYTES_MAX", "2gb", "stream_bytes_max", 2 * 1024**3),
        ("FASTWORKER_STREAM_BYTES_MAX", "65536", "stream_bytes_max", 65_536),
        ("FASTWORKER_STREAM_FORMAT", "NATIVE", "stream_format", "native"),
        ("FASTWORKER_IGNORE_GROUPS", "osprey-consumers, old", "ignore_groups", ("osprey-consumers", "old")),
        ("FASTWORKER_RESOLVE_HANDLES", "off", "resolve_handles", False),
        ("RELAY_URL", "relay.one, wss://relay.two/xrpc/x", "relay_urls", ("relay.one", "wss://relay.two/xrpc/x")),
        ("REDIS_URL", "unix:///run/redis.sock", "redis_url", "unix:///run/redis.sock"),
        ("REDIS_URL", "rediss://:p@h:6380/0", "redis_url", "rediss://:p@h:6380/0"),
        ("DATABASE_URL", "postgres:///x?host=/run/pg", "database_url", "postgres:///x?host=/run/pg"),
        ("DATABASE_URL", "postgresql://u@[::1]:5432/x", "database_url", "postgresql://u@[::1]:5432/x"),
    ],
)
def test_accepted(name: str, text: str, field: str, value: object) -> None:
    assert getattr(parse_config({name: text}), field) == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("BATCH_SIZE", "ten", "whole number from 1 to 100,000"),
        ("BATCH_SIZE", "0", "whole number from 1 to 100,000"),
        ("BATCH_SIZE", "1e3", "whole number from 1 to 100,000"),
        ("BATCH_SIZE", "9" * 30, "whole number from 1 to 100,000"),
        ("DB_POOL_SIZE", "-1", "whole number from 1 to 10,000"),
        ("FASTWORKER_PROCESSES", "1000", "whole number from 1 to 128"),
        ("FASTWORKER_HTTP_PORT", "70000", "0 to 65535, or off"),
        ("FASTWORKER_HTTP_PORT", "of", "0 to 65535, or off"),
        ("FASTWORKER_STREAM_FORMAT", "xml", "json, native, frame"),
        ("FASTWORKER_DERIVE", "ful", "full, core, or a list of"),
        ("FASTWORKER_LOG_FORMAT", "yaml", "human, json"),
        ("FASTWORKER_STREAM_BYTES_MAX", "2tb", "kb, mb or gb"),
        ("LOG_LEVEL", "loud", "DEBUG, INFO"),
        ("RELAY_URL", "ftp://relay", "wss://"),
        ("RELAY_URL", ",", "wss://"),
        ("REDIS_URL", "localhost:6379", "redis://"),
        ("REDIS_URL", "unix://", "unix://"),
        ("REDIS_URL", "redis://h:port", "redis://"),
        ("DATABASE_URL", "mysql://h/x", "postgresql://"),
        ("DATABASE_URL", "postgresql+asyncpg://h/x", "postgresql://"),
        ("DATABASE_URL", "host=h dbname", "postgresql://"),
        ("DATABASE_URL", "dbname=x", "postgresql://"),
        ("DATABASE_URL", "postgresql:///x", "postgresql://"),
        ("FASTWORKER_PLC_URL", "plc.directory", "https://"),
    ],
)
def test_refused_with_name_value_and_what_is_allowed(name: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({name: text})
    said = str(refusal.value)
    assert said.startswith(f"{name}={text!r} is refused:")
    assert allowed in said
    assert "\n" not in said
    assert refusal.value.exit_code == ExitCode.USAGE


def test_an_unknown_name_of_ours_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"FASTWORKER_PROCESES='4'.*did you mean FASTWORKER_PROCESSES\?"):
        parse_config({"FASTWORKER_PROCESES": "4"})
    with pytest.raises(ConfigError, match=r"QQQQ='1'.*the known ones are FASTWORKER_ACCOUNTS, "):
        parse_config({"FASTWORKER_QQQQ": "1"})
    with pytest.raises(ConfigError) as refusal:
        parse_config({"FASTWORKER_DB_PASSWORD": "hunter2"})
    assert "hunter2" not in str(refusal.value)


BROKEN = [
    "mysql://user:hunter2@host/x",
    "{}://user:hunt/er2@ho:st:5432/x",
    "{}://user:hunter2@p@host:port/x",
    "{}:// user:hunter2@host/x",
    "{}://:hunter2@",
    "{}//:hunter2@host?password=hunter2",
    "{}://user:hunter2",
    "{}://user:12/hunter2@host/0",
    "{}://user:a@b/hunter2@host/0",
    "{}://:hunter2",
    "{}://user:1?hunter2/x@host:1:2/0",
    "hunter2 password=hunter2",
    "host=h password='hunter2 hunter2",
    "password='x' hunter2@",
    "{}-sentinel://:hunter2@h:26379/mymaster",
    "{}://:hunter2@h1:port,h2",
]


@pytest.mark.parametrize("url", BROKEN)
@pytest.mark.parametrize(("name", "scheme"), [("DATABASE_URL", "postgresql"), ("REDIS_URL", "redis")])
def test_a_refused_url_never_shows_its_password(name: str, scheme: str, url: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({name: url.format(scheme)})
    said = str(refusal.value)
    assert "hunter2" not in said.replace("hunt/er2", "hunter2")
    assert "er2" not in said


def test_redact() -> None:
    assert redact("at postgresql://u:p@ss@h:1/x?sslpassword=p&a=b end") == (
        "at postgresql://u:***@h:1/x?sslpassword=***&a=b end"
    )
    assert redact("redis://:p@h") == "redis://:***@h"
    assert redact("at://did:plc:abc/app.bsky.feed.post/1") == "at://did:plc:abc/app.bsky.feed.post/1"


LINKS = {
    "FASTWORKER_PORT": "tcp://10.0.0.7:9400",
    "FASTWORKER_SERVICE_HOST": "10.0.0.7",
    "FASTWORKER_SERVICE_PORT": "9400",
    "FASTWORKER_SERVICE_PORT_HTTP": "9400",
    "FASTWORKER_SERVICE_PORT_HTTP_2": "9400",
    "FASTWORKER_PORT_9400_TCP": "tcp://10.0.0.7:9400",
    "FASTWORKER_PORT_9400_TCP_PROTO": "tcp",
    "FASTWORKER_PORT_9400_TCP_PORT": "9400",
    "FASTWORKER_PORT_9400_TCP_ADDR": "10.0.0.7",
    "FASTWORKER_READER_SERVICE_HOST": "fd00::8",
    "FASTWORKER_READER_PORT": "udp://[fd00::8]:9401",
    "FASTWORKER_READER_PORT_9401_UDP": "udp://[fd00::8]:9401",
    "FASTWORKER_READER_2_PORT_9401_SCTP_PROTO": "sctp",
    "FASTWORKER_NAME": "/python-worker/fastworker",
    "FASTWORKER_ENV_LOG_LEVEL": "",
    "FASTWORKER_READER_ENV_PATH": "/usr/bin:/bin",
    "FASTWORKER_HTTP_PORT": "tcp://10.0.0.9:80",
    "FASTWORKER_HTTP_SERVICE_HOST": "10.0.0.9",
}


def test_links_of_kubernetes_and_docker_are_no_settings() -> None:
    assert parse_config(LINKS) == Config()
    (said,) = remarks(LINKS)
    assert "FASTWORKER_ENV_LOG_LEVEL" in said
    assert f"{len(LINKS) - 3} more" in said
    assert remarks({"FASTWORKER_HTTP_PORT": "9400"}) == []


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("FASTWORKER_HTP_PORT", "1", "FASTWORKER_HTTP_PORT"),
        ("FASTWORKER_PORT", "9400", "FASTWORKER_HTTP_PORT"),
        ("FASTWORKER_HTTP_HOSTT", "10.0.0.7", "FASTWORKER_HTTP_HOST"),
        ("FASTWORKER_NAME", "x", "FASTWORKER_HOME"),
    ],
)
def test_what_only_looks_like_a_link_is_refused(name: str, value: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}='{value}' is not a setting.*{nearest}"):
        parse_config({**LINKS, name: value})
    with pytest.raises(ConfigError, match="FASTWORKER_HTTP_PORT"):
        parse_config({"FASTWORKER_HTTP_PORT": "http://10.0.0.7"})


def test_secrets_in_files(tmp_path: Path) -> None:
    path = tmp_path / "url"
    path.write_text("postgresql://u:p@h/x\n")
    config = parse_config({"DATABASE_URL_FILE": f" {path}", "DATABASE_URL": "", "REDIS_URL_FILE": ""})
    assert config.database_url == "postgresql://u:p@h/x"
    assert "DATABASE_URL" in config.given
    path.write_text("redis://:p@h\r\n")
    assert parse_config({"REDIS_URL_FILE": str(path)}).redis_url == "redis://:p@h"
    for wrong, why in (
        ({"DATABASE_URL_FILE": str(path), "DATABASE_URL": "postgresql://h/x"}, "both set"),
        ({"DATABASE_URL_FILE": str(tmp_path / "none")}, "No such file"),
        ({"DATABASE_URL_FILE": str(tmp_path)}, "directory"),
        ({"DATABASE_URL_FILE": str(path)}, "must start with"),
        ({"REDIS_URL_FILE": "/dev/null"}, "empty"),
    ):
        with pytest.raises(ConfigError, match=why) as refusal:
            parse_config(wrong)
        assert ":p@" not in str(refusal.value)


def test_an_environment_file(tmp_path: Path) -> None:
    path = tmp_path / "worker.env"
    path.write_bytes(
        b"\xef\xbb\xbf# of the old worker\r\nexport RELAY_URL=wss://bsky.network\nBATCH_SIZE=10 # each\n"
        b"PASSWORD='p$w#d'\nDATABASE_URL=\"postgresql://u:${PASSWORD}@h/x\"\n\nEMPTY=\nBARE\nREDIS_URL = redis://:a#b@h\n"
    )
    values = read_env_file(path)
    assert values == {
        "RELAY_URL": "wss://bsky.network",
        "BATCH_SIZE": "10",
        "PASSWORD": "p$w#d",
        "DATABASE_URL": "postgresql://u:p$w#d@h/x",
        "EMPTY": "",
        "REDIS_URL": "redis://:a#b@h",
    }
    for content, why in ((b"A=1\nB='open\n", "line 2"), (b"\xff=1", "not text"), (b"A=x\0y", "cannot be")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=why):
            read_env_file(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_env_file(tmp_path / "none")


@pytest.mark.parametrize("path", sorted((DOCS / "env").glob("*.env")), ids=lambda path: path.name)
def test_the_documented_files_start(path: Path) -> None:
    parse_config(read_env_file(path))


UNNAMED = {"limits", "drain_s", "scan_s", "lease_ms", "foreign_idle_ms", "abandoned_ms", "silence_floor_s"}
"""What tests shorten, and no operator needs: there is no variable for it."""


def test_every_field_is_declared_once_with_all_that_the_reference_shows() -> None:
    names = [variable.name for variable in VARIABLES]
    assert len(names) == len(set(names))
    assert {"given", *UNNAMED} == set(Config.__struct_fields__) - {variable.field for variable in VARIABLES}
    for variable in VARIABLES:
        assert variable.meaning, variable.name
        assert variable.allowed, variable.name
        assert variable.used_by, variable.name
        assert "|" not in variable.meaning + variable.allowed + variable.default, "would break the table"


def test_the_configuration_page_is_what_the_code_says() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert page == markdown(), "run: python -m fastworker.config > docs/configuration.md"


def test_what_the_old_worker_backfilled_is_named_once() -> None:
    env = {"BACKFILL_DAYS": "-1", "BACKFILL_BATCH_SIZE": "5", "BACKFILL_USE_IDLE": ""}
    parse_config(env)
    assert [line.split()[0] for line in remarks(env)] == ["BACKFILL_BATCH_SIZE"]
    assert "docs/history.md" in remarks(env)[0]


def test_collections() -> None:
    assert parse_config({"FASTWORKER_COLLECTIONS": "app.bsky.*, site.standard.document"}).collections == (
        "app.bsky.*",
        "site.standard.document",
    )
    with pytest.raises(ConfigError, match="is not the name of a collection"):
        parse_config({"FASTWORKER_COLLECTIONS": "app.bsky.*,posts"})
