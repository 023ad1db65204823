"""`fastworker import`: repositories from CAR files into the tables, without a stream and without the network.

Nobody knows when a file was written, so its snapshot counts as (its revision, 0): older than every event that has no
revision, and than every deletion of its account. Whatever is newer on the stream or in the tables stays, in any order.
Signatures are not checked: a file is the operator's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, Unreachable
from fastworker.event.proof import Unproved
from fastworker.event.repository import Repository
from fastworker.store.migrate import check as check_schema
from fastworker.store.store import Store
from fastworker.store.stored import open_stored
from fastworker.sync.settle import Report, Settle, unless_stopped
from fastworker.table.snapshot import Snapshot, tid_moment


async def import_files(config: Config, paths: Sequence[Path], stop: asyncio.Event, *, dry_run: bool) -> ExitCode:
    """DONE when everything is in the tables (or was there), NO when a file could not be read or, dry, differs."""
    files = list(files_of(paths))
    if not files:
        raise ConfigError("There is no .car file to import")
    url = config.require_database_url("import")
    if problems := await check_schema(url):
        raise Unreachable("\n".join(problems))
    store = None
    report = Report(dry_run=dry_run)
    try:
        if not dry_run:
            store = await Store.connect(url, pool_size=1, application_name="fastworker-import", derive=config.derive)
        async with open_stored(url) as stored:
            settle = Settle(stored, store)
            for number, path in enumerate(files, 1):
                if not await unless_stopped(_import(settle, path, report), stop):
                    report.stopped = f"{number - 1} of {len(files)} files"
                    break
                report.tell(len(files) - number)
            while store is not None and await store.maintain():
                pass
    except StoreUnavailable as error:
        raise Unreachable(str(error)) from error
    finally:
        if store is not None:
            await store.close()
    return report.end()


async def _import(settle: Settle, path: Path, report: Report) -> None:
    try:
        with Repository(path) as repository:
            repository.check()
            commit = repository.commit
            taken_at = tid_moment(commit.rev)
            now = datetime.now(UTC).replace(tzinfo=None)
            snapshot = Snapshot(commit.did, commit.rev, 0, min(taken_at or now, now))
            settled = await settle.settle(repository, snapshot, accept_older=False)
    except (Unproved, OSError) as error:
        report.failed(str(path), str(error))
        return
    report.add(settled)
    if settled.refused:
        report.failed(str(path), settled.refused)


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and every `.car` in the directories."""
    for path in paths:
        if path.is_dir():
            yield from sorted(one for one in path.iterdir() if one.suffix == ".car")
        else:
            yield path
