"""The predecessor reader's dialect of records back to lexicon JSON.

That reader puts its SDK's dump on the stream (docs/compatibility.md): snake_case names, a `py_type` in every
object (also where the lexicon implies the type and JSON has no `$type`), nulls for absent fields, hex
for links and bytes. Members that the SDK did not know stand beside these under their own names, so
only the names that the lexicon has for an object's `py_type` are renamed: a blind rename would
corrupt what people wrote. What cannot be undone: an explicit `$type` where it is implied, an explicit
null, defaults that were filled in, links and bytes inside members that the SDK did not know.

Names as in the SDK's versions 0.0.55 to 0.0.73, which is what predecessors run.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from fastworker.event import Record
from fastworker.event.record import hex_cid_text


def _camel(name: str) -> str:
    head, *rest = name.rstrip("_").split("_")
    return head + "".join(word.capitalize() for word in rest)


def _types(text: str) -> dict[str, dict[str, str]]:
    lines = (line.split() for line in text.strip().splitlines())
    return {line[0]: {name: _camel(name) for name in line[1:]} for line in lines}


# Objects whose type the lexicon implies by where they stand: their tag goes.
_IMPLIED = _types("""
app.bsky.embed.defs#aspectRatio height width
app.bsky.embed.external#external description title uri associated_refs thumb
app.bsky.embed.images#image alt image aspect_ratio
app.bsky.embed.video#caption file lang
app.bsky.feed.post#entity index type value
app.bsky.feed.post#replyRef parent root
app.bsky.feed.post#textSlice end start
app.bsky.graph.starterpack#feedItem uri
app.bsky.labeler.defs#labelerPolicies label_values label_value_definitions
app.bsky.richtext.facet features index
app.bsky.richtext.facet#byteSlice byte_end byte_start
com.atproto.label.defs#labelValueDefinition blurs identifier locales severity adult_only default_setting
com.atproto.label.defs#labelValueDefinitionStrings description lang name
com.atproto.label.defs#selfLabel val
com.atproto.repo.strongRef cid uri
com.germnetwork.declaration#messageMe message_me_url show_button_to
place.stream.chat.profile#badgeSelections global_ streamer
place.stream.chat.profile#color blue green red
place.stream.chat.profile#streamerBadgeSelection badge streamer
place.stream.livestream#notificationSettings push_notification
site.standard.document#contributor did display_name role
site.standard.publication#preferences show_in_discover
social.grain.defs#aspectRatio height width
""")

# Records, members of unions and blobs: their tag becomes `$type`.
_TAGGED = _types("""
blob mime_type ref size
app.bsky.actor.contentVisibilityDeclaration hide_from_algorithmic_recommendations
app.bsky.actor.link created_at url icon labels title
app.bsky.actor.profile avatar banner created_at description display_name joined_via_starter_pack labels links pinned_post pronouns website
app.bsky.actor.status created_at status duration_minutes embed
app.bsky.embed.external external
app.bsky.embed.gallery items
app.bsky.embed.gallery#image alt aspect_ratio image
app.bsky.embed.images images
app.bsky.embed.record record
app.bsky.embed.recordWithMedia media record
app.bsky.embed.video video alt aspect_ratio captions presentation
app.bsky.feed.generator created_at did display_name accepts_interactions avatar content_mode description description_facets labels
app.bsky.feed.like created_at subject via
app.bsky.feed.post created_at text embed entities facets labels langs reply tags
app.bsky.feed.postgate created_at post detached_embedding_uris embedding_rules
app.bsky.feed.postgate#disableRule
app.bsky.feed.repost created_at subject via
app.bsky.feed.threadgate created_at post allow hidden_replies
app.bsky.feed.threadgate#followerRule
app.bsky.feed.threadgate#followingRule
app.bsky.feed.threadgate#listRule list
app.bsky.feed.threadgate#mentionRule
app.bsky.graph.block created_at subject
app.bsky.graph.follow created_at subject via
app.bsky.graph.list created_at name purpose avatar description description_facets labels
app.bsky.graph.listblock created_at subject
app.bsky.graph.listitem created_at list subject
app.bsky.graph.referencelistoptout created_at subject
app.bsky.graph.starterpack created_at list name description description_facets feeds
app.bsky.graph.verification created_at display_name handle subject
app.bsky.labeler.service created_at policies labels reason_types subject_collections subject_types
app.bsky.notification.declaration allow_subscriptions
app.bsky.richtext.facet#link uri
app.bsky.richtext.facet#mention did
app.bsky.richtext.facet#tag tag
chat.bsky.actor.declaration allow_incoming allow_group_invites
com.atproto.label.defs#selfLabels values
com.atproto.lexicon.schema lexicon
com.germnetwork.declaration current_key version continuity_proofs key_package message_me
place.stream.chat.pinnedRecord created_at pinned_message expires_at pinned_by
place.stream.chat.profile badges color self_labels
place.stream.defs#activityGame uri name
place.stream.defs#activityLabel label
place.stream.livestream created_at title activity agent canonical_url ended_at idle_timeout_seconds last_seen_at notification_settings post tags thumb url
site.standard.document published_at site title bsky_post_ref content contributors cover_image description labels links path tags text_content updated_at
site.standard.graph.recommend created_at document
site.standard.graph.subscription publication created_at
site.standard.publication name url basic_theme description icon labels preferences
site.standard.theme.basic accent accent_foreground background foreground
site.standard.theme.color#rgb b g r
social.grain.favorite created_at subject
social.grain.gallery.item created_at gallery item position
social.grain.photo photo alt aspect_ratio created_at
""")  # noqa: E501

_TYPES = _IMPLIED | _TAGGED

# Where the lexicon has bytes (a text of hex digits could be just that anywhere else).
_BYTES = {("com.germnetwork.declaration", name) for name in ("current_key", "continuity_proofs", "key_package")}


def lexicon_record(record: Record) -> Record:
    """A record whose top level has `py_type`, as lexicon JSON. The argument is left as it is."""
    plain = _object(record, is_implied=True)
    plain.setdefault("$type", record["py_type"])
    return plain


def _value(value: Any) -> Any:
    if type(value) is dict:
        return _object(value, is_implied=False)
    if type(value) is list:
        return [_value(item) for item in value]
    return value


def _object(value: dict[str, Any], *, is_implied: bool) -> dict[str, Any]:
    py_type = value.get("py_type")
    if type(py_type) is not str:  # not the SDK's: names and nulls are the author's
        plain = {key: _value(item) for key, item in value.items()}
        return _with_link(plain) if plain.get("$type") == "blob" else plain
    plain = {} if is_implied or py_type in _IMPLIED else {"$type": py_type}
    names = _TYPES.get(py_type)
    for key, item in value.items():
        if key == "py_type":
            continue
        name = _camel(key) if names is None else names.get(key)  # a type that is newer than this list: the best guess
        if name is None:
            plain.setdefault(key, _value(item))
        elif (py_type, key) in _BYTES:
            plain[name] = [_bytes(one) for one in item] if type(item) is list else _bytes(item)
        elif py_type == "app.bsky.embed.recordWithMedia" and key == "record" and type(item) is dict:
            plain[name] = _object(item, is_implied=True)  # elsewhere this type is a member of a union
        elif item is not None:
            plain[name] = _value(item)
    return _with_link(plain) if py_type == "blob" else plain


def _with_link(blob: dict[str, Any]) -> dict[str, Any]:
    ref = blob.get("ref")
    if type(ref) is str and (link := hex_cid_text(ref)) is not None:
        blob["ref"] = {"$link": link}
    return blob


def _bytes(value: Any) -> Any:
    try:
        return {"$bytes": b64encode(bytes.fromhex(value)).rstrip(b"=").decode()}
    except (TypeError, ValueError):
        return value
