"""The predecessor reader's dialect: its own recorded example, and lexicon records sent through an independent converter."""

from __future__ import annotations

import json
from typing import Any

import libipld
import pytest

from fastworker.event import Commit
from fastworker.event.dialect import lexicon_record
from fastworker.event.entry import decode_entry
from tests.sdk_dialect import predecessor

BLOB_HEX = "01551220d7bdd545f09d8a73c2b990337c8211d708a04ccd9748627685e4fc79cc038039"
BLOB = {
    "$type": "blob",
    "ref": {"$link": libipld.encode_cid(bytes.fromhex(BLOB_HEX))},
    "mimeType": "image/jpeg",
    "size": 1234,
}
REF = {
    "cid": "bafyreidrm3k6s3p3x7lq5nxzseavd76snd2eppqhmjs7ie2w2iih5sg4ka",
    "uri": "at://did:plc:ccc/app.bsky.feed.post/3",
}
NOW = "2026-10-18T12:34:56.789Z"

# The entry as the predecessor's reader put it on a stream.
EXAMPLE = r"""{"repo":"did:plc:aaaaaaaaaaaaaaaaaaaaaaaa","ops":[{"action":"create","path":"app.bsky.feed.post/3k1",
 "cid":"bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge",
 "record":{"created_at":"2026-10-18T12:34:56.789Z","text":"hi @bob.test see https://x.y #tag",
  "embed":{
   "media":{"images":[{"alt":"an alt",
     "image":{"mime_type":"image/jpeg","size":1234,"ref":"01551220d7bdd545f09d8a73c2b990337c8211d708a04ccd9748627685e4fc79cc038039","py_type":"blob"},
     "aspect_ratio":{"height":3,"width":4,"py_type":"app.bsky.embed.defs#aspectRatio"},"py_type":"app.bsky.embed.images#image"}],
    "py_type":"app.bsky.embed.images"},
   "record":{"record":{"cid":"bafyreidrm3k6s3p3x7lq5nxzseavd76snd2eppqhmjs7ie2w2iih5sg4ka","uri":"at://did:plc:ccc/app.bsky.feed.post/3","py_type":"com.atproto.repo.strongRef"},"py_type":"app.bsky.embed.record"},
   "py_type":"app.bsky.embed.recordWithMedia"},
  "entities":null,
  "facets":[
   {"features":[{"did":"did:plc:bbb","py_type":"app.bsky.richtext.facet#mention"}],"index":{"byte_end":12,"byte_start":3,"py_type":"app.bsky.richtext.facet#byteSlice"},"py_type":"app.bsky.richtext.facet"},
   {"features":[{"uri":"https://x.y","py_type":"app.bsky.richtext.facet#link"}],"index":{"byte_end":28,"byte_start":17,"py_type":"app.bsky.richtext.facet#byteSlice"},"py_type":"app.bsky.richtext.facet"}],
  "labels":{"values":[{"val":"porn","py_type":"com.atproto.label.defs#selfLabel"}],"py_type":"com.atproto.label.defs#selfLabels"},
  "langs":["en","pt-BR"],
  "reply":{"parent":{"cid":"bafyreic2i36iss3khcdc7lsz53ghk6jioyc6nab6ipon25vpxxfdx5dvka","uri":"at://did:plc:bbb/app.bsky.feed.post/2","py_type":"com.atproto.repo.strongRef"},
           "root":{"cid":"bafyreifxgfigsswhdgdutaltdyqfzpnhfe36yunmxodwmom3m4klqmvr7e","uri":"at://did:plc:bbb/app.bsky.feed.post/1","py_type":"com.atproto.repo.strongRef"},
           "py_type":"app.bsky.feed.post#replyRef"},
  "tags":["one"],"py_type":"app.bsky.feed.post","via":"MyClient","customField":{"fooBar":[1,2]},
  "$type":"app.bsky.feed.post"}}]}"""

EXAMPLE_POST = {
    "$type": "app.bsky.feed.post",
    "createdAt": NOW,
    "text": "hi @bob.test see https://x.y #tag",
    "embed": {
        "$type": "app.bsky.embed.recordWithMedia",
        "media": {
            "$type": "app.bsky.embed.images",
            "images": [{"alt": "an alt", "image": BLOB, "aspectRatio": {"height": 3, "width": 4}}],
        },
        "record": {"record": REF},
    },
    "facets": [
        {
            "features": [{"$type": "app.bsky.richtext.facet#mention", "did": "did:plc:bbb"}],
            "index": {"byteStart": 3, "byteEnd": 12},
        },
        {
            "features": [{"$type": "app.bsky.richtext.facet#link", "uri": "https://x.y"}],
            "index": {"byteStart": 17, "byteEnd": 28},
        },
    ],
    "labels": {"$type": "com.atproto.label.defs#selfLabels", "values": [{"val": "porn"}]},
    "langs": ["en", "pt-BR"],
    "reply": {
        "parent": {
            "cid": "bafyreic2i36iss3khcdc7lsz53ghk6jioyc6nab6ipon25vpxxfdx5dvka",
            "uri": "at://did:plc:bbb/app.bsky.feed.post/2",
        },
        "root": {
            "cid": "bafyreifxgfigsswhdgdutaltdyqfzpnhfe36yunmxodwmom3m4klqmvr7e",
            "uri": "at://did:plc:bbb/app.bsky.feed.post/1",
        },
    },
    "tags": ["one"],
    "via": "MyClient",
    "customField": {"fooBar": [1, 2]},
}


def commit_of(fields: dict[bytes, bytes]) -> Commit:
    event = decode_entry(fields)
    assert isinstance(event, Commit)
    return event


def test_the_recorded_example() -> None:
    fields = {b"type": b"commit", b"data": EXAMPLE.encode(), b"seq": b"1234567890"}
    event = commit_of(fields)
    assert event.drops == []
    assert event.seq == 1234567890
    assert event.ops[0].record == EXAMPLE_POST


# -- there and back by the independent converter ---------------------------------------------------------


LABELS = {"$type": "com.atproto.label.defs#selfLabels", "values": [{"val": "porn"}]}
FACETS = [
    {"index": {"byteStart": 0, "byteEnd": 4}, "features": [{"$type": "app.bsky.richtext.facet#tag", "tag": "a_b"}]},
    {
        "index": {"byteStart": 5, "byteEnd": 9},
        "features": [{"$type": "app.bsky.richtext.facet#link", "uri": "https://x"}],
    },
]
RECORDS: list[dict[str, Any]] = [
    EXAMPLE_POST,
    {
        "$type": "app.bsky.feed.post",
        "text": "",
        "createdAt": NOW,
        "client_tag": {"some_key": None, "py": [None]},
        "nothing": None,
    },
    {
        "$type": "app.bsky.feed.post",
        "text": "q",
        "createdAt": NOW,
        "embed": {"$type": "app.bsky.embed.record", "record": REF},
    },
    {
        "$type": "app.bsky.feed.post",
        "text": "video",
        "createdAt": NOW,
        "embed": {
            "$type": "app.bsky.embed.video",
            "video": BLOB,
            "alt": "x",
            "aspectRatio": {"width": 1, "height": 2},
            "captions": [{"lang": "en", "file": BLOB}],
        },
    },
    {
        "$type": "app.bsky.feed.post",
        "text": "external",
        "createdAt": NOW,
        "embed": {
            "$type": "app.bsky.embed.external",
            "external": {"uri": "https://x", "title": "t", "description": "d", "thumb": BLOB, "associatedRefs": [REF]},
        },
    },
    {
        "$type": "app.bsky.feed.post",
        "text": "gallery",
        "createdAt": NOW,
        "embed": {
            "$type": "app.bsky.embed.gallery",
            "items": [
                {
                    "$type": "app.bsky.embed.gallery#image",
                    "image": BLOB,
                    "alt": "",
                    "aspectRatio": {"width": 1, "height": 2},
                }
            ],
        },
    },
    {
        "$type": "app.bsky.feed.post",
        "text": "old",
        "createdAt": NOW,
        "entities": [{"index": {"start": 0, "end": 3}, "type": "mention", "value": "did:plc:x"}],
        "langs": [],
    },
    {"$type": "app.bsky.feed.like", "subject": REF, "createdAt": NOW},
    {"$type": "app.bsky.feed.like", "subject": REF, "createdAt": NOW, "via": REF},
    {"$type": "app.bsky.feed.repost", "subject": REF, "createdAt": NOW, "via": REF},
    {"$type": "app.bsky.graph.block", "subject": "did:plc:x", "createdAt": NOW},
    {"$type": "app.bsky.graph.follow", "subject": "did:plc:x", "createdAt": NOW, "customField": {"blob": BLOB}},
    {"$type": "app.bsky.graph.listblock", "subject": "at://did:plc:x/app.bsky.graph.list/1", "createdAt": NOW},
    {
        "$type": "app.bsky.graph.listitem",
        "subject": "did:plc:x",
        "list": "at://did:plc:x/app.bsky.graph.list/1",
        "createdAt": NOW,
    },
    {
        "$type": "app.bsky.graph.list",
        "name": "n",
        "purpose": "app.bsky.graph.defs#curatelist",
        "description": "d",
        "descriptionFacets": FACETS,
        "avatar": BLOB,
        "labels": LABELS,
        "createdAt": NOW,
    },
    {
        "$type": "app.bsky.graph.starterpack",
        "name": "n",
        "list": "at://did:plc:x/app.bsky.graph.list/1",
        "feeds": [{"uri": "at://did:plc:x/app.bsky.feed.generator/1"}],
        "descriptionFacets": FACETS,
        "createdAt": NOW,
    },
    {
        "$type": "app.bsky.graph.verification",
        "subject": "did:plc:x",
        "handle": "a.b",
        "displayName": "A B",
        "createdAt": NOW,
    },
    {
        "$type": "app.bsky.actor.profile",
        "displayName": "A_b",
        "description": "d",
        "avatar": BLOB,
        "banner": BLOB,
        "pinnedPost": REF,
        "joinedViaStarterPack": REF,
        "labels": LABELS,
        "pronouns": "x",
        "createdAt": NOW,
    },
    {"$type": "app.bsky.actor.profile"},
    {
        "$type": "app.bsky.actor.status",
        "status": "app.bsky.actor.status#live",
        "durationMinutes": 5,
        "embed": {"$type": "app.bsky.embed.external", "external": {"uri": "https://x", "title": "", "description": ""}},
        "createdAt": NOW,
    },
    {"$type": "app.bsky.actor.contentVisibilityDeclaration", "hideFromAlgorithmicRecommendations": True},
    {
        "$type": "app.bsky.feed.generator",
        "did": "did:web:x",
        "displayName": "F",
        "descriptionFacets": FACETS,
        "avatar": BLOB,
        "acceptsInteractions": True,
        "contentMode": "app.bsky.feed.defs#contentModeVideo",
        "labels": LABELS,
        "createdAt": NOW,
    },
    {
        "$type": "app.bsky.feed.threadgate",
        "post": "at://did:plc:x/app.bsky.feed.post/1",
        "allow": [
            {"$type": "app.bsky.feed.threadgate#mentionRule"},
            {"$type": "app.bsky.feed.threadgate#followingRule"},
            {"$type": "app.bsky.feed.threadgate#followerRule"},
            {"$type": "app.bsky.feed.threadgate#listRule", "list": "at://did:plc:x/app.bsky.graph.list/1"},
        ],
        "hiddenReplies": ["at://did:plc:x/app.bsky.feed.post/2"],
        "createdAt": NOW,
    },
    {"$type": "app.bsky.feed.threadgate", "post": "at://did:plc:x/app.bsky.feed.post/1", "allow": [], "createdAt": NOW},
    {
        "$type": "app.bsky.feed.postgate",
        "post": "at://did:plc:x/app.bsky.feed.post/1",
        "embeddingRules": [{"$type": "app.bsky.feed.postgate#disableRule"}],
        "detachedEmbeddingUris": ["at://did:plc:x/app.bsky.feed.post/2"],
        "createdAt": NOW,
    },
    {
        "$type": "app.bsky.labeler.service",
        "policies": {
            "labelValues": ["porn", "my_label"],
            "labelValueDefinitions": [
                {
                    "identifier": "my_label",
                    "severity": "inform",
                    "blurs": "none",
                    "defaultSetting": "warn",
                    "adultOnly": True,
                    "locales": [{"lang": "en", "name": "n", "description": "d"}],
                }
            ],
        },
        "labels": LABELS,
        "reasonTypes": ["x"],
        "subjectTypes": ["y"],
        "subjectCollections": ["a.b.c"],
        "createdAt": NOW,
    },
    {"$type": "app.bsky.notification.declaration", "allowSubscriptions": "followers"},
    {"$type": "chat.bsky.actor.declaration", "allowIncoming": "all", "allowGroupInvites": "none"},
    {"$type": "com.atproto.lexicon.schema", "lexicon": 1, "customField": {"some_def": {"type": "record"}}},
    {
        "$type": "com.germnetwork.declaration",
        "version": "1",
        "currentKey": {"$bytes": "AQID"},
        "continuityProofs": [{"$bytes": "AQ"}, {"$bytes": "Ag"}],
        "messageMe": {"messageMeUrl": "https://x", "showButtonTo": "everyone"},
    },
    {"$type": "site.standard.graph.subscription", "publication": "at://did:plc:x/site.standard.publication/1"},
    {
        "$type": "site.standard.document",
        "site": "https://x",
        "title": "t",
        "textContent": "c",
        "bskyPostRef": REF,
        "coverImage": BLOB,
        "contributors": [{"did": "did:plc:x", "displayName": "X"}],
        "publishedAt": NOW,
    },
    {
        "$type": "site.standard.theme.basic",
        "accent": {"$type": "site.standard.theme.color#rgb", "r": 1, "g": 2, "b": 3},
        "accentForeground": {"$type": "site.standard.theme.color#rgb", "r": 1, "g": 2, "b": 3},
    },
    {"$type": "place.stream.chat.profile", "badges": {"global": REF}, "color": {"red": 1, "green": 2, "blue": 3}},
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["$type"])
def test_there_and_back(record: dict[str, Any]) -> None:
    sent = predecessor(record) | {"$type": record["$type"]}
    assert "py_type" in sent
    before = json.dumps(sent)
    assert lexicon_record(sent) == record
    assert json.dumps(sent) == before  # the argument is left as it is


def test_an_unknown_member_of_a_union_keeps_its_names() -> None:
    sent = {
        "py_type": "app.bsky.feed.post",
        "$type": "app.bsky.feed.post",
        "text": "x",
        "embed": {
            "$type": "com.example.embed",
            "some_key": None,
            "image": {"$type": "blob", "ref": BLOB_HEX, "mimeType": "image/jpeg", "size": 1234},
        },
    }
    assert lexicon_record(sent) == {
        "$type": "app.bsky.feed.post",
        "text": "x",
        "embed": {"$type": "com.example.embed", "some_key": None, "image": BLOB},
    }


def test_a_type_that_is_newer_than_the_list() -> None:
    sent = {
        "py_type": "app.bsky.new.record",
        "some_thing": {"py_type": "app.bsky.new.record#part", "a_b": 1},
        "gone": None,
    }
    assert lexicon_record(sent) == {
        "$type": "app.bsky.new.record",
        "someThing": {"$type": "app.bsky.new.record#part", "aB": 1},
    }


@pytest.mark.parametrize("ref", ["not hex", "", "a\0", "01551220", None, 5])
def test_a_ref_that_is_no_hex_stays_as_it_is(ref: Any) -> None:
    sent = {"py_type": "app.bsky.actor.profile", "avatar": {"py_type": "blob", "ref": ref, "mime_type": "x", "size": 1}}
    assert lexicon_record(sent)["avatar"].get("ref") == ref


def test_a_lexicon_record_is_not_taken_for_the_dialect() -> None:
    for record in ({"$type": "a.b.c", "created_at": "x"}, {"py_type": 5, "created_at": None}):
        data = {"repo": "did:plc:x", "ops": [{"action": "create", "path": "a.b.c/1", "cid": "x", "record": record}]}
        fields = {b"type": b"commit", b"data": json.dumps(data).encode(), b"seq": b"1"}
        assert commit_of(fields).ops[0].record == record
