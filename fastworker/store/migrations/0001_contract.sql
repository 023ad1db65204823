-- The tables of the AppView's contract that ingestion writes or reads, in the public schema: exactly the names,
-- types, defaults, constraints and indexes that its API server expects. Only for an empty database: where the
-- AppView made its tables itself, this file is recorded as adopted and nothing in public is touched.
-- Timestamps are without time zone and mean UTC.

CREATE TABLE users (
    did varchar(255) PRIMARY KEY,
    handle varchar(255) NOT NULL,
    display_name varchar(255),
    avatar_url text,
    banner_url text,
    description text,
    profile_record jsonb,
    pinned_post jsonb,
    search_vector tsvector,
    created_at timestamp NOT NULL DEFAULT now(),
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_users_handle ON users (handle);
CREATE INDEX idx_users_created_at ON users (created_at);
CREATE INDEX idx_users_search_vector ON users USING gin (search_vector);

CREATE FUNCTION users_search_vector_trigger() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.search_vector :=
        setweight(to_tsvector('english', coalesce(NEW.handle, '')), 'A')
        || setweight(to_tsvector('english', coalesce(NEW.display_name, '')), 'B')
        || setweight(to_tsvector('english', coalesce(NEW.description, '')), 'C');
    RETURN NEW;
END
$$;
CREATE TRIGGER users_search_vector_update BEFORE INSERT OR UPDATE OF handle, display_name, description ON users
    FOR EACH ROW EXECUTE FUNCTION users_search_vector_trigger();

-- Handle search by similarity, where the server has pg_trgm and lets us install it; the API works without.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_trgm') THEN
        CREATE EXTENSION IF NOT EXISTS pg_trgm;
        CREATE INDEX idx_users_handle_trgm ON users USING gin (handle gin_trgm_ops);
    END IF;
EXCEPTION WHEN insufficient_privilege OR undefined_object THEN
    RAISE NOTICE 'pg_trgm cannot be used here: no similarity search of handles';
END
$$;

CREATE TABLE user_settings (
    user_did varchar(255) PRIMARY KEY REFERENCES users (did) ON DELETE CASCADE,
    blocked_keywords jsonb NOT NULL DEFAULT '[]',
    muted_users jsonb NOT NULL DEFAULT '[]',
    custom_lists jsonb NOT NULL DEFAULT '[]',
    feed_preferences jsonb NOT NULL DEFAULT '{}',
    data_collection_forbidden boolean NOT NULL DEFAULT false,
    last_backfill_at timestamp,
    last_liked_posts_backfill timestamp,
    last_follows_backfill timestamp,
    last_feeds_backfill timestamp,
    last_notifications_backfill timestamp,
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now()
);

CREATE TABLE posts (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    author_did varchar(255) NOT NULL,
    text text NOT NULL,
    langs jsonb,
    parent_uri varchar(512),
    parent_cid varchar(255),
    root_uri varchar(512),
    root_cid varchar(255),
    embed jsonb,
    facets jsonb,
    violates_thread_gate boolean NOT NULL DEFAULT false,
    violates_embedding_rules boolean NOT NULL DEFAULT false,
    has_thread_gate boolean NOT NULL DEFAULT false,
    has_post_gate boolean NOT NULL DEFAULT false,
    tags jsonb NOT NULL DEFAULT '[]',
    search_vector tsvector,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64)
);
CREATE INDEX idx_posts_author_did ON posts (author_did);
CREATE INDEX idx_posts_indexed_at ON posts (indexed_at);
CREATE INDEX idx_posts_parent_uri ON posts (parent_uri);
CREATE INDEX idx_posts_root_uri ON posts (root_uri);
CREATE INDEX idx_posts_search_vector ON posts USING gin (search_vector);

CREATE TABLE feed_items (
    uri varchar(512) PRIMARY KEY,
    post_uri varchar(512) NOT NULL,
    originator_did varchar(255) NOT NULL,
    type varchar(32) NOT NULL,
    sort_at timestamp NOT NULL,
    cid varchar(255) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_feed_items_originator ON feed_items (originator_did);
CREATE INDEX idx_feed_items_post ON feed_items (post_uri);
CREATE INDEX idx_feed_items_sort_at ON feed_items (sort_at);
CREATE INDEX idx_feed_items_type ON feed_items (type);
CREATE INDEX idx_feed_items_originator_sort ON feed_items (originator_did, sort_at);

CREATE TABLE post_aggregations (
    post_uri varchar(512) PRIMARY KEY,
    like_count integer NOT NULL DEFAULT 0,
    repost_count integer NOT NULL DEFAULT 0,
    reply_count integer NOT NULL DEFAULT 0,
    bookmark_count integer NOT NULL DEFAULT 0,
    quote_count integer NOT NULL DEFAULT 0,
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_post_aggregations_like_count ON post_aggregations (like_count);
CREATE INDEX idx_post_aggregations_repost_count ON post_aggregations (repost_count);
CREATE INDEX idx_post_aggregations_reply_count ON post_aggregations (reply_count);
CREATE INDEX idx_post_aggregations_bookmark_count ON post_aggregations (bookmark_count);
CREATE INDEX idx_post_aggregations_quote_count ON post_aggregations (quote_count);

CREATE TABLE post_viewer_states (
    post_uri varchar(512) NOT NULL,
    viewer_did varchar(255) NOT NULL,
    like_uri varchar(512),
    repost_uri varchar(512),
    bookmarked boolean NOT NULL DEFAULT false,
    thread_muted boolean NOT NULL DEFAULT false,
    reply_disabled boolean NOT NULL DEFAULT false,
    embedding_disabled boolean NOT NULL DEFAULT false,
    pinned boolean NOT NULL DEFAULT false,
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX idx_post_viewer_states_post_viewer ON post_viewer_states (post_uri, viewer_did);
CREATE INDEX idx_post_viewer_states_post ON post_viewer_states (post_uri);
CREATE INDEX idx_post_viewer_states_viewer ON post_viewer_states (viewer_did);

CREATE TABLE thread_contexts (
    post_uri varchar(512) PRIMARY KEY,
    root_author_like_uri varchar(512),
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_thread_contexts_root_author_like ON thread_contexts (root_author_like_uri);

CREATE TABLE likes (
    uri varchar(512) PRIMARY KEY,
    user_did varchar(255) NOT NULL,
    post_uri varchar(512) NOT NULL,
    subject_cid varchar(255),
    via jsonb,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64)
);
CREATE INDEX idx_likes_user_did ON likes (user_did);
CREATE INDEX idx_likes_post_uri ON likes (post_uri);
CREATE UNIQUE INDEX unique_like_user_post ON likes (user_did, post_uri);

CREATE TABLE reposts (
    uri varchar(512) PRIMARY KEY,
    user_did varchar(255) NOT NULL,
    post_uri varchar(512) NOT NULL,
    subject_cid varchar(255),
    via jsonb,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64)
);
CREATE INDEX idx_reposts_user_did ON reposts (user_did);
CREATE INDEX idx_reposts_post_uri ON reposts (post_uri);
CREATE UNIQUE INDEX unique_repost_user_post ON reposts (user_did, post_uri);

CREATE TABLE bookmarks (
    uri varchar(512) PRIMARY KEY,
    user_did varchar(255) NOT NULL,
    post_uri varchar(512) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_bookmarks_user_did ON bookmarks (user_did);
CREATE INDEX idx_bookmarks_post_uri ON bookmarks (post_uri);
CREATE UNIQUE INDEX unique_bookmark_user_post ON bookmarks (user_did, post_uri);

CREATE TABLE quotes (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    post_uri varchar(512) NOT NULL,
    quoted_uri varchar(512) NOT NULL,
    quoted_cid varchar(255),
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_quotes_post ON quotes (post_uri);
CREATE INDEX idx_quotes_quoted ON quotes (quoted_uri);
CREATE UNIQUE INDEX unique_quote_post_quoted ON quotes (post_uri, quoted_uri);

CREATE TABLE follows (
    uri varchar(512) PRIMARY KEY,
    follower_did varchar(255) NOT NULL,
    following_did varchar(255) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64)
);
CREATE INDEX idx_follows_follower ON follows (follower_did);
CREATE INDEX idx_follows_following ON follows (following_did);
CREATE UNIQUE INDEX unique_follow_follower_following ON follows (follower_did, following_did);

CREATE TABLE blocks (
    uri varchar(512) PRIMARY KEY,
    blocker_did varchar(255) NOT NULL,
    blocked_did varchar(255) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now(),
    commit_time timestamp,
    commit_seq varchar(32),
    commit_rev varchar(64)
);
CREATE INDEX idx_blocks_blocker ON blocks (blocker_did);
CREATE INDEX idx_blocks_blocked ON blocks (blocked_did);
CREATE UNIQUE INDEX unique_block_blocker_blocked ON blocks (blocker_did, blocked_did);

CREATE TABLE list_blocks (
    uri varchar(512) PRIMARY KEY,
    blocker_did varchar(255) NOT NULL,
    list_uri varchar(512) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_list_blocks_blocker ON list_blocks (blocker_did);
CREATE INDEX idx_list_blocks_list ON list_blocks (list_uri);
CREATE UNIQUE INDEX unique_list_block ON list_blocks (blocker_did, list_uri);

CREATE TABLE lists (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) NOT NULL,
    name varchar(255) NOT NULL,
    purpose varchar(64) NOT NULL,
    description text,
    avatar_url text,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_lists_creator ON lists (creator_did);
CREATE INDEX idx_lists_purpose ON lists (purpose);
CREATE INDEX idx_lists_indexed_at ON lists (indexed_at);

CREATE TABLE list_items (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    list_uri varchar(512) NOT NULL,
    subject_did varchar(255) NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_list_items_list ON list_items (list_uri);
CREATE INDEX idx_list_items_subject ON list_items (subject_did);
CREATE UNIQUE INDEX unique_list_item ON list_items (list_uri, subject_did);

CREATE TABLE feed_generators (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) NOT NULL,
    did varchar(255) NOT NULL,
    display_name varchar(255) NOT NULL,
    description text,
    avatar_url text,
    like_count integer NOT NULL DEFAULT 0,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_feed_generators_creator ON feed_generators (creator_did);
CREATE INDEX idx_feed_generators_did ON feed_generators (did);
CREATE INDEX idx_feed_generators_like_count ON feed_generators (like_count);
CREATE INDEX idx_feed_generators_indexed_at ON feed_generators (indexed_at);

CREATE TABLE starter_packs (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) NOT NULL,
    name varchar(255) NOT NULL,
    description text,
    list_uri varchar(512),
    feeds jsonb NOT NULL DEFAULT '[]',
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_starter_packs_creator ON starter_packs (creator_did);
CREATE INDEX idx_starter_packs_list ON starter_packs (list_uri);
CREATE INDEX idx_starter_packs_indexed_at ON starter_packs (indexed_at);

CREATE TABLE labeler_services (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    creator_did varchar(255) NOT NULL,
    policies jsonb NOT NULL,
    like_count integer NOT NULL DEFAULT 0,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_labeler_services_creator ON labeler_services (creator_did);
CREATE INDEX idx_labeler_services_like_count ON labeler_services (like_count);
CREATE INDEX idx_labeler_services_indexed_at ON labeler_services (indexed_at);

CREATE TABLE labels (
    uri varchar(512) PRIMARY KEY,
    src varchar(255) NOT NULL,
    subject varchar(512) NOT NULL,
    val varchar(128) NOT NULL,
    neg boolean NOT NULL DEFAULT false,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_labels_subject ON labels (subject);
CREATE INDEX idx_labels_src ON labels (src);
CREATE INDEX idx_labels_val ON labels (val);
CREATE INDEX idx_labels_subject_val ON labels (subject, val);

CREATE TABLE label_events (
    id serial PRIMARY KEY,
    label_uri varchar(512) NOT NULL REFERENCES labels (uri) ON DELETE CASCADE,
    action varchar(32) NOT NULL,
    created_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_label_events_label_uri ON label_events (label_uri);
CREATE INDEX idx_label_events_created_at ON label_events (created_at);

CREATE TABLE notifications (
    id serial PRIMARY KEY,
    uri varchar(512) NOT NULL CONSTRAINT notifications_uri_unique UNIQUE,
    recipient_did varchar(255) NOT NULL,
    author_did varchar(255) NOT NULL,
    reason varchar(64) NOT NULL,
    reason_subject varchar(512),
    cid varchar(255),
    is_read boolean NOT NULL DEFAULT false,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_notifications_recipient ON notifications (recipient_did);
CREATE INDEX idx_notifications_recipient_read ON notifications (recipient_did, is_read);
CREATE INDEX idx_notifications_created_at ON notifications (created_at);
CREATE INDEX idx_notifications_indexed_at ON notifications (indexed_at);

CREATE TABLE verifications (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    subject_did varchar(255) NOT NULL,
    handle varchar(255) NOT NULL,
    verified_at timestamp NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_verifications_subject ON verifications (subject_did);
CREATE INDEX idx_verifications_handle ON verifications (handle);
CREATE UNIQUE INDEX unique_verification_subject ON verifications (subject_did);

CREATE TABLE thread_gates (
    post_uri varchar(512) PRIMARY KEY,
    owner_did varchar(255) NOT NULL,
    allow_mentions boolean NOT NULL DEFAULT true,
    allow_following boolean NOT NULL DEFAULT true,
    allow_list_members boolean NOT NULL DEFAULT false,
    allow_list_uris jsonb NOT NULL DEFAULT '[]',
    created_at timestamp NOT NULL DEFAULT now(),
    updated_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_thread_gates_owner ON thread_gates (owner_did);

CREATE TABLE post_gates (
    post_uri varchar(512) PRIMARY KEY,
    embedding_rules jsonb NOT NULL DEFAULT '{}',
    created_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_post_gates_created_at ON post_gates (created_at);

CREATE TABLE generic_records (
    uri varchar(512) PRIMARY KEY,
    cid varchar(255) NOT NULL,
    author_did varchar(255) NOT NULL,
    record_type varchar(255) NOT NULL,
    record jsonb NOT NULL,
    created_at timestamp NOT NULL,
    indexed_at timestamp NOT NULL DEFAULT now()
);
CREATE INDEX idx_generic_records_author ON generic_records (author_did);
CREATE INDEX idx_generic_records_type ON generic_records (record_type);
CREATE INDEX idx_generic_records_created_at ON generic_records (created_at);

CREATE TABLE firehose_cursor (
    id serial PRIMARY KEY,
    service varchar(255) NOT NULL CONSTRAINT firehose_cursor_service_unique UNIQUE,
    cursor text,
    last_event_time timestamp,
    updated_at timestamp NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX idx_firehose_cursor_service ON firehose_cursor (service);
