-- What a flush does with few rows, as one round trip each: a statement costs the worker more than its rows do
-- (docs/performance.md). Each statement in here has a snapshot of its own, as if it had been sent alone. The statements
-- are those of fastworker/table/merge.py.

-- New rows of the hot tables and what follows from them; NULL where there is nothing. `placed`: the uris of the new rows
-- that were inserted, NULL if all of them were. `whole`: all of them or nothing, else SQLSTATE FW001.
-- `owed_since`: when the keys that are owed were written.
CREATE FUNCTION fastworker.put(
    new_users varchar[],
    new_likes fastworker.likes_row[],
    new_reposts fastworker.reposts_row[],
    new_follows fastworker.follows_row[],
    new_blocks fastworker.blocks_row[],
    new_posts fastworker.posts_row[],
    whole boolean,
    no_quotes varchar[],
    new_quotes fastworker.quotes_row[],
    no_feed_items varchar[],
    new_feed_items fastworker.feed_items_row[],
    no_notifications varchar[],
    new_notifications fastworker.notifications_row[],
    unseen_posts varchar[],
    unseen_viewers varchar[],
    unseen_likes boolean[],
    unseen_reposts boolean[],
    unseen_bookmarks boolean[],
    new_viewers fastworker.post_viewer_states_row[],
    deltas fastworker.post_aggregations_row[],
    owed_kinds text[],
    owed_keys text[],
    of_stream text,
    of_consumer text,
    until_seq bigint,
    until_entry text,
    OUT placed varchar[],
    OUT owed_since timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    got varchar[];
    wanted int := 0;
BEGIN
    IF new_users IS NOT NULL THEN
        INSERT INTO public.users (did, handle) SELECT did, 'handle.invalid' FROM unnest(new_users) AS u (did)
        ON CONFLICT (did) DO NOTHING;
    END IF;
    IF new_likes IS NOT NULL THEN
        WITH new AS (
            INSERT INTO public.likes (uri, user_did, post_uri, subject_cid, via, created_at, commit_time, commit_seq,
                commit_rev) SELECT * FROM unnest(new_likes) ON CONFLICT DO NOTHING RETURNING uri
        ) SELECT array_agg(uri) INTO got FROM new;
        placed := placed || got;
        wanted := wanted + cardinality(new_likes);
    END IF;
    IF new_reposts IS NOT NULL THEN
        WITH new AS (
            INSERT INTO public.reposts (uri, user_did, post_uri, subject_cid, via, created_at, commit_time, commit_seq,
                commit_rev) SELECT * FROM unnest(new_reposts) ON CONFLICT DO NOTHING RETURNING uri
        ) SELECT array_agg(uri) INTO got FROM new;
        placed := placed || got;
        wanted := wanted + cardinality(new_reposts);
    END IF;
    IF new_follows IS NOT NULL THEN
        WITH new AS (
            INSERT INTO public.follows (uri, follower_did, following_did, created_at, commit_time, commit_seq,
                commit_rev) SELECT * FROM unnest(new_follows) ON CONFLICT DO NOTHING RETURNING uri
        ) SELECT array_agg(uri) INTO got FROM new;
        placed := placed || got;
        wanted := wanted + cardinality(new_follows);
    END IF;
    IF new_blocks IS NOT NULL THEN
        WITH new AS (
            INSERT INTO public.blocks (uri, blocker_did, blocked_did, created_at, commit_time, commit_seq,
                commit_rev) SELECT * FROM unnest(new_blocks) ON CONFLICT DO NOTHING RETURNING uri
        ) SELECT array_agg(uri) INTO got FROM new;
        placed := placed || got;
        wanted := wanted + cardinality(new_blocks);
    END IF;
    IF new_posts IS NOT NULL THEN
        WITH new AS (
            INSERT INTO public.posts (uri, cid, author_did, text, langs, parent_uri, parent_cid, root_uri, root_cid,
                embed, facets, tags, created_at, indexed_at, commit_time, commit_seq, commit_rev)
            SELECT * FROM unnest(new_posts) ON CONFLICT DO NOTHING RETURNING uri
        ) SELECT array_agg(uri) INTO got FROM new;
        placed := placed || got;
        wanted := wanted + cardinality(new_posts);
    END IF;
    IF coalesce(cardinality(placed), 0) = wanted THEN
        placed := NULL;
    ELSIF whole THEN
        RAISE EXCEPTION 'not every row is new' USING ERRCODE = 'FW001';
    ELSIF placed IS NULL THEN
        placed := '{}';
    END IF;

    IF no_quotes IS NOT NULL THEN
        DELETE FROM public.quotes WHERE uri = ANY(no_quotes);
    END IF;
    IF new_quotes IS NOT NULL THEN
        INSERT INTO public.quotes AS t (uri, cid, post_uri, quoted_uri, quoted_cid, created_at)
        SELECT * FROM unnest(new_quotes) ON CONFLICT (uri) DO UPDATE SET cid = excluded.cid,
            post_uri = excluded.post_uri, quoted_uri = excluded.quoted_uri, quoted_cid = excluded.quoted_cid,
            created_at = excluded.created_at;
    END IF;
    IF no_feed_items IS NOT NULL THEN
        DELETE FROM public.feed_items WHERE uri = ANY(no_feed_items);
    END IF;
    IF new_feed_items IS NOT NULL THEN
        INSERT INTO public.feed_items AS t (uri, post_uri, originator_did, type, sort_at, cid, created_at)
        SELECT * FROM unnest(new_feed_items) ON CONFLICT (uri) DO UPDATE SET post_uri = excluded.post_uri,
            originator_did = excluded.originator_did, type = excluded.type, sort_at = excluded.sort_at,
            cid = excluded.cid, created_at = excluded.created_at;
    END IF;
    IF no_notifications IS NOT NULL THEN
        DELETE FROM public.notifications WHERE uri = ANY(no_notifications);
    END IF;
    IF new_notifications IS NOT NULL THEN
        INSERT INTO public.notifications AS t (uri, recipient_did, author_did, reason, reason_subject, cid, created_at)
        SELECT * FROM unnest(new_notifications) ON CONFLICT (uri) DO UPDATE SET recipient_did = excluded.recipient_did,
            author_did = excluded.author_did, reason = excluded.reason, reason_subject = excluded.reason_subject,
            cid = excluded.cid, created_at = excluded.created_at;
    END IF;

    -- Clears, then drops what is left empty: two statements, because the second must see the first.
    IF unseen_posts IS NOT NULL THEN
        UPDATE public.post_viewer_states AS t SET
            like_uri = CASE WHEN u.l THEN NULL ELSE t.like_uri END,
            repost_uri = CASE WHEN u.r THEN NULL ELSE t.repost_uri END,
            bookmarked = t.bookmarked AND NOT u.b, updated_at = now()
        FROM unnest(unseen_posts, unseen_viewers, unseen_likes, unseen_reposts, unseen_bookmarks)
            AS u (post, viewer, l, r, b)
        WHERE t.post_uri = u.post AND t.viewer_did = u.viewer;
    END IF;
    IF new_viewers IS NOT NULL THEN
        INSERT INTO public.post_viewer_states AS t (post_uri, viewer_did, like_uri, repost_uri, bookmarked)
        SELECT * FROM unnest(new_viewers) ON CONFLICT (post_uri, viewer_did) DO UPDATE SET
            like_uri = coalesce(excluded.like_uri, t.like_uri), repost_uri = coalesce(excluded.repost_uri, t.repost_uri),
            bookmarked = t.bookmarked OR excluded.bookmarked, updated_at = now();
    END IF;
    IF unseen_posts IS NOT NULL THEN
        DELETE FROM public.post_viewer_states AS t USING unnest(unseen_posts, unseen_viewers) AS u (post, viewer)
        WHERE t.post_uri = u.post AND t.viewer_did = u.viewer AND t.like_uri IS NULL AND t.repost_uri IS NULL
            AND NOT (t.bookmarked OR t.thread_muted OR t.reply_disabled OR t.embedding_disabled OR t.pinned);
    END IF;

    -- Counters late: hot rows stay locked until the commit. DO UPDATE locks the row even where its WHERE is false.
    IF deltas IS NOT NULL THEN
        INSERT INTO public.post_aggregations AS t (post_uri, like_count, repost_count, reply_count, bookmark_count,
            quote_count)
        SELECT * FROM unnest(deltas) ON CONFLICT (post_uri) DO UPDATE SET
            like_count = greatest(0, t.like_count + excluded.like_count),
            repost_count = greatest(0, t.repost_count + excluded.repost_count),
            reply_count = greatest(0, t.reply_count + excluded.reply_count),
            bookmark_count = greatest(0, t.bookmark_count + excluded.bookmark_count),
            quote_count = greatest(0, t.quote_count + excluded.quote_count), updated_at = now()
        WHERE excluded.like_count <> 0 OR excluded.repost_count <> 0 OR excluded.reply_count <> 0
            OR excluded.bookmark_count <> 0 OR excluded.quote_count <> 0;
    END IF;
    -- After them: whoever owes or pays the same key would wait for the counters, too.
    IF owed_keys IS NOT NULL THEN
        INSERT INTO fastworker.recheck (kind, key) SELECT * FROM unnest(owed_kinds, owed_keys)
        ON CONFLICT (kind, key) DO UPDATE SET owed_at = now();
        owed_since := now();
    END IF;
    IF until_entry IS NOT NULL THEN
        INSERT INTO fastworker.progress (stream, consumer, seq, entry_id)
        VALUES (of_stream, of_consumer, until_seq, until_entry) ON CONFLICT (stream, consumer) DO UPDATE SET
            seq = excluded.seq, entry_id = excluded.entry_id, stored_at = now();
    END IF;
END $$;

-- Rows that join two records, under the lock of the row that carries them; the owed keys (kinds, keys, owed_at) are paid
-- with it. Not `patient`: a post that another flush has locked is left owed instead.
CREATE FUNCTION fastworker.recompute(
    contexts varchar[],
    gates varchar[],
    roots varchar[],
    services varchar[],
    aggregates varchar[],
    owed_kinds text[],
    owed_keys text[],
    owed_times timestamptz[],
    patient boolean
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    stale varchar[] := ARRAY(SELECT k FROM unnest(owed_kinds, owed_keys) AS o (kind, k) WHERE kind = 'context');
    got varchar[];
    missing varchar[];
    busy varchar[] := '{}';
BEGIN
    IF cardinality(roots) > 0 THEN
        got := ARRAY(SELECT uri FROM public.posts WHERE root_uri = ANY(roots) AND uri <> root_uri);
        stale := stale || got;
        contexts := contexts || got;
    END IF;
    IF cardinality(contexts) > 0 OR cardinality(gates) > 0 THEN
        -- A post that is committed from here on is its own writer's: touching it would take its lock late.
        IF patient THEN
            WITH mine AS (
                SELECT uri FROM public.posts WHERE uri = ANY(contexts || gates) ORDER BY uri COLLATE "C" FOR NO KEY UPDATE
            ) SELECT array_agg(uri) INTO got FROM mine;
        ELSE
            WITH mine AS (
                SELECT uri FROM public.posts WHERE uri = ANY(contexts || gates) ORDER BY uri COLLATE "C"
                FOR NO KEY UPDATE SKIP LOCKED
            ) SELECT array_agg(uri) INTO got FROM mine;
            missing := ARRAY(SELECT unnest(contexts || gates) EXCEPT SELECT unnest(got));
            IF cardinality(missing) > 0 THEN
                busy := ARRAY(SELECT uri FROM public.posts WHERE uri = ANY(missing));
            END IF;
            IF cardinality(busy) > 0 THEN
                stale := ARRAY(SELECT s FROM unnest(stale) AS s WHERE s <> ALL(busy));
                INSERT INTO fastworker.recheck (kind, key)
                SELECT l.kind, l.k FROM (
                    SELECT 'context', c FROM unnest(contexts) AS c UNION SELECT 'gate', g FROM unnest(gates) AS g
                ) AS l (kind, k)
                WHERE l.k = ANY(busy) AND NOT EXISTS (
                    SELECT 1 FROM unnest(owed_kinds, owed_keys) AS o (kind, k) WHERE o.kind = l.kind AND o.k = l.k
                )
                ORDER BY l.kind COLLATE "C", l.k COLLATE "C"
                ON CONFLICT (kind, key) DO UPDATE SET owed_at = now();
            END IF;
        END IF;
        contexts := ARRAY(SELECT unnest(contexts) INTERSECT SELECT unnest(got));
        gates := ARRAY(SELECT unnest(gates) INTERSECT SELECT unnest(got));
    END IF;
    IF cardinality(contexts) > 0 THEN
        INSERT INTO public.thread_contexts AS t (post_uri, root_author_like_uri)
        SELECT p.uri, (SELECT l.uri FROM public.likes AS l
            WHERE l.user_did = split_part(p.root_uri, '/', 3) AND l.post_uri = p.uri)
        FROM public.posts AS p JOIN public.posts AS r ON r.uri = p.root_uri
        WHERE p.uri = ANY(contexts) AND r.uri <> p.uri
        ON CONFLICT (post_uri) DO UPDATE SET root_author_like_uri = excluded.root_author_like_uri, updated_at = now()
        WHERE t.root_author_like_uri IS DISTINCT FROM excluded.root_author_like_uri;
    END IF;
    IF cardinality(stale) > 0 THEN
        DELETE FROM public.thread_contexts AS t WHERE t.post_uri = ANY(stale) AND NOT EXISTS (
            SELECT 1 FROM public.posts AS p JOIN public.posts AS r ON r.uri = p.root_uri
            WHERE p.uri = t.post_uri AND r.uri <> p.uri);
    END IF;
    IF cardinality(gates) > 0 THEN
        UPDATE public.posts AS p SET has_thread_gate = f.thread, has_post_gate = f.post FROM (
            SELECT u.uri,
                EXISTS (SELECT 1 FROM fastworker.gates AS g WHERE g.post_uri = u.uri AND g.kind = 'thread') AS thread,
                EXISTS (SELECT 1 FROM fastworker.gates AS g WHERE g.post_uri = u.uri AND g.kind = 'post') AS post
            FROM unnest(gates) AS u (uri)) AS f
        WHERE p.uri = f.uri AND (p.has_thread_gate, p.has_post_gate) IS DISTINCT FROM (f.thread, f.post);
    END IF;
    IF cardinality(services) > 0 THEN
        PERFORM uri FROM public.feed_generators WHERE uri = ANY(services) ORDER BY uri COLLATE "C" FOR NO KEY UPDATE;
        IF FOUND THEN
            UPDATE public.feed_generators AS s SET like_count = f.likes FROM (
                SELECT u.uri, coalesce((SELECT a.like_count FROM public.post_aggregations AS a
                    WHERE a.post_uri = u.uri), 0) AS likes
                FROM unnest(services) AS u (uri)) AS f WHERE s.uri = f.uri AND s.like_count <> f.likes;
        END IF;
        PERFORM uri FROM public.labeler_services WHERE uri = ANY(services) ORDER BY uri COLLATE "C" FOR NO KEY UPDATE;
        IF FOUND THEN
            UPDATE public.labeler_services AS s SET like_count = f.likes FROM (
                SELECT u.uri, coalesce((SELECT a.like_count FROM public.post_aggregations AS a
                    WHERE a.post_uri = u.uri), 0) AS likes
                FROM unnest(services) AS u (uri)) AS f WHERE s.uri = f.uri AND s.like_count <> f.likes;
        END IF;
    END IF;
    IF cardinality(aggregates) > 0 THEN
        PERFORM post_uri FROM public.post_aggregations WHERE post_uri = ANY(aggregates)
        ORDER BY post_uri COLLATE "C" FOR UPDATE;
        DELETE FROM public.post_aggregations AS a WHERE a.post_uri = ANY(aggregates) AND a.like_count <= 0
            AND a.repost_count <= 0 AND a.reply_count <= 0 AND a.bookmark_count <= 0 AND a.quote_count <= 0
            AND NOT EXISTS (SELECT 1 FROM public.posts AS p WHERE p.uri = a.post_uri);
    END IF;
    IF cardinality(owed_keys) > 0 THEN
        DELETE FROM fastworker.recheck AS r USING unnest(owed_kinds, owed_keys, owed_times) AS u (kind, key, owed_at)
        WHERE r.kind = u.kind AND r.key = u.key AND r.owed_at = u.owed_at
            AND NOT (u.kind IN ('context', 'gate') AND u.key = ANY(busy));
    END IF;
END $$;

-- A whole flush of new rows of the hot tables, as docs/invariants.md has it: the look, the main transaction, the look back,
-- the rows that join two records. If anything else is to be done (not every row is new, one is beaten or in the shadow,
-- somebody must not be stored), nothing is, with SQLSTATE FW001. `is_late`: it is all written, and something overtook
-- it: the look back is the caller's.
CREATE PROCEDURE fastworker.put_whole(
    new_users varchar[],
    new_likes fastworker.likes_row[],
    new_reposts fastworker.reposts_row[],
    new_follows fastworker.follows_row[],
    new_blocks fastworker.blocks_row[],
    new_posts fastworker.posts_row[],
    new_quotes fastworker.quotes_row[],
    new_feed_items fastworker.feed_items_row[],
    new_notifications fastworker.notifications_row[],
    new_viewers fastworker.post_viewer_states_row[],
    deltas fastworker.post_aggregations_row[],
    of_stream text,
    of_consumer text,
    until_seq bigint,
    until_entry text,
    uris text[],
    repos varchar[],
    dids varchar[],
    with_contexts boolean,
    with_gates boolean,
    with_services boolean,
    INOUT is_late boolean
) LANGUAGE plpgsql AS $$
DECLARE
    posts varchar[];
    contexts varchar[] := '{}';
    gates varchar[] := '{}';
    services varchar[] := '{}';
BEGIN
    IF EXISTS (SELECT 1 FROM fastworker.versions WHERE uri = ANY(uris) AND deleted)
        OR EXISTS (SELECT 1 FROM fastworker.accounts WHERE did = ANY(repos) AND deleted_seq IS NOT NULL)
        OR EXISTS (SELECT 1 FROM fastworker.twins WHERE uri = ANY(uris))
        OR EXISTS (SELECT 1 FROM public.user_settings WHERE data_collection_forbidden AND user_did = ANY(dids))
    THEN
        RAISE EXCEPTION 'not only new rows' USING ERRCODE = 'FW001';
    END IF;
    PERFORM fastworker.put(new_users, new_likes, new_reposts, new_follows, new_blocks, new_posts, true, NULL, new_quotes,
        NULL, new_feed_items, NULL, new_notifications, NULL, NULL, NULL, NULL, NULL, new_viewers, deltas, NULL, NULL,
        of_stream, of_consumer, until_seq, until_entry);
    COMMIT;
    is_late := EXISTS (SELECT 1 FROM fastworker.versions WHERE uri = ANY(uris) AND deleted)
        OR EXISTS (SELECT 1 FROM fastworker.accounts WHERE did = ANY(repos) AND deleted_seq IS NOT NULL)
        OR EXISTS (SELECT 1 FROM fastworker.twins WHERE uri = ANY(uris));
    IF is_late THEN
        RETURN;
    END IF;
    IF new_posts IS NOT NULL AND (with_contexts OR with_gates) THEN
        posts := ARRAY(SELECT uri FROM unnest(new_posts));
    END IF;
    IF with_contexts THEN
        contexts := ARRAY(
            SELECT uri FROM unnest(new_posts) WHERE root_uri <> uri
            UNION SELECT p.uri FROM public.posts AS p WHERE p.root_uri = ANY(posts) AND p.uri <> p.root_uri
            UNION SELECT p.uri FROM unnest(new_likes) AS l JOIN public.posts AS p ON p.uri = l.post_uri
            WHERE starts_with(p.root_uri, 'at://' || l.user_did || '/'));
    END IF;
    IF with_gates AND posts IS NOT NULL THEN
        gates := ARRAY(SELECT DISTINCT post_uri FROM fastworker.gates WHERE post_uri = ANY(posts));
    END IF;
    IF with_services AND new_likes IS NOT NULL THEN
        services := ARRAY(SELECT DISTINCT post_uri FROM unnest(new_likes)
            WHERE strpos(post_uri, '/app.bsky.feed.generator/') > 0 OR strpos(post_uri, '/app.bsky.labeler.service/') > 0);
    END IF;
    IF cardinality(contexts) > 0 OR cardinality(gates) > 0 OR cardinality(services) > 0 THEN
        PERFORM fastworker.recompute(contexts, gates, '{}', services, '{}', '{}', '{}', '{}', false);
    END IF;
END $$;
