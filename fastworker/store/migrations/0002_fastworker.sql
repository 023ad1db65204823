-- What is ours, all in one schema; nothing in public is altered. docs/invariants.md has the reasons.
CREATE SCHEMA IF NOT EXISTS fastworker;

-- Version order of the state law: rev (TID text, byte order) when both have one, else seq.
-- A row without a version is lower than everything.
CREATE OR REPLACE FUNCTION fastworker.newer(a_rev text, a_seq bigint, b_rev text, b_seq bigint)
RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN a_rev IS NOT NULL AND b_rev IS NOT NULL AND a_rev <> b_rev THEN a_rev COLLATE "C" > b_rev COLLATE "C"
        WHEN a_seq IS NOT NULL AND b_seq IS NOT NULL THEN a_seq > b_seq
        ELSE (a_rev IS NOT NULL OR a_seq IS NOT NULL) AND b_rev IS NULL AND b_seq IS NULL
    END
$$;

-- The newest version of a record: of every deleted record (its tombstone), and of every record whose
-- table has no version columns. Tombstones are pruned at the horizon.
CREATE TABLE fastworker.versions (
    uri text COLLATE "C" PRIMARY KEY,
    rev text COLLATE "C",
    seq bigint,
    cid text COLLATE "C",
    deleted boolean NOT NULL,
    written_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX versions_tombstones ON fastworker.versions (written_at) WHERE deleted;

-- Live records that lost their unique pair to a twin with a lower rkey; `row_values` are the row's columns
-- in the order of fastworker/table/schema.py, as a JSON array.
CREATE TABLE fastworker.twins (
    uri text COLLATE "C" PRIMARY KEY,
    table_name text NOT NULL,
    pair text COLLATE "C" NOT NULL, -- the pair's columns, joined by a newline
    rkey text COLLATE "C" NOT NULL,
    rev text COLLATE "C",
    seq bigint,
    cid text,
    row_values jsonb NOT NULL
);
CREATE INDEX twins_pair ON fastworker.twins (table_name, pair);

-- Gate records of both kinds; public.thread_gates and public.post_gates follow them.
CREATE TABLE fastworker.gates (
    uri varchar(512) PRIMARY KEY,
    kind varchar(16) NOT NULL CHECK (kind IN ('thread', 'post')),
    post_uri varchar(512) NOT NULL,
    owner_did varchar(255) NOT NULL,
    rules jsonb NOT NULL,
    created_at timestamp NOT NULL
);
CREATE INDEX gates_post ON fastworker.gates (post_uri);

-- Profile records; the profile columns of public.users follow them.
CREATE TABLE fastworker.profiles (
    uri varchar(512) PRIMARY KEY,
    did varchar(255) NOT NULL,
    display_name varchar(255),
    description text,
    avatar_url text,
    banner_url text,
    profile_record jsonb,
    pinned_post jsonb
);

-- The newest #account event of each DID. `deleted_seq` is the tombstone for all its records below it;
-- `purge_pending` while its rows are still being removed, in pieces.
CREATE TABLE fastworker.accounts (
    did varchar(255) PRIMARY KEY,
    active boolean NOT NULL,
    status text,
    relay text,
    seq bigint,
    event_at timestamptz NOT NULL,
    deleted_seq bigint,
    purge_pending boolean NOT NULL DEFAULT false
);
CREATE INDEX accounts_purge ON fastworker.accounts (did) WHERE purge_pending;

-- The newest #identity event of each DID. `resolve_pending` when it carried no usable handle: marked at `marked_at`, not
-- asked again before `resolve_after`.
CREATE TABLE fastworker.identities (
    did varchar(255) PRIMARY KEY,
    handle text,
    relay text,
    seq bigint,
    event_at timestamptz NOT NULL,
    resolve_pending boolean NOT NULL DEFAULT false,
    marked_at timestamptz,
    resolve_after timestamptz NOT NULL DEFAULT '-infinity',
    attempts integer NOT NULL DEFAULT 0
);
CREATE INDEX identities_resolve ON fastworker.identities (resolve_after) WHERE resolve_pending;

-- Keys of joined rows (two records each) that a committed transaction still owes a recomputation.
CREATE TABLE fastworker.recheck (
    kind text NOT NULL,
    key text COLLATE "C" NOT NULL,
    owed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, key)
);

-- How far each consumer saw the stream finished: everything up to and including (seq, entry_id) is settled.
CREATE TABLE fastworker.progress (
    stream text NOT NULL,
    consumer text NOT NULL,
    seq bigint,
    entry_id text NOT NULL,
    stored_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (stream, consumer)
);

-- Sequence spaces this database was fed from. With two of them, seq alone orders nothing.
CREATE TABLE fastworker.relays (
    host text PRIMARY KEY,
    first_seen timestamptz NOT NULL DEFAULT now()
);

-- Tombstones written until this time are gone, or go soon: it is announced first, then they are deleted.
CREATE TABLE fastworker.horizon (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    pruned_until timestamptz NOT NULL DEFAULT '-infinity',
    announced_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO fastworker.horizon DEFAULT VALUES;

-- Repositories whose #sync said that their state was replaced.
CREATE TABLE fastworker.repairs (
    did varchar(255) PRIMARY KEY,
    rev text,
    seq bigint,
    seen_at timestamptz NOT NULL DEFAULT now()
);

-- Gaps the relay admitted (OutdatedCursor): events in (from_seq, to_seq) were never received.
CREATE TABLE fastworker.gaps (
    relay text NOT NULL,
    from_seq bigint NOT NULL,
    to_seq bigint NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (relay, from_seq)
);

-- One row of ours per table, in the order of fastworker/table/schema.py: statements take arrays of these.
CREATE TYPE fastworker.posts_row AS (
    uri varchar, cid varchar, author_did varchar, text text, langs jsonb, parent_uri varchar, parent_cid varchar,
    root_uri varchar, root_cid varchar, embed jsonb, facets jsonb, tags jsonb, created_at timestamp,
    indexed_at timestamp, commit_time timestamp, commit_seq varchar, commit_rev varchar
);
CREATE TYPE fastworker.likes_row AS (
    uri varchar, user_did varchar, post_uri varchar, subject_cid varchar, via jsonb, created_at timestamp,
    commit_time timestamp, commit_seq varchar, commit_rev varchar
);
CREATE TYPE fastworker.reposts_row AS (
    uri varchar, user_did varchar, post_uri varchar, subject_cid varchar, via jsonb, created_at timestamp,
    commit_time timestamp, commit_seq varchar, commit_rev varchar
);
CREATE TYPE fastworker.follows_row AS (
    uri varchar, follower_did varchar, following_did varchar, created_at timestamp, commit_time timestamp,
    commit_seq varchar, commit_rev varchar
);
CREATE TYPE fastworker.blocks_row AS (
    uri varchar, blocker_did varchar, blocked_did varchar, created_at timestamp, commit_time timestamp,
    commit_seq varchar, commit_rev varchar
);
CREATE TYPE fastworker.bookmarks_row AS (uri varchar, user_did varchar, post_uri varchar, created_at timestamp);
CREATE TYPE fastworker.lists_row AS (
    uri varchar, cid varchar, creator_did varchar, name varchar, purpose varchar, description text, avatar_url text,
    created_at timestamp
);
CREATE TYPE fastworker.list_items_row AS (
    uri varchar, cid varchar, list_uri varchar, subject_did varchar, created_at timestamp
);
CREATE TYPE fastworker.list_blocks_row AS (uri varchar, blocker_did varchar, list_uri varchar, created_at timestamp);
CREATE TYPE fastworker.feed_generators_row AS (
    uri varchar, cid varchar, creator_did varchar, did varchar, display_name varchar, description text,
    avatar_url text, created_at timestamp
);
CREATE TYPE fastworker.starter_packs_row AS (
    uri varchar, cid varchar, creator_did varchar, name varchar, description text, list_uri varchar, feeds jsonb,
    created_at timestamp
);
CREATE TYPE fastworker.labeler_services_row AS (
    uri varchar, cid varchar, creator_did varchar, policies jsonb, created_at timestamp
);
CREATE TYPE fastworker.labels_row AS (
    uri varchar, src varchar, subject varchar, val varchar, neg boolean, created_at timestamp
);
CREATE TYPE fastworker.verifications_row AS (
    uri varchar, cid varchar, subject_did varchar, handle varchar, verified_at timestamp, created_at timestamp
);
CREATE TYPE fastworker.generic_records_row AS (
    uri varchar, cid varchar, author_did varchar, record_type varchar, record jsonb, created_at timestamp
);
CREATE TYPE fastworker.gates_row AS (
    uri varchar, kind varchar, post_uri varchar, owner_did varchar, rules jsonb, created_at timestamp
);
CREATE TYPE fastworker.profiles_row AS (
    uri varchar, did varchar, display_name varchar, description text, avatar_url text, banner_url text,
    profile_record jsonb, pinned_post jsonb
);
CREATE TYPE fastworker.feed_items_row AS (
    uri varchar, post_uri varchar, originator_did varchar, type varchar, sort_at timestamp, cid varchar,
    created_at timestamp
);
CREATE TYPE fastworker.quotes_row AS (
    uri varchar, cid varchar, post_uri varchar, quoted_uri varchar, quoted_cid varchar, created_at timestamp
);
CREATE TYPE fastworker.notifications_row AS (
    uri varchar, recipient_did varchar, author_did varchar, reason varchar, reason_subject varchar, cid varchar,
    created_at timestamp
);
CREATE TYPE fastworker.post_viewer_states_row AS (
    post_uri varchar, viewer_did varchar, like_uri varchar, repost_uri varchar, bookmarked boolean
);
CREATE TYPE fastworker.post_aggregations_row AS (
    post_uri varchar, like_count int, repost_count int, reply_count int, bookmark_count int, quote_count int
);
