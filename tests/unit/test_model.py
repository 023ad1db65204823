"""The model against the state law, sentence by sentence, with answers written by hand."""

# ruff: noqa: DTZ001, DTZ901 - the tables hold UTC without a zone
from __future__ import annotations

import json
from datetime import datetime, timedelta
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastworker.law.compare import Difference, diff, report, same
from fastworker.law.model import COLUMNS, CORE, FULL, Model, parse_time
from tests.rig import histories
from tests.rig.histories import History, cid_of, entry_ms, random_history, to_entry

A, B, C = ("did:plc:" + letter * 24 for letter in "abc")
NOW = "2026-03-01T12:00:00.000Z"
NOON = datetime(2026, 3, 1, 12)
POST = f"at://{A}/app.bsky.feed.post/1"
NULL_PROFILE = dict.fromkeys(
    ["display_name", "avatar_url", "banner_url", "description", "profile_record", "pinned_post"]
)


def commit(
    seq: int, repo: str, *ops: dict[str, Any], rev: str | None = "auto", time: str | None = NOW
) -> dict[str, Any]:
    rev = f"3k{seq:011}" if rev == "auto" else rev
    return {"kind": "commit", "seq": seq, "repo": repo, "rev": rev, "time": time, "ops": list(ops)}


def put(path: str, cid: str = "cid1", **record: Any) -> dict[str, Any]:
    return {"action": "create", "path": path, "cid": cid, "record": {"createdAt": NOW, **record}}


def delete(path: str) -> dict[str, Any]:
    return {"action": "delete", "path": path, "cid": None}


def post(rkey: str = "1", cid: str = "cid1", **record: Any) -> dict[str, Any]:
    return put(f"app.bsky.feed.post/{rkey}", cid, **{"text": "hi", **record})


def like(rkey: str = "1", uri: str = POST, **record: Any) -> dict[str, Any]:
    return put(f"app.bsky.feed.like/{rkey}", subject={"uri": uri, "cid": "target"}, **record)


def repost(rkey: str = "1", uri: str = POST) -> dict[str, Any]:
    return put(f"app.bsky.feed.repost/{rkey}", subject={"uri": uri, "cid": "target"})


def reply_to(parent: str, root: str | None = None) -> dict[str, Any]:
    return {"parent": {"uri": parent, "cid": "p"}, "root": {"uri": root or parent, "cid": "r"}}


def quoting(uri: object) -> dict[str, Any]:
    return {"$type": "app.bsky.embed.record", "record": {"uri": uri, "cid": "q"}}


def identity(seq: int, did: str, handle: str | None) -> dict[str, Any]:
    return {"kind": "identity", "seq": seq, "did": did, "handle": handle, "time": NOW}


def account(seq: int, did: str, status: str | None, *, active: bool = False) -> dict[str, Any]:
    return {"kind": "account", "seq": seq, "did": did, "active": active, "status": status, "time": NOW}


def tables(*events: dict[str, Any], **options: Any) -> dict[str, list[dict[str, Any]]]:
    model = Model(**options)
    for event in events:
        model.apply(event)
    return model.tables()


def in_any_order(*events: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables, after making sure that no order of the events and no second delivery changes them."""
    expected = tables(*events)
    for order in permutations(events):
        assert diff(expected, tables(*order)) == []
        assert diff(expected, tables(*order, *events)) == []
    return expected


def column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return sorted(row[name] for row in rows)


def only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    assert len(rows) == 1, rows
    return rows[0]


def reasons(*events: dict[str, Any]) -> list[str]:
    model = Model()
    for event in events:
        model.apply(event)
    return list(model.drops.values())


# Winner


def test_a_post_is_a_row_with_everything_that_the_commit_says() -> None:
    record: dict[str, Any] = {"langs": ["en"], "tags": ["t"], "reply": reply_to(f"at://{B}/app.bsky.feed.post/9", POST)}
    assert tables(commit(7, A, post("2", **record)))["posts"] == [
        {
            "uri": f"at://{A}/app.bsky.feed.post/2",
            "cid": "cid1",
            "author_did": A,
            "text": "hi",
            "langs": ["en"],
            "parent_uri": f"at://{B}/app.bsky.feed.post/9",
            "parent_cid": "p",
            "root_uri": POST,
            "root_cid": "r",
            "embed": None,
            "facets": None,
            "tags": ["t"],
            "created_at": NOON,
            "indexed_at": NOON,
            "commit_time": NOON,
            "commit_seq": "7",
            "commit_rev": "3k00000000007",
            "has_thread_gate": False,
            "has_post_gate": False,
            "violates_thread_gate": False,
            "violates_embedding_rules": False,
        }
    ]


def test_the_highest_version_wins_in_any_order() -> None:
    found = in_any_order(commit(1, A, post(text="old")), commit(2, A, post(text="new")), commit(3, B, like()))
    assert only(found["posts"])["text"] == "new"


def test_a_delete_beats_the_late_create() -> None:
    found = in_any_order(commit(1, A, post()), commit(2, A, delete("app.bsky.feed.post/1")))
    assert found["posts"] == []
    assert found["feed_items"] == []
    assert found["post_aggregations"] == []


def test_created_again_after_its_delete_it_lives() -> None:
    found = in_any_order(
        commit(1, A, post(text="first")), commit(2, A, delete("app.bsky.feed.post/1")), commit(3, A, post(text="again"))
    )
    assert only(found["posts"])["text"] == "again"


def test_an_update_replaces_the_whole_record() -> None:
    found = in_any_order(commit(1, A, post(langs=["en"], tags=["t"])), commit(2, A, post()))
    assert only(found["posts"])["langs"] is None
    assert only(found["posts"])["tags"] == []


def test_revs_decide_where_both_have_one_and_seqs_where_not() -> None:
    by_rev = tables(commit(9, A, post(text="low"), rev="3k1"), commit(1, A, post(text="high"), rev="3k2"))
    assert only(by_rev["posts"])["text"] == "high"
    by_seq = tables(commit(10, A, post(text="high"), rev=None), commit(9, A, post(text="low"), rev="3k2"))
    assert only(by_seq["posts"])["text"] == "high"


def test_same_rev_is_decided_by_seq() -> None:
    found = tables(commit(10, A, post(text="high"), rev="3k1"), commit(9, A, post(text="low"), rev="3k1"))
    assert only(found["posts"])["text"] == "high"


def test_ties_op_index_then_delete_then_cid() -> None:
    later_op = tables(commit(1, A, delete("app.bsky.feed.post/1"), post()))
    assert len(later_op["posts"]) == 1
    same_op = [commit(1, A, post()), commit(1, A, delete("app.bsky.feed.post/1"))]
    assert in_any_order(*same_op)["posts"] == []
    cids = [commit(1, A, post(cid="cid1")), commit(1, A, post(cid="cid2"))]
    assert only(in_any_order(*cids)["posts"])["cid"] == "cid2"


def test_a_dropped_operation_never_happened() -> None:
    bad = commit(2, A, put("app.bsky.feed.like/1", subject="nothing"))
    found = in_any_order(commit(1, A, like(uri=f"at://{B}/app.bsky.feed.post/1")), bad)
    assert len(found["likes"]) == 1
    assert reasons(bad) == ["bad_record"]


# Twins


@pytest.mark.parametrize(
    ("table", "collection", "record"),
    [
        ("likes", "app.bsky.feed.like", {"subject": {"uri": POST}}),
        ("reposts", "app.bsky.feed.repost", {"subject": {"uri": POST}}),
        ("bookmarks", "app.bsky.bookmark", {"subject": {"uri": POST}}),
        ("follows", "app.bsky.graph.follow", {"subject": C}),
        ("blocks", "app.bsky.graph.block", {"subject": C}),
        ("list_items", "app.bsky.graph.listitem", {"list": f"at://{B}/app.bsky.graph.list/1", "subject": C}),
        ("list_blocks", "app.bsky.graph.listblock", {"subject": f"at://{A}/app.bsky.graph.list/1"}),
        ("verifications", "app.bsky.graph.verification", {"subject": C, "handle": "c.test"}),
    ],
)
def test_of_twins_the_lowest_rkey_is_in_the_table_and_the_next_one_follows(
    table: str, collection: str, record: dict[str, Any]
) -> None:
    low, high = commit(2, B, put(f"{collection}/1", **record)), commit(1, B, put(f"{collection}/2", **record))
    gone = commit(3, B, delete(f"{collection}/1"))
    assert column(in_any_order(low, high)[table], "uri") == [f"at://{B}/{collection}/1"]
    assert column(in_any_order(low, high, gone)[table], "uri") == [f"at://{B}/{collection}/2"]


def test_verifications_of_several_verifiers_lowest_rkey_then_uri() -> None:
    record: dict[str, Any] = {"subject": C, "handle": "c.test"}
    same_rkey = [commit(n, did, put("app.bsky.graph.verification/5", **record)) for n, did in ((1, B), (2, A))]
    assert only(in_any_order(*same_rkey)["verifications"])["uri"].startswith(f"at://{A}/")
    lower = commit(3, B, put("app.bsky.graph.verification/4", **record))
    assert only(in_any_order(*same_rkey, lower)["verifications"])["uri"].endswith("/4")


def test_a_twin_in_the_shadow_counts_for_nothing() -> None:
    found = in_any_order(commit(1, B, like("1"), repost("1")), commit(2, B, like("2"), repost("2")))
    aggregate = only(found["post_aggregations"])
    assert (aggregate["like_count"], aggregate["repost_count"]) == (1, 1)
    assert len(found["feed_items"]) == 1
    assert len(found["notifications"]) == 2
    assert only(found["post_viewer_states"])["like_uri"].endswith("/1")


# Counters, aggregates, feed items, quotes, viewer states


def test_counters_are_counts() -> None:
    found = in_any_order(
        commit(1, A, post()),
        commit(2, B, like(), repost(), put("app.bsky.bookmark/1", subject={"uri": POST})),
        commit(3, C, like(), post("r", reply=reply_to(POST)), post("q", embed=quoting(POST))),
    )
    aggregate = only([row for row in found["post_aggregations"] if row["post_uri"] == POST])
    assert aggregate == {
        "post_uri": POST,
        "like_count": 2,
        "repost_count": 1,
        "reply_count": 1,
        "bookmark_count": 1,
        "quote_count": 1,
    }


def test_an_aggregate_for_each_live_post_and_each_subject_of_any_kind() -> None:
    uris = [f"at://{A}/app.bsky.feed.post/{n}" for n in range(6)]
    found = tables(
        commit(1, B, like(uri=uris[0]), repost(uri=uris[1]), put("app.bsky.bookmark/1", subject={"uri": uris[2]})),
        commit(2, B, post("r", reply=reply_to(uris[3], uris[5])), post("q", embed=quoting(uris[4]))),
    )
    own = [f"at://{B}/app.bsky.feed.post/{n}" for n in "rq"]
    assert column(found["post_aggregations"], "post_uri") == sorted([*uris[:5], *own])  # a root alone has none


def test_likes_of_generators_and_labelers_count_there_too() -> None:
    generator, labeler = f"at://{A}/app.bsky.feed.generator/1", f"at://{A}/app.bsky.labeler.service/self"
    found = in_any_order(
        commit(1, A, put("app.bsky.feed.generator/1", did="did:web:x.example", displayName="F")),
        commit(2, A, put("app.bsky.labeler.service/self")),
        commit(3, B, like("1", generator), like("2", labeler)),
    )
    assert only(found["feed_generators"])["like_count"] == 1
    assert only(found["labeler_services"])["like_count"] == 1
    assert column(found["post_aggregations"], "post_uri") == [generator, labeler]


def test_a_feed_item_for_each_post_and_repost() -> None:
    found = tables(commit(1, A, post()), commit(2, B, repost()))
    common = {"post_uri": POST, "sort_at": NOON, "cid": "cid1", "created_at": NOON}
    assert found["feed_items"] == [
        {"uri": POST, "originator_did": A, "type": "post", **common},
        {"uri": f"at://{B}/app.bsky.feed.repost/1", "originator_did": B, "type": "repost", **common},
    ]


def test_a_quote_for_each_live_post_that_embeds_a_post() -> None:
    with_media = {
        "$type": "app.bsky.embed.recordWithMedia",
        "record": {"record": {"uri": POST, "cid": "q"}},
        "media": {"$type": "com.example.media"},
    }
    generator = quoting(f"at://{A}/app.bsky.feed.generator/1")
    by_handle = quoting("at://alice.test/app.bsky.feed.post/1")
    embeds = {
        "1": quoting(POST),
        "2": with_media,
        "3": generator,
        "4": by_handle,
        "5": quoting(5),
        "6": 7,
    }
    found = tables(commit(1, B, *[post(rkey, embed=embed) for rkey, embed in embeds.items()]))
    assert [row["uri"] for row in found["quotes"]] == [f"at://{B}/app.bsky.feed.post/{n}#quote" for n in "12"]
    assert found["quotes"][0] == {
        "uri": f"at://{B}/app.bsky.feed.post/1#quote",
        "cid": "cid1",
        "post_uri": f"at://{B}/app.bsky.feed.post/1",
        "quoted_uri": POST,
        "quoted_cid": "q",
        "created_at": NOON,
    }


def test_no_quote_of_a_post_whose_uri_or_did_does_not_fit() -> None:
    far, odd = f"at://{A}/app.bsky.feed.post/" + "r" * 500, "at://did:plc:" + "a" * 250 + "/app.bsky.feed.post/1"
    found = tables(commit(1, B, post("1", embed=quoting(far)), post("2", embed=quoting(odd))))
    assert len(found["posts"]) == 2
    assert found["quotes"] == []
    assert found["notifications"] == []


def test_no_quote_whose_uri_does_not_fit_and_no_count_of_it() -> None:
    head = f"at://{B}/app.bsky.feed.post/"
    for length, there in ((512 - len("#quote"), 1), (512 - len("#quote") + 1, 0)):
        found = tables(commit(1, B, post("r" * (length - len(head)), embed=quoting(POST))))
        assert len(found["posts"]) == 1
        assert len(found["quotes"]) == there
        assert len([row for row in found["post_aggregations"] if row["post_uri"] == POST]) == there


def test_viewer_states_follow_the_tables_and_go_when_empty() -> None:
    events = [commit(1, B, like()), commit(2, B, repost(), put("app.bsky.bookmark/1", subject={"uri": POST}))]
    like_uri, repost_uri = f"at://{B}/app.bsky.feed.like/1", f"at://{B}/app.bsky.feed.repost/1"
    key = {"post_uri": POST, "viewer_did": B}
    full = in_any_order(*events)["post_viewer_states"]
    assert full == [{**key, "like_uri": like_uri, "repost_uri": repost_uri, "bookmarked": True}]
    unliked = commit(3, B, delete("app.bsky.feed.like/1"))
    less = in_any_order(*events, unliked)["post_viewer_states"]
    assert less == [{**key, "like_uri": None, "repost_uri": repost_uri, "bookmarked": True}]
    emptied = commit(4, B, delete("app.bsky.feed.repost/1"), delete("app.bsky.bookmark/1"))
    assert in_any_order(*events, unliked, emptied)["post_viewer_states"] == []


# Notifications


def test_one_notification_for_each_row_reason_and_recipient() -> None:
    mention = {"features": [{"$type": "app.bsky.richtext.facet#mention", "did": C}]}
    record: dict[str, Any] = {
        "reply": reply_to(POST),
        "embed": quoting(f"at://{C}/app.bsky.feed.post/9"),
        "facets": [mention, mention],
    }
    found = tables(commit(1, B, like(), repost(), put("app.bsky.graph.follow/1", subject=C), post("2", **record)))
    post_uri = f"at://{B}/app.bsky.feed.post/2"
    assert {
        (row["uri"], row["recipient_did"], row["reason"], row["reason_subject"]) for row in found["notifications"]
    } == {
        (f"at://{B}/app.bsky.feed.like/1#notification", A, "like", POST),
        (f"at://{B}/app.bsky.feed.repost/1#notification", A, "repost", POST),
        (f"at://{B}/app.bsky.graph.follow/1#notification", C, "follow", None),
        (f"{post_uri}#notification/reply", A, "reply", POST),
        (f"{post_uri}#notification/quote", C, "quote", f"at://{C}/app.bsky.feed.post/9"),
        (f"{post_uri}#notification/mention/{C}", C, "mention", post_uri),
    }
    assert len(found["notifications"]) == 6
    assert {(row["author_did"], row["cid"], row["created_at"]) for row in found["notifications"]} == {(B, "cid1", NOON)}


def test_never_to_oneself() -> None:
    facets = [{"features": [{"$type": "app.bsky.richtext.facet#mention", "did": A}]}]
    own = post("2", reply=reply_to(POST), embed=quoting(POST), facets=facets)
    assert tables(commit(1, A, like(), repost(), put("app.bsky.graph.follow/1", subject=A), own))["notifications"] == []


def test_to_the_owner_of_whatever_is_liked_whether_or_not_it_arrived() -> None:
    found = tables(commit(1, B, like(uri=f"at://{C}/app.bsky.feed.generator/1")))
    assert only(found["notifications"])["recipient_did"] == C


def test_gone_when_the_cause_is_gone() -> None:
    assert in_any_order(commit(1, B, like()), commit(2, B, delete("app.bsky.feed.like/1")))["notifications"] == []


def test_the_first_hundred_mentions_and_none_whose_uri_does_not_fit() -> None:
    dids = [f"did:plc:{n:024}" for n in range(101)]
    features = [{"$type": "app.bsky.richtext.facet#mention", "did": did} for did in dids]
    found = tables(commit(1, B, post(facets=[{"features": features}])))["notifications"]
    assert column(found, "recipient_did") == dids[:100]
    long = "r" * (512 - len(f"at://{B}/app.bsky.feed.post/#notification/mention/{dids[0]}"))
    facets = [{"features": features[:1]}]
    assert len(tables(commit(1, B, post(long, facets=facets)))["notifications"]) == 1
    assert tables(commit(1, B, post(long + "r", facets=facets)))["notifications"] == []


# Threads and gates


def test_a_thread_context_while_reply_and_root_live_with_the_root_authors_like() -> None:
    reply_uri = f"at://{B}/app.bsky.feed.post/2"
    root, reply = commit(1, A, post()), commit(2, B, post("2", reply=reply_to(POST)))
    liked = commit(3, A, like(uri=reply_uri))
    assert in_any_order(root, reply)["thread_contexts"] == [{"post_uri": reply_uri, "root_author_like_uri": None}]
    expected = [{"post_uri": reply_uri, "root_author_like_uri": f"at://{A}/app.bsky.feed.like/1"}]
    assert in_any_order(root, reply, liked)["thread_contexts"] == expected
    assert tables(reply, liked)["thread_contexts"] == []
    assert in_any_order(root, reply, commit(4, A, delete("app.bsky.feed.post/1")))["thread_contexts"] == []
    assert tables(root, reply, commit(4, C, like(uri=reply_uri)))["thread_contexts"][0]["root_author_like_uri"] is None


def test_no_thread_context_for_a_post_that_is_its_own_root() -> None:
    assert tables(commit(1, A, post(reply=reply_to(POST))))["thread_contexts"] == []


def gate(kind: str = "threadgate", rkey: str = "1", **record: Any) -> dict[str, Any]:
    return put(f"app.bsky.feed.{kind}/{rkey}", **record)


def test_thread_gate_rules() -> None:
    kind = "app.bsky.feed.threadgate#"
    list_uri = f"at://{A}/app.bsky.graph.list/1"
    allow = [{"$type": kind + "mentionRule"}, {"$type": kind + "listRule", "list": list_uri}]
    base = {"post_uri": POST, "owner_did": A, "created_at": NOON}
    nobody = {"allow_mentions": False, "allow_following": False, "allow_list_members": False, "allow_list_uris": []}
    some = {"allow_mentions": True, "allow_following": False, "allow_list_members": True, "allow_list_uris": [list_uri]}
    following = {**nobody, "allow_following": True}
    assert tables(commit(1, A, gate(allow=allow)))["thread_gates"] == [{**base, **some}]
    assert tables(commit(1, A, gate(allow=[])))["thread_gates"] == [{**base, **nobody}]
    assert tables(commit(1, A, gate(allow=[{"$type": kind + "followingRule"}])))["thread_gates"] == [
        {**base, **following}
    ]
    assert tables(commit(1, A, gate(allow=[{"$type": kind + "followerRule"}])))["thread_gates"] == []  # has no column
    assert tables(commit(1, A, gate()))["thread_gates"] == []  # everyone


def test_gate_flags_follow_the_live_gates() -> None:
    events = [commit(1, A, post()), commit(2, A, gate()), commit(3, A, gate("postgate"))]
    row = only(in_any_order(*events)["posts"])
    assert (row["has_thread_gate"], row["has_post_gate"]) == (True, True)
    gone = commit(4, A, delete("app.bsky.feed.threadgate/1"))
    row = only(in_any_order(*events, gone)["posts"])
    assert (row["has_thread_gate"], row["has_post_gate"]) == (False, True)


def test_post_gate_rules() -> None:
    rules = [{"$type": "app.bsky.feed.postgate#disableRule"}]
    base = {"post_uri": POST, "created_at": NOON}
    both = tables(commit(1, A, gate("postgate", embeddingRules=rules, detachedEmbeddingUris=[POST, 7])))["post_gates"]
    assert both == [{**base, "embedding_rules": {"disableRule": True, "detachedEmbeddingUris": [POST]}}]
    assert tables(commit(1, A, gate("postgate", embeddingRules=[])))["post_gates"] == [{**base, "embedding_rules": {}}]


def test_a_gate_that_names_another_post_is_dropped() -> None:
    assert reasons(commit(1, A, gate(post=f"at://{B}/app.bsky.feed.post/1"))) == ["gate_mismatch"]
    assert reasons(commit(1, A, gate("postgate", post=POST + "1"))) == ["gate_mismatch"]
    assert reasons(commit(1, A, gate(post=POST))) == []


# Labels, lists, generic records


def test_labels_keep_uri_src_and_cts_and_have_one_event() -> None:
    record: dict[str, Any] = {"src": C, "uri": POST, "val": "spam", "cts": "2026-01-01T00:00:00Z", "neg": True}
    found = in_any_order(commit(1, A, put("com.atproto.label.label/1", **record)), commit(2, B))
    uri = f"at://{A}/com.atproto.label.label/1"
    created = datetime(2026, 1, 1)
    assert found["labels"] == [
        {"uri": uri, "src": C, "subject": POST, "val": "spam", "neg": True, "created_at": created}
    ]
    assert found["label_events"] == [{"label_uri": uri, "action": "created"}]
    gone = commit(3, A, delete("com.atproto.label.label/1"))
    assert tables(commit(1, A, put("com.atproto.label.label/1", **record)), gone)["label_events"] == []


def test_a_label_of_an_account_by_its_own_repository() -> None:
    row = only(tables(commit(1, A, put("com.atproto.label.label/1", did=B, val="x")))["labels"])
    assert (row["src"], row["subject"], row["neg"], row["created_at"]) == (A, B, False, NOON)
    odd = put("com.atproto.label.label/1", src=C, did=B, val="x", neg="yes")
    assert only(tables(commit(1, A, odd))["labels"])["neg"] is False


def test_only_the_owner_puts_people_on_a_list_before_or_after_it_exists() -> None:
    item = put("app.bsky.graph.listitem/1", list=f"at://{A}/app.bsky.graph.list/1", subject=C)
    assert len(tables(commit(1, A, item))["list_items"]) == 1
    assert tables(commit(1, B, item))["list_items"] == []
    assert reasons(commit(1, B, item)) == ["not_owner"]


def test_a_record_of_another_type_is_dropped() -> None:
    spoof = put("app.bsky.feed.post/1", "cid1", **{"$type": "app.bsky.feed.like", "subject": {"uri": POST}})
    assert reasons(commit(1, B, spoof)) == ["type_mismatch"]
    assert len(tables(commit(1, B, post(**{"$type": "app.bsky.feed.post"})))["posts"]) == 1


def test_every_unknown_collection_is_a_generic_record() -> None:
    found = tables(commit(1, A, put("com.example.thing/x", a={"b": [1]})))
    assert found["generic_records"] == [
        {
            "uri": f"at://{A}/com.example.thing/x",
            "cid": "cid1",
            "author_did": A,
            "record_type": "com.example.thing",
            "record": {"createdAt": NOW, "a": {"b": [1]}},
            "created_at": NOON,
        }
    ]


def test_lists_generators_packs_labelers_verifications() -> None:
    blob = {"$type": "blob", "ref": {"$link": "bafkrei1"}}
    found = tables(
        commit(
            1,
            A,
            put("app.bsky.graph.list/1", name="n" * 300, purpose="p", description="d", avatar=blob),
            put("app.bsky.graph.listblock/1", subject=f"at://{B}/app.bsky.graph.list/1"),
            put("app.bsky.feed.generator/1", did=B, displayName="F", avatar={"cid": "bafkrei2", "mimeType": "x"}),
            put(
                "app.bsky.graph.starterpack/1",
                name="S",
                list=f"at://{A}/app.bsky.graph.list/1",
                feeds=[{"uri": POST}, 1],
            ),
            put("app.bsky.graph.starterpack/2", name="S", feeds=None),
            put("app.bsky.labeler.service/self", policies={"labelValues": ["x"]}),
            put("app.bsky.graph.verification/1", subject=B, handle="Bob.Test", verifiedAt="2026-01-01"),
        )
    )
    common = {"cid": "cid1", "creator_did": A, "created_at": NOON}
    assert found["lists"] == [
        {
            "uri": f"at://{A}/app.bsky.graph.list/1",
            "name": "n" * 255,
            "purpose": "p",
            "description": "d",
            "avatar_url": "bafkrei1",
            **common,
        }
    ]
    block = {"uri": f"at://{A}/app.bsky.graph.listblock/1", "blocker_did": A, "created_at": NOON}
    assert found["list_blocks"] == [{**block, "list_uri": f"at://{B}/app.bsky.graph.list/1"}]
    generator = only(found["feed_generators"])
    assert (generator["did"], generator["display_name"], generator["avatar_url"]) == (B, "F", "bafkrei2")
    assert [row["feeds"] for row in found["starter_packs"]] == [[POST], []]
    assert [row["list_uri"] for row in found["starter_packs"]] == [f"at://{A}/app.bsky.graph.list/1", None]
    assert only(found["labeler_services"])["policies"] == {"labelValues": ["x"]}
    verification = only(found["verifications"])
    assert (verification["handle"], verification["verified_at"]) == ("bob.test", datetime(2026, 1, 1))
    assert verification["created_at"] == NOON


# Users


def test_a_user_for_everyone_who_acted_or_was_followed_blocked_or_listed() -> None:
    dids = [f"did:plc:{n:024}" for n in range(9)]
    found = tables(
        commit(1, dids[0]),
        identity(2, dids[1], None),
        account(3, dids[2], "takendown"),
        commit(4, dids[3], put("app.bsky.graph.follow/1", subject=dids[4])),
        commit(5, dids[3], put("app.bsky.graph.block/1", subject=dids[5])),
        commit(
            6, dids[3], put("app.bsky.graph.listitem/1", list=f"at://{dids[3]}/app.bsky.graph.list/1", subject=dids[6])
        ),
        commit(7, dids[3], like(uri=f"at://{dids[7]}/app.bsky.feed.post/1"), post(reply=reply_to(POST))),
        {"kind": "sync", "seq": 8, "did": dids[8], "rev": "3k1", "time": NOW},
    )
    assert column(found["users"], "did") == dids[:7]
    assert {row["handle"] for row in found["users"]} == {"handle.invalid"}


def test_a_user_stays_when_the_follow_was_replaced_or_deleted() -> None:
    follow = "app.bsky.graph.follow/1"
    events = [commit(1, A, put(follow, subject=B)), commit(2, A, put(follow, subject=C)), commit(3, A, delete(follow))]
    assert column(in_any_order(*events)["users"], "did") == [A, B, C]


def test_the_newest_real_handle_in_lower_case() -> None:
    found = in_any_order(
        identity(1, A, "old.test"), identity(2, A, "New.Test"), identity(3, A, "handle.invalid"), identity(4, A, None)
    )
    assert found["users"] == [{"did": A, "handle": "new.test", **NULL_PROFILE}]
    assert only(tables(identity(1, A, A))["users"])["handle"] == "handle.invalid"


def test_identity_events_without_seq_are_ordered_by_time() -> None:
    late = {**identity(0, A, "late.test"), "seq": None, "time": "2026-03-01T12:00:01Z"}
    early = {**identity(0, A, "early.test"), "seq": None}
    assert only(in_any_order(late, early)["users"])["handle"] == "late.test"


def test_the_profile_follows_its_record_and_goes_with_it() -> None:
    record: dict[str, Any] = {
        "displayName": "Al\x00ice" + "e" * 300,
        "description": "d",
        "avatar": {"ref": {"$link": "bafkrei1"}},
        "banner": "bafkrei2",
        "pinnedPost": {"uri": POST, "cid": "c"},
    }
    set_, gone = (
        commit(1, A, put("app.bsky.actor.profile/self", **record)),
        commit(2, A, delete("app.bsky.actor.profile/self")),
    )
    row = only(tables(set_)["users"])
    assert row["display_name"] == ("Alice" + "e" * 300)[:255]
    assert row["description"] == "d"
    assert (row["avatar_url"], row["banner_url"]) == ("bafkrei1", "bafkrei2")
    assert row["pinned_post"] == {"uri": POST, "cid": "c"}
    assert row["profile_record"]["displayName"] == "Alice" + "e" * 300
    assert in_any_order(set_, gone)["users"] == [{"did": A, "handle": "handle.invalid", **NULL_PROFILE}]
    removed_name = commit(3, A, put("app.bsky.actor.profile/self"))
    assert only(in_any_order(set_, removed_name)["users"])["display_name"] is None


def test_a_profile_under_another_rkey_is_none() -> None:
    event = commit(1, A, put("app.bsky.actor.profile/other", displayName="x"))
    assert reasons(event) == ["bad_path"]
    assert only(tables(event)["users"])["display_name"] is None


# Accounts


def test_the_newest_status_whatever_it_is_called() -> None:
    found = in_any_order(account(1, A, "takendown"), account(3, A, "tomorrows"), account(2, A, None, active=True))
    assert found["fastworker.accounts"] == [{"did": A, "active": False, "status": "tomorrows"}]


def test_other_inactive_states_keep_the_records() -> None:
    assert len(in_any_order(commit(1, A, post()), account(2, A, "takendown"))["posts"]) == 1


def test_a_deletion_is_a_tombstone_for_all_records_below_it() -> None:
    profile = put("app.bsky.actor.profile/self", displayName="x")
    before, after = commit(1, A, post("1"), profile, like("1")), commit(5, A, post("2"))
    found = in_any_order(before, account(4, A, "deleted"), after)
    assert column(found["posts"], "uri") == [f"at://{A}/app.bsky.feed.post/2"]
    assert found["likes"] == []
    assert found["users"] == [{"did": A, "handle": "handle.invalid", **NULL_PROFILE}]
    assert column(found["post_aggregations"], "post_uri") == [f"at://{A}/app.bsky.feed.post/2"]


def test_reactivation_revives_nothing_and_the_highest_deletion_counts() -> None:
    events = [commit(1, A, post("1")), account(2, A, "deleted"), account(3, A, None, active=True)]
    found = in_any_order(*events)
    assert found["posts"] == []
    assert found["fastworker.accounts"] == [{"did": A, "active": True, "status": None}]
    assert in_any_order(*events, commit(4, A, post("2")), account(5, A, "deleted"))["posts"] == []


def test_an_update_after_the_deletion_lives_an_older_one_does_not() -> None:
    events = [commit(1, A, post(text="old")), account(2, A, "deleted"), commit(3, A, post(text="new"))]
    assert only(in_any_order(*events)["posts"])["text"] == "new"


def test_an_active_account_is_not_deleted_whatever_its_status_says() -> None:
    assert len(tables(commit(1, A, post()), account(2, A, "deleted", active=True))["posts"]) == 1


def test_forbidden_accounts_leave_nothing() -> None:
    events = [commit(1, A, post()), identity(2, A, "a.test"), commit(3, B, put("app.bsky.graph.follow/1", subject=A))]
    found = tables(*events, forbidden=[A])
    assert column(found["users"], "did") == [B]
    assert found["posts"] == []
    assert len(found["follows"]) == 1


# Dates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-01T00:00:00Z", datetime(2026, 1, 1)),
        ("2026-01-01T00:00:00+09:00", datetime(2025, 12, 31, 15)),
        ("2026-01-01T00:00:00.123456789Z", datetime(2026, 1, 1, 0, 0, 0, 123456)),
        ("2026-01-01T00:00:00", datetime(2026, 1, 1)),
        ("2026-01-01", datetime(2026, 1, 1)),
        (" 2026-1-1 3:04 ", datetime(2026, 1, 1, 3, 4)),
        ("2026-01-01t00:00:00z", datetime(2026, 1, 1)),
        ("2026-1-1 00:00 +09:00", datetime(2025, 12, 31, 15)),
        ("2026-01-01T24:00:00Z", datetime(2026, 1, 2)),
        ("2025-12-31T23:59:60Z", datetime(2026, 1, 1)),
        ("2025-12-31T23:59:59.5-01:30", datetime(2026, 1, 1, 1, 29, 59, 500000)),
        ("0000-06-01T00:00:00Z", datetime.min),
        ("0001-01-01T00:00:00+01:00", datetime.min),
        ("9999-12-31T23:59:59-01:00", datetime.max),
        ("2026-02-30", None),
        ("2026-01-01T25:00:00Z", None),
        ("+012026-01-01", datetime.max),
        ("yesterday", None),
        ("", None),
        (5, None),
        (None, None),
    ],
)
def test_dates_are_utc_with_offsets_converted(text: Any, expected: datetime | None) -> None:
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("2026-03-01T11:00:00Z", NOON - timedelta(hours=1)),
        ("2026-03-01T12:01:59Z", NOON + timedelta(seconds=119)),
        ("2026-03-01T12:02:01Z", NOON + timedelta(minutes=2)),
        ("9999-12-31T23:59:59Z", NOON + timedelta(minutes=2)),
        ("1960-01-01T00:00:00Z", datetime(1970, 1, 1)),
        ("0000-01-01T00:00:00Z", datetime(1970, 1, 1)),
        ("nonsense", NOON),
        (None, NOON),
    ],
)
def test_dates_are_clamped_around_the_commits_time(created: Any, expected: datetime) -> None:
    row = only(tables(commit(1, A, post(createdAt=created)))["posts"])
    assert (row["created_at"], row["indexed_at"]) == (expected, expected)


def test_without_a_commit_time_the_entrys_time_counts() -> None:
    model = Model()
    model.apply(commit(1, A, post(createdAt="nonsense"), time=None), 1_772_366_400_000)
    row = only(model.tables()["posts"])
    assert (row["created_at"], row["commit_time"]) == (NOON, None)


# Sizes and characters


def test_nul_and_lone_surrogates_are_cleaned_everywhere_also_in_keys() -> None:
    found = tables(
        commit(
            1,
            A,
            post(text="a\x00b\ud800c", tags=["x\x00"]),
            put("com.example.x/1", "cid1", **{"k\x00": ["v\udc00", {"\x00": 1}]}),
        )
    )
    assert (only(found["posts"])["text"], only(found["posts"])["tags"]) == ("abc", ["x"])
    assert only(found["generic_records"])["record"] == {"createdAt": NOW, "k": ["v", {"": 1}]}


@pytest.mark.parametrize(
    ("collection", "record", "reason"),
    [
        ("app.bsky.feed.like", {}, "bad_record"),
        ("app.bsky.feed.like", {"subject": {"uri": "at://alice.test/app.bsky.feed.post/1"}}, "bad_record"),
        ("app.bsky.feed.like", {"subject": {"uri": f"at://{A}/app.bsky.feed.post/" + "r" * 500}}, "too_long"),
        ("app.bsky.feed.like", {"subject": {"uri": "at://did:plc:" + "a" * 250 + "/app.bsky.feed.post/1"}}, "too_long"),
        ("com.example." + "x" * 60 + (".x" + "x" * 60) * 4, {}, "too_long"),
        ("app.bsky.feed.repost", {"subject": None}, "bad_record"),
        ("app.bsky.bookmark", {"subject": POST}, "bad_record"),
        ("app.bsky.graph.follow", {"subject": "alice.test"}, "bad_record"),
        ("app.bsky.graph.follow", {"subject": "did:plc:" + "a" * 250}, "too_long"),
        ("app.bsky.graph.block", {}, "bad_record"),
        ("app.bsky.graph.list", {"purpose": "p"}, "bad_record"),
        ("app.bsky.graph.list", {"name": "n"}, "bad_record"),
        ("app.bsky.graph.list", {"name": "n", "purpose": "p" * 65}, "too_long"),
        ("app.bsky.graph.listitem", {"list": "at://alice.test/app.bsky.graph.list/1", "subject": A}, "bad_record"),
        ("app.bsky.graph.listblock", {}, "bad_record"),
        ("app.bsky.feed.generator", {"displayName": "x"}, "bad_record"),
        ("app.bsky.graph.starterpack", {}, "bad_record"),
        ("com.atproto.label.label", {"uri": POST}, "bad_record"),
        ("com.atproto.label.label", {"val": "x"}, "bad_record"),
        ("com.atproto.label.label", {"uri": POST, "val": "x" * 129}, "too_long"),
        ("app.bsky.graph.verification", {"subject": A}, "bad_record"),
        ("app.bsky.feed.post", {"reply": reply_to(f"at://{A}/app.bsky.feed.post/" + "r" * 500)}, "too_long"),
    ],
)
def test_a_record_without_what_it_is_about_is_dropped_and_its_siblings_live(
    collection: str, record: dict[str, Any], reason: str
) -> None:
    event = commit(1, A, put(f"{collection}/1", **record), post("sibling"))
    assert reasons(event) == [reason]
    assert len(tables(event)["posts"]) == 1


@pytest.mark.parametrize(
    "path", ["", "nothing", "app.bsky.feed.post", "app.bsky.feed.post/", "a/b", "app.bsky.feed.post/a/b"]
)
def test_a_bad_path_is_dropped(path: str) -> None:
    assert reasons(commit(1, A, put(path))) == ["bad_path"]


def test_an_identifier_longer_than_its_column_drops_the_record() -> None:
    assert reasons(commit(1, A, post("r" * 500))) == ["too_long"]


def test_one_bad_field_never_costs_the_record() -> None:
    bad: dict[str, Any] = {
        "text": 5,
        "langs": "en",
        "tags": {},
        "facets": 1,
        "embed": "x",
        "reply": {"parent": 5, "root": {"uri": "x"}},
    }
    row = only(tables(commit(1, A, post(**bad)))["posts"])
    found = [row[name] for name in ("text", "langs", "tags", "facets", "embed", "parent_uri", "root_uri", "root_cid")]
    assert found == ["", None, [], None, None, None, None, None]
    liked = put("app.bsky.feed.like/1", subject={"uri": POST, "cid": 5}, via="x")
    row = only(tables(commit(1, A, liked))["likes"])
    assert (row["subject_cid"], row["via"]) == (None, None)


# Embeds

BLOB = {"ref": {"$link": "bafkrei1"}}


@pytest.mark.parametrize(
    ("embed", "expected"),
    [
        (
            {"$type": "app.bsky.embed.images", "images": [{"image": BLOB}, {"image": {}}, 5]},
            {"$type": "app.bsky.embed.images", "images": [{"image": BLOB}]},
        ),
        ({"$type": "app.bsky.embed.images", "images": [{"image": {}}]}, None),
        ({"$type": "app.bsky.embed.images"}, None),
        (
            {"$type": "app.bsky.embed.external", "external": {"uri": "u", "thumb": {"ref": 5}}},
            {"$type": "app.bsky.embed.external", "external": {"uri": "u"}},
        ),
        (
            {"$type": "app.bsky.embed.external", "external": {"uri": "u", "thumb": BLOB}},
            {"$type": "app.bsky.embed.external", "external": {"uri": "u", "thumb": BLOB}},
        ),
        (
            {"$type": "app.bsky.embed.video", "video": BLOB, "thumbnail": None},
            {"$type": "app.bsky.embed.video", "video": BLOB},
        ),
        (
            {"$type": "app.bsky.embed.recordWithMedia", "record": {"record": {"uri": POST}}, "media": None},
            {"$type": "app.bsky.embed.record", "record": {"uri": POST}},
        ),
        ({"$type": "app.bsky.embed.record", "record": {"uri": "u"}}, None),
        (
            {"$type": "app.bsky.embed.recordWithMedia", "record": {"record": {"uri": "u"}}, "media": {"$type": "m"}},
            {"$type": "m"},
        ),
        ({"$type": "app.bsky.embed.recordWithMedia", "record": {}, "media": {"$type": "app.bsky.embed.images"}}, None),
        ({"$type": "com.example.embed", "x": 1}, {"$type": "com.example.embed", "x": 1}),
    ],
)
def test_embeds_lose_media_that_name_no_blob(embed: Any, expected: Any) -> None:
    assert only(tables(commit(1, A, post(embed=embed)))["posts"])["embed"] == expected


# Derive


def test_what_is_not_derived_is_missing() -> None:
    event = commit(1, B, post("2", reply=reply_to(POST), embed=quoting(POST)), like())
    core = tables(event, derive="core")
    assert not core.keys() & {"quotes", "notifications", "post_viewer_states", "thread_contexts"}
    assert len(core["feed_items"]) == 1
    liked = only([row for row in core["post_aggregations"] if row["post_uri"] == POST])
    assert liked == {"post_uri": POST, "like_count": 1, "repost_count": 0, "bookmark_count": 0}
    assert "has_thread_gate" not in only(core["posts"])
    nothing = tables(event, derive=[])
    assert not nothing.keys() & {"post_aggregations", "feed_items"}
    only_quotes = tables(event, derive={"quotes"})["post_aggregations"]
    assert only_quotes == [{"post_uri": POST, "quote_count": 1}]
    assert CORE < FULL
    with pytest.raises(ValueError, match="derive"):
        Model(derive="most")


# Order, and the comparison itself


def run(history: History, order: list[int]) -> dict[str, list[dict[str, Any]]]:
    model = Model()
    for position in order:
        model.apply(history.events[position], entry_ms(history.events[position]))
    return model.tables()


@settings(max_examples=150, deadline=None)
@given(histories.histories(max_events=10), st.randoms())
def test_order_and_repetition_do_not_matter(history: History, random: Any) -> None:
    expected = run(history, list(range(len(history.events))))
    assert report(diff(expected, run(history, [p for batch in history.batches for p in batch]))) == "no difference"
    shuffled = list(range(len(history.events))) * 2
    random.shuffle(shuffled)
    assert report(diff(expected, run(history, shuffled))) == "no difference"


@given(histories.histories())
@settings(max_examples=50, deadline=None)
def test_a_history_delivers_everything_and_has_entries_in_the_contracts_form(history: History) -> None:
    assert {p for batch in history.batches for p in batch} == set(range(len(history.events)))
    assert all(history.batches)
    for event in history.events:
        fields = to_entry(event)
        assert list(fields) == [b"type", b"data", b"seq"]
        assert fields[b"seq"] == str(event["seq"]).encode()
        data = json.loads(fields[b"data"])
        assert data["did" if event["kind"] != "commit" else "repo"] == event.get("did", event.get("repo"))
        for op in data.get("ops", ()):
            assert set(op) == ({"action", "path"} if op["action"] == "delete" else {"action", "path", "cid", "record"})


def test_a_long_history_is_the_same_every_time_and_fills_every_table() -> None:
    history = random_history(1, 4_000)
    assert history == random_history(1, 4_000)
    found = run(history, list(range(4_000)))
    assert [table for table, rows in found.items() if not rows] == []
    assert report(diff(found, run(history, [p for batch in history.batches for p in batch]))) == "no difference"
    assert {tuple(sorted(row)) for row in found["posts"]} == {tuple(sorted(COLUMNS["posts"].split()))}
    for table, rows in found.items():
        assert set(rows[0]) == set(COLUMNS[table].split()), table


def test_diff_names_table_key_column_and_both_values() -> None:
    expected = {"likes": [{"uri": "x", "post_uri": "p"}, {"uri": "y", "post_uri": "p"}], "quotes": []}
    found = {"likes": [{"uri": "x", "post_uri": "q"}], "quotes": [{"uri": "z"}, {"uri": "z"}]}
    differences = diff(expected, found)
    assert differences == [
        Difference("likes", ("x",), "post_uri", "p", "q"),
        Difference("likes", ("y",), "(row)", {"uri": "y", "post_uri": "p"}, "(absent)"),
        Difference("quotes", ("z",), "(row)", "(absent)", [{"uri": "z"}, {"uri": "z"}]),
    ]
    assert "3 differences" in report(differences)
    assert "likes x post_uri: expected 'p', found 'q'" in report(differences)


def test_diff_finds_a_row_that_is_there_twice() -> None:
    label = {"label_uri": "x", "action": "created"}
    assert len(diff({"label_events": [label]}, {"label_events": [label, label]})) == 1
    assert diff({"label_events": [label]}, {"label_events": [label]}) == []


def test_a_long_report_is_cut_but_shows_each_kind() -> None:
    expected = {"likes": [{"uri": str(n)} for n in range(500)], "quotes": [{"uri": "q"}]}
    lines = report(diff(expected, {"likes": [], "quotes": []}), limit=10).splitlines()
    assert len(lines) <= 1 + 2 + 10
    assert any(line.startswith("quotes q") for line in lines)
    assert len(report(diff(expected, {"likes": [], "quotes": []}), limit=1).splitlines()) == 1 + 2 + 1


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, 1.0, True),
        (1e300, 10**300, True),
        (True, 1, False),
        ({"a": [1, True]}, {"a": [1, 1]}, False),
        ({"a": 1, "b": None}, {"b": None, "a": 1}, True),
        ({"a": None}, {}, False),
        ([1], [1, 2], False),
        ("1", 1, False),
        (None, [], False),
    ],
)
def test_same_is_equality_as_jsonb_sees_it(a: Any, b: Any, *, equal: bool) -> None:
    assert same(a, b) is equal


def test_cid_of_is_a_well_formed_cid() -> None:
    cid = cid_of({"a": 1})
    assert cid.startswith("bafyrei")
    assert len(cid) == 59
    assert cid != cid_of({"a": 2})
