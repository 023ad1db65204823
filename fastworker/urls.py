"""The two URLs that name servers, read once: what libpq and redis-py take, made into what our drivers take. Pure.

Hosting consoles write options into these URLs that only some drivers know. Each is used, or listed in `unused`, so that
one line of the log can say that it has no effect. What remains of DATABASE_URL's options are settings of PostgreSQL,
sent to the server as asyncpg does. Words about a URL never quote it: any part of it may be a password.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import msgspec

ENCODE: Final = "a user name or password with one of / : @ ? # % must be percent-encoded"


class Server(msgspec.Struct, frozen=True):
    """`url`: for the driver. `unused`: names of options that have no effect here."""

    url: str
    unused: tuple[str, ...] = ()


_POSTGRES_SCHEMES: Final = ("postgresql", "postgres")
_USED: Final = (
    *("user", "password", "passfile", "service", "sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl"),
    *("sslpassword", "sslnegotiation", "ssl_min_protocol_version", "ssl_max_protocol_version"),
    *("target_session_attrs", "krbsrvname", "gsslib"),
)
"""Options of libpq that asyncpg takes as they are, beside host, port and dbname."""
_UNUSED: Final = frozenset(
    {
        # libpq's; application_name is ours, the encoding is the driver's, connections have time limits of our own
        *("application_name", "fallback_application_name", "client_encoding", "connect_timeout", "hostaddr"),
        *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
        *("channel_binding", "require_auth", "requirepeer", "scram_client_key", "scram_server_key", "gssencmode"),
        *("gssdelegation", "load_balance_hosts", "replication", "servicefile", "sslcertmode", "sslcompression"),
        *("sslcrldir", "sslkeylogfile", "sslsni", "min_protocol_version", "max_protocol_version"),
        *("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope"),
        # of other drivers and tools: Prisma, node-postgres, SQLAlchemy, pgx, JDBC, Supabase
        *("schema", "pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "statement_cache_size"),
        *("prepared_statement_cache_size", "sslaccept", "sslidentity", "uselibpqcompat", "binary_parameters"),
        *("prepareThreshold", "currentSchema", "pool_mode", "pool_max_conns", "pool_min_conns", "pool_size"),
        *("default_query_exec_mode", "statement_cache_capacity", "supa", "workaround", "encoding"),
    }
)
_CHOICES: Final = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": ("any", "primary", "standby", "prefer-standby", "read-write", "read-only"),
}
_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


def postgres(text: str) -> Server:
    """`postgresql://` as libpq reads it, several hosts and all, or `key=value` words. ValueError says what is wrong."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme.lower() in _POSTGRES_SCHEMES:
        options = _of_uri(rest)
    elif re.match(r"\s*\w+\s*=", text):
        scheme, options = "postgresql", dict(_of_words(text))
    else:
        raise ValueError("it must start with postgresql:// or postgres://")
    options = {name: value for name, value in options.items() if value}
    if options.pop("ssl", "") in ("true", "1", "require"):
        options.setdefault("sslmode", "require")
    if options.get("schema") == "public":
        del options["schema"]  # as it is
    if "hostaddr" in options and "host" not in options:
        options["host"] = options.pop("hostaddr")
    options.setdefault("dbname", options.pop("database", ""))
    _certificates(options)
    for name, allowed in _CHOICES.items():
        if options.get(name, allowed[0]) not in allowed:
            raise ValueError(f"its {name} is none of {', '.join(allowed)}")
    unused = tuple(name for name in options if name in _UNUSED)
    return Server(_for_asyncpg(scheme.lower(), options), unused)


def _of_uri(rest: str) -> dict[str, str]:
    """The options that a URI stands for. As in libpq `#` is nothing special, and `+` is no space."""
    if re.search(r"\s", rest):
        raise ValueError("it contains white space")
    before_path = rest.partition("/")[0]
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    if "@" not in authority and "@" in before_path:
        authority = before_path  # a ? in the password
    path, _, query = rest[len(authority) :].partition("?")
    if "@" in path or ("@" in query.partition("=")[0]):
        raise ValueError(f"its host cannot be read ({ENCODE})")
    userinfo, _, hosts = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    options = {"user": unquote(user), "password": unquote(password), "dbname": unquote(path.removeprefix("/"))}
    options["host"], options["port"] = _hosts(hosts)
    for pair in filter(None, query.split("&")):
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError("one of its options has no value")
        options[unquote(name)] = unquote(value)
    return options


def _hosts(text: str) -> tuple[str, str]:
    """Hosts and ports of an authority, as libpq's `host` and `port` have them."""
    hosts, ports = [], []
    for spec in text.split(","):
        found = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(.*))?", spec)
        if found is None:
            raise ValueError(f"its host or port cannot be read ({ENCODE})")
        hosts.append(unquote(found[1].strip("[]")))
        ports.append(unquote(found[2] or ""))
    if any(ports) and not all(ports):
        ports = [port or "5432" for port in ports]
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


_WORD: Final = re.compile(r"\s*(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?=\s|$)", re.DOTALL)


def _of_words(text: str) -> Iterator[tuple[str, str]]:
    """`host=h dbname=x password='it''s'`, quoted and escaped as libpq has it."""
    at = 0
    while text[at:].strip():
        found = _WORD.match(text, at)
        if found is None:
            raise ValueError("one of its key=value words cannot be read (a value with spaces needs '...')")
        yield found[1], re.sub(r"\\(.)", r"\1", found[2] if found[2] is not None else found[3], flags=re.DOTALL)
        at = found.end()


def _certificates(options: dict[str, str]) -> None:
    """Files that cannot be read are refused here, in words; `system` is the system's own authorities."""
    if options.get("sslrootcert") == "system":
        options["sslrootcert"] = ssl.get_default_verify_paths().cafile or ""
        options.setdefault("sslmode", "verify-full")
        if not options["sslrootcert"]:
            raise ValueError("its sslrootcert=system finds no authorities: SSL_CERT_FILE must name their file")
    for name in _FILES:
        if name in options and not Path(options[name]).expanduser().is_file():
            raise ValueError(f"its {name} names no file")


def _for_asyncpg(scheme: str, options: dict[str, str]) -> str:
    hosts, ports = options.get("host", "").split(","), options.get("port", "").split(",")
    if not all(re.fullmatch(r"|\d{1,5}", port) and int(port or 1) in range(1, 65_536) for port in ports):
        raise ValueError(f"its host or port cannot be read ({ENCODE})")
    if len(ports) not in (1, len(hosts)):
        raise ValueError(f"it names {len(hosts)} hosts, but {len(ports)} ports")
    if not all(hosts) and "service" not in options:
        raise ValueError("it names no host")
    bracketed = [f"[{host}]" if ":" in host and not host.startswith("/") else host for host in hosts]
    # One host goes where people look for it; several, and sockets, where only asyncpg looks.
    plain = len(hosts) == 1 and not hosts[0].startswith("/")
    userinfo = ":".join(quote(options[name], safe="") for name in ("user", "password") if name in options)
    if "password" in options and "user" not in options:
        userinfo = f":{userinfo}"
    place = "".join(quote(host, safe="[]:") for host in bracketed) if plain else ""
    if plain and ports[0]:
        place += f":{ports[0]}"
    extra = {} if plain else {"host": ",".join(bracketed), "port": ",".join(ports) if any(ports) else ""}
    known = {"host", "port", "dbname", "user", "password"}
    extra |= {name: value for name, value in options.items() if name not in _UNUSED | known}
    query = "&".join(f"{quote(name, safe='')}={quote(value, safe='/,[]:')}" for name, value in extra.items() if value)
    database = quote(options["dbname"], safe="")
    return (
        f"{scheme}://{userinfo}{'@' if userinfo else ''}{place}"
        f"{'/' if database or not (userinfo or place) else ''}{database}{'?' if query else ''}{query}"
    )


def place_of(url: str) -> str:
    """Where `postgres(...).url` leads, without user and password, for a sentence."""
    parts = urlsplit(url)
    options = dict(pair.split("=", 1) for pair in parts.query.split("&") if pair)
    if parts.hostname:
        host = f"[{parts.hostname}]" if ":" in parts.hostname else unquote(parts.hostname)
        return f"{host}:{parts.port or 5432}"
    if "host" not in options:
        return f"its service {unquote(options.get('service', ''))}".rstrip()
    hosts, ports = unquote(options["host"]).split(","), options.get("port", "5432").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    places = [
        f"the socket in {host}" if host.startswith("/") else f"{host}:{port}"
        for host, port in zip(hosts, ports, strict=True)
    ]
    return " or ".join(places)


_REDIS_SCHEMES: Final = {"valkey": "redis", "valkeys": "rediss"}
_REDIS_USED: Final = re.compile(r"db|(sentinel_)?(username|password)|ssl_\w+")


def redis(text: str) -> Server:
    """`redis://`, `rediss://` (TLS), `unix://`, or either of the first two with `+sentinel` (stream/sentinel.py)
    or `+cluster` (stream/cluster.py); those of Valkey mean the same. ValueError says what is wrong."""
    scheme, separator, rest = text.partition("://")
    scheme, plus, by = scheme.lower().partition("+")
    scheme = _REDIS_SCHEMES.get(scheme, scheme)
    if (
        not separator
        or scheme not in ("redis", "rediss", "unix")
        or (plus and (by not in ("sentinel", "cluster") or scheme == "unix"))
    ):
        raise ValueError("it must start with redis:// or rediss:// or unix:// or redis+sentinel:// or redis+cluster://")
    if re.search(r"\s", rest):
        raise ValueError("it contains white space")
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    hosts = authority.rpartition("@")[2]
    if "#" in rest or "@" in path or ("@" in query and "@" not in authority) or "@" in query.partition("=")[0]:
        raise ValueError(f"its host cannot be read ({ENCODE})")
    if by == "sentinel":
        _sentinels(hosts, path)
    elif by == "cluster":
        for host in hosts.split(","):
            _redis_place(host, "")
        if path.strip("/0"):
            raise ValueError("a cluster has no other database than 0")
    elif "," in hosts:
        raise ValueError("it names several servers: name one, or use redis+sentinel:// or redis+cluster://")
    elif scheme == "unix":
        if not path.strip("/"):
            raise ValueError("it names no socket path")
    else:
        _redis_place(hosts, path)
    kept, unused = _redis_options(scheme, query)
    return Server(f"{scheme}{plus}{by}://{before}{'?' if kept else ''}{kept}", unused)


def _sentinels(hosts: str, path: str) -> None:
    master, _, database = path.partition("/")
    for host in hosts.split(","):
        _redis_place(host, database)
    if not master:
        raise ValueError("it names no master: redis+sentinel://host,host,host/MASTER")


def _redis_place(hosts: str, path: str) -> None:
    found = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]*)(?::(\d{0,5}))?", hosts)
    if found is None or int(found[2] or 0) > 65_535:
        raise ValueError(f"its host or port cannot be read ({ENCODE})")
    if not found[1]:
        raise ValueError("it names no host")
    if not re.fullmatch(r"\d*/?", path):
        raise ValueError("what follows its host is not the number of a database")


def _redis_options(scheme: str, query: str) -> tuple[str, tuple[str, ...]]:
    """The query for redis-py, and the names that it leaves out."""
    kept, unused = [], []
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        if name in ("ssl", "tls") and value.lower() in ("true", "1", "yes", "on") and scheme == "redis":
            raise ValueError("TLS is asked for by rediss://, not by an option")
        if name.startswith("ssl_") and scheme != "rediss":
            raise ValueError("its ssl_ options need rediss://")
        if name == "db" and not value.isdigit():
            raise ValueError("its db is not a number")
        if not _REDIS_USED.fullmatch(name):
            unused.append(unquote(name))
        elif name == "ssl_cert_reqs":
            kept.append(f"{name}={value.lower().removeprefix('cert_')}")
        else:
            kept.append(pair)
    return "&".join(kept), tuple(unused)
