-- A whole small flush, as docs/invariants.md has it: look, the main transaction, look back, rows that join two records. If
-- something beats a record, or it must not be stored, or is older than a floor, nothing is written, with
-- SQLSTATE FW003; if the rows are not as the caller takes them to be (new, or as `first` read them), with FW001 or 23505.
-- `new_uris`: those of the uris that were not read. `is_late`: it is all written, and something overtook it, or more than `crowd` thread contexts follow: the look back is the
-- caller's; so, too, if a joined row was refused. `note`: what was owed with it is the caller's, because of that, or because
-- one of the roots has more replies than `crowd`.
CREATE OR REPLACE PROCEDURE fastworker.put_whole_8(
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
    with_services boolean,
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
    paid int;
BEGIN
    SELECT bool_or(kind <> 'twin'), bool_or(kind = 'twin' AND key = ANY(new_uris)) INTO is_beaten, is_waiting
    FROM fastworker.look_3(uris, repos, lowest_rev, lowest_seq, dids, false);
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
    SELECT p.is_owing, p.note INTO is_owing, note FROM fastworker.put_7(
        new_users => NULL, {{new_rows_passed}}, whole => true, fresh => fresh,
        no_quotes => no_quotes, new_quotes => new_quotes, no_feed_items => no_feed_items, new_feed_items => new_feed_items,
        no_notifications => no_notifications, new_notifications => new_notifications, unseen_posts => unseen_posts,
        unseen_viewers => unseen_viewers, unseen_likes => unseen_likes, unseen_reposts => unseen_reposts,
        unseen_bookmarks => unseen_bookmarks, new_viewers => new_viewers, deltas => deltas, recounts => recounts,
        with_replies => with_replies, with_quotes => with_quotes, owed_kinds => owed_kinds, owed_keys => owed_keys,
        of_stream => of_stream, of_consumer => of_consumer, until_seq => until_seq, until_entry => until_entry,
        floors => NULL, repos => NULL, lowest_rev => NULL, lowest_seq => NULL, known_floors => NULL) AS p;
    COMMIT;
    -- mutant: no look back after a whole flush
    SELECT coalesce(bool_or(kind IN ('tombstone', 'account', 'twin')), false)
            OR count(*) FILTER (WHERE kind = 'context') > crowd,
        array_agg(DISTINCT key) FILTER (WHERE kind = 'context'),
        array_agg(DISTINCT key) FILTER (WHERE kind = 'gate'),
        array_agg(DISTINCT key) FILTER (WHERE kind = 'like_count')
    INTO is_late, contexts, gates, services
    FROM fastworker.look_back_3(uris, repos, posts, like_posts, like_users, crowd, with_contexts, with_gates, with_services);
    IF is_late THEN
        contexts := NULL;
        gates := NULL;
        services := NULL;
    ELSE
        gates := gates || gates_of;
        services := services || services_of;
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
    IF coalesce(contexts, gates, services, roots, aggregates) IS NOT NULL THEN
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
