"""Mutation check: change one place of the product, in a copy, and see that the suite notices.

    scripts/mutants [NAME ...] [--list] [--write] [--jobs N]

A comment `mutant: NAME` in the source marks the place: what follows it, a statement, the head of a compound statement,
or one line inside an expression or of SQL. So edits around it move the mutant along. Released migrations are never
edited: there, the text itself is the mark.

Each mutant runs the tests that should kill it; one that survives is a hole in the suite. Exit 1 if any does.
`--write` keeps the results in docs/mutants.md.
"""

# ruff: noqa: T201 - a command

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mutants.md"
MARK = re.compile(r"^\s*(?:#|--) mutant: (.+)$", re.MULTILINE)


class Edit(NamedTuple):
    """`old` within the marked place becomes `new`; without `old`, all of the place does."""

    new: str
    old: str = ""


class Mutant(NamedTuple):
    """The marks of further edits have a number: `mutant: NAME (2)`."""

    name: str
    file: str
    tests: str
    edits: tuple[Edit, ...]


def _mutant(name: str, file: str, tests: str, new: str, old: str = "", *more: Edit) -> Mutant:
    return Mutant(name, file, tests, (Edit(new, old), *more))


_STATEMENTS, _DERIVE = "fastworker/store/statements.py", "fastworker/table/derive.py"
_FLUSH, _SETTLE, _EFFECTS = (f"fastworker/store/{name}.py" for name in ("flush", "settle", "effects"))
_PUT, _WHOLE, _RECOMPUTE, _RECOUNT, _PAY, _FIRST, _CHANGE = (
    f"fastworker/store/sql/{name}.sql"
    for name in ("put", "put_whole", "recompute", "recount", "pay_bucket", "first", "change")
)
_WRITTEN = "fastworker/store/sql/written.sql"
_APART, _PAY_ALL = "fastworker/store/sql/pay_apart.sql", "fastworker/store/sql/pay.sql"
_WANTED = "fastworker/store/migrations/0006_relays_and_handles.sql"
_SHOWN, _CLAIMS = (f"fastworker/store/sql/{name}_handles.sql" for name in ("show", "claim"))
_BATCH, _MAPPER, _PIPELINE = "fastworker/table/batch.py", "fastworker/table/mapper.py", "fastworker/worker/pipeline.py"
_PROOF, _CHAIN, _VERIFY = "fastworker/event/proof.py", "fastworker/reader/chain.py", "fastworker/reader/verify.py"
_HELD, _WRITING, _LIMITS = (f"fastworker/worker/{name}.py" for name in ("held", "flush", "limits"))

LAW = "tests/property/test_law.py tests/property/test_histories.py"
RACES = "tests/property/test_interleavings.py"
IN_TWO_CALLS = RACES + "::test_every_interleaving_ends_as_the_law_says[{}-whole]"
FLOORS, _SYNC = "tests/property/test_floors.py", "fastworker/sync/settle.py"
BUGS, RELAYS, RESOLVER, HORIZON, OF_PIPELINE, OF_WHOLE = (
    f"tests/integration/test_{name}.py" for name in ("bugs", "relays", "resolver", "horizon", "pipeline", "whole_flush")
)
OF_PARTITIONS = "tests/integration/test_partitions.py"
OF_SLOTS = "tests/integration/test_slots.py"
RULES = "tests/unit/test_readiness_rules.py"
OF_STREAM, _LUA = "tests/integration/test_stream.py", "fastworker/stream/lua"
_BULK, OF_BULK = "fastworker/store/bulk.py", "tests/integration/test_bulk.py"
FAULTS, DEBTS = "tests/faults/test_postgres_faults.py", "tests/integration/test_debts.py"
CROWDS = (
    f"{FAULTS}::test_a_large_thread_is_recomputed_in_pieces {FAULTS}::test_a_large_thread_takes_nobody_s_connection"
)
OF_HOSTS, OF_FAULTS = "tests/integration/test_hosts.py", "tests/integration/test_failure_table.py"
OF_BACKFILL, OF_FILTER = (f"tests/integration/test_{name}.py" for name in ("backfill", "reader_filter"))
_FILTER = "fastworker/reader/filter.py"
OF_CHAIN, OF_LEVELS = "tests/unit/test_chain.py", "tests/integration/test_reader_levels.py"
OF_SETTLE, OF_REPAIRS, OF_SYNCER = (f"tests/integration/test_{name}.py" for name in ("settle", "repairs", "syncer"))
OF_JUDGE, OF_REPOSITORY, OF_VERIFY = (
    f"tests/unit/test_{name}.py" for name in ("judge", "event_repository", "reader_verify")
)
_MANY, _JUDGE, _FETCH, _GAPS, _SYNCER = (
    f"fastworker/sync/{name}.py" for name in ("many", "judge", "fetch", "gaps", "syncer")
)
_REPOSITORY = "fastworker/event/repository.py"
OF_MAPPER, OF_DATES, OF_PAIRS = (f"tests/unit/test_{name}.py" for name in ("mapper", "mapper_dates", "pairs"))

MUTANTS = [
    # commits that prove themselves
    _mutant("a commit of another account", _PROOF, OF_CHAIN, "if type(commit) is dict:"),
    _mutant("a replay moves the chain", _CHAIN, OF_CHAIN, "if state == known:"),
    _mutant("a break is forgotten by a crash", _CHAIN, OF_CHAIN, "if verdict is Verdict.BREAK and False:"),
    _mutant("prevData is not compared", _CHAIN, OF_CHAIN, "return Verdict.OK"),
    _mutant("since is not compared", _CHAIN, f"{OF_CHAIN}::test_commits_that_do_not {OF_CHAIN}::test_commits_of_old_hosts", "is_next = since is not None"),
    _mutant("a commit that takes since away", _CHAIN, f"{OF_VERIFY}::test_what_each_level_says_of_a_commit_of_which_something_was_taken", "if is_next:"),
    _mutant("ops without prevData are not undone", _VERIFY, f"{OF_VERIFY}::test_what_each_level_says_of_a_commit_of_which_something_was_taken", "if False:"),
    _mutant("a bad commit is none", _VERIFY, f"{OF_LEVELS}::test_another_accounts_commit", "elif False:"),
    _mutant("nobody is unverified", _VERIFY, f"{OF_LEVELS}::test_an_unknown_key_is_asked_for_beside_the_stream", "elif False:"),
    _mutant("two ops on one path", _PROOF, "tests/unit/test_event_proof.py", "if False:"),
    _mutant("commits from the future", _VERIFY, OF_LEVELS, "if False:"),
    _mutant("commits that the account did not sign", _VERIFY, OF_LEVELS, "if False:"),
    _mutant("ops that nothing proves", _VERIFY, OF_LEVELS, "if False:"),
    _mutant("a key that does not verify is never asked for again", "fastworker/reader/keys.py", OF_LEVELS, "if held is None:"),
    _mutant("requests at once count as failures in a row", "fastworker/sync/hosts.py", OF_HOSTS, "if True:"),
    _mutant("what waits for a slot does not see the pause", "fastworker/sync/hosts.py", OF_HOSTS, "if False:"),
    _mutant("earlier claims are never verified", _STATEMENTS, RESOLVER, "AND false", "AND NOT i.resolve_pending"),
    # versions
    _mutant("no version guard", _BATCH, LAW, "return True"),
    _mutant("rev order turned", _BATCH, LAW, "return a_rev < b_rev"),
    _mutant("op index ignored", _BATCH, LAW, "(0, a.row is None", "(a.op_index, a.row is None"),
    _mutant("deletes ignored", _SETTLE, LAW, "pass"),
    _mutant("delete mapped to update", _MAPPER, LAW, 'if op.action == "never":'),
    _mutant("tombstones not written", _FLUSH, LAW, "if False:"),
    _mutant("tombstone not read", _STATEMENTS, LAW, "AND NOT deleted", "AND deleted"),
    _mutant("cold gate open", _SETTLE, LAW, "newest = {c.uri for c in changes}"),
    # what others commit meanwhile
    _mutant("no look back", _FLUSH, RACES, "if False:"),
    _mutant("joined rows never recomputed", _FLUSH, RACES, "pass"),
    _mutant("no second look", "fastworker/store/upkeep.py", RACES, "if removals and (failed := []):"),
    _mutant("an account is purged once", _STATEMENTS, RACES, "purge_pending = false", "purge_pending = purged_at IS NULL"),
    _mutant("nothing is owed", _EFFECTS, LAW, "if False:", "", Edit("return Owed(set(), None, counters=False)")),
    _mutant("no recount", _DERIVE, RACES, "pass"),
    _mutant("recount without its lock", _EFFECTS, RACES, "counts.keys() - effects", "counts.keys() | effects"),
    _mutant("unsorted users", "fastworker/store/writer.py", BUGS, "list(", "sorted("),
    _mutant("unsorted rows", _FLUSH, BUGS, "for change in changes:"),
    # floors
    _mutant("no floor", _SYNC, FLOORS, "refused = set()"),
    _mutant("a settle does not wait", _SYNC, FLOORS, "pass"),
    _mutant("an equal row under a tombstone", "fastworker/sync/judge.py", FLOORS, "if False:"),
    _mutant("true is one", "fastworker/sync/judge.py", "tests/unit/test_judge.py", "return bool(orjson.loads(a) == orjson.loads(b))"),
    _mutant("history comes in unread", _EFFECTS, "tests/integration/test_settle.py", "pass"),
    _mutant("floors not looked at", "fastworker/store/look.py", FLOORS, "if False:"),
    _mutant("deletes pass a floor", "fastworker/store/look.py", FLOORS, "return change.row is not None and (change.rev or '') < rev"),
    _mutant("a floor that came since the look", _PUT, FLOORS, "IF false AND EXISTS (", "IF EXISTS ("),
    _mutant("the first floor that came since the look", _PUT, FLOORS, "IF false AND EXISTS (", "IF EXISTS ("),
    _mutant("a floor goes down", _STATEMENTS, FLOORS, "WHERE true OR", "WHERE $4::boolean OR"),
    _mutant("a tombstone below a floor", _STATEMENTS, FLOORS, "AS f WHERE false AND", "AS f WHERE"),
    _mutant("a late deletion against a floor", _STATEMENTS, FLOORS, "", "(SETTLE_AGAIN, DELETION),"),
    # settles
    _mutant("S0 after the fetch", _MANY, f"{OF_REPAIRS}::test_s0_is_the_cursor_before_the_request", "mark = await self._live.mark()\nsnapshot = Snapshot(one.did, commit.rev, mark.seq, mark.at)"),
    _mutant("a settle does not wait for the worker", _MANY, f"{OF_REPAIRS}::test_nobody_is_compared_before_the_worker_has_finished_what_was_there", "if False:"),
    _mutant("older than the list said", _MANY, f"{OF_REPAIRS}::test_what_is_older_than_the_list_said_is_no_answer", "if False:"),
    _mutant("a floor beside others who know none", _MANY, f"{OF_REPAIRS}::test_beside_a_worker_that_knows_no_floors_none_is_set", "floor = True"),
    _mutant("an account twice at once", _MANY, f"{OF_REPAIRS}::test_who_is_asked_for_again_is_not_fetched_twice_at_once", "if False:"),
    _mutant("everybody waits for a large account", _MANY, f"{OF_REPAIRS}::test_nobody_waits_for_a_large_account", "if False:"),
    _mutant("a refused account counts as settled", _MANY, f"{OF_FAULTS}", "if False:"),
    _mutant("a 429 spends a try", _MANY, f"{OF_FAULTS}", "is_limited = False"),
    _mutant("two snapshots of one account in a group", _SYNC, f"{OF_SETTLE}::test_two_snapshots_of_one_account_at_once", "if False:"),
    _mutant("who was deleted before the floor", _SYNC, f"{OF_SETTLE}::test_a_deletion_that_comes_before_the_floor", "return [look for look in looks if not look.result.refused]"),
    _mutant("a deletion while small accounts are read", _SYNC, f"{OF_SETTLE}::test_a_deletion_that_comes_while_it_is_read", "pass"),
    _mutant("a deletion while a large account is read", _SYNC, f"{OF_SETTLE}::test_a_deletion_that_comes_while_it_is_read", "pass"),
    _mutant("what small accounts lack stays", _SYNC, f"{OF_SETTLE}::test_what_others_wrote", "pass"),
    _mutant("what a large account lacks stays", _SYNC, f"{OF_SETTLE}::test_what_others_wrote", "pass"),
    _mutant("who does not want it is settled", _SYNC, f"{OF_SETTLE}::test_who_may_not_be_settled", "if False:"),
    _mutant("who was deleted is settled", _SYNC, f"{OF_SETTLE}::test_who_may_not_be_settled", "if False:"),
    _mutant("an older repository is taken", _SYNC, f"{OF_SETTLE}::test_who_may_not_be_settled", "if False:"),
    _mutant("a newer tombstone is overwritten", _JUDGE, f"{OF_SETTLE}::test_a_snapshot_that_comes_late_takes_nothing_from_what_is_newer", "if False:"),
    _mutant("a newer record is overwritten", _JUDGE, f"{OF_SETTLE}::test_a_snapshot_that_comes_late_takes_nothing_from_what_is_newer", "if False:"),
    _mutant("an equal row that is older than a deletion", _JUDGE, f"{OF_SETTLE}::test_a_deleted_account_that_came_back_keeps_what_its_repository_holds", "if False:"),
    _mutant("what an API wrote just now goes", _JUDGE, f"{OF_SETTLE}::test_what_others_wrote", "return True"),
    _mutant("a newer record that the snapshot lacks goes", _JUDGE, f"{OF_SETTLE}::test_a_snapshot_that_comes_late_takes_nothing_from_what_is_newer", "return True"),
    # repositories and their hosts
    _mutant("the repository of another account", _FETCH, f"{OF_HOSTS}::test_what_ends_a_fetch", "if False:"),
    _mutant("a repository from the future", _FETCH, f"{OF_HOSTS}::test_what_ends_a_fetch", "if False:"),
    _mutant("a rotated key is not looked up", _FETCH, f"{OF_HOSTS}::test_a_rotated_key_is_looked_up_again", "pass"),
    _mutant("a repository that nobody signed", _FETCH, f"{OF_HOSTS}::test_what_ends_a_fetch", "if False:"),
    _mutant("a repository is not walked", _FETCH, f"{OF_HOSTS}::test_what_is_not_whole_is_asked_for_again", "pass"),
    _mutant("keys that do not ascend", _REPOSITORY, f"{OF_REPOSITORY}::test_trees_that_are_none", "if False:"),
    _mutant("a key in another layer", _REPOSITORY, f"{OF_REPOSITORY}::test_trees_that_are_none", "if False:"),
    _mutant("an empty node in a tree", _REPOSITORY, f"{OF_REPOSITORY}::test_trees_that_are_none", "if False:"),
    _mutant("where a redirect leads is not judged", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_what_ends_a_fetch", "asked is url and (why", "(why"),
    _mutant("a redirect takes no turn", "fastworker/sync/hosts.py", OF_HOSTS, "if False:"),
    _mutant("headers slow nobody down", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_headers_slow_us_down", "pass"),
    _mutant("a host that has nothing left is asked on", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_a_host_that_has_nothing_left_is_asked_after_its_reset", "if False:"),
    _mutant("a pause of any length is waited for", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_a_429_that_asks_for_more_than_we_wait", "if False:"),
    _mutant("a bomb is unpacked", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_what_ends_a_fetch", "if False:"),
    _mutant("a trickle is waited for", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_a_trickle_ends_by_its_speed", "if False:"),
    _mutant("a packed body that ends early", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_a_packed_body_that_ends_early", "if False:"),
    _mutant("a host that fails is asked on", "fastworker/sync/hosts.py", f"{OF_HOSTS}::test_a_host_that_is_down_is_left_alone_and_its_neighbour_is_not", "pass"),
    _mutant("private addresses are asked", "fastworker/sync/addresses.py", "tests/unit/test_addresses.py", "return True"),
    # gaps, and what events ask for
    _mutant("a gap closes while its list is read", _GAPS, f"{OF_BACKFILL}::test_a_gap_is_open_until_its_list_is_read_and_everybody_is_settled", "", " AND s.done_at IS NOT NULL"),
    _mutant("a gap closes while somebody waits", _GAPS, f"{OF_BACKFILL}::test_a_gap_is_open_until_its_list_is_read_and_everybody_is_settled", "AND r.state = 'fetching')", "AND r.state IN ('waiting', 'fetching', 'refused'))"),
    _mutant("a list that began before a gap covers it", _GAPS, f"{OF_BACKFILL}::test_a_list_that_began_before_a_gap_does_not_cover_it", "if True:"),
    _mutant("a gap is forgotten before it is closed", _GAPS, f"{OF_BACKFILL}::test_a_gap_is_open_until_its_list_is_read_and_everybody_is_settled", "if gap is not None:"),
    _mutant("hosts' clocks are ours", _GAPS, f"{OF_BACKFILL}::test_a_list_that_began_before_a_gap_does_not_cover_it", "", " - MARGIN"),
    _mutant("who breaks at each commit is repaired each time", _SYNCER, f"{OF_SYNCER}::test_a_host_that_breaks_at_each_commit_costs_less_and_less", "due = new"),
    _mutant("the time between repairs does not grow", _SYNCER, f"{OF_SYNCER}::test_a_host_that_breaks_at_each_commit_costs_less_and_less", "THEN apart_s", "THEN least(2 * apart_s, {APART_MAX_S})"),
    _mutant("who asks again while it is repaired is forgotten", _SYNCER, f"{OF_SYNCER}::test_who_is_asked_for_again_while_it_is_repaired_is_repaired_again", "new = [did for did in found if did not in records]"),
    # one call
    _mutant("a whole flush that is not whole", _WHOLE, OF_WHOLE, "IF false THEN"),
    _mutant("no look before a whole flush", _WHOLE, OF_WHOLE, "NULL;"),
    _mutant("no look back after a whole flush", _WHOLE, OF_WHOLE, "SELECT false"),
    _mutant("joined rows of a whole flush never recomputed", _WHOLE, OF_WHOLE, "IF false THEN"),
    _mutant("a row that changed since it was read", "fastworker/store/routines.py", IN_TWO_CALLS.format("two_updates"), "true", "f.uri || ' ' || f.xmin = ANY(seen)"),
    _mutant("what is there although it was not read", "fastworker/store/routines.py", IN_TWO_CALLS.format("a_winner_deleted_while_its_twin_arrives"), "IF false THEN"),
    _mutant("a row that is gone since it was read", _CHANGE, IN_TWO_CALLS.format("a_winner_deleted_while_its_twin_arrives"), "IF false THEN"),
    _mutant("the gate of a small flush open", _CHANGE, IN_TWO_CALLS.format("create_and_delete_of_a_cold_record"), "IF false THEN"),
    _mutant("identities of who must not be stored", _FIRST, BUGS, "IF false THEN"),
    _mutant("two of a pair in a small flush", "fastworker/store/whole.py", OF_WHOLE, "pass"),
    _mutant("two new records of a pair", "fastworker/store/whole.py", OF_WHOLE, "return False"),
    _mutant("two of a pair taken to be new", "fastworker/store/whole.py", OF_WHOLE, "is_fresh = bool(pairs) and sql.may_be_taken(table)"),
    _mutant("a record in two places", _WHOLE, OF_WHOLE, "is_late := false;"),
    _mutant("a record in two places, step by step", "fastworker/store/sql/look_back.sql", RACES + "::test_every_interleaving_ends_as_the_law_says[a_new_record_that_changes_its_pair-copy]", "SELECT 'twin', NULL, NULL, NULL WHERE false"),
    _mutant("a cold record becomes a twin meanwhile", _SETTLE, RACES + "::test_every_interleaving_ends_as_the_law_says[cold_pairs_changed-copy]", "if False:"),
    _mutant("a locked post is not owed", _RECOMPUTE, OF_WHOLE, "IF false THEN"),
    _mutant("an installed routine is never replaced", "fastworker/store/routines.py", OF_WHOLE, "return []"),
    _mutant("a routine is not listed", "fastworker/store/routines.py", OF_WHOLE, "", '"recompute",'),
    # debts
    _mutant("notes that are left are forgotten", "fastworker/store/debts.py", DEBTS, "pass"),
    _mutant("all new users at once", _FLUSH, DEBTS, "size = len(users)"),
    _mutant("a busy counter is not owed", _WRITTEN, DEBTS, "IF false THEN"),
    _mutant("counters beside a debt", _WRITTEN, DEBTS, "is_owing := is_owing;"),
    _mutant("a debt is paid twice", _PAY, DEBTS, "PERFORM 1;"),
    _mutant("owed for a counter that a stranger has locked", _WRITTEN, DEBTS, "IF false THEN"),
    _mutant("a payment waits for a stranger", _PAY, DEBTS, "FOR NO KEY UPDATE) AS f);"),
    _mutant("an owed recount is forgotten", _APART, DEBTS, "IF false THEN"),
    _mutant("a recount counts what is owed", _RECOUNT, DEBTS, "WHERE false AND d.post_uri", "WHERE d.post_uri"),
    _mutant("an aggregate goes before it is paid", _RECOMPUTE, DEBTS, "WHILE false LOOP END LOOP;"),
    _mutant("a counter beside its debt that is put back", _WRITTEN, f"{DEBTS}::test_a_counter_that_is_refused_is_put_back_alone", "WHERE false AND", "WHERE"),
    _mutant("a debt overtakes one that is put back", _PAY, f"{DEBTS}::test_a_counter_that_is_refused_is_put_back_alone", "WHERE false AND", "WHERE"),
    _mutant("a counter that is refused stops the others", _APART, f"{DEBTS}::test_a_counter_that_is_refused_is_put_back_alone", "EXCEPTION WHEN division_by_zero THEN"),
    _mutant("a joined row that is refused stops a small flush", _WHOLE, DEBTS, "EXCEPTION WHEN division_by_zero THEN"),
    _mutant("a joined row that is refused stops who pays", _PAY_ALL, "tests/faults/test_postgres_faults.py::test_one_owed_key_that_cannot_be_paid_waits_alone", "EXCEPTION WHEN division_by_zero THEN"),
    _mutant("a joined row that is refused stops its flush", "fastworker/store/joined.py", f"{DEBTS}::test_a_joined_row_that_is_refused_is_put_back_alone", "raise"),
    _mutant("joined rows that are owed wait for maintenance", _PAY_ALL, f"{DEBTS}::test_what_another_leaves_is_paid_by_a_tick_and_told", "IF false THEN"),
    _mutant("behind, and nobody knows whether it catches up", "fastworker/monitor/readiness.py", RULES, "if facts.behind_s > BEHIND_S and before is not None and facts.behind_s >= before:"),
    _mutant("a gate is as old as its post", "fastworker/table/snapshot.py", "tests/unit/test_snapshot.py", "return moment"),
    _mutant("debts that are never paid are not noticed", "fastworker/monitor/readiness.py", RULES, "if False:"),
    _mutant("counters are not paid after the commit", _FLUSH, DEBTS, "if False:"),
    _mutant("users that no later commit makes durable", _FLUSH, DEBTS, "if False:"),
    _mutant("a debt is drift", "fastworker/store/audit.py", DEBTS, "AS d WHERE false) AS d", "AS d) AS d"),
    # unique pairs
    _mutant("pair refused without lock", _STATEMENTS, RACES, "return select(table)"),
    _mutant("what is locked is forgotten", _FLUSH, RACES, "changes, progress, users = [], None, ()"),
    _mutant("highest rkey wins", "fastworker/table/pairs.py", f"{OF_PAIRS} {LAW}", "max(", "min("),
    _mutant("twins never stored", _SETTLE, LAW, "if False:"),
    _mutant("trusted verifier ignored", "fastworker/table/schema.py", "tests/integration/test_verify.py", "rank = 0"),
    # what follows from rows
    _mutant("notifications to oneself", _DERIVE, LAW, 'if parent is not None and (to := did_of(parent)) != "":'),
    _mutant("no allow means nobody", _DERIVE, "tests/unit/test_mapper.py", "allow = []"),
    _mutant("unlike drops the state of the API", _WRITTEN, BUGS, "AND NOT t.bookmarked;"),
    _mutant("a like resets the viewer state", _WRITTEN, BUGS, "bookmarked = excluded.bookmarked,", "bookmarked = t.bookmarked OR excluded.bookmarked,"),
    _mutant("profile stays after its delete", _DERIVE, LAW, "pass"),
    _mutant("no reply decrement", _DERIVE, LAW, "pass"),
    _mutant("no like decrement", _DERIVE, LAW, "pass"),
    _mutant("context without its like", _RECOMPUTE, LAW, "p.root_uri)", "p.uri)"),
    _mutant("gate flags mixed up", _RECOMPUTE, LAW, "'thread') AS post", "'post') AS post"),
    _mutant("empty aggregates stay", _RECOMPUTE, LAW, "AND false;"),
    _mutant("no crowd bound", "fastworker/store/look.py", CROWDS, "if crowded := []:"),
    _mutant("a crowd at once", "fastworker/store/joined.py", CROWDS, "crowds = set()"),
    _mutant("a large thread takes a flush's connection", "fastworker/store/store.py", CROWDS, "async with self.connection() as db:"),
    # accounts, relays, handles
    _mutant("deleted accounts not looked at", "fastworker/store/look.py", BUGS, "False", "is_gone(change.rev, change.seq, *gone)"),
    _mutant("purge never begins", _STATEMENTS, LAW, "", ", purge_pending = true, purged_at = NULL"),
    _mutant("opt-out ignored", _FLUSH, BUGS, "", " if c.row is None or c.repo not in forbidden"),
    _mutant("opt-out of identities ignored", _FLUSH, BUGS, "", " if did not in seen.forbidden"),
    _mutant("older account event wins", _STATEMENTS, RELAYS, "(0,", "(coalesce({t}.seq, -1),"),
    _mutant("account events of relays by seq", _STATEMENTS, RELAYS, "did, seq DESC", "did, event_at DESC"),
    _mutant("a deletion by the seq of another relay", _STATEMENTS, RELAYS, "count(*) > 9", "count(*) > 1"),
    _mutant("a stored seq against another relay", _BATCH, RELAYS, "if False:"),
    _mutant("the gate of many relays", _FLUSH, RELAYS, "pass"),
    _mutant("entries without a rev beside two relays", _HELD, HORIZON, "if False:"),
    _mutant("older identity wins", _CLAIMS, RELAYS, "r.did, r.last_at,", "r.did, r.last_at DESC,"),
    _mutant("handles are not locked", _SHOWN, RACES, "NULL;"),
    _mutant("the last claim shows a handle", _SHOWN, RELAYS, "at DESC,", "at DESC, first_at,"),
    _mutant("a claim takes a verified handle", _SHOWN, RESOLVER, "is_verified IS NULL,"),
    _mutant("claims are shown at once", _WANTED, RESOLVER, "WHEN i.handle", "WHEN only_verified OR i.handle"),
    _mutant("a handle shown by two", _SHOWN, RELAYS, "LEFT JOIN wanting AS h ON", "LEFT JOIN holders AS h ON"),
    # what one record may do
    _mutant("identifiers mended", _MAPPER, OF_MAPPER, "if type(value) is not str or (found := _is_uri(value := clean_text(value).strip())) is None:"),
    _mutant("list items of others", _MAPPER, f"{OF_MAPPER} {LAW}", 'if list_uri.split("/", 3)[2] == "":'),
    _mutant("type spoofed", _MAPPER, OF_MAPPER, "if False:"),
    _mutant("the moment of the entry ignored", "fastworker/table/dates.py", OF_DATES, "return told or received"),
    _mutant("control record not asked", "fastworker/store/store.py", FAULTS, "pass"),
    _mutant("rows that a trigger keeps", _SETTLE, FAULTS + "::test_rows_that_a_trigger_keeps_as_they_are_are_not_taken_for_changed", "if False:"),
    _mutant("a refusal of state is isolated", "fastworker/store/blame.py", FAULTS, "raise error"),
    # entries
    _mutant("ack before commit", _WRITING, f"{OF_PIPELINE} tests/integration/test_supervisor_worker.py", "await self._ack(held, [])\nstore_drops = await self.write(held.batch)"),
    _mutant("what is too slow is tried for ever", "fastworker/worker/slow.py", OF_PIPELINE, "if False:"),
    _mutant("a postponed entry is forgotten", _PIPELINE, OF_PIPELINE, "pass"),
    _mutant("a lost reply is not read again", "fastworker/worker/intake.py", "tests/integration/test_stream.py", "if False:"),
    _mutant("a worker's own progress looks like a restore", "fastworker/worker/failover.py", "tests/faults/test_failover.py::test_a_progress_that_a_worker_takes_back_is_no_restore", "if _order(found.entry_id) < _order(known.entry_id):"),
    _mutant("what a dead consumer held and somebody trimmed is lost", f"{_LUA}/lost.lua", "tests/integration/test_reader.py::test_what_a_dead_worker_held_and_somebody_trims_comes_again", ""),
    _mutant("upkeep that gets on hides what fails", "fastworker/worker/worker.py", "tests/integration/test_horizon.py::test_upkeep_that_fails_is_told_beside_what_succeeds", "if True:"),
    _mutant("what waited for its connection is sent to whom another one has met", "fastworker/stream/lineage.py", "tests/integration/test_lineage.py", "if False:"),
    _mutant("a connection is taken while it is closed", "fastworker/stream/quick.py", "tests/integration/test_redis_client.py", "pass"),
    _mutant("an idle connection still leads to the old master", "fastworker/stream/lineage.py", "tests/integration/test_lineage.py", "pass"),
    _mutant("what was skipped is held by nobody", f"{_LUA}/give_skipped.lua", "tests/integration/test_stream.py::test_what_waits_to_be_adopted_survives_its_group", ""),
    _mutant("what waits to be adopted is held by nobody", f"{_LUA}/claim.lua", "tests/integration/test_stream.py::test_what_waits_to_be_adopted_survives_its_group", "local rest = nil"),
    _mutant("what was made up for the old master is sent to the new one", "fastworker/stream/lineage.py", "tests/integration/test_lineage.py", "pass"),
    _mutant("the old master is believed", "fastworker/stream/lineage.py", "tests/integration/test_lineage.py", "await self.connect()"),
    _mutant("the group goes forward to what it has not read", f"{_LUA}/go_back.lua", "tests/integration/test_lineage.py", ""),
    _mutant("what another acked is still held", f"{_LUA}/disown.lua", "tests/integration/test_lineage.py", "if false then"),
    _mutant("what an old master gave is missed on the new one", f"{_LUA}/hold.lua", "tests/integration/test_lineage.py", "if known < one then"),
    _mutant("what was held of another server ends untold", "fastworker/stream/holding.py", "tests/integration/test_lineage.py", "if self.ids.pop(entry_id, _MISSING) is None and False:"),
    _mutant("a replica is taken for the master", "fastworker/stream/lineage.py", "tests/integration/test_lineage.py", "if False:"),
    _mutant("another history goes unnoticed", "fastworker/stream/consumer.py", "tests/integration/test_lineage.py", "if True:"),
    _mutant("an ack that does not tell what was read", f"{_LUA}/ack.lua", OF_STREAM, 'hold(KEYS[4], KEYS[5], KEYS[6], ARGV[2], ARGV[3], "")'),
    _mutant("what was trimmed between two looks of the reader is lost", f"{_LUA}/give_skipped.lua", OF_STREAM, ""),
    _mutant("what was removed between two entries of a read is taken for read", "fastworker/stream/holding.py", OF_STREAM, "if numbers:"),
    _mutant("ids are numbered as Redis does", f"{_LUA}/append.lua", "tests/integration/test_reader_parts.py", "newest[p] = redis.call('XADD', stream_of(p), '*', unpack(fields, 2))"),
    _mutant("what was skipped is trimmed", f"{_LUA}/trim.lua", OF_STREAM, "if false then upto = upto end"),
    _mutant("an append without an answer is somebody else's", "fastworker/stream/feed.py", "tests/integration/test_reader_parts.py", "is_foreign = is_ahead"),
    _mutant("a chunk without a seq is there when the cursor is gone", f"{_LUA}/append.lua", "tests/integration/test_reader_parts.py", "local is_there = cursor == ARGV[4] and redis.call('GET', KEYS[5]) == ARGV[5]"),
    _mutant("cursors of an older number of partitions are believed", "fastworker/stream/slots.py", OF_SLOTS, "is_one_number = True"),
    _mutant("the number of partitions changes while their cursors differ", "fastworker/stream/slots.py", OF_SLOTS, "is_level = True"),
    _mutant("what a slot has already is appended again", "fastworker/stream/slots.py", OF_SLOTS, "slot.there = None"),
    _mutant("the cursor that others know is ahead of a partition", "fastworker/stream/slots.py", OF_SLOTS, "if not all([await first.append(*pieces.get(0, (b'', 0)), chunk.seq, host, **limits), *await of_every(of_each)]):"),
    _mutant("a chunk goes beyond the place where a slot is", "fastworker/reader/receive.py", OF_SLOTS, "if False:"),
    _mutant("the furthest partition counts", "fastworker/stream/feed.py", OF_PARTITIONS, "return max(known)"),
    _mutant("the reader resumes from the furthest partition", "fastworker/store/admin.py", OF_PARTITIONS, "max(seq)"),
    _mutant("an idle partition is further than it is", f"{_LUA}/watch.lua", OF_PARTITIONS, "if ARGV[5] ~= '' then"),
    _mutant("an older state is judged by what was known of the newer one", f"{_LUA}/watch.lua", "tests/integration/test_reader_parts.py", "if false then return end"),
    _mutant("progress without a look", "fastworker/worker/worker.py", OF_PARTITIONS, "finished = [one.partition for one in readers.owned_streams]"),
    _mutant("progress with every flush", _WRITING, OF_PIPELINE, "if False:"),
    _mutant("marks are kept", _PIPELINE, OF_PIPELINE, "pass"),
    _mutant("dead letters not counted", _LIMITS, OF_PIPELINE, "pass"),
    _mutant("letters of one account not counted", _LIMITS, OF_PIPELINE, "pass"),
    # parts of repositories
    _mutant("days ignored", "fastworker/table/chosen.py", "tests/integration/test_settle.py", "return True"),
    _mutant(
        "a partial snapshot deletes what it did not look at",
        "fastworker/sync/settle.py",
        "tests/integration/test_settle.py",
        "return not is_left_out(collection)",
    ),
    _mutant("accounts are not left out", _MAPPER, "tests/integration/test_accounts.py", "is_stranger = False"),
    # history beside the live stream, and what is left out before it
    _mutant("history does not wait for the live stream", "fastworker/sync/many.py", OF_BACKFILL, "pass"),
    _mutant("the reader filters what others read", _FILTER, OF_FILTER, "if False:"),
    _mutant("the reader leaves deletes out", _FILTER, OF_FILTER, "ops = [op for op in commit.ops if not (is_stranger or is_left_out(op.collection))]"),
    # bulk loads
    _mutant(
        "bulk loses an index",
        _BULK,
        OF_BULK,
        "await build(connection, table, indexes[:-1])",
        "await build(connection, table, indexes)",
    ),
    _mutant("bulk loads what is known", _BULK, OF_BULK, "[]", "[_not_new(table) for table in PRIMARY]"),
    _mutant("bulk forgets a crash", _BULK, OF_BULK, "return False"),
    _mutant("bulk without versions", _BULK, OF_BULK, "return (rows,)"),
]  # fmt: skip


def mutated(mutant: Mutant) -> str:
    """The text of its file with all its edits. Raises ValueError where a mark or a text is not there exactly once."""
    text = (ROOT / mutant.file).read_text("utf-8")
    for number, edit in enumerate(mutant.edits, 1):
        mark = mutant.name if number == 1 else f"{mutant.name} ({number})"
        start, end = (0, len(text)) if "/migrations/" in mutant.file else _place(text, mark, mutant.file)
        place = text[start:end]
        if edit.old:
            if place.count(edit.old) != 1:
                raise ValueError(f"{mutant.file}: `{edit.old}` is not once in the place of `mutant: {mark}`")
            place = place.replace(edit.old, edit.new)
        else:
            indent = place[: len(place) - len(place.lstrip())]
            place = "".join(f"{indent}{line}\n" for line in edit.new.splitlines())
        text = text[:start] + place + text[end:]
    return text


def _place(text: str, mark: str, file: str) -> tuple[int, int]:
    """Start and end of what the mark stands before."""
    found = [one.end() + 1 for one in MARK.finditer(text) if one[1] == mark]
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} comments `mutant: {mark}`, not one")
    lines = text.splitlines(keepends=True)
    first = text.count("\n", 0, found[0])
    last = first if file.endswith((".sql", ".lua")) else _last_line(text, first + 1) - 1
    start = sum(map(len, lines[:first]))
    return start, start + sum(map(len, lines[first : last + 1]))


def _last_line(text: str, line: int) -> int:
    """Of the statement, or of its head, that begins in this line; else this line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and node.lineno == line:
            body: list[ast.stmt] | None = getattr(node, "body", None)
            if body is None:
                return node.end_lineno or line
            return node.test.end_lineno or line if isinstance(node, ast.If) else body[0].lineno - 1
    return line


def marks() -> dict[str, list[str]]:
    """All marks of the product, by file."""
    found = {}
    for path in sorted((ROOT / "fastworker").rglob("*")):
        if path.suffix in (".py", ".sql", ".lua") and (names := MARK.findall(path.read_text("utf-8"))):
            found[str(path.relative_to(ROOT))] = names
    return found


def try_one(mutant: Mutant, jobs: int) -> tuple[str, float]:
    """The test that killed it, or nothing; and the seconds it took."""
    with tempfile.TemporaryDirectory(prefix="fw-mutant-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*cache"))
        (copy / mutant.file).write_text(mutated(mutant), "utf-8")
        started = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-n",
                str(jobs),
                "-p",
                "no:cacheprovider",
                *(["--extended"] if RACES in mutant.tests else []),  # all of their orders
                *mutant.tests.split(),
            ],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    took = time.monotonic() - started
    if done.returncode == 0:
        return "", took
    words = done.stdout.decode(errors="replace").splitlines()
    failed = [line.partition(" ")[2] for line in words if line.startswith(("FAILED tests", "ERROR tests"))]
    if not failed:
        sys.exit("\n".join(words[-30:]))
    return failed[0].split(" - ")[0], took


def write_page(results: dict[str, str]) -> None:
    """Into docs/mutants.md, beside the results of earlier runs."""
    killers = dict(re.findall(r"^\| (.+?) \| `.+?` \| (.+?) \|$", PAGE.read_text("utf-8"), re.MULTILINE))
    killers |= {name: f"`{killer}`" if killer else "**survived**" for name, killer in results.items()}
    rows = [(mutant, killers.get(mutant.name, "not run yet")) for mutant in MUTANTS]
    killed = sum(killer.startswith("`") for _, killer in rows)
    survived = sum(killer == "**survived**" for _, killer in rows)
    lines = [
        "# Mutants",
        "",
        f"`scripts/mutants --write`: of {len(rows)} mutants {killed} are killed by the suite, {survived} survive.",
        "A comment `mutant: NAME` in the source marks the place that is changed.",
        "",
        "| mutant | file | killed by |",
        "|---|---|---|",
        *(f"| {mutant.name} | `{mutant.file}` | {killer} |" for mutant, killer in rows),
    ]
    PAGE.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run the tests of one mutant")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    if options.list:
        print("\n".join(mutant.name for mutant in mutants))
        return
    survived = 0
    for mutant in mutants:
        killer, took = try_one(mutant, options.jobs)
        survived += not killer
        print(f"{'killed  ' if killer else 'SURVIVED'} {mutant.name} ({took:.0f} s) {killer}", flush=True)
        if options.write:
            write_page({mutant.name: killer})
    print(f"{len(mutants) - survived} of {len(mutants)} killed")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
