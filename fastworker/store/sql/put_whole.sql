-- A whole small flush, as docs/invariants.md has it: look, the main transaction, look back, rows that join two records. If
-- something beats a record, or it must not be stored, or is older than a floor, nothing is written, with
-- SQLSTATE FW003; if the rows are not as the caller takes them to be (new, or as `first` read them), with FW001 or 23505.
-- `new_uris`: those of the uris that were not read. `is_late`: it is all written, and something overtook it, or more than `crowd` thread contexts follow: the look back is the
-- caller's; so, too, if a joined row was refused. `note`: what was owed with it is the caller's, because of that, or because
-- one of the roots has more replies than `crowd`.
CREATE OR REPLACE PROCEDURE fastworker.put_whole_9(
    new_users varchar[],
    {{new_rows_arguments}}
    fresh boolean,
    {{change_arguments}}
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
    recounts varchar[],
    owed_kinds text[],
    owed_keys text[],
    of_stream text,
    of_consumer text,
    until_seq bigint,
    until_entry text,
    uris text[],
    new_uris text[],
    repos varchar[],
    lowest_rev text,
    lowest_seq bigint,
    dids varchar[],
    crowd int,
    posts varchar[],
    like_posts varchar[],
    like_users varchar[],
    gates_of varchar[],
    services_of varchar[],
    with_contexts boolean,
    with_gates boolean,
    with_replies boolean,
    with_quotes boolean,
    INOUT is_late boolean,
    INOUT note bigint
) LANGUAGE plpgsql AS $$
DECLARE
    contexts varchar[];
    gates varchar[];
    services varchar[];
    roots varchar[];
    aggregates varchar[];
    is_beaten boolean;
    is_waiting boolean;
    is_owing boolean;
    missing int := 0;
    made int;
    paid int;
    {{written_variables}}
BEGIN
    -- What `look` finds, told by yes or no. Floors are read in this transaction: who sets one waits for it.
    SELECT {{is_beaten}} OR EXISTS (
            SELECT FROM public.user_settings AS s WHERE s.data_collection_forbidden AND s.user_did = ANY(dids))
        OR EXISTS (
            SELECT FROM fastworker.floors AS f WHERE f.did = ANY(repos)
                AND (f.rev > lowest_rev COLLATE "C" OR f.seq >= lowest_seq)),
        EXISTS (SELECT FROM fastworker.twins AS w WHERE w.uri = ANY(new_uris))
    INTO is_beaten, is_waiting;
    IF is_beaten THEN
        -- mutant: no look before a whole flush
        RAISE EXCEPTION 'something beats a record' USING ERRCODE = 'FW003';
    ELSIF is_waiting THEN
        RAISE EXCEPTION 'not only new rows' USING ERRCODE = 'FW001';
    END IF;
    IF new_users IS NOT NULL THEN
        {{users}};
    END IF;
    IF seen IS NOT NULL OR gated_uris IS NOT NULL THEN
        PERFORM fastworker.change_2({{change_passed}});
    END IF;
{{insert_whole_rows}}
    -- mutant: a whole flush that is not whole
    IF missing > 0 THEN
        RAISE EXCEPTION 'not every row is new' USING ERRCODE = 'FW001';
    END IF;

{{written}}
    COMMIT;
    -- What `look_back` finds; each question only where it may have an answer.
    -- mutant: no look back after a whole flush
    SELECT {{is_beaten}}, EXISTS (SELECT FROM fastworker.twins AS w WHERE w.uri = ANY(uris)) INTO is_late, is_waiting;
    IF is_waiting AND NOT is_late THEN
        -- mutant: a record in two places
        is_late := EXISTS ({{uris_in_two_places}});
    END IF;
    IF posts IS NOT NULL AND with_contexts THEN
        contexts := ARRAY(
            SELECT p.uri FROM public.posts AS p WHERE p.uri = ANY(posts) AND p.root_uri <> p.uri UNION ALL
            SELECT p.uri FROM unnest(posts) AS r (uri), LATERAL (
                SELECT q.uri FROM public.posts AS q WHERE q.root_uri = r.uri AND q.uri <> r.uri LIMIT crowd + 1) AS p);
    END IF;
    IF posts IS NOT NULL AND with_gates THEN
        gates := ARRAY(SELECT DISTINCT g.post_uri FROM fastworker.gates AS g WHERE g.post_uri = ANY(posts));
    END IF;
    IF like_posts IS NOT NULL AND with_contexts THEN
        contexts := contexts || ARRAY(
            SELECT p.uri FROM unnest(like_posts, like_users) AS l (post, did) JOIN public.posts AS p ON p.uri = l.post
            WHERE starts_with(p.root_uri, 'at://' || l.did || '/'));
    END IF;
    is_late := is_late OR coalesce(cardinality(contexts) > crowd, false);
    IF is_late THEN
        contexts := NULL;
        gates := NULL;
        services := NULL;
    ELSE
        gates := gates || gates_of;
        services := services_of;
    END IF;
    IF note IS NOT NULL THEN
        IF 'root' = ANY(owed_kinds) THEN
            roots := ARRAY(SELECT o.k FROM unnest(owed_kinds, owed_keys) AS o (kind, k) WHERE o.kind = 'root');
        END IF;
        IF roots IS NOT NULL AND EXISTS ({{crowded}}) THEN
            owed_kinds := NULL;
            owed_keys := NULL;
            roots := NULL;
        ELSE
            SELECT contexts || array_agg(o.k) FILTER (WHERE o.kind = 'context'),
                gates || array_agg(o.k) FILTER (WHERE o.kind = 'gate'),
                services || array_agg(o.k) FILTER (WHERE o.kind = 'like_count'),
                array_agg(o.k) FILTER (WHERE o.kind = 'aggregate')
            INTO contexts, gates, services, aggregates FROM unnest(owed_kinds, owed_keys) AS o (kind, k);
        END IF;
    END IF;
    -- mutant: joined rows of a whole flush never recomputed
    IF cardinality(contexts || gates || services || roots || aggregates) > 0 THEN
        BEGIN
            PERFORM fastworker.recompute_5(
                contexts => coalesce(contexts, '{}'), gates => coalesce(gates, '{}'), roots => coalesce(roots, '{}'),
                services => coalesce(services, '{}'), aggregates => coalesce(aggregates, '{}'),
                owed_kinds => coalesce(owed_kinds, '{}'), owed_keys => coalesce(owed_keys, '{}'), owed_times => '{}',
                note => CASE WHEN owed_keys IS NOT NULL THEN note END, patient => false,
                with_replies => with_replies, with_quotes => with_quotes);
        -- mutant: a joined row that is refused stops a small flush
        EXCEPTION WHEN {{refused}} OR query_canceled THEN
            is_late := true;
            owed_keys := NULL;
        END;
    END IF;
    IF owed_keys IS NOT NULL THEN
        note := NULL;
    END IF;
    IF is_owing THEN
        COMMIT;
        CALL fastworker.pay_2(with_replies, with_quotes, paid);
    END IF;
END $$;
