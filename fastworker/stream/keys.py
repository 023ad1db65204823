"""Every Redis key: its name, what it holds, and how it is made for a stream.

The usual stream and the usual group have the keys as they are written here. Another stream, or another group, has its
own: with its name behind a colon, as in `fastworker:ledger:staging:events`. A stream may have partitions: the first is
the stream itself, the others are `firehose:events:1` and so on, each with consumers of its own.

Keys that one script uses have to be in one slot of a Redis Cluster, so there the stream's name has a hash tag, as in
`{firehose}:events`: then all of its keys have it. The partitions of such a stream are in slots of their own, and what a
script of one of them changes must be there, too. So each is a stream by itself, `{firehose:1}:events` and so on: with a
cursor, a reader's lease, a ledger and dead letters of its own. What there is of one kind is the sum of all partitions'.
"""

from __future__ import annotations

import re
from binascii import crc_hqx
from typing import Final

STREAM: Final = "firehose:events"
"""Stream: the events (`REDIS_STREAM_KEY`)."""
GROUP: Final = "firehose-processors"
"""The workers' consumer group on it."""
CURSOR: Final = "firehose:python_cursor"
"""String: decimal seq up to which the reader has put events on the stream (`REDIS_CURSOR_KEY`)."""

CLUSTERED: Final = ("{firehose}:events", "{firehose}:python_cursor")
"""Stream and cursor on a Redis Cluster, unless others are named."""
BROADCAST: Final = "firehose:events:broadcast"
"""Channel: JSON of some of the events."""
_CURSOR_STREAM: Final = "fastworker:stream-of"


_TAG: Final = re.compile(r"^([^{]*\{[^}]+)(\}.*)$", re.DOTALL)


def _key(name: str, *more: str) -> str:
    return ":".join([name, *more])


class _StreamKeys:
    """Those of a stream."""

    def __init__(self, stream: str) -> None:
        of_stream = [stream] if stream != STREAM else []
        # One for a server: the API and the readers before ours know them by these names.
        tagged = [stream] if "{" in stream else []
        self.metrics: Final = _key("cluster:metrics", *tagged)
        """Hash: totalEvents, errors, and events by kind."""
        self.status: Final = _key("firehose:status", *tagged)
        """String: JSON of what the reader does, for ten seconds."""
        self.recent: Final = _key("firehose:recent_events", *tagged)
        """String: JSON of the newest events, for ten seconds."""
        # The workers'
        self.ledger: Final = _key("fastworker:ledger", *of_stream)
        """Hash: `committed`, `nothing_to_store`, `set_aside`, `ghosts` (entries, each counted once), `drop:<reason>`
        (ops)."""
        self.dead_letters: Final = _key("firehose:dead-letters", *of_stream)
        """Stream: entries that could not be stored, with the reason."""
        self.worker_status: Final = _key("fastworker:status:worker", *of_stream)
        """Hash: `<host>:<pid>` of each supervisor -> JSON of its processes, rewritten every two seconds."""
        self.partitions: Final = _key("fastworker:partitions", *of_stream)
        """String: two numbers, how many partitions the reader appends to, and how many it ever did. None: one."""
        # The reader's
        self.reader_lease: Final = _key("fastworker:reader", *of_stream)
        """String: token of the reader at work."""
        self.reader_stats: Final = _key("fastworker:reader:stats", *of_stream)
        """Hash: figures of the reader."""
        self.relay: Final = _key("fastworker:relay", *of_stream)
        """String: the host that the main cursor belongs to."""
        self.relays: Final = _key("fastworker:relays", *of_stream)
        """Hash: host -> ms when it was first read from. Each host is a sequence space of its own."""
        self._cursor: Final = _key("fastworker:cursor", *of_stream)
        self.repairs: Final = _key("fastworker:repairs", *of_stream)
        """Hash: DID -> JSON {rev, seq, relay, time} of its newest #sync (JSON form only; other forms put it on the
        stream), or with the reason why its newest commit was not enough (FASTWORKER_VERIFY)."""
        self.repair_status: Final = _key("fastworker:repair", *of_stream)
        """String: JSON of what the syncer last told: gaps, repairs, samples; for an hour."""
        self.history_status: Final = _key("fastworker:history", *of_stream)
        """String: JSON of how far the history that backfills ask for is; for an hour."""
        self.unverified: Final = _key("fastworker:unverified", *of_stream)
        """Stream: frames (did, frame, relay) whose signature is not by the key that was known; they wait for the newest
        (FASTWORKER_VERIFY)."""
        self.gaps: Final = _key("fastworker:gaps", *of_stream)
        """List, newest first: JSON {relay, reason, after, resumed, at} of each stretch that the relay did not give
        us."""

    def cursor_of(self, host: str) -> str:
        """String: decimal seq, that relay's cursor, kept while another relay is read."""
        return f"{self._cursor}:{host}"


class Keys(_StreamKeys):
    """Also those of one of its partitions, and of one group."""

    def __init__(self, stream: str = STREAM, group: str = GROUP, partition: int = 0) -> None:
        number = partition
        if partition and has_slots(stream):
            stream, partition = in_slot(stream, partition), 0
        super().__init__(stream)
        of_stream = [stream] if stream != STREAM else []
        of_group = [*of_stream, group] if group != GROUP else of_stream
        of_partition = [f"{stream}:{partition}"] if partition else of_stream
        of_members = [*of_partition, group] if group != GROUP else of_partition
        self.stream: Final = f"{stream}:{partition}" if partition else stream
        """The partition's."""
        self.partition: Final = number
        # Of the group
        self.go_back: Final = _key("fastworker:go-back", *of_group)
        """String: JSON {seq, relay} to where the reader has to go back, because PostgreSQL did; seq null: nobody
        knows. With `lost`: entries are gone that a dead worker held."""
        self.members: Final = _key("fastworker:members", *of_group)
        """Hash: token of each worker process that reads partitions -> ms until which it lives."""
        self.owners: Final = _key("fastworker:owners", *of_group)
        """Hash: number of a partition -> token of the process that reads it."""
        # Of the partition, and of the group on it
        self._consumer_lease: Final = _key("fastworker:consumer", *of_partition)
        self.consumers: Final = _key("fastworker:consumers", *of_members)
        """Set of consumer names that were ever leased by a fastworker and still exist in the group."""
        self.held: Final = _key("fastworker:held", *of_members)
        """Hash: consumer -> the lowest id that it holds. Nothing from there on is trimmed, in whosever pending list it
        is."""
        self.given: Final = _key("fastworker:given", *of_members)
        """String: "id ms id": all up to the first one was given to somebody, as seen then; the group's last id then."""
        self.reads: Final = _key("fastworker:reads", *of_members)
        """Hash: first id -> last id of each read beyond that."""
        self.tellers: Final = _key("fastworker:tellers", *of_members)
        """Hash: consumer -> token of its lease, of those that tell what they were given."""
        self.database: Final = _key("fastworker:database", *of_members)
        """String: JSON {system, timeline, written, entry_id} of the PostgreSQL that takes what the group reads."""
        self.recreate_lock: Final = _key("firehose:stream:recreate-lock", *of_members)
        """String: one worker makes the group again, the others wait."""
        # Of the partition, the reader's
        self.tail: Final = _key("fastworker:tail", *of_partition)
        """String: the id of the newest entry that a reader of ours appended."""
        self.marks: Final = _key("fastworker:marks", *of_partition)
        """List, oldest first: "id seq host" of appended entries, about one a second, that the workers have not reached
        yet."""
        self.finished: Final = _key("fastworker:finished", *of_partition)
        """String: the newest mark up to which the workers have finished the stream."""

    def consumer_lease(self, consumer: str = "") -> str:
        """String: token of the process that has this consumer's name. Without a name: the beginning of these keys."""
        return f"{self._consumer_lease}:{consumer}"


def has_slots(stream: str) -> bool:
    """Whether each partition of this stream has a slot of its own on a Redis Cluster."""
    return _TAG.match(stream) is not None


def in_slot(key: str, partition: int | str) -> str:
    """What a key of a stream with slots is called where this partition is: `{firehose:1}:events`."""
    if not partition:
        return key
    return _TAG.sub(rf"\1:{partition}\2", key) if has_slots(key) else f"{key}:{partition}"


def slot(key: str) -> int:
    """0 to 16383: which part of a Redis Cluster has the key; of its hash tag, where it has one.

    As in the Redis Cluster specification, Hash tags. Not the client library's, which takes 0.2 s to import: the
    configuration is read with it.
    """
    _, _, rest = key.partition("{")
    tag, closed, _ = rest.partition("}")
    return crc_hqx((tag if tag and closed else key).encode(), 0) % 16_384


def stream_of(cursor_key: str) -> str:
    """String: the stream that this cursor belongs to."""
    return f"{_CURSOR_STREAM}:{cursor_key}"


USUAL: Final = Keys()
