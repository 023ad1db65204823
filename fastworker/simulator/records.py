"""Records of every collection, as clients write them: lexicon JSON, sizes and shares near the measured ones.

Shares of replies, embeds, facets, languages and `via` are those of the real frames and of the 2024 sample
(112 posts: 52 % replies, 34 % with an embed, 20 % with facets, 94 % with langs, 40 % not ASCII).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple, Protocol, TypeVar

from fastworker.simulator.cbor import DAG_CBOR, RAW, cid_text
from fastworker.simulator.repo import Clock

Record = dict[str, Any]
T = TypeVar("T")


class Ref(NamedTuple):
    """A strong reference."""

    uri: str
    cid: str


class Post(NamedTuple):
    """A post that others can answer: itself, and the root of its thread."""

    this: Ref
    root: Ref


class Person(NamedTuple):
    did: str
    handle: str


class Targets(Protocol):
    """Whom and what records speak about: the traffic decides."""

    def person(self) -> Person: ...
    def post(self) -> Post: ...
    def like_subject(self) -> Ref: ...
    def via(self) -> Ref | None: ...
    def list_uri(self, owner: str) -> str: ...
    def feed_uri(self) -> str: ...


@lru_cache(100_000)
def name_cid(name: str) -> str:
    """The CID of something that is never shown, the same for the same name."""
    return cid_text(DAG_CBOR + sha256(name.encode()).digest())


_LANGUAGES = (
    ("en",) * 72 + ("pt",) * 6 + ("ja",) * 6 + ("es",) * 4 + ("de",) * 4 + ("tr",) * 3 + ("ko",) * 3 + ("ru",) * 2
)
_PHRASES = {
    "en": (
        "good morning", "I finally finished the book", "the light over the harbour was unreal today 🌅", "no",
        "does anyone else think this?", "been thinking about this a lot lately", "lol", "new drawing!", "so tired",
        "we're all going to be fine, probably", "the train is late again", "my cat has opinions about breakfast 🐈",
        "here's what nobody tells you about growing tomatoes on a balcony in a windy city", "this is the way",
        "I made soup, and it is extremely good soup, and I will not be taking questions", "honestly same", "congrats!",
    ),
    "pt": ("bom dia, pessoal", "não acredito que já é sexta-feira", "saudade demais", "que gol lindo, meu deus ⚽"),
    "ja": ("おはようございます", "今日はとてもいい天気ですね", "描きました", "ねむい", "新しいイラストを投稿しました"),
    "es": ("buenos días a todos", "¿alguien más lo vio?", "qué semana tan larga, por favor", "mañana será otro día"),
    "de": ("Guten Morgen allerseits", "schön, dass du da bist", "das Wetter könnte wirklich besser sein", "na ja"),
    "tr": ("merhaba arkadaşlar", "bugün hava çok güzel", "şimdi çay içelim, biraz da sohbet"),
    "ko": ("좋은 아침이에요", "오늘 하루도 화이팅", "새로운 그림을 올렸어요"),
    "ru": ("доброе утро", "сегодня отличная погода, правда", "ну и денёк"),
}  # fmt: skip
_TAGS = ("art", "photography", "cats", "nowplaying", "WIP", "日本", "ciência", "booksky", "gamedev", "birds")
_NAMES = ("Ada", "Mira ☕", "たろう", "João", "the void", "Nightjar", "Ø", "k.", "Quiet Machines", "🌿 fern")
_EMBEDS = ("images",) * 45 + ("external",) * 32 + ("record",) * 16 + ("video",) * 3 + ("recordWithMedia",) * 4
_LIST_PURPOSES = tuple(f"app.bsky.graph.defs#{kind}list" for kind in ("mod", "curate", "curate", "reference"))
_GENERIC_TEXTS = ("listening", "watching the kettle", "12 %", "level up", "…")


class Records:
    """Makes records. All chance comes from `rng`, all time from `clock`."""

    def __init__(self, rng: random.Random, clock: Clock, targets: Targets) -> None:
        self._rng = rng
        self._random = rng.random
        self._clock = clock
        self._targets = targets
        self._owner = self._rkey = ""  # of the record that is being made
        self._make: dict[str, Callable[[], Record]] = {
            "app.bsky.feed.post": self._post,
            "app.bsky.feed.like": self._like,
            "app.bsky.feed.repost": self._like,
            "app.bsky.graph.follow": self._about_person,
            "app.bsky.graph.block": self._about_person,
            "app.bsky.bookmark": self._bookmark,
            "app.bsky.graph.list": self._list,
            "app.bsky.graph.listitem": self._list_item,
            "app.bsky.graph.listblock": self._list_block,
            "app.bsky.feed.generator": self._generator,
            "app.bsky.graph.starterpack": self._starter_pack,
            "app.bsky.labeler.service": self._labeler,
            "com.atproto.label.label": self._label,
            "app.bsky.graph.verification": self._verification,
            "app.bsky.feed.threadgate": self._thread_gate,
            "app.bsky.feed.postgate": self._post_gate,
            "app.bsky.actor.profile": self._profile,
        }

    def make(self, collection: str, owner: str, rkey: str) -> Record:
        """A record of `collection` in the repository `owner`; a generic one where the collection is unknown here."""
        self._owner, self._rkey = owner, rkey
        return {"$type": collection} | self._make.get(collection, self._generic)()

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random() * len(choices))]

    def chance(self, share: float) -> bool:
        return self._random() < share

    def phrase(self, characters_max: int = 300) -> str:
        """Text with a log-normal length: median about 60 characters."""
        return self._sentence(self.pick(_LANGUAGES), characters_max)

    def blob(self, mime: str = "image/jpeg") -> Record:
        raw = RAW + self._rng.getrandbits(256).to_bytes(32, "big")
        size = 20_000 + int(self._random() * 900_000)
        return {"$type": "blob", "ref": {"$link": cid_text(raw)}, "mimeType": mime, "size": size}

    def _now(self) -> str:
        """Clients stamp records a moment before the relay shows them."""
        return self._clock.iso(-int(self._random() * 900_000) - 80_000)

    def _sentence(self, language: str, characters_max: int) -> str:
        phrases = _PHRASES[language]
        wanted = min(characters_max, int(self._rng.lognormvariate(4.0, 0.95)))
        said = self.pick(phrases)
        while len(said) < wanted:
            said += (" ", ". ", "\n")[int(self._random() * 3)] + self.pick(phrases)
        return said[:characters_max]

    def _strong(self, ref: Ref) -> Record:
        return {"cid": ref.cid, "uri": ref.uri}

    def _post(self) -> Record:
        language = self.pick(_LANGUAGES)
        record: Record = {"text": "" if self.chance(0.045) else self._sentence(language, 240), "createdAt": self._now()}
        if self.chance(0.94):
            record["langs"] = [language] if self.chance(0.97) else [language, "en-US"]
        if self.chance(0.52):
            parent = self._targets.post()
            record["reply"] = {"root": self._strong(parent.root), "parent": self._strong(parent.this)}
        if self.chance(0.34):
            record["embed"] = self._embed(self.pick(_EMBEDS))
        if self.chance(0.205):
            self._decorate(record)
        if self.chance(0.01):
            record["tags"] = [self.pick(_TAGS), "extra"]
        if self.chance(0.01):
            labels = [{"val": "graphic-media"}]
            record["labels"] = {"$type": "com.atproto.label.defs#selfLabels", "values": labels}
        return record

    def _decorate(self, record: Record) -> None:
        """Appends a link, a tag or a mention with its facet; indexes count UTF-8 bytes."""
        facets = []
        said: str = record["text"]
        for _ in range(1 if self.chance(0.75) else 3):
            roll = self._random()
            if roll < 0.5:
                tag = self.pick(_TAGS)
                shown, feature = f"#{tag}", {"$type": "app.bsky.richtext.facet#tag", "tag": tag}
            elif roll < 0.85:
                uri = f"https://example.com/{int(self._random() * 1e6)}"
                shown, feature = uri[8:], {"$type": "app.bsky.richtext.facet#link", "uri": uri}
            else:
                person = self._targets.person()
                shown, feature = f"@{person.handle}", {"$type": "app.bsky.richtext.facet#mention", "did": person.did}
            said += " " if said else ""
            start = len(said.encode())
            said += shown
            index = {"byteStart": start, "byteEnd": len(said.encode())}
            facets.append({"index": index, "features": [feature]})
        record["text"] = said
        record["facets"] = facets

    def _embed(self, kind: str) -> Record:
        embed: Record = {"$type": f"app.bsky.embed.{kind}"}
        if kind == "images":
            count = 1 if self.chance(0.85) else 2 + int(self._random() * 3)
            embed["images"] = [
                {"alt": self.phrase(120) if self.chance(0.4) else "", "image": self.blob()} for _ in range(count)
            ]
            for image in embed["images"]:
                if self.chance(0.9):
                    image["aspectRatio"] = {"width": 2000, "height": 1000 + int(self._random() * 1000)}
        elif kind == "external":
            page = {"uri": f"https://example.org/a/{int(self._random() * 1e6)}", "title": self.phrase(80)}
            embed["external"] = page | {"description": self.phrase(200)}
            if self.chance(0.7):
                embed["external"]["thumb"] = self.blob()
        elif kind == "video":
            embed |= {"video": self.blob("video/mp4"), "aspectRatio": {"width": 1080, "height": 1920}}
        elif kind == "record":
            embed["record"] = self._strong(self._targets.post().this)
        else:
            quoted = {"$type": "app.bsky.embed.record", "record": self._strong(self._targets.post().this)}
            embed |= {"media": self._embed(self.pick(("images", "external", "video"))), "record": quoted}
        return embed

    def _like(self) -> Record:
        subject = self._targets.like_subject()
        record: Record = {"subject": {"cid": subject.cid, "uri": subject.uri}, "createdAt": self._now()}
        if self._random() < 0.17 and (via := self._targets.via()) is not None:
            record["via"] = {"cid": via.cid, "uri": via.uri}
        return record

    def _bookmark(self) -> Record:
        return {"subject": self._strong(self._targets.post().this), "createdAt": self._now()}

    def _about_person(self) -> Record:
        return {"subject": self._targets.person().did, "createdAt": self._now()}

    def _list(self) -> Record:
        record: Record = {"purpose": self.pick(_LIST_PURPOSES), "name": self.phrase(40), "createdAt": self._now()}
        if self.chance(0.5):
            record |= {"description": self.phrase(), "avatar": self.blob()}
        return record

    def _list_item(self) -> Record:
        uri = self._targets.list_uri(self._owner)
        return {"list": uri, "subject": self._targets.person().did, "createdAt": self._now()}

    def _list_block(self) -> Record:
        return {"subject": self._targets.list_uri(""), "createdAt": self._now()}

    def _generator(self) -> Record:
        record: Record = {"did": "did:web:feeds.example.com", "displayName": self.phrase(24), "createdAt": self._now()}
        if self.chance(0.6):
            record |= {"description": self.phrase(), "avatar": self.blob("image/png")}
        return record

    def _starter_pack(self) -> Record:
        record: Record = {
            "name": self.phrase(50),
            "list": self._targets.list_uri(self._owner),
            "createdAt": self._now(),
        }
        if self.chance(0.6):
            record |= {"feeds": [{"uri": self._targets.feed_uri()}], "description": self.phrase()}
        return record

    def _labeler(self) -> Record:
        definition: Record = {
            "identifier": "spoiler",
            "severity": "inform",
            "blurs": "content",
            "defaultSetting": "warn",
        }
        locales = [{"lang": "en", "name": "Spoiler", "description": "Gives it away"}]
        policies = {"labelValues": ["spoiler", "rude"], "labelValueDefinitions": [definition | {"locales": locales}]}
        return {"policies": policies, "createdAt": self._now()}

    def _label(self) -> Record:
        about = self._targets.post().this.uri if self.chance(0.7) else self._targets.person().did
        record: Record = {"src": self._owner, "uri": about, "val": self.pick(("spam", "rude", "porn", "!hide"))}
        return record | {"cts": self._now()} | ({"neg": True} if self.chance(0.2) else {})

    def _verification(self) -> Record:
        person = self._targets.person()
        return {
            "subject": person.did,
            "handle": person.handle,
            "displayName": self.pick(_NAMES),
            "createdAt": self._now(),
        }

    def _thread_gate(self) -> Record:
        record: Record = {"post": f"at://{self._owner}/app.bsky.feed.post/{self._rkey}", "createdAt": self._now()}
        if self.chance(0.8):
            rules = [{"$type": f"app.bsky.feed.threadgate#{rule}Rule"} for rule in ("mention", "following", "follower")]
            record["allow"] = [rule for rule in rules if self.chance(0.4)]
            if self.chance(0.3):
                rule = {"$type": "app.bsky.feed.threadgate#listRule", "list": self._targets.list_uri(self._owner)}
                record["allow"].append(rule)
        if self.chance(0.3):
            record["hiddenReplies"] = [self._targets.post().this.uri]
        return record

    def _post_gate(self) -> Record:
        record: Record = {"post": f"at://{self._owner}/app.bsky.feed.post/{self._rkey}", "createdAt": self._now()}
        record["embeddingRules"] = [{"$type": "app.bsky.feed.postgate#disableRule"}] if self.chance(0.8) else []
        if self.chance(0.4):
            record["detachedEmbeddingUris"] = [self._targets.post().this.uri]
        return record

    def _profile(self) -> Record:
        record: Record = {"displayName": self.pick(_NAMES), "description": self.phrase(256)}
        if self.chance(0.8):
            record["avatar"] = self.blob()
        if self.chance(0.5):
            record["banner"] = self.blob()
        if self.chance(0.3):
            record["pinnedPost"] = self._strong(self._targets.post().this)
        if self.chance(0.8):
            record["createdAt"] = self._now()
        return record

    def _generic(self) -> Record:
        record: Record = {
            "status": self.pick(_GENERIC_TEXTS),
            "createdAt": self._now(),
            "count": int(self._random() * 9),
        }
        if self.chance(0.3):
            record["subject"] = self._strong(self._targets.post().this)
        if self.chance(0.3):
            record["image"] = self.blob("image/webp")
        if self.chance(0.2):
            digest = {"$bytes": "q83vEjRWeA"}
            record["nested"] = {"a": {"b": [1, -2, None, True, {"c": 0.5}]}, "digest": digest}
        return record
