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
from fastworker.store.chosen_accounts import read_accounts
from fastworker.store.migrate import check as check_schema
from fastworker.store.repos import open_queue
from fastworker.sync.files import Car, Settings, settle_cars
from fastworker.sync.report import Report, unless_stopped
from fastworker.sync.settle import Settled
from fastworker.table.chosen import chosen_accounts


async def import_files(config: Config, paths: Sequence[Path], stop: asyncio.Event, *, dry_run: bool) -> ExitCode:
    """DONE when everything is in the tables (or was there), NO when a file could not be read or, dry, differs."""
    files = list(files_of(paths))
    if not files:
        raise ConfigError("There is no .car file to import")
    url = config.require_database_url("import")
    if problems := await check_schema(url):
        raise Unreachable("\n".join(problems))
    await read_whose(config, url)
    report = Report(dry_run=dry_run)
    settings = Settings(
        url,
        "fastworker-import",
        config.rules,
        config.collections,
        chosen_accounts(),
        dry_run,
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


async def read_whose(config: Config, url: str) -> None:
    """Whose records are kept. Raises ConfigError and Unreachable."""
    if config.accounts is None:
        return
    try:
        async with open_queue(url) as queue:
            await read_accounts(config.accounts, queue.followed)
    except StoreUnavailable as error:
        raise Unreachable(str(error)) from None


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
