"""The hot path of a reader: each frame of a relay decoded, judged, encoded and put into the outbox, in order."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from typing import Any, Final

import orjson

from fastworker.config import Config
from fastworker.errors import InvalidEvent, Reason, StoppedItself
from fastworker.event import Commit, ErrorFrame, Event, Identity, Info, Sync, Unknown, account_of
from fastworker.event.entry import encode_frame_entry, encode_json, encode_native
from fastworker.event.frame import open_frame, read_frame
from fastworker.reader.dashboard import Dashboard
from fastworker.reader.filter import Filter
from fastworker.reader.gate import SEQ_JUMP, Gate, Jump
from fastworker.reader.outbox import Outbox
from fastworker.reader.relay import RelayLost, Subscription
from fastworker.reader.stats import ReaderStats
from fastworker.reader.verify import Verifier
from fastworker.stream.chunk import Chunk
from fastworker.stream.feed import Feed
from fastworker.stream.partitions import partition_of

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 2_000_000
TURN_S: Final = 0.008  # of decoding at a stretch, before the loop gets its turn
SET_ASIDE_PER_MINUTE: Final = 100
"""Malformed frames kept in the dead letters; beyond, they are counted only, so that a broken relay cannot push
the workers' dead letters out."""
SET_ASIDE_BYTES: Final = 65_536


class TooFar(Exception):
    """Frames that are good may have been passed over together with one that is too large."""


class Receiver:
    def __init__(self, settings: Config, feed: Feed, stats: ReaderStats, dashboard: Dashboard) -> None:
        self.gate = Gate()
        self.outbox = Outbox(feed.chunk_items, CHUNK_BYTES)
        self.last_seq: int | None = None  # newest in the outbox or beyond it
        self.gap: dict[str, Any] | None = None  # to be recorded with the next seq
        self.places: list[int] = []  # seqs, the lowest first, at which a chunk has to end
        self.events = 0  # frames with a seq: what else comes is no sign of life
        self.verifier: Verifier | None = None
        self.filter: Filter | None = None
        self._settings = settings
        self._feed = feed
        self._stats = stats
        self._dashboard = dashboard
        self._set_aside_until = 0.0
        self._set_aside_left = 0

    def empty(self) -> None:
        """What was not appended belongs to the next reader, who starts from the cursor."""
        self.outbox = Outbox(self._feed.chunk_items, CHUNK_BYTES)

    async def run(self, subscription: Subscription) -> None:
        """The hot path: every frame of one connection, in order."""
        stats, outbox, host = self._stats, self.outbox, subscription.host
        gate = self.gate
        receive, put, clock = subscription.receive, outbox.put, time.perf_counter
        worked_s, began = 0.0, clock()
        while True:
            # While there are frames and room, nothing below gives the loop its turn: lease and heartbeat need it.
            worked_s += clock() - began
            if worked_s >= TURN_S:
                await asyncio.sleep(0)
                worked_s = 0.0
            data = await receive()
            began = clock()
            stats.frames += 1
            stats.bytes += len(data)
            try:
                header, payload = open_frame(data)
                frame = read_frame(header, payload, host)
                if isinstance(frame, Info | ErrorFrame):
                    self._told(frame, host)
                    continue
                seq, last = frame.seq, self.last_seq
                if seq is not None:
                    self.events += 1
                    if last is not None and seq <= last:
                        stats.duplicates += 1
                        continue
                    if self.gap is not None and gate.is_too_far():
                        raise TooFar
                if self.places and seq is not None and seq > self.places[0]:
                    await self._end_chunk(seq)
                if seq is not None and last is not None and (gate.doubted or (last and seq - last > SEQ_JUMP)):
                    self._judge_jump(seq, last, data, host)  # last 0: all there is
                    if gate.doubted is not None:
                        continue
                if isinstance(frame, Unknown):
                    self.drop(Reason.UNKNOWN_KIND)
                else:
                    self._put_event(frame, payload, data)
            except InvalidEvent as invalid:
                self._put_malformed(data, invalid)
                seq = None
            else:
                gate.good()
            chunk = outbox.filling
            if seq is not None:
                self.last_seq = chunk.seq = seq
                if self.gap is not None:
                    chunk.gap(orjson.dumps({**self.gap, "resumed": seq}))
                    self.gap = None
                    gate.no_skip()
                gate.passed()
            await put()
            if gate.gives_up():
                raise RelayLost("too many malformed frames in a row")

    async def _end_chunk(self, seq: int) -> None:
        while self.places and seq > self.places[0]:
            self.places.pop(0)
        # mutant: a chunk goes beyond the place where a slot is
        if self.outbox.filling.items or self.outbox.filling.seq is not None:
            await self.outbox.seal()

    def _judge_jump(self, seq: int, last: int, data: bytes, host: str) -> None:
        verdict, (high, waited) = self.gate.jump(seq, last, data, is_announced=self.gap is not None)
        if verdict in (Jump.MALFORMED, Jump.BOTH_WRONG):
            log.error("A frame of %s jumps from seq %d to %d, and the next one is %d: malformed", host, last, high, seq)
            self._put_malformed(waited, InvalidEvent(Reason.BAD_FRAME, f"seq {high} between {last} and {seq}"))
        if verdict is not Jump.GAP:
            return
        log.error("%s jumps from seq %d to %d and goes on there: a gap, recorded in fastworker:gaps", host, last, high)
        self.note_gap("seq_jump")
        self.outbox.filling.gap(orjson.dumps({**(self.gap or {}), "resumed": high}))
        self.gap = None
        header, payload = open_frame(waited)
        frame = read_frame(header, payload, host)
        assert not isinstance(frame, Info | ErrorFrame)
        if isinstance(frame, Unknown):
            self.drop(Reason.UNKNOWN_KIND)
        else:
            self._put_event(frame, payload, waited)

    def _put_event(self, event: Event, payload: dict[str, Any], data: bytes) -> None:
        stats, verifier = self._stats, self.verifier
        if isinstance(event, Commit):
            stats.commits += 1
            if verifier is not None:
                verifier.put(self.outbox.filling, event, payload, data)
                return
        elif isinstance(event, Sync):
            stats.syncs += 1
            if verifier is not None:
                verifier.sync(event, payload)
        elif isinstance(event, Identity):
            stats.identities += 1
            if verifier is not None and verifier.keys is not None:
                verifier.keys.changed(event.did)
        else:
            stats.accounts += 1
        self.deliver(self.outbox.filling, event, data)

    def deliver(self, chunk: Chunk, event: Event, data: bytes | None) -> None:
        """Into the chunk, in the stream's form. `data`: its frame; None where the event is not all that the frame says.

        Such an event has the native form beside frames: all who read the one read the other.
        """
        form = self._settings.stream_format
        if isinstance(event, Commit):
            if not event.ops and not event.drops:
                self._stats.empty += 1
                return
            if self.filter is not None and (kept := self.filter.kept(event)) is not event:
                event, data = kept, None
                if not event.ops and not event.drops:
                    return
            if event.ops:
                self._dashboard.note(event)
        elif not isinstance(event, Sync):
            self._dashboard.note(event)
        if form == "frame" and data is not None:
            chunk.entry(encode_frame_entry(data, event.relay), self._partition_of(event))
        elif form != "json":
            chunk.entry(encode_native(event), self._partition_of(event))
        elif isinstance(event, Sync):
            told = {"rev": event.rev, "seq": event.seq, "relay": event.relay, "time": event.time}
            chunk.repair(event.did, orjson.dumps(told))
        else:
            fields = encode_json(event)
            assert fields is not None  # only a #sync has no JSON form
            chunk.entry(fields)

    def _partition_of(self, event: Event) -> int:
        partitions = self._feed.partitions
        return partition_of(account_of(event), partitions) if partitions > 1 else 0

    def _put_malformed(self, data: bytes, invalid: InvalidEvent) -> None:
        self.gate.malformed()
        self.drop(invalid.reason)
        now = time.monotonic()
        if now > self._set_aside_until:
            self._set_aside_until, self._set_aside_left = now + 60, SET_ASIDE_PER_MINUTE
        if not self._set_aside_left:
            return
        self._set_aside_left -= 1
        self._stats.set_aside += 1
        kept = base64.b64encode(data[:SET_ASIDE_BYTES])
        cut = f" (the first {SET_ASIDE_BYTES} of {len(data)} bytes)" if len(data) > SET_ASIDE_BYTES else ""
        log.debug("Malformed frame of %d bytes set aside: %s", len(data), invalid)
        self.outbox.filling.dead_letter(
            [
                (b"type", b"frame"),
                (b"data", kept),
                (b"seq", b""),
                (b"origId", b""),
                (b"deliveries", b"0"),
                (b"reason", invalid.reason.encode()),
                (b"error", f"{invalid.detail}{cut}".encode("utf-8", "replace")),
                (b"form", b"frame"),
                (b"consumer", b"reader"),
                (b"setAsideAt", str(int(time.time() * 1000)).encode()),
            ]
        )

    def _told(self, frame: Info | ErrorFrame, host: str) -> None:
        """What the relay says about the stream itself."""
        if isinstance(frame, Info):
            if frame.name == "OutdatedCursor":
                log.warning("%s no longer has the events from our cursor on: a gap, recorded in fastworker:gaps", host)
                self.note_gap("outdated_cursor")
            else:
                log.info("%s says %s: %s", host, frame.name, frame.message or "")
            return
        if frame.error == "FutureCursor" and not self.gate.skip:
            raise StoppedItself(
                f"{host} says that the cursor {self.last_seq} lies in its future: is this another relay, or was it "
                "rebuilt? Run `fastworker reader --from live` once to begin at its live tip, or with `--from oldest` "
                "for all that it still has (with `up`: the same options of `fastworker up`)"
            )
        self.gate.no_skip()
        raise RelayLost(f"{frame.error}: {frame.message or 'the relay gave no message'}")

    def note_gap(self, reason: str, **more: str) -> None:
        """Recorded on the way to the stream together with the next seq, which says where the gap ends."""
        if self.gap is None:
            self._stats.gaps += 1
            at = int(time.time() * 1000)
            self.gap = {"relay": self._stats.relay, "reason": reason, "after": self.last_seq, "at": at, **more}

    def drop(self, reason: Reason) -> None:
        self._stats.drops[reason] += 1
