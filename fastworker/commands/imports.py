"""`fastworker import`: repositories from CAR files into the tables, without a stream and without the network.

Nobody knows when a file was written, so its snapshot counts as (its revision, 0): older than every event that has no
revision, and than every deletion of its account. Whatever is newer on the stream or in the tables stays, in any order.
Signatures are not checked: a file is the operator's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, Unreachable, first_of
from fastworker.store.migrate import check as check_schema
from fastworker.sync.files import Car, Settings, settle_cars
from fastworker.sync.report import Report, unless_stopped
from fastworker.sync.settle import Settled


async def import_files(config: Config, paths: Sequence[Path], stop: asyncio.Event, *, dry_run: bool) -> ExitCode:
    """DONE when everything is in the tables (or was there), NO when a file could not be read or, dry, differs."""
    files = list(files_of(paths))
    if not files:
        raise ConfigError("There is no .car file to import")
    url = config.require_database_url("import")
    if problems := await check_schema(url):
        raise Unreachable("\n".join(problems))
    report = Report(dry_run=dry_run)
    settings = Settings(
        url, "fastworker-import", config.derive, config.collections, tuple(config.trusted_verifiers), dry_run
    )

    async def told(car: Car, became: Settled | str) -> None:
        if isinstance(became, str):
            report.failed(car.path, became)
        else:
            report.add(became)
            if became.refused:
                report.failed(car.path, became.refused)
        report.tell(len(files) - report.done)

    cars = [Car(str(path), _size(path)) for path in files]
    try:
        if not await unless_stopped(settle_cars(settings, cars, told), stop):
            report.stopped = f"{report.done} of {len(files)} files"
    except* StoreUnavailable as group:
        raise Unreachable(str(first_of(group))) from None
    return report.end()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # opening it will say why


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and every `.car` in the directories."""
    for path in paths:
        if path.is_dir():
            yield from sorted(one for one in path.iterdir() if one.suffix == ".car")
        else:
            yield path
