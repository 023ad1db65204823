"""What the predecessor reader's SDK does to a lexicon record, written from the shapes of the lexicon.

Independent of fastworker/event/dialect.py, which undoes it.
"""

from __future__ import annotations

import base64
import re
from typing import Any


def snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda match: "_" + match[0].lower(), name)


# The lexicon's object types by the member that holds them; members of unions say it themselves.
HOLDS = {
    "subject": "com.atproto.repo.strongRef",
    "via": "com.atproto.repo.strongRef",
    "parent": "com.atproto.repo.strongRef",
    "root": "com.atproto.repo.strongRef",
    "pinnedPost": "com.atproto.repo.strongRef",
    "joinedViaStarterPack": "com.atproto.repo.strongRef",
    "bskyPostRef": "com.atproto.repo.strongRef",
    "associatedRefs": "com.atproto.repo.strongRef",
    "reply": "app.bsky.feed.post#replyRef",
    "facets": "app.bsky.richtext.facet",
    "descriptionFacets": "app.bsky.richtext.facet",
    "index": "app.bsky.richtext.facet#byteSlice",
    "values": "com.atproto.label.defs#selfLabel",
    "images": "app.bsky.embed.images#image",
    "aspectRatio": "app.bsky.embed.defs#aspectRatio",
    "external": "app.bsky.embed.external#external",
    "captions": "app.bsky.embed.video#caption",
    "feeds": "app.bsky.graph.starterpack#feedItem",
    "policies": "app.bsky.labeler.defs#labelerPolicies",
    "labelValueDefinitions": "com.atproto.label.defs#labelValueDefinition",
    "locales": "com.atproto.label.defs#labelValueDefinitionStrings",
    "entities": "app.bsky.feed.post#entity",
    "messageMe": "com.germnetwork.declaration#messageMe",
    "contributors": "site.standard.document#contributor",
    "preferences": "site.standard.publication#preferences",
    "badges": "place.stream.chat.profile#badgeSelections",
    "global": "com.atproto.repo.strongRef",
    "color": "place.stream.chat.profile#color",
    "notificationSettings": "place.stream.livestream#notificationSettings",
}
# Optional members that the SDK fills with null.
ABSENT = {
    "app.bsky.feed.post": ("embed", "entities", "facets", "labels", "langs", "reply", "tags"),
    "app.bsky.feed.like": ("via",),
    "app.bsky.actor.profile": ("avatar", "banner", "pinnedPost", "joinedViaStarterPack", "labels", "website"),
    "app.bsky.graph.starterpack": ("feeds", "descriptionFacets"),
    "app.bsky.embed.external#external": ("thumb",),
    "app.bsky.embed.images#image": ("aspectRatio",),
}
OUTSIDE = ("customField", "client_tag", "Mixed_Case", "nothing")  # members that no lexicon has


def predecessor(value: Any, holder: str = "", outer: str = "") -> Any:
    if type(value) is list:
        return [predecessor(item, holder, outer) for item in value]
    if type(value) is not dict:
        return value
    if value.keys() == {"$link"}:
        return _raw_cid(value["$link"]).hex()
    if value.keys() == {"$bytes"}:
        return base64.b64decode(value["$bytes"] + "==").hex()
    kind = value.get("$type") or HOLDS.get(holder)
    if holder == "record" and outer == "app.bsky.embed.recordWithMedia":
        kind = "app.bsky.embed.record"
    elif holder == "record":
        kind = "com.atproto.repo.strongRef"
    elif holder == "index" and outer == "app.bsky.feed.post#entity":
        kind = "app.bsky.feed.post#textSlice"
    elif holder == "streamer":
        kind = "place.stream.chat.profile#streamerBadgeSelection"
    assert kind, (holder, value)
    dump = {snake(name): None for name in ABSENT.get(kind, ())}
    for name, item in value.items():
        if name in OUTSIDE:
            dump[name] = _hex_links(item)
        elif name == "global":
            dump["global_"] = predecessor(item, name, kind)
        elif name != "$type":
            dump[snake(name)] = predecessor(item, name, kind)
    return dump | {"py_type": kind}


def _hex_links(value: Any) -> Any:
    """Outside the lexicon only bytes and links are changed."""
    if type(value) is dict:
        if value.keys() == {"$link"}:
            return _raw_cid(value["$link"]).hex()
        return {name: _hex_links(item) for name, item in value.items()}
    return [_hex_links(item) for item in value] if type(value) is list else value


def _raw_cid(text: str) -> bytes:
    return base64.b32decode(text[1:].upper() + "=" * (-len(text[1:]) % 8))
