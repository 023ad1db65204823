    -- What follows from the rows, what is owed, and how far the stream is stored: of `put` and `put_whole` alike. Not a
    -- routine, but a part of both: a call in between costs a small flush more than its rows do.
    IF no_quotes IS NOT NULL THEN
        DELETE FROM public.quotes WHERE uri = ANY(no_quotes);
    END IF;
    IF new_quotes IS NOT NULL THEN
        IF fresh THEN
            INSERT INTO public.quotes ({{columns quotes}}) SELECT * FROM unnest(new_quotes);
        ELSE
            INSERT INTO public.quotes AS t ({{columns quotes}})
            SELECT * FROM unnest(new_quotes) ON CONFLICT (uri) DO UPDATE SET {{set quotes}};
        END IF;
    END IF;
    IF no_feed_items IS NOT NULL THEN
        DELETE FROM public.feed_items WHERE uri = ANY(no_feed_items);
    END IF;
    IF new_feed_items IS NOT NULL THEN
        IF fresh THEN
            INSERT INTO public.feed_items ({{columns feed_items}}) SELECT * FROM unnest(new_feed_items);
        ELSE
            INSERT INTO public.feed_items AS t ({{columns feed_items}})
            SELECT * FROM unnest(new_feed_items) ON CONFLICT (uri) DO UPDATE SET {{set feed_items}};
        END IF;
    END IF;
    IF no_notifications IS NOT NULL THEN
        DELETE FROM public.notifications WHERE uri = ANY(no_notifications);
    END IF;
    IF new_notifications IS NOT NULL THEN
        IF fresh THEN
            INSERT INTO public.notifications ({{columns notifications}}) SELECT * FROM unnest(new_notifications);
        ELSE
            INSERT INTO public.notifications AS t ({{columns notifications}})
            SELECT * FROM unnest(new_notifications) ON CONFLICT (uri) DO UPDATE SET {{set notifications}};
        END IF;
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
        INSERT INTO public.post_viewer_states AS t ({{columns post_viewer_states}})
        SELECT * FROM unnest(new_viewers) ON CONFLICT (post_uri, viewer_did) DO UPDATE SET
            like_uri = coalesce(excluded.like_uri, t.like_uri), repost_uri = coalesce(excluded.repost_uri, t.repost_uri),
            -- mutant: a like resets the viewer state
            bookmarked = t.bookmarked OR excluded.bookmarked, updated_at = now();
    END IF;
    IF unseen_posts IS NOT NULL THEN
        DELETE FROM public.post_viewer_states AS t USING unnest(unseen_posts, unseen_viewers) AS u (post, viewer)
        WHERE t.post_uri = u.post AND t.viewer_did = u.viewer AND t.like_uri IS NULL AND t.repost_uri IS NULL
            -- mutant: unlike drops the state of the API
            AND NOT (t.bookmarked OR t.thread_muted OR t.reply_disabled OR t.embedding_disabled OR t.pinned);
    END IF;

    -- Counters late: their buckets are ours until the commit. DO UPDATE locks the row even where its WHERE is false, for
    -- writers that know no buckets.
    IF deltas IS NOT NULL THEN
        is_owing := NOT (
            SELECT bool_and(pg_try_advisory_xact_lock({{counters}}, fastworker.bucket(d.post_uri)))
            FROM unnest(deltas) AS d);
        -- A later statement than the one that locks: what was owed before that is seen.
        SELECT EXISTS (SELECT FROM fastworker.debts), {{stale_joined}} INTO are_debts, is_stale;
        IF are_debts THEN
            -- mutant: counters beside a debt
            is_owing := is_owing OR EXISTS (SELECT FROM fastworker.debts WHERE attempts = 0);
            -- What is put back is in nobody's way but that of its own counter.
            is_owing := is_owing OR EXISTS (
                -- mutant: a counter beside its debt that is put back
                SELECT FROM (SELECT (o.deltas[1]).post_uri FROM fastworker.debts AS o WHERE o.attempts > 0) AS late (uri)
                WHERE late.uri = ANY(ARRAY(SELECT d.post_uri FROM unnest(deltas) AS d)));
        END IF;
        -- mutant: a busy counter is not owed
        IF is_owing THEN
            -- A counter that a session which is not ours has locked is waited for, as if nothing were owed: the entries
            -- that touch it wait for that transaction. Locks are looked at only where a row's last writer may be at work.
            moving := ARRAY(
                SELECT a.post_uri FROM unnest(deltas) AS d JOIN public.post_aggregations AS a USING (post_uri)
                WHERE age(a.xmax) <=
                    pg_current_xact_id()::text::bigint - pg_snapshot_xmin(pg_current_snapshot())::text::bigint);
            -- mutant: owed for a counter that a stranger has locked
            IF cardinality(moving) > 0 THEN
                moving := ARRAY(
                    WITH held AS MATERIALIZED (SELECT locktype, transactionid, classid, pid FROM pg_locks WHERE granted)
                    SELECT a.post_uri FROM public.post_aggregations AS a
                    JOIN held AS h ON h.locktype = 'transactionid' AND h.transactionid = a.xmax
                    WHERE a.post_uri = ANY(moving) AND h.pid <> pg_backend_pid() AND h.pid NOT IN (
                        SELECT b.pid FROM held AS b WHERE b.locktype = 'advisory' AND b.classid = {{ours}}
                            AND b.pid IS NOT NULL));
                PERFORM FROM public.post_aggregations WHERE post_uri = ANY(moving) ORDER BY post_uri COLLATE "C"
                FOR NO KEY UPDATE;
            END IF;
            INSERT INTO fastworker.debts (bucket, deltas, recounts)
            SELECT fastworker.bucket(d.post_uri), array_agg(d), array_agg(d.post_uri) FILTER (WHERE d.post_uri = ANY(recounts))
            FROM unnest(deltas) AS d GROUP BY 1;
        ELSE
            INSERT INTO public.post_aggregations AS t ({{columns post_aggregations}})
            SELECT * FROM unnest(deltas) ON CONFLICT (post_uri) DO UPDATE SET
                {{add post_aggregations}}, updated_at = now()
            WHERE {{moves post_aggregations}};
            IF recounts IS NOT NULL THEN
                PERFORM fastworker.recount_1(recounts, with_replies, with_quotes);
            END IF;
        END IF;
    ELSE
        is_stale := {{stale_joined}};
    END IF;
    is_owing := is_stale OR coalesce(is_owing, false);
    IF owed_keys IS NOT NULL THEN
        INSERT INTO fastworker.notes (kinds, keys) VALUES (owed_kinds, owed_keys) RETURNING id INTO note;
    END IF;
    IF until_entry IS NOT NULL THEN
        INSERT INTO fastworker.progress (stream, consumer, seq, entry_id)
        VALUES (of_stream, of_consumer, until_seq, until_entry) ON CONFLICT (stream, consumer) DO UPDATE SET
            seq = excluded.seq, entry_id = excluded.entry_id, stored_at = now();
    END IF;
