-- Rows that join two records, under the lock of the row that carries them; the owed keys (kinds, keys, owed_at) are paid
-- with it. Not `patient`: a post that another flush has locked is left owed instead, and so is what reads counters that
-- another one is paying. `note`: the owed keys are those of a flush (fastworker.notes); else they are in fastworker.recheck.
-- Returns how many of these are paid.
CREATE OR REPLACE FUNCTION fastworker.recompute_5(
    contexts varchar[],
    gates varchar[],
    roots varchar[],
    services varchar[],
    aggregates varchar[],
    owed_kinds text[],
    owed_keys text[],
    owed_times timestamptz[],
    note bigint,
    patient boolean,
    with_replies boolean,
    with_quotes boolean
) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    stale varchar[] := '{}';
    got varchar[];
    missing varchar[];
    busy varchar[] := '{}';
    mine int[];
    one int;
    paid int := 0;
    unpaid varchar[] := '{}'; -- services and aggregates whose counters another flush is paying
BEGIN
    IF 'context' = ANY(owed_kinds) THEN
        stale := ARRAY(SELECT k FROM unnest(owed_kinds, owed_keys) AS o (kind, k) WHERE kind = 'context');
    END IF;
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
            IF cardinality(got) IS DISTINCT FROM cardinality(contexts || gates) THEN
                missing := ARRAY(SELECT unnest(contexts || gates) EXCEPT SELECT unnest(got));
                busy := ARRAY(SELECT uri FROM public.posts WHERE uri = ANY(missing));
            END IF;
            -- mutant: a locked post is not owed
            IF cardinality(busy) > 0 THEN
                stale := ARRAY(SELECT s FROM unnest(stale) AS s WHERE s <> ALL(busy));
                INSERT INTO fastworker.recheck (kind, key)
                SELECT l.kind, l.k FROM (
                    SELECT 'context', c FROM unnest(contexts) AS c UNION SELECT 'gate', g FROM unnest(gates) AS g
                ) AS l (kind, k)
                WHERE l.k = ANY(busy) AND (note IS NOT NULL OR NOT EXISTS (
                    SELECT 1 FROM unnest(owed_kinds, owed_keys) AS o (kind, k) WHERE o.kind = l.kind AND o.k = l.k
                ))
                ORDER BY l.kind COLLATE "C", l.k COLLATE "C"
                ON CONFLICT (kind, key) DO UPDATE SET owed_at = now();
            END IF;
        END IF;
        IF cardinality(got) IS DISTINCT FROM cardinality(contexts || gates) THEN
            contexts := ARRAY(SELECT unnest(contexts) INTERSECT SELECT unnest(got));
            gates := ARRAY(SELECT unnest(gates) INTERSECT SELECT unnest(got));
        END IF;
    END IF;
    IF cardinality(contexts) > 0 THEN
        INSERT INTO public.thread_contexts AS t (post_uri, root_author_like_uri)
        SELECT p.uri, (SELECT l.uri FROM public.likes AS l
            -- mutant: context without its like
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
            -- Joined, because for EXISTS among the columns PostgreSQL 18 reads all gates there are.
            SELECT u.uri, bool_or(g.kind IS NOT DISTINCT FROM 'thread') AS thread,
                -- mutant: gate flags mixed up
                bool_or(g.kind IS NOT DISTINCT FROM 'post') AS post
            FROM unnest(gates) AS u (uri) LEFT JOIN fastworker.gates AS g ON g.post_uri = u.uri GROUP BY u.uri) AS f
        WHERE p.uri = f.uri AND (p.has_thread_gate, p.has_post_gate) IS DISTINCT FROM (f.thread, f.post);
    END IF;
    -- What reads counters, or removes their row, holds their bucket, and all that is owed in it is paid.
    IF cardinality(services || aggregates) > 0 THEN
        mine := ARRAY(SELECT b.bucket FROM (
            SELECT DISTINCT fastworker.bucket(k) AS bucket FROM unnest(services || aggregates) AS k ORDER BY 1) AS b
            WHERE CASE WHEN patient THEN pg_advisory_xact_lock({{counters}}, b.bucket) IS NOT NULL
                ELSE pg_try_advisory_xact_lock({{counters}}, b.bucket) END);
        IF EXISTS (SELECT FROM fastworker.debts) THEN
            FOREACH one IN ARRAY mine LOOP
                -- mutant: an aggregate goes before it is paid
                WHILE fastworker.pay_bucket_2(one, with_replies, with_quotes) > 0 LOOP END LOOP;
            END LOOP;
        END IF;
        unpaid := ARRAY(SELECT k FROM unnest(services || aggregates) AS k WHERE fastworker.bucket(k) <> ALL(mine)
            OR EXISTS (SELECT FROM fastworker.debts AS o, unnest(o.deltas) AS d WHERE d.post_uri = k));
    END IF;
    IF cardinality(unpaid) > 0 THEN
        INSERT INTO fastworker.recheck (kind, key)
        SELECT l.kind, l.k FROM (
            SELECT 'like_count', k FROM unnest(services) AS k UNION SELECT 'aggregate', k FROM unnest(aggregates) AS k
        ) AS l (kind, k)
        WHERE l.k = ANY(unpaid) AND (note IS NOT NULL OR NOT EXISTS (
            SELECT 1 FROM unnest(owed_kinds, owed_keys) AS o (kind, k) WHERE o.kind = l.kind AND o.k = l.k
        ))
        ORDER BY l.kind COLLATE "C", l.k COLLATE "C"
        ON CONFLICT (kind, key) DO UPDATE SET owed_at = now();
        services := ARRAY(SELECT unnest(services) EXCEPT SELECT unnest(unpaid));
        aggregates := ARRAY(SELECT unnest(aggregates) EXCEPT SELECT unnest(unpaid));
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
        -- One condition on all counters, so that no plan goes by a counter's index: nearly every row has a zero.
        DELETE FROM public.post_aggregations AS a WHERE a.post_uri = ANY(aggregates)
            AND greatest(a.like_count, a.repost_count, a.reply_count, a.bookmark_count, a.quote_count) <= 0
            -- mutant: empty aggregates stay
            AND NOT EXISTS (SELECT 1 FROM public.posts AS p WHERE p.uri = a.post_uri);
    END IF;
    IF note IS NOT NULL THEN
        DELETE FROM fastworker.notes WHERE id = note;
    ELSIF cardinality(owed_keys) > 0 THEN
        DELETE FROM fastworker.recheck AS r USING unnest(owed_kinds, owed_keys, owed_times) AS u (kind, key, owed_at)
        WHERE r.kind = u.kind AND r.key = u.key AND r.owed_at = u.owed_at
            AND NOT (u.kind IN ('context', 'gate') AND u.key = ANY(busy))
            AND NOT (u.kind IN ('like_count', 'aggregate') AND u.key = ANY(unpaid));
        GET DIAGNOSTICS paid = ROW_COUNT;
    END IF;
    RETURN paid;
END $$;
