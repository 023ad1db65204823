"""DATABASE_URL and REDIS_URL: what libpq and redis-py take, and what hosting consoles write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args  # type: ignore[attr-defined]

from fastworker.urls import place_of, postgres, redis


def asyncpg_of(text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Addresses and parameters, as the driver understands what it is given."""
    monkeypatch.setenv("PGPASSFILE", "/nonexistent")
    names = (
        *("host", "port", "user", "password", "passfile", "database", "ssl", "service", "servicefile", "direct_tls"),
        *("server_settings", "target_session_attrs", "krbsrvname", "gsslib"),
    )
    found: tuple[Any, Any] = _parse_connect_dsn_and_args(dsn=postgres(text).url, **dict.fromkeys(names))
    return found


@pytest.mark.parametrize(
    ("text", "addresses", "user", "password", "database"),
    [
        ("postgresql://u:p@h/db", [("h", 5432)], "u", "p", "db"),
        ("POSTGRES://u:p@h:6/db", [("h", 6)], "u", "p", "db"),
        ("postgresql://u:p%40%2F%23@h/d%20b", [("h", 5432)], "u", "p@/#", "d b"),
        ("postgresql://u:p#w?x@h/db", [("h", 5432)], "u", "p#w?x", "db"),
        ("postgresql://u:p@ss@h/db", [("h", 5432)], "u", "p@ss", "db"),
        ("postgresql://u:100%@h/db", [("h", 5432)], "u", "100%", "db"),
        ("postgresql://u:a+b@h/db", [("h", 5432)], "u", "a+b", "db"),
        ("postgresql://h/db?user=u&password=a+b&port=6", [("h", 6)], "u", "a+b", "db"),
        ("postgresql://u:p@h", [("h", 5432)], "u", "p", "u"),
        ("postgresql://u:p@h1:1,h2:2/db", [("h1", 1), ("h2", 2)], "u", "p", "db"),
        ("postgresql://u:p@h1,h2:2/db", [("h1", 5432), ("h2", 2)], "u", "p", "db"),
        ("postgresql://u:p@h1,h2/db?port=7", [("h1", 7), ("h2", 7)], "u", "p", "db"),
        ("postgresql://u:p@[::1]:1,[::2]:2/db", [("::1", 1), ("::2", 2)], "u", "p", "db"),
        ("postgresql://u:p@[::1]/db", [("::1", 5432)], "u", "p", "db"),
        ("postgresql://u:p@/db?host=a,b&port=1,2", [("a", 1), ("b", 2)], "u", "p", "db"),
        ("postgresql://u@/db?host=/run/pg", ["/run/pg/.s.PGSQL.5432"], "u", None, "db"),
        ("postgresql://u@%2Frun%2Fpg:6/db", ["/run/pg/.s.PGSQL.6"], "u", None, "db"),
        ("postgresql://u@/?host=/run/pg,h", ["/run/pg/.s.PGSQL.5432", ("h", 5432)], "u", None, "u"),
        ("postgresql://u@/db?hostaddr=10.0.0.1", [("10.0.0.1", 5432)], "u", None, "db"),
        ("host=h user=u dbname=db password='a b\\'c\\\\d'", [("h", 5432)], "u", "a b'c\\d", "db"),
        ("host=a,b port=1,2 user=u password=p\\ q dbname = db", [("a", 1), ("b", 2)], "u", "p q", "db"),
        ("user=u host=/run/pg dbname=''", ["/run/pg/.s.PGSQL.5432"], "u", None, "u"),
        ("host=::1 user=u port=6 dbname=db", [("::1", 6)], "u", None, "db"),
    ],
)
def test_what_the_driver_makes_of_it(
    text: str, addresses: Any, user: str, password: str | None, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, params = asyncpg_of(text, monkeypatch)
    assert (found, params.user, params.password, params.database) == (addresses, user, password, database)
    assert not params.server_settings


OF_LIBPQ = "channel_binding connect_timeout keepalives keepalives_idle gssencmode application_name load_balance_hosts"
OF_OTHERS = "schema pgbouncer connection_limit statement_cache_size uselibpqcompat prepareThreshold"


@pytest.mark.parametrize("name", [*OF_LIBPQ.split(), *OF_OTHERS.split()])
def test_options_without_effect_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert postgres(f"postgresql://h/x?{name}=1&sslmode=disable").unused == (name,)
    assert postgres(f"host=h {name}=1").unused == (name,)
    assert not asyncpg_of(f"postgresql://u@h/x?{name}=1", monkeypatch)[1].server_settings


def test_options_with_effect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "postgresql://u@h/x?sslmode=require&target_session_attrs=read-write&options=-c%20geqo%3Doff&work_mem=8MB"
    assert postgres(text).unused == ()
    _, params = asyncpg_of(text, monkeypatch)
    assert params.server_settings == {"options": "-c geqo=off", "work_mem": "8MB"}
    assert params.target_session_attrs == "read-write"
    assert params.sslmode.name == "require"
    assert asyncpg_of("postgresql://u@h/x?ssl=true", monkeypatch)[1].sslmode.name == "require"
    assert postgres("postgresql://h/x?schema=public&sslmode=").unused == ()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "all.pem"))
    (tmp_path / "all.pem").touch()
    system = postgres("postgresql://h/x?sslrootcert=system").url
    assert "sslmode=verify-full" in system
    assert "all.pem" in system


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("postgresql://u:p@h:1,h:2,h:3/db?port=1,2", "names 3 hosts, but 2 ports"),
        ("postgresql://u:p@/db", "names no host"),
        ("postgresql://u:p@a,,b/db", "names no host"),
        ("postgresql://u:p@h:0/db", "host or port"),
        ("postgresql://u:p@h:65536/db", "host or port"),
        ("postgresql://u:p@::1/db", "host or port"),
        ("postgresql://u:p/q@h/db", "percent-encoded"),
        ("postgresql://u:1/q@h/db", "percent-encoded"),
        ("postgresql://h/db?sslmode=no-verify", "sslmode is none of disable"),
        ("postgresql://h/db?target_session_attrs=master", "none of any"),
        ("postgresql://h/db?sslrootcert=/nonexistent.pem", "sslrootcert names no file"),
        ("postgresql://h/db?sslmode", "has no value"),
        ("host=h dbname", "key=value"),
        ("host=h password='a", "key=value"),
    ],
)
def test_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        postgres(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("postgresql://u:p@H.example/db", "h.example:5432"),
        ("postgresql://u:p@[::1]:6/db", "[::1]:6"),
        ("postgresql://u:p@a:1,b:2/db?sslmode=require", "a:1 or b:2"),
        ("postgresql://u:p@/db?host=/run/pg", "the socket in /run/pg"),
        ("service=main password=p", "its service main"),
    ],
)
def test_where_it_leads(text: str, place: str) -> None:
    assert place_of(postgres(text).url) == place


@pytest.mark.parametrize(
    ("text", "url", "unused"),
    [
        ("redis://localhost:6379", "redis://localhost:6379", ()),
        ("rediss://u:p%40%2F%23@h:6380/0", "rediss://u:p%40%2F%23@h:6380/0", ()),
        ("redis://:p@ss@h", "redis://:p@ss@h", ()),
        ("redis://[::1]:1/", "redis://[::1]:1/", ()),
        ("valkeys://h", "rediss://h", ()),
        ("REDIS://h?db=3", "redis://h?db=3", ()),
        ("redis://h?family=0&protocol=3&decode_responses=yes", "redis://h", ("family", "protocol", "decode_responses")),
        ("rediss://h?ssl_cert_reqs=CERT_NONE", "rediss://h?ssl_cert_reqs=none", ()),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1", ()),
        ("valkey+sentinel://u:p@a,b:1,c/main/2", "redis+sentinel://u:p@a,b:1,c/main/2", ()),
        ("redis+cluster://u:p@a,b:1/0", "redis+cluster://u:p@a,b:1/0", ()),
        ("rediss+Sentinel://a/m?sentinel_password=x&hz=1", "rediss+sentinel://a/m?sentinel_password=x", ("hz",)),
    ],
)
def test_redis(text: str, url: str, unused: tuple[str, ...]) -> None:
    found = redis(text)
    assert (found.url, found.unused) == (url, unused)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("redis+sentinel://h:26379", "names no master"),
        ("redis+sentinel://h:26379/main/x", "number of a database"),
        ("redis+sentinel://h:26379,/main", "names no host"),
        ("unix+sentinel://h/main", "must start with redis://"),
        ("redis+cluster://a,b/1", "no other database than 0"),
        ("redis+cluster://a:1,,b", "names no host"),
        ("redis://a:1,b:2", "several servers"),
        ("redis://:p#w@h", "percent-encoded"),
        ("redis://u:12/w@h", "percent-encoded"),
        ("redis://u:p?w@h", "percent-encoded"),
        ("redis://h/zero", "number of a database"),
        ("redis://h?db=x", "db is not a number"),
        ("redis://h?ssl=true", "rediss://"),
        ("redis://h?ssl_ca_certs=x", "rediss://"),
        ("redis://h:99999", "host or port"),
        ("http://h", "must start with redis://"),
    ],
)
def test_redis_refused_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        redis(text)
