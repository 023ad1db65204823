"""The state law as a program: small, slow, obvious. It says what the tables must hold.

`Model.apply` takes events in any order, any number of times; `Model.tables` computes every table from
what is left. Nothing is updated in place and nothing is counted by deltas, so there is nothing to get
wrong twice: one winner per record, then pure functions. It shares no code with the writer.

An event is a plain dict, its records are lexicon JSON (`{"$link"}`, `{"$bytes"}`):

    {"kind": "commit", "seq", "repo", "rev", "time", "ops": [{"action", "path", "cid", "record"?}]}
    {"kind": "identity", "seq", "did", "handle" or None, "time"}
    {"kind": "account", "seq", "did", "active", "status" or None, "time"}
    {"kind": "sync", "seq", "did", "rev", "time"}
    {"kind": "snapshot", "seq", "did", "rev", "time", "records": {path: {"cid", "record"}}}

The last is a whole repository at `rev`; what happened up to `seq` had happened before it was taken, at `time`.

Each may say by which "relay" it came: seq orders nothing between two of them.

This holds whenever nothing is owed: counters and joined rows may follow their records later, within a second under
load (docs/invariants.md, "What may be owed, and for how long"); everything else is there with them.

Where the law (docs/invariants.md) leaves a choice, the comment that starts with `Choice:` makes it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

Row = dict[str, Any]
Tables = dict[str, list[Row]]
Event = dict[str, Any]

URI_MAX = 512
DID_MAX = 255
CID_MAX = 255
NAME_MAX = 255
MENTIONS_MAX = 100
TEXT_BYTES_MAX = 100_000
SELF_ONLY = {
    "app.bsky.actor.profile",
    "app.bsky.actor.status",
    "app.bsky.labeler.service",
    "app.bsky.notification.declaration",
    "chat.bsky.actor.declaration",
}

FULL = frozenset(
    {
        "counts",  # of likes, reposts and bookmarks
        "reply_counts",
        "feed_items",
        "quotes",  # and their counts
        "notifications",
        "viewer_states",
        "thread_contexts",
        "gate_flags",
        "like_counts",  # of generators and labelers
    }
)
CORE = frozenset({"counts", "feed_items"})

_COMMIT = "commit_time commit_seq commit_rev"
COLUMNS: dict[str, str] = {
    "users": "did handle display_name avatar_url banner_url description profile_record pinned_post",
    "posts": f"uri cid author_did text langs parent_uri parent_cid root_uri root_cid embed facets tags created_at "
    f"indexed_at {_COMMIT} has_thread_gate has_post_gate violates_thread_gate violates_embedding_rules",
    "likes": f"uri user_did post_uri subject_cid via created_at {_COMMIT}",
    "reposts": f"uri user_did post_uri subject_cid via created_at {_COMMIT}",
    "follows": f"uri follower_did following_did created_at {_COMMIT}",
    "blocks": f"uri blocker_did blocked_did created_at {_COMMIT}",
    "bookmarks": "uri user_did post_uri created_at",
    "lists": "uri cid creator_did name purpose description avatar_url created_at",
    "list_items": "uri cid list_uri subject_did created_at",
    "list_blocks": "uri blocker_did list_uri created_at",
    "feed_generators": "uri cid creator_did did display_name description avatar_url like_count created_at",
    "starter_packs": "uri cid creator_did name description list_uri feeds created_at",
    "labeler_services": "uri cid creator_did policies like_count created_at",
    "labels": "uri src subject val neg created_at",
    "label_events": "label_uri action",
    "verifications": "uri cid subject_did handle verified_at created_at",
    "generic_records": "uri cid author_did record_type record created_at",
    "post_aggregations": "post_uri like_count repost_count reply_count bookmark_count quote_count",
    "feed_items": "uri post_uri originator_did type sort_at cid created_at",
    "quotes": "uri cid post_uri quoted_uri quoted_cid created_at",
    "notifications": "uri recipient_did author_did reason reason_subject cid created_at",
    "post_viewer_states": "post_uri viewer_did like_uri repost_uri bookmarked",
    "thread_contexts": "post_uri root_author_like_uri",
    "thread_gates": "post_uri owner_did allow_mentions allow_following allow_list_members allow_list_uris created_at",
    "post_gates": "post_uri embedding_rules created_at",
    "fastworker.accounts": "did active status",
}
"""Every compared table and its compared columns."""

PAIRS: dict[str, tuple[str, ...]] = {
    "likes": ("user_did", "post_uri"),
    "reposts": ("user_did", "post_uri"),
    "bookmarks": ("user_did", "post_uri"),
    "follows": ("follower_did", "following_did"),
    "blocks": ("blocker_did", "blocked_did"),
    "list_items": ("list_uri", "subject_did"),
    "list_blocks": ("blocker_did", "list_uri"),
    "verifications": ("subject_did",),
}
"""Columns that the schema keeps unique: of several live records (twins), one is in the table."""


# --- Text, identifiers, dates -----------------------------------------------------------------------------------------

DID = re.compile(r"did:[a-z]+:[a-zA-Z0-9._:%-]*[a-zA-Z0-9._-]")
AT_URI_OF_DID = re.compile(rf"at://({DID.pattern})(/[!-~]*)?")
POST_URI = re.compile(rf"at://{DID.pattern}/app\.bsky\.feed\.post/[!-.0-~]+")
AT_URI = re.compile(rf"at://({DID.pattern}|[a-zA-Z0-9.-]+)(/[!-~]*)?")
WORD = re.compile(r"[!-~]+")
CID = re.compile(r"[a-zA-Z0-9+=]+")
IDENTIFIER = re.compile(r"(at://|https?://|did:)[!-~]+|b[a-z2-7]{50,}|Qm[1-9A-HJ-NP-Za-km-z]{44}")
NSID = re.compile(
    r"[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)+\.[a-zA-Z][a-zA-Z0-9]{0,62}"
)
RKEY = re.compile(r"[A-Za-z0-9._:~-]{1,512}")
HANDLE = re.compile(r"([a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.)+[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?")
NEAR_DAY = re.compile(r"(\d{4}|[+-]\d{6})-(\d{1,2})-(\d{1,2})", re.ASCII)
NEAR_TIME = re.compile(r"(?:[Tt_]|\s+)(\d{1,2}):(\d{1,2})(?::(\d{1,2})(?:[.,](\d*))?)?", re.ASCII)
NEAR_OFFSET = re.compile(r"[Zz]|([+-])(\d{1,2}):?(\d\d)?", re.ASCII)
SPACES = " \t\n\r\f\v"
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - the tables hold UTC without a zone
CLOCK_SKEW = timedelta(minutes=2)


class Dropped(Exception):
    """This operation is not stored; the argument is the reason. As far as the tables go, it never happened."""


def clean(value: Any) -> Any:
    """The value as PostgreSQL can hold it: no NUL, no lone surrogate (keys too), no NaN or infinity.

    An identifier that would be another one without them is no item and no member.
    """
    if isinstance(value, str):
        return UNSTORABLE.sub("", value)
    if isinstance(value, list):
        return [clean(item) for item in value if not is_broken_identifier(item)]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items() if not is_broken_identifier(item)}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_broken_identifier(value: Any) -> bool:
    return (
        isinstance(value, str)
        and UNSTORABLE.search(value) is not None
        and IDENTIFIER.fullmatch(UNSTORABLE.sub("", value)) is not None
    )


def loses_identifiers(value: Any) -> bool:
    """Whether `clean` leaves something out."""
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(loses_identifiers, value)) if isinstance(value, list) else is_broken_identifier(value)


def is_at_uri(value: Any) -> bool:
    """A reference to a record; its authority may be a handle."""
    return isinstance(value, str) and AT_URI.fullmatch(value) is not None


def is_cid(value: Any) -> bool:
    return isinstance(value, str) and CID.fullmatch(value) is not None


def is_did(value: Any) -> bool:
    return isinstance(value, str) and DID.fullmatch(value) is not None


def authority(uri: str) -> str | None:
    """The DID in an at:// URI, None if there is none (a handle, something else)."""
    found = AT_URI_OF_DID.fullmatch(uri)
    return found[1] if found else None


def parse_time(value: Any) -> datetime | None:
    """A naive UTC datetime; None for what is not a date.

    Choice: a date is what `datetime.fromisoformat` reads (UTC where no offset is given), or the near misses that
    clients write: spaces around it, one digit where two belong, lower-case `t` and `z`, 24:00, a leap second, year 0,
    a year of six digits with its sign.
    """
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return _near_date(value)
    return _shift(at.replace(tzinfo=None), -(at.utcoffset() or timedelta()))


def _near_date(text: str) -> datetime | None:
    text = text.strip(SPACES)
    on = NEAR_DAY.match(text)
    if on is None:
        return None
    text = text[on.end() :]
    at = NEAR_TIME.match(text)
    text = text[at.end() if at else 0 :].lstrip(SPACES)
    zone = NEAR_OFFSET.fullmatch(text)
    if text and zone is None:
        return None
    year, month, day = (int(part) for part in on.groups())
    hour, minute, second = (int(part or 0) for part in at.groups()[:3]) if at else (0, 0, 0)
    micro = int(((at[4] if at else None) or "").ljust(6, "0")[:6])
    sign, offset_hour, offset_minute = (zone[1], int(zone[2] or 0), int(zone[3] or 0)) if zone else (None, 0, 0)
    is_time = (hour < 24 or (hour, minute, second) == (24, 0, 0)) and minute < 60 and second <= 60
    if not is_time or offset_hour > 23 or offset_minute > 59:
        return None
    try:
        # the calendar repeats every 400 years
        midnight = datetime(year if 0 < year < 10_000 else 2000 + year % 400, month, day)  # noqa: DTZ001
    except ValueError:
        return None
    if year <= 0:
        return datetime.min  # noqa: DTZ901 - what Python cannot say is the nearest that it can
    if year >= 10_000:
        return datetime.max  # noqa: DTZ901
    offset = timedelta(hours=offset_hour, minutes=offset_minute)
    passed = timedelta(hours=hour, minutes=minute, seconds=second, microseconds=micro)
    return _shift(midnight, passed + offset if sign == "-" else passed - offset)


def _shift(at: datetime, by: timedelta) -> datetime:
    try:
        return at + by
    except OverflowError:
        return datetime.max if by > timedelta() else datetime.min  # noqa: DTZ901


def tid_time(tid: str) -> datetime:
    """The time that a TID holds: microseconds above ten bits of a clock's number."""
    number = 0
    for letter in tid:
        number = number << 5 | "234567abcdefghijklmnopqrstuvwxyz".index(letter)
    return EPOCH + timedelta(microseconds=number >> 10)


def real_handle(handle: Any) -> str | None:
    """The handle in lower case; None for none, for the placeholder and for what is not one."""
    if not isinstance(handle, str) or len(handle) > 253 or not HANDLE.fullmatch(handle):
        return None
    lowered = handle.lower()
    return None if lowered == "handle.invalid" else lowered


# --- Record to row: one function per collection -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record comes from. `clock` is the moment of its commit."""

    uri: str
    repo: str
    collection: str
    rkey: str
    cid: str
    seq: int
    rev: str | None
    commit_time: datetime | None
    clock: datetime

    def clamp(self, at: datetime) -> datetime:
        return max(EPOCH, min(at, self.clock + CLOCK_SKEW))

    def date(self, value: Any) -> datetime:
        return self.clamp(parse_time(value) or self.clock)

    def commit_columns(self) -> Row:
        return {"commit_time": self.commit_time, "commit_seq": str(self.seq), "commit_rev": self.rev}


def text_or_none(value: Any, length: int | None = None) -> str | None:
    """Text for people: cleaned, cut where the column ends, and where what is searched of it would not fit."""
    if not isinstance(value, str):
        return None
    text: str = clean(value)[:length]
    return text.encode()[:TEXT_BYTES_MAX].decode(errors="ignore")


def required_text(value: Any, length: int | None = None) -> str:
    """The same, of a member without which the record means nothing. It may be empty."""
    if not isinstance(value, str):
        raise Dropped("bad_record")
    return str(clean(value))[:length]


def fitting(value: str, length: int) -> str:
    """Identifiers are never cut: one that exceeds its column costs the record."""
    if len(value) > length:
        raise Dropped("too_long")
    return value


def required_did(value: Any) -> str:
    if not is_did(value):
        raise Dropped("bad_record")
    return fitting(value, DID_MAX)


def uri_or_none(value: Any) -> str | None:
    """An at:// URI whose authority is a DID: with a handle nobody could tell whose record is meant."""
    owner = authority(value) if isinstance(value, str) else None
    if owner is None:
        return None
    fitting(owner, DID_MAX)
    return fitting(value, URI_MAX)


def required_uri(value: Any) -> str:
    found = uri_or_none(value)
    if found is None:
        raise Dropped("bad_record")
    return found


def cid_or_none(value: Any) -> str | None:
    """The CID beside a URI. Choice: one that is none is left out, for the URI says enough."""
    return value if is_cid(value) and len(value) <= CID_MAX else None


def strong_ref(value: Any) -> tuple[str | None, str | None]:
    """(uri, cid) of a reference to a record, of which the CID may be missing."""
    found = uri_or_none(member(value, "uri"))
    return found, cid_or_none(member(value, "cid")) if found else None


def object_or_none(value: Any) -> Any:
    return clean(value) if isinstance(value, dict) else None


def array_or_none(value: Any) -> Any:
    return clean(value) if isinstance(value, list) else None


def strings(value: Any) -> list[str]:
    """The at:// URIs among the items of an array; nothing for what is no array."""
    return [item for item in value if is_at_uri(item)] if isinstance(value, list) else []


def member(value: Any, *names: str) -> Any:
    """`value[name][name]...`, None where the path leaves the objects."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def blob_cid(blob: Any) -> str | None:
    """A blob's CID: `ref.$link`, `ref` as text, the old form's `cid`, or the blob as text."""
    ref = member(blob, "ref")
    if isinstance(blob, str):
        found: Any = blob
    elif ref is None:
        found = member(blob, "cid")
    else:
        found = ref if isinstance(ref, str) else member(ref, "$link")
    return found if is_cid(found) else None


def normal_embed(embed: Any) -> Any:
    """The embed as the API expects it: media that name no blob and quotes that name no record are taken out."""
    kind = member(embed, "$type")
    if kind == "app.bsky.embed.record":
        if bad_uri(embed.get("record")):
            return None
        return {**embed, "record": normal_ref(embed["record"])} if "record" in embed else embed
    if kind != "app.bsky.embed.recordWithMedia":
        return normal_media(embed)
    media = normal_media(embed.get("media"))
    quoted = member(embed, "record", "record")
    if media is None:
        has_quote = isinstance(quoted, dict) and not bad_uri(quoted)
        return {"$type": "app.bsky.embed.record", "record": normal_ref(quoted)} if has_quote else None
    if bad_uri(quoted):
        return media
    if isinstance(quoted, dict):
        return {**embed, "media": media, "record": {**embed["record"], "record": normal_ref(quoted)}}
    return {**embed, "media": media}


def bad_uri(ref: Any) -> bool:
    uri = member(ref, "uri")
    return isinstance(uri, str) and not is_at_uri(uri)


def normal_ref(ref: Any) -> Any:
    """Without a CID that is none."""
    if isinstance(ref, dict) and isinstance(ref.get("cid"), str) and not is_cid(ref["cid"]):
        return {name: value for name, value in ref.items() if name != "cid"}
    return ref


def normal_facets(facets: Any) -> Any:
    """Without mentions of nobody and links that cleaning would change, and without facets that had nothing else."""
    if not isinstance(facets, list):
        return None
    found = []
    for facet in facets:
        features = member(facet, "features")
        if isinstance(features, list) and any(map(is_lost_feature, features)):
            facet = {**facet, "features": [one for one in features if not is_lost_feature(one)]}  # noqa: PLW2901
            if not facet["features"]:
                continue
        found.append(facet)
    return found


def is_lost_feature(feature: Any) -> bool:
    match member(feature, "$type"):
        case "app.bsky.richtext.facet#mention":
            return not is_did(feature.get("did"))
        case "app.bsky.richtext.facet#link":
            uri = feature.get("uri")
            return isinstance(uri, str) and UNSTORABLE.search(uri) is not None
    return False


def normal_media(media: Any) -> Any:
    if not isinstance(media, dict):
        return None
    kind = media.get("$type")
    if kind == "app.bsky.embed.images":
        images = media.get("images")
        images = [i for i in images if blob_cid(member(i, "image"))] if isinstance(images, list) else []
        return {**media, "images": images} if images else None
    external = media.get("external")
    address = member(external, "uri")
    if kind == "app.bsky.embed.external" and isinstance(address, str) and UNSTORABLE.search(address):
        return None
    if kind == "app.bsky.embed.external" and isinstance(external, dict) and not blob_cid(external.get("thumb")):
        return {**media, "external": {name: v for name, v in external.items() if name != "thumb"}}
    if kind == "app.bsky.embed.video" and not blob_cid(media.get("thumbnail")):
        return {name: v for name, v in media.items() if name != "thumbnail"}
    return media


def post(source: Source, record: Row) -> Row:
    parent_uri, parent_cid = strong_ref(member(record, "reply", "parent"))
    root_uri, root_cid = strong_ref(member(record, "reply", "root"))
    created_at = source.date(record.get("createdAt"))
    return {
        "uri": source.uri,
        "cid": source.cid,
        "author_did": source.repo,
        "text": text_or_none(record.get("text")) or "",
        "langs": array_or_none(record.get("langs")),
        "parent_uri": parent_uri,
        "parent_cid": parent_cid,
        "root_uri": root_uri,
        "root_cid": root_cid,
        "embed": clean(normal_embed(record.get("embed"))),
        "facets": array_or_none(normal_facets(record.get("facets"))),
        "tags": array_or_none(record.get("tags")) or [],
        "created_at": created_at,
        "indexed_at": created_at,
        **source.commit_columns(),
    }


def like_or_repost(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "user_did": source.repo,
        "post_uri": required_uri(member(record, "subject", "uri")),
        "subject_cid": cid_or_none(member(record, "subject", "cid")),
        "via": None if bad_uri(record.get("via")) else object_or_none(record.get("via")),
        "created_at": source.date(record.get("createdAt")),
        **source.commit_columns(),
    }


def bookmark(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "user_did": source.repo,
        "post_uri": required_uri(member(record, "subject", "uri")),
        "created_at": source.date(record.get("createdAt")),
    }


def follow(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "follower_did": source.repo,
        "following_did": required_did(record.get("subject")),
        "created_at": source.date(record.get("createdAt")),
        **source.commit_columns(),
    }


def block(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "blocker_did": source.repo,
        "blocked_did": required_did(record.get("subject")),
        "created_at": source.date(record.get("createdAt")),
        **source.commit_columns(),
    }


def list_(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "cid": source.cid,
        "creator_did": source.repo,
        "name": required_text(record.get("name"), NAME_MAX),
        "purpose": fitting(required_text(record.get("purpose")), 64),
        "description": text_or_none(record.get("description")),
        "avatar_url": blob_cid(record.get("avatar")),
        "created_at": source.date(record.get("createdAt")),
    }


def list_item(source: Source, record: Row) -> Row:
    list_uri = required_uri(record.get("list"))
    if authority(list_uri) != source.repo:
        raise Dropped("not_owner")
    return {
        "uri": source.uri,
        "cid": source.cid,
        "list_uri": list_uri,
        "subject_did": required_did(record.get("subject")),
        "created_at": source.date(record.get("createdAt")),
    }


def list_block(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "blocker_did": source.repo,
        "list_uri": required_uri(record.get("subject")),
        "created_at": source.date(record.get("createdAt")),
    }


def feed_generator(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "cid": source.cid,
        "creator_did": source.repo,
        "did": required_did(record.get("did")),
        "display_name": required_text(record.get("displayName"), NAME_MAX),
        "description": text_or_none(record.get("description")),
        "avatar_url": blob_cid(record.get("avatar")),
        "created_at": source.date(record.get("createdAt")),
    }


def starter_pack(source: Source, record: Row) -> Row:
    feeds = record.get("feeds")
    return {
        "uri": source.uri,
        "cid": source.cid,
        "creator_did": source.repo,
        "name": required_text(record.get("name"), NAME_MAX),
        "description": text_or_none(record.get("description")),
        "list_uri": uri_or_none(record.get("list")),
        "feeds": strings([member(feed, "uri") for feed in feeds] if isinstance(feeds, list) else []),
        "created_at": source.date(record.get("createdAt")),
    }


def labeler_service(source: Source, record: Row) -> Row:
    policies = object_or_none(record.get("policies"))
    return {
        "uri": source.uri,
        "cid": source.cid,
        "creator_did": source.repo,
        "policies": {"labelValues": [], "labelValueDefinitions": []} if policies is None else policies,
        "created_at": source.date(record.get("createdAt")),
    }


def label(source: Source, record: Row) -> Row:
    src = record.get("src")
    subject = next((record[name] for name in ("uri", "did") if isinstance(record.get(name), str) and record[name]), "")
    kind = AT_URI if subject.startswith("at:") else DID if subject.startswith("did:") else WORD
    if not kind.fullmatch(subject):
        raise Dropped("bad_record")
    return {
        "uri": source.uri,
        "src": required_did(src) if is_did(src) else source.repo,
        "subject": fitting(subject, URI_MAX),
        "val": fitting(required_text(record.get("val")), 128),
        "neg": record.get("neg") is True,
        "created_at": source.date(record.get("cts")),
    }


def verification(source: Source, record: Row) -> Row:
    created_at = source.date(record.get("createdAt"))
    verified_at = parse_time(record.get("verifiedAt"))
    return {
        "uri": source.uri,
        "cid": source.cid,
        "subject_did": required_did(record.get("subject")),
        "handle": required_text(record.get("handle")).lower()[:NAME_MAX],
        "verified_at": source.clamp(verified_at) if verified_at else created_at,
        "created_at": created_at,
    }


def generic_record(source: Source, record: Row) -> Row:
    return {
        "uri": source.uri,
        "cid": source.cid,
        "author_did": source.repo,
        "record_type": source.collection,
        "record": clean(record),
        "created_at": source.date(record.get("createdAt")),
    }


def gate(source: Source, record: Row) -> Row:
    """A thread gate or post gate, with the post that its own rkey names."""
    post_uri = f"at://{source.repo}/app.bsky.feed.post/{source.rkey}"
    if record.get("post", post_uri) != post_uri:
        raise Dropped("gate_mismatch")
    return {"post_uri": post_uri, "record": clean(record), "created_at": source.date(record.get("createdAt"))}


def profile(_source: Source, record: Row) -> Row:
    pinned_uri, pinned_cid = strong_ref(record.get("pinnedPost"))
    return {
        "display_name": text_or_none(record.get("displayName"), NAME_MAX),
        "avatar_url": blob_cid(record.get("avatar")),
        "banner_url": blob_cid(record.get("banner")),
        "description": text_or_none(record.get("description")),
        "profile_record": clean(record),
        "pinned_post": {"uri": pinned_uri, "cid": pinned_cid} if pinned_uri else None,
    }


COLLECTIONS: dict[str, tuple[str, Callable[[Source, Row], Row]]] = {
    "app.bsky.feed.post": ("posts", post),
    "app.bsky.feed.like": ("likes", like_or_repost),
    "app.bsky.feed.repost": ("reposts", like_or_repost),
    "app.bsky.graph.follow": ("follows", follow),
    "app.bsky.graph.block": ("blocks", block),
    "app.bsky.bookmark": ("bookmarks", bookmark),
    "app.bsky.graph.list": ("lists", list_),
    "app.bsky.graph.listitem": ("list_items", list_item),
    "app.bsky.graph.listblock": ("list_blocks", list_block),
    "app.bsky.feed.generator": ("feed_generators", feed_generator),
    "app.bsky.graph.starterpack": ("starter_packs", starter_pack),
    "app.bsky.labeler.service": ("labeler_services", labeler_service),
    "com.atproto.label.label": ("labels", label),
    "app.bsky.graph.verification": ("verifications", verification),
    "app.bsky.feed.threadgate": ("thread gates", gate),
    "app.bsky.feed.postgate": ("post gates", gate),
    "app.bsky.actor.profile": ("profiles", profile),
}
"""Collection to (table, function). Names with a space, and `profiles`, are not tables: others follow from them.
Every other collection goes to `generic_records`."""

UNTOUCHED = {"bookmarks", "labels"}
"""Others write these, too: a snapshot says nothing about them."""

REPLACED = {
    *("app.bsky.feed.threadgate", "app.bsky.feed.postgate"),
    *("app.bsky.graph.list", "app.bsky.feed.generator", "app.bsky.graph.starterpack"),
}
"""The key of these does not tell when they were written: a gate has that of its post, the others are replaced."""

NEW_USERS = {"follows": "following_did", "blocks": "blocked_did", "list_items": "subject_did"}
"""Columns whose DID gets a users row."""


# --- What is kept -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """One operation on one record. `row` is None for a delete, `cid` is the acting record's."""

    source: Source
    op_index: int
    table: str
    row: Row | None


def beats(a: Held, b: Held) -> bool:
    """Whether operation a on a record wins over operation b: the higher version, then the ties."""
    if a.source.rev is not None and b.source.rev is not None and a.source.rev != b.source.rev:
        return a.source.rev > b.source.rev  # TIDs sort as they count
    if a.source.seq != b.source.seq:
        return a.source.seq > b.source.seq
    return (a.op_index, a.row is None, a.source.cid) > (b.op_index, b.row is None, b.source.cid)


@dataclass(frozen=True, slots=True)
class Told:
    """What an account event of one relay said, and when."""

    relay: str
    seq: int | None
    time: datetime
    active: bool
    status: str | None

    def rank(self) -> tuple[Any, ...]:
        """Of one relay's events the highest is the newest. Of two deliveries of one event the earlier counts."""
        later = (self.time - datetime.min).total_seconds()  # noqa: DTZ901
        seq = -1 if self.seq is None else self.seq
        return (seq, later if self.seq is None else -later, not self.active, self.status or "")


@dataclass(frozen=True, slots=True)
class Claim:
    """A handle that an identity event of one relay named, and when."""

    relay: str
    seq: int | None
    time: datetime
    handle: str

    def newness(self) -> tuple[Any, ...]:
        later = (self.time - datetime.min).total_seconds()  # noqa: DTZ901
        return (-1 if self.seq is None else self.seq, later if self.seq is None else -later)

    def earliness(self) -> tuple[Any, ...]:
        return (math.inf if self.seq is None else self.seq, self.time)


class Model:
    """Events in, tables out.

    `derive` is "full", "core" or names of FULL: what is not derived is missing from the tables.
    `forbidden` are DIDs with data_collection_forbidden, `trusted` those of trusted verifiers, the first one first.
    `verified_only`: the resolver is on.
    """

    def __init__(
        self,
        *,
        derive: str | Iterable[str] = "full",
        forbidden: Iterable[str] = (),
        trusted: Sequence[str] = (),
        verified_only: bool = False,
    ) -> None:
        named = {"full": FULL, "core": CORE}.get(derive) if isinstance(derive, str) else frozenset(derive)
        if named is None or not named <= FULL:
            raise ValueError(f"derive must be full, core or names of {sorted(FULL)}: {derive!r}")
        self.derive = named
        self.forbidden = frozenset(forbidden)
        self.trusted = tuple(trusted)
        self.drops: dict[tuple[int, int], str] = {}  # (seq, op index) -> reason
        self._records: dict[tuple[str, bool], Held] = {}  # (uri, whether it has a rev) -> its winner
        self._dids: set[str] = set()  # everyone who acted, or was followed, blocked or listed
        self.verified_only = verified_only
        self._claims: dict[str, list[Claim]] = {}  # did -> every real handle that was claimed for it
        self._verified: dict[str, tuple[datetime, str]] = {}  # did -> its latest verified handle
        self._accounts: dict[str, dict[str, Told]] = {}  # did -> relay -> the newest that it told
        self._deleted: dict[str, tuple[int, datetime]] = {}  # did -> highest seq and latest time of a deletion
        self._relays: set[str] = set()
        self._floors: dict[str, tuple[str, int]] = {}  # did -> rev and seq of its newest snapshot

    # What happens

    def apply(self, event: Event, entry_ms: int | None = None) -> None:
        """Take one event. `entry_ms` (of the stream id) is when it was received."""
        if event.get("relay"):
            self._relays.add(event["relay"])
        match event["kind"]:
            case "commit":
                self._commit(event, entry_ms)
            case "identity":
                self._identity(event, entry_ms)
            case "account":
                self._account(event, entry_ms)
            case "snapshot":
                self._snapshot(event)
            case _:  # a #sync is recorded for repair, no table shows it
                pass

    def _commit(self, event: Event, entry_ms: int | None) -> None:
        repo = event["repo"]
        if repo in self.forbidden or len(repo) > DID_MAX:
            return
        self._meet(repo)  # a commit without a single op makes its author known too
        for index, op in enumerate(event["ops"]):
            try:
                held = self._read(event, index, op, entry_ms)
            except Dropped as reason:
                self.drops[event["seq"], index] = str(reason)
                continue
            self._keep(held)

    def _snapshot(self, event: Event) -> None:
        """For every path of the repository one operation: an upsert of what it holds, a delete of what it lacks.

        What cannot be stored is not there either. Labels and bookmarks are not touched.
        """
        did, taken_at = event["did"], parse_time(event["time"])
        assert taken_at is not None
        if did in self.forbidden:
            return
        self._floors[did] = max(self._floors.get(did, ("", 0)), (event["rev"], event["seq"]))
        for path, one in event["records"].items():
            collection, _, rkey = path.partition("/")
            is_tid = len(rkey) == 13 and set(rkey) <= set("234567abcdefghijklmnopqrstuvwxyz") and rkey[0] <= "j"
            time = tid_time(rkey) if is_tid else taken_at
            if not datetime(2022, 1, 1) <= time <= taken_at + CLOCK_SKEW or collection in REPLACED:  # noqa: DTZ001
                time = taken_at
            told = {"repo": did, "rev": event["rev"], "seq": event["seq"], "time": time.isoformat()}
            try:
                held = self._read(told, 0, {"action": "create", "path": path, **one}, None)
            except Dropped:
                continue
            if held.table not in UNTOUCHED:
                self._meet(did)
                self._keep(held)

    def _keep(self, held: Held) -> None:
        if held.row is not None and held.table in NEW_USERS:
            self._meet(held.row[NEW_USERS[held.table]])  # even if this operation loses
        key = (held.source.uri, held.source.rev is not None)
        if key not in self._records or beats(held, self._records[key]):
            self._records[key] = held

    def _read(self, event: Event, index: int, op: Row, entry_ms: int | None) -> Held:
        collection, slash, rkey = op["path"].partition("/")
        if not slash or not NSID.fullmatch(collection) or not RKEY.fullmatch(rkey) or rkey in {".", ".."}:
            raise Dropped("bad_path")
        if op["action"] not in {"create", "update", "delete"}:
            raise Dropped("bad_action")
        commit_time = parse_time(event.get("time"))
        source = Source(
            uri=fitting(f"at://{event['repo']}/{collection}/{rkey}", URI_MAX),
            repo=event["repo"],
            collection=fitting(collection, NAME_MAX),
            rkey=rkey,
            cid=fitting(op.get("cid") or "", CID_MAX),
            seq=event["seq"],
            rev=event.get("rev"),
            commit_time=commit_time,
            clock=moment(event, entry_ms),
        )
        table, to_row = COLLECTIONS.get(collection, ("generic_records", generic_record))
        if op["action"] == "delete":
            return Held(source, index, table, None)
        record = op.get("record")
        if not isinstance(record, dict):
            raise Dropped("bad_record")
        if collection in SELF_ONLY and rkey != "self":
            raise Dropped("bad_path")
        if record.get("$type", collection) != collection:
            raise Dropped("type_mismatch")
        return Held(source, index, table, to_row(source, record))

    def _identity(self, event: Event, entry_ms: int | None) -> None:
        did = event["did"]
        self._meet(did)
        handle = real_handle(event["handle"])
        if handle is None:  # resolve again: what is known stays
            return
        time = moment(event, entry_ms)
        self._claims.setdefault(did, []).append(Claim(event.get("relay") or "", event.get("seq"), time, handle))

    def verify(self, did: str, handle: str, at: datetime) -> None:
        """At that moment the DID's document and the handle named each other."""
        self._verified[did] = max(self._verified.get(did, (at, handle)), (at, handle))

    def _account(self, event: Event, entry_ms: int | None) -> None:
        did, seq = event["did"], event.get("seq")
        self._meet(did)
        time = moment(event, entry_ms)
        told = Told(event.get("relay") or "", seq, time, event["active"], event.get("status"))
        newest = self._accounts.setdefault(did, {})
        held = newest.get(told.relay)
        if held is None or told.rank() > held.rank():
            newest[told.relay] = told
        # Choice: only the seq orders a deletion against commits; one without a seq is a status and no tombstone.
        if not told.active and told.status == "deleted" and seq is not None:
            before = self._deleted.get(did, (seq, time))
            self._deleted[did] = (max(seq, before[0]), max(time, before[1]))

    def _meet(self, did: str) -> None:
        if did not in self.forbidden:
            self._dids.add(did)

    # What follows

    def tables(self) -> Tables:
        """Every table, computed from nothing but the winners."""
        rows: dict[str, list[Held]] = {table: [] for table, _ in COLLECTIONS.values()}
        rows["generic_records"] = []
        for held in self._live():
            rows[held.table].append(held)
        for table, columns in PAIRS.items():
            first = self.trusted if table == "verifications" else ()
            rows[table] = _without_twins(rows[table], columns, first)
        tables: Tables = {table: [_row(held) for held in rows[table]] for table in rows if _is_table(table)}
        tables["users"] = self._users(rows["profiles"])
        latest = {
            did: max(told.values(), key=lambda one: (one.time, one.relay)) for did, told in self._accounts.items()
        }
        tables["fastworker.accounts"] = [
            {"did": did, "active": one.active, "status": one.status} for did, one in latest.items()
        ]
        # Choice: one event for each label in the table; the foreign key takes it away with its label.
        tables["label_events"] = [{"label_uri": row["uri"], "action": "created"} for row in tables["labels"]]
        tables["thread_gates"] = thread_gates(rows["thread gates"])
        tables["post_gates"] = post_gates(rows["post gates"])
        self._derive(tables, rows)
        return tables

    def _live(self) -> list[Held]:
        """Records whose winner is not a delete and that no deletion of their account came after."""
        return [
            held
            for held in self._winners()
            if held.row is not None
            and not (held.source.repo in self._deleted and self._before(held.source, *self._deleted[held.source.repo]))
        ]

    def _winners(self) -> Iterable[Held]:
        """Of each record the highest version. With two relays one with a rev beats one without: seqs say nothing."""
        standing = {key: held for key, held in self._records.items() if not self._is_superseded(held)}
        for (uri, has_rev), held in standing.items():
            other = standing.get((uri, not has_rev))
            if other is None or (has_rev if len(self._relays) > 1 else beats(held, other)):
                yield held

    def _is_superseded(self, held: Held) -> bool:
        """Whether it is older than a snapshot of its repository."""
        source = held.source
        if source.repo not in self._floors or held.table in UNTOUCHED:
            return False
        rev, seq = self._floors[source.repo]
        return source.rev < rev if source.rev is not None else source.seq <= seq

    def _before(self, source: Source, seq: int, time: datetime) -> bool:
        """Whether a record was written before its account's deletion: by seq in one relay, else by its rev's time."""
        if len(self._relays) < 2:
            return source.seq < seq
        return source.rev is None or tid_time(source.rev) < time

    def _users(self, profiles: list[Held]) -> list[Row]:
        known = {held.source.repo: _row(held) for held in profiles}
        shown = self._shown_handles()
        nothing = dict.fromkeys(
            ("display_name", "avatar_url", "banner_url", "description", "profile_record", "pinned_post")
        )
        return [
            {
                "did": did,
                "handle": shown.get(did, "handle.invalid"),
                **known.get(did, nothing),
            }
            for did in self._dids
        ]

    def _wanted_handle(self, did: str) -> str | None:
        """What the DID shows if nobody else does: the newer of what is claimed and what is verified."""
        newest: dict[str, Claim] = {}
        for claim in self._claims.get(did, ()):
            newest[claim.relay] = max(newest.get(claim.relay, claim), claim, key=Claim.newness)
        verified = self._verified.get(did)
        if self.verified_only or not newest:
            return verified[1] if verified else None
        claimed = max(newest.values(), key=lambda claim: (claim.time, claim.relay))
        return verified[1] if verified and verified[0] >= claimed.time else claimed.handle

    def _shown_handles(self) -> dict[str, str]:
        """DID to handle; each handle once. Choice: a claim is as old as the first time that its DID made it."""
        wanting: dict[str, list[str]] = {}
        for did in {*self._claims, *self._verified} - self.forbidden:
            if (handle := self._wanted_handle(did)) is not None:
                wanting.setdefault(handle, []).append(did)
        shown = {}
        for handle, dids in wanting.items():
            verified = [did for did in dids if did in self._verified and self._verified[did][1] == handle]
            if verified:
                latest = max(self._verified[did][0] for did in verified)
                holder = min(did for did in verified if self._verified[did][0] == latest)
            else:
                holder = self._first_claimant(handle, dids)
            shown[holder] = handle
        return shown

    def _first_claimant(self, handle: str, dids: list[str]) -> str:
        """Each relay's lowest seq, and of these the earliest moment, then the relay, then the DID."""
        first: dict[str, tuple[Any, ...]] = {}  # relay -> (seq, time, did)
        for did in dids:
            for claim in self._claims[did]:
                if claim.handle == handle:
                    mine = (*claim.earliness(), did)
                    first[claim.relay] = min(first.get(claim.relay, mine), mine)
        _, _, did = min((time, relay, did) for relay, (_, time, did) in first.items())
        return str(did)

    def _derive(self, tables: Tables, rows: dict[str, list[Held]]) -> None:
        derive = self.derive
        if "gate_flags" in derive:
            threads = {_row(held)["post_uri"] for held in rows["thread gates"]}
            posts = {_row(held)["post_uri"] for held in rows["post gates"]}
            tables["posts"] = [
                {
                    **row,
                    "has_thread_gate": row["uri"] in threads,
                    "has_post_gate": row["uri"] in posts,
                    "violates_thread_gate": False,
                    "violates_embedding_rules": False,
                }
                for row in tables["posts"]
            ]
        if "like_counts" in derive:
            likes = Counter(row["post_uri"] for row in tables["likes"])
            for table in ("feed_generators", "labeler_services"):
                tables[table] = [{**row, "like_count": likes[row["uri"]]} for row in tables[table]]
        if derive & {"counts", "reply_counts", "quotes"}:
            tables["post_aggregations"] = post_aggregations(tables, derive)
        if "feed_items" in derive:
            tables["feed_items"] = feed_items(tables["posts"], rows["reposts"])
        if "quotes" in derive:
            tables["quotes"] = quotes(tables["posts"])
        if "notifications" in derive:
            tables["notifications"] = notifications(rows)
        if "viewer_states" in derive:
            tables["post_viewer_states"] = viewer_states(tables)
        if "thread_contexts" in derive:
            tables["thread_contexts"] = thread_contexts(tables)


def moment(event: Event, entry_ms: int | None) -> datetime:
    """When an event happened. What it says of itself is a claim: it counts within four days before and two minutes
    after the time of its stream entry, which counts otherwise. Without an entry the claim is all there is."""
    claimed = parse_time(event.get("time"))
    if entry_ms is None:
        if claimed is None:
            raise ValueError("an event without a time needs the time of its entry")
        return claimed
    received = EPOCH + timedelta(milliseconds=entry_ms)
    if claimed is None:
        return received
    early, late = received - timedelta(days=4), received + CLOCK_SKEW
    return claimed if early <= claimed <= late else received


def _is_table(name: str) -> bool:
    return name != "profiles" and " " not in name


def _row(held: Held) -> Row:
    assert held.row is not None
    return held.row


def _without_twins(held: list[Held], columns: tuple[str, ...], trusted: Sequence[str]) -> list[Held]:
    """Of the live records with the same pair, that of the first of the trusted, then the lowest rkey (then URI)."""
    first: dict[tuple[Any, ...], Held] = {}

    def order(one: Held) -> tuple[int, str, str]:
        by = one.source.repo
        return trusted.index(by) if by in trusted else len(trusted), one.source.rkey, one.source.uri

    for twin in sorted(held, key=order):
        first.setdefault(tuple(_row(twin)[column] for column in columns), twin)
    return list(first.values())


# --- Derived tables: each a pure function of the primary ones ---------------------------------------------------------


def quote_of(row: Row) -> tuple[str, str | None] | None:
    """(uri, cid) of the post that a posts row quotes. An embedded list, generator or starter pack is no quote."""
    kind = member(row["embed"], "$type")
    if kind == "app.bsky.embed.record":
        quoted = member(row["embed"], "record")
    elif kind == "app.bsky.embed.recordWithMedia":
        quoted = member(row["embed"], "record", "record")
    else:
        return None
    uri = member(quoted, "uri")
    if not isinstance(uri, str) or not POST_URI.fullmatch(uri):
        return None
    if len(uri) > URI_MAX or len(authority(uri) or "") > DID_MAX:  # Choice: it does not fit, so it is no quote
        return None
    return uri, cid_or_none(member(quoted, "cid"))


def mentions_of(row: Row) -> list[str]:
    """The DIDs that a posts row's facets mention, in their order, each once."""
    found = []
    for facet in row["facets"] or []:
        features = member(facet, "features")
        for feature in features if isinstance(features, list) else []:
            did = member(feature, "did")
            is_mention = member(feature, "$type") == "app.bsky.richtext.facet#mention"
            if is_mention and is_did(did) and len(did) <= DID_MAX and did not in found:
                found.append(did)
    return found[:MENTIONS_MAX]


def quotes(posts: list[Row]) -> list[Row]:
    found = []
    for row in posts:
        quoted = quote_of(row)
        uri = row["uri"] + "#quote"
        if quoted is not None and len(uri) <= URI_MAX:
            found.append(
                {
                    "uri": uri,
                    "cid": row["cid"],
                    "post_uri": row["uri"],
                    "quoted_uri": quoted[0],
                    "quoted_cid": quoted[1],
                    "created_at": row["created_at"],
                }
            )
    return found


def post_aggregations(tables: Tables, derive: frozenset[str]) -> list[Row]:
    """A row for every live post and for every subject. Counters are counts; those not derived are left out."""
    counts: dict[str, Counter[str]] = {}
    if "counts" in derive:
        counts["like_count"] = Counter(row["post_uri"] for row in tables["likes"])
        counts["repost_count"] = Counter(row["post_uri"] for row in tables["reposts"])
        counts["bookmark_count"] = Counter(row["post_uri"] for row in tables["bookmarks"])
    if "reply_counts" in derive:
        counts["reply_count"] = Counter(row["parent_uri"] for row in tables["posts"] if row["parent_uri"] is not None)
    if "quotes" in derive:
        counts["quote_count"] = Counter(row["quoted_uri"] for row in quotes(tables["posts"]))
    uris = {row["uri"] for row in tables["posts"]} if "counts" in derive else set()
    uris = uris.union(*counts.values())
    return [{"post_uri": uri, **{column: counted[uri] for column, counted in counts.items()}} for uri in uris]


def feed_items(posts: list[Row], reposts: list[Held]) -> list[Row]:
    return [
        {
            "uri": row["uri"],
            "post_uri": row["uri"],
            "originator_did": row["author_did"],
            "type": "post",
            "sort_at": row["created_at"],
            "cid": row["cid"],
            "created_at": row["created_at"],
        }
        for row in posts
    ] + [
        {
            "uri": held.source.uri,
            "post_uri": _row(held)["post_uri"],
            "originator_did": held.source.repo,
            "type": "repost",
            "sort_at": _row(held)["created_at"],
            "cid": held.source.cid or held.source.uri[:CID_MAX],  # the predecessor's choice
            "created_at": _row(held)["created_at"],
        }
        for held in reposts
    ]


def notifications(rows: dict[str, list[Held]]) -> list[Row]:
    found = []

    def notify(held: Held, suffix: str, recipient: str | None, reason: str, subject: str | None) -> None:
        uri = held.source.uri + suffix
        if recipient is None or recipient == held.source.repo or len(uri) > URI_MAX:
            return
        found.append(
            {
                "uri": uri,
                "recipient_did": recipient,
                "author_did": held.source.repo,
                "reason": reason,
                "reason_subject": subject,
                "cid": held.source.cid or None,
                "created_at": _row(held)["created_at"],
            }
        )

    for table, reason in (("likes", "like"), ("reposts", "repost")):
        for held in rows[table]:
            subject = _row(held)["post_uri"]
            notify(held, "#notification", authority(subject), reason, subject)
    for held in rows["follows"]:
        notify(held, "#notification", _row(held)["following_did"], "follow", None)
    for held in rows["posts"]:
        row = _row(held)
        if row["parent_uri"] is not None:
            notify(held, "#notification/reply", authority(row["parent_uri"]), "reply", row["parent_uri"])
        if (quoted := quote_of(row)) is not None:
            notify(held, "#notification/quote", authority(quoted[0]), "quote", quoted[0])
        for did in mentions_of(row):
            notify(held, f"#notification/mention/{did}", did, "mention", row["uri"])
    return found


def viewer_states(tables: Tables) -> list[Row]:
    """One row for each (post, viewer) with anything to show."""
    states: dict[tuple[str, str], Row] = {}

    def state(row: Row) -> Row:
        key = (row["post_uri"], row["user_did"])
        return states.setdefault(
            key, {"post_uri": key[0], "viewer_did": key[1], "like_uri": None, "repost_uri": None, "bookmarked": False}
        )

    for row in tables["likes"]:
        state(row)["like_uri"] = row["uri"]
    for row in tables["reposts"]:
        state(row)["repost_uri"] = row["uri"]
    for row in tables["bookmarks"]:
        state(row)["bookmarked"] = True
    return list(states.values())


def thread_contexts(tables: Tables) -> list[Row]:
    """For each live reply whose root is live: the like that the root's author gave to the reply."""
    live = {row["uri"] for row in tables["posts"]}
    likes = {(row["user_did"], row["post_uri"]): row["uri"] for row in tables["likes"]}
    return [
        {"post_uri": row["uri"], "root_author_like_uri": likes.get((authority(row["root_uri"]), row["uri"]))}
        for row in tables["posts"]
        if row["root_uri"] in live and row["root_uri"] != row["uri"]
    ]


def thread_gates(gates: list[Held]) -> list[Row]:
    """No `allow` means everyone may reply: no row. A list that allows nobody has a row that says so.

    A rule that has no column would be a row that shuts out whom it lets in: no row.
    """
    found = []
    for held in gates:
        allow = _row(held)["record"].get("allow")
        if not isinstance(allow, list):
            continue
        rules = [rule for rule in allow if isinstance(rule, dict)]
        kinds = [rule["$type"] for rule in rules if isinstance(rule.get("$type"), str)]
        if any(kind.rpartition("#")[2] not in {"mentionRule", "followingRule", "listRule"} for kind in kinds):
            continue
        found.append(
            {
                "post_uri": _row(held)["post_uri"],
                "owner_did": held.source.repo,
                "allow_mentions": "app.bsky.feed.threadgate#mentionRule" in kinds,
                "allow_following": "app.bsky.feed.threadgate#followingRule" in kinds,
                "allow_list_members": "app.bsky.feed.threadgate#listRule" in kinds,
                "allow_list_uris": [
                    rule["list"]
                    for rule in rules
                    if rule.get("$type") == "app.bsky.feed.threadgate#listRule" and is_at_uri(rule.get("list"))
                ],
                "created_at": _row(held)["created_at"],
            }
        )
    return found


def post_gates(gates: list[Held]) -> list[Row]:
    found = []
    for held in gates:
        record = _row(held)["record"]
        rules, detached = record.get("embeddingRules"), strings(record.get("detachedEmbeddingUris"))
        rules = rules if isinstance(rules, list) else []
        embedding: Row = {}
        if any(member(rule, "$type") == "app.bsky.feed.postgate#disableRule" for rule in rules):
            embedding["disableRule"] = True
        if detached:
            embedding["detachedEmbeddingUris"] = detached
        found.append(
            {
                "post_uri": _row(held)["post_uri"],
                "embedding_rules": embedding,
                "created_at": _row(held)["created_at"],
            }
        )
    return found
