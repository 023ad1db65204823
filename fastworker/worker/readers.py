"""The pipelines of one process: they come and go with the partitions that it reads (worker/share.py)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from fastworker.errors import StreamUnavailable, Unreachable
from fastworker.stream.consumer import WorkerStream
from fastworker.stream.members import Look, Members
from fastworker.stream.partitions import Layout
from fastworker.worker.pipeline import Pipeline
from fastworker.worker.share import share_of
from fastworker.worker.suspects import Quiet

log = logging.getLogger(__name__)

RELEASE_S = 2.0


class Reader:
    """One pipeline and its consumer. `number`: no other one of the process has it."""

    def __init__(self, number: int, stream: WorkerStream, pipeline: Pipeline) -> None:
        self.number = number
        self.stream = stream
        self.pipeline = pipeline
        self.stopping = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


Make = Callable[[int, int], tuple[WorkerStream, Pipeline]]
"""Of a number and a partition."""


class Readers:
    """`follow` is called every second or so; it raises StreamUnavailable, and the next call goes on."""

    def __init__(self, members: Members, quiet: Quiet, make: Make, pipelines: int, max_stream_len: int) -> None:
        self.members = members
        self.layout = Layout()
        self.owned: Sequence[int] = (0,)
        self._quiet = quiet
        self._make = make
        self._pipelines = pipelines  # while there is one partition
        self._max_stream_len = max_stream_len
        self._helped: int | None = None
        self._all: list[Reader] = []
        self._group: asyncio.TaskGroup | None = None

    @property
    def streams(self) -> list[WorkerStream]:
        return [reader.stream for reader in self._all]

    @property
    def pipelines(self) -> list[Pipeline]:
        return [reader.pipeline for reader in self._all]

    @property
    def owned_streams(self) -> list[WorkerStream]:
        """One for each partition that is ours."""
        return list({one.partition: one for one in self.streams if one.partition in self.owned}.values())

    @property
    def names(self) -> str:
        """Of the consumers, and where there are several partitions, of which."""
        several = self.layout.known > 1
        return " ".join(f"{one.name}@{one.partition}" if several else one.name for one in self.streams)

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin to read, with what `follow` found so far, and at once with what it finds later."""
        self._group = group
        for reader in self._all:
            self._run(reader)

    def stop(self) -> list[asyncio.Task[None]]:
        """No intake from here on; the tasks end when what is held is settled."""
        for reader in self._all:
            reader.stopping.set()
        return [reader.task for reader in self._all if reader.task is not None]

    async def follow(self) -> None:
        """Read what is ours to read, and nothing else."""
        await self._release_ended()
        look = await self.members.look()
        wanted = {0: self._pipelines} if look is None else await self._settle(look)
        for partition, count in wanted.items():
            at_work = self._reading(partition)
            for reader in at_work[count:]:
                reader.stopping.set()
            for _ in range(count - len(at_work)):
                await self._begin(partition)
        for reader in self._all:
            if reader.stream.partition not in wanted:
                reader.stopping.set()

    async def _settle(self, look: Look) -> dict[int, int]:
        """How many pipelines each partition should have here."""
        self.layout = look.layout
        share = share_of(self.members.token, look, self._helped, max_stream_len=self._max_stream_len)
        for partition in share.give:
            if not any(reader.stream.partition == partition for reader in self._all):
                await self.members.give(partition)
        taken = await self.members.take(share.take)
        self.owned = sorted([*share.keep, *taken])
        self._helped = share.help
        here = self.owned if share.help is None else [*self.owned, share.help]
        return dict.fromkeys(here, max(1, self._pipelines // max(1, len(here))))

    def _reading(self, partition: int) -> list[Reader]:
        return [one for one in self._all if one.stream.partition == partition and not one.stopping.is_set()]

    async def _begin(self, partition: int) -> None:
        taken = {reader.number for reader in self._all}
        number = next(n for n in range(len(taken) + 1) if n not in taken)
        stream, pipeline = self._make(number, partition)
        reader = Reader(number, stream, pipeline)
        try:
            await stream.acquire()
        except BaseException:
            self._quiet.members.remove(pipeline)
            raise
        self._all.append(reader)
        if self._group is not None:
            self._run(reader)

    def _run(self, reader: Reader) -> None:
        assert self._group is not None
        name = f"pipeline {reader.stream.name} of {reader.stream.stream_key}"
        reader.task = self._group.create_task(reader.pipeline.run(reader.stopping), name=name)

    async def _release_ended(self) -> None:
        for reader in list(self._all):
            if reader.task is not None and reader.task.done():
                await reader.stream.release()
                self._all.remove(reader)
                self._quiet.members.remove(reader.pipeline)

    async def release(self) -> None:
        """Give names and partitions back, so that a successor need not wait for the leases to end.

        A commit of ours may still be on its way. A worker that took over at once could finish before it, and nobody
        would look back after it. So a consumer whose last write has no known end keeps its lease until it expires.
        """
        for reader in self._all:
            name = f"The lease of {reader.stream.name}"
            if reader.pipeline.is_unsure:
                log.warning("%s ends by itself: it is not known how its last write ended", name)
                continue
            try:
                async with asyncio.timeout(RELEASE_S):
                    await reader.stream.release()
            except (StreamUnavailable, Unreachable, TimeoutError) as error:
                log.warning("%s ends by itself: %s", name, error)
                return
        try:
            async with asyncio.timeout(RELEASE_S):
                await self.members.leave()
        except (StreamUnavailable, Unreachable, TimeoutError) as error:
            log.warning("Others take this process's partitions over in a few seconds: %s", error)
