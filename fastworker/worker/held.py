"""What a pipeline holds for one flush: entries, what they become, and how each will be counted. No I/O."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from fastworker.errors import InvalidEvent, Reason
from fastworker.event import Account, Commit, Event, Identity, Sync
from fastworker.event.entry import decode_entry, received_ms
from fastworker.store.upkeep import EntryRules
from fastworker.stream.consumer import SetAside, Tally, original_fields
from fastworker.table.batch import Batch, Change, Limits, Mapped, Refused
from fastworker.table.dates import moment_of, parse_date
from fastworker.table.mapper import map_commit
from fastworker.worker.overlap import Overlap, keys_of

log = logging.getLogger(__name__)

_COMMIT = Tally("committed", "#commit")
_NOTHING = Tally("nothing_to_store", "#commit")
_IDENTITY = Tally("committed", "#identity")
_ACCOUNT = Tally("committed", "#account")
_SYNC = Tally("committed")
NEVER = datetime.min.replace(tzinfo=UTC)
UNBOUNDED = EntryRules(NEVER, ambiguous=False)
CLOCKS = timedelta(minutes=10)  # by which the clocks of relay, Redis and PostgreSQL may differ


class Held:
    """A batch, the entries it came from (to apply them again in halves), and how each will be counted."""

    __slots__ = (
        "batch",
        "before_horizon",
        "changes",
        "entries",
        "keys",
        "kinds",
        "mark",
        "rejected",
        "rules",
        "since_ms",
        "tallies",
        "told",
    )

    def __init__(self, rules: EntryRules = UNBOUNDED) -> None:
        self.rules = rules
        self.before_horizon: dict[str, list[Change]] = {}  # upserts of entries that a forgotten delete may beat
        self.batch = Batch()
        self.entries: dict[str, dict[bytes, bytes]] = {}
        self.changes: dict[str, list[Change]] = {}  # by entry
        self.tallies: dict[Tally, list[str]] = {}
        self.keys: list[int] = []  # marked in the overlap
        self.kinds: Counter[type[Event]] = Counter()
        self.rejected: list[SetAside] = []  # never settled: they leave through the dead letters
        self.since_ms = 0  # when its first entry was read
        self.mark: tuple[str, int | None] | None = None  # id and seq of the latest entry understood
        self.told: str | None = None  # its time, as the relay said it

    def __bool__(self) -> bool:
        return bool(self.entries)

    def is_full(self, limits: Limits) -> bool:
        return self.batch.is_full(limits) or len(self.entries) >= limits.entries_max

    def rejected_in_a_row(self) -> int:
        """The longest row of them among the entries."""
        rejected = {letter.entry_id for letter in self.rejected}
        longest = run = 0
        for entry_id in self.entries:
            run = run + 1 if entry_id in rejected else 0
            longest = max(longest, run)
        return longest

    def apply(
        self, entry_id: str, fields: dict[bytes, bytes], overlap: Overlap | None = None, *, postpone: bool = False
    ) -> bool:
        """Put one entry's content into the batch, all of it or nothing, and settle it; or reject it.

        False, and nothing is done: another pipeline holds one of its records, and it may be postponed.
        """
        self.entries[entry_id] = fields
        try:
            event = decode_entry(fields)
            entry_ms = received_ms(entry_id, fields)
            # mutant: entries without a rev beside two relays
            if self.rules.ambiguous and isinstance(event, Commit) and event.rev is None:
                self.rejected.append(SetAside(entry_id, fields, Reason.AMBIGUOUS_SEQ, f"seq {event.seq} without rev"))
                return True
            tally, mapped, at = _understand(event, entry_ms)
        except InvalidEvent as error:
            self.rejected.append(
                SetAside(entry_id, fields, error.reason, error.detail or f"{error.reason}: nothing there")
            )
            return True
        except Exception as error:
            # A bug of ours that some bytes can reach must not stop the stream for everybody else's: the entry waits
            # in the dead letters for the release that mends it, and the limit still stops a worker that is all bug.
            log.exception("Entry %s could not be understood", entry_id)
            self.rejected.append(SetAside(entry_id, fields, Reason.BAD_ENTRY, f"our bug: {error!r}"))
            return True
        batch = self.batch
        if mapped is not None:
            if self.rules.pruned_until > NEVER and _moment(event, entry_ms) < self.rules.pruned_until + CLOCKS:
                upserts = [change for change in mapped.changes if change.row is not None]
                if upserts:
                    self.before_horizon[entry_id] = upserts
                    return True
            if overlap is not None:
                keys = keys_of(mapped)
                if not overlap.take(keys) and postpone:
                    del self.entries[entry_id]
                    return False
                self.keys += keys
            batch.put(mapped)
            self.changes[entry_id] = mapped.changes
        elif isinstance(event, Identity):
            batch.put_identity(event, at)
        elif isinstance(event, Account):
            batch.put_account(event, at)
        elif isinstance(event, Sync):
            batch.put_sync(event)
        self.mark = (entry_id, event.seq)
        self.told = event.time
        self.kinds[type(event)] += 1
        batch.settle(entry_id, payload_bytes=sum(map(len, fields.values())))
        self.tallies.setdefault(tally, []).append(entry_id)
        return True

    def uncount(self) -> None:
        """Count entries whose records had all been deleted as `nothing_to_store`, not as `committed`."""
        beaten = self.batch.beaten
        for tally, ids in list(self.tallies.items()) if beaten else ():
            if tally.kind == _COMMIT.kind and tally.outcome == _COMMIT.outcome:
                # Usually the first record shows it already.
                some = [one for one in ids if (of := self.changes[one]) and of[0].uri in beaten]
                gone = {one for one in some if all(c.uri in beaten for c in self.changes[one])}
                if gone:
                    del self.tallies[tally]
                    nothing = Tally(_NOTHING.outcome, tally.kind, tally.drops)
                    for one in ids:
                        self.tallies.setdefault(nothing if one in gone else tally, []).append(one)


def _understand(event: Event, entry_ms: int) -> tuple[Tally, Mapped | None, datetime]:
    """How an event is counted, what a commit becomes, and when the other kinds happened."""
    if isinstance(event, Commit):
        mapped = map_commit(event, entry_ms)
        tally = _COMMIT if mapped.changes or mapped.dids else _NOTHING
        if mapped.drops:
            tally = Tally(tally.outcome, tally.kind, tuple(sorted(drop.reason for drop in mapped.drops)))
        return tally, mapped, NEVER
    at = _moment(event, entry_ms)
    if isinstance(event, Identity):
        return _IDENTITY, None, at
    return (_ACCOUNT if isinstance(event, Account) else _SYNC), None, at


def _moment(event: Event, entry_ms: int) -> datetime:
    """When it happened: by its own time where that can be, else when it was received."""
    return moment_of(None if event.time is None else parse_date(event.time), entry_ms).replace(tzinfo=UTC)


def names_of(event: Event, changes: Sequence[Change], reason: str, detail: str) -> list[Refused]:
    """An event's records, or its account, by name: what is kept of it when its content is not."""
    did = event.repo if isinstance(event, Commit) else event.did
    rev = event.rev if isinstance(event, Commit | Sync) else None
    seq = event.seq if event.seq is None or abs(event.seq) < 2**63 else None
    of = [(change.uri, change.cid) for change in changes] or [(f"at://{did}", None)]
    return [Refused(uri, did, cid, rev, seq, str(reason), detail[:200]) for uri, cid in of]


def names_of_letter(letter: dict[bytes, bytes]) -> list[Refused]:
    """The same of a dead letter that is pushed out; empty where it cannot be decoded."""
    reason, error = (letter.get(name, b"").decode(errors="replace") for name in (b"reason", b"error"))
    try:
        event = decode_entry(original_fields(letter))
        changes = map_commit(event, 0).changes if isinstance(event, Commit) else []
    except Exception:  # noqa: BLE001 - whatever made it a letter
        return []
    return names_of(event, changes, reason, error)
