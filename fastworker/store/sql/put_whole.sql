-- A whole flush of new rows of the hot tables, as docs/invariants.md has it: look, main transaction, look back, rows that
-- join two records. If anything else is to be done (a row is not new, one is beaten or among the twins, somebody must
-- not be stored, or is older than a floor), nothing is, with SQLSTATE FW001. `is_late`: it is all written, and something overtook it, or
-- more than `crowd` thread contexts follow: the look back is the caller's.
CREATE OR REPLACE PROCEDURE fastworker.put_whole_6(
    new_users varchar[],
    {{new_rows_arguments}}
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
    lowest_rev text,
    lowest_seq bigint,
    dids varchar[],
    crowd int,
    with_contexts boolean,
    with_gates boolean,
    with_services boolean,
    with_replies boolean,
    with_quotes boolean,
    INOUT is_late boolean
) LANGUAGE plpgsql AS $$
DECLARE
    contexts varchar[];
    gates varchar[];
    services varchar[];
    is_owing boolean;
    paid int;
BEGIN
    IF EXISTS (SELECT FROM fastworker.look_3(uris, repos, lowest_rev, lowest_seq, dids, false)) THEN
        -- mutant: no look before a whole flush
        RAISE EXCEPTION 'not only new rows' USING ERRCODE = 'FW001';
    END IF;
    SELECT p.is_owing INTO is_owing FROM fastworker.put_6(
        new_users => new_users, {{new_rows_passed}}, whole => true,
        no_quotes => NULL, new_quotes => new_quotes, no_feed_items => NULL, new_feed_items => new_feed_items,
        no_notifications => NULL, new_notifications => new_notifications, unseen_posts => NULL, unseen_viewers => NULL,
        unseen_likes => NULL, unseen_reposts => NULL, unseen_bookmarks => NULL, new_viewers => new_viewers,
        deltas => deltas, recounts => NULL, with_replies => with_replies, with_quotes => with_quotes,
        owed_kinds => NULL, owed_keys => NULL, of_stream => of_stream, of_consumer => of_consumer,
        until_seq => until_seq, until_entry => until_entry, floors => NULL, repos => NULL,
        lowest_rev => NULL, lowest_seq => NULL, known_floors => NULL) AS p;
    COMMIT;
    -- mutant: no look back after a whole flush
    SELECT coalesce(bool_or(kind IN ('tombstone', 'account', 'twin')), false)
            OR count(*) FILTER (WHERE kind = 'context') > crowd,
        array_agg(DISTINCT key) FILTER (WHERE kind = 'context'),
        array_agg(DISTINCT key) FILTER (WHERE kind = 'gate'),
        array_agg(DISTINCT key) FILTER (WHERE kind = 'like_count')
    INTO is_late, contexts, gates, services
    FROM fastworker.look_back_2(uris, repos,
        ARRAY(SELECT uri FROM unnest(new_posts)), ARRAY(SELECT post_uri FROM unnest(new_likes)),
        ARRAY(SELECT user_did FROM unnest(new_likes)), crowd, with_contexts, with_gates, with_services);
    -- mutant: joined rows of a whole flush never recomputed
    IF NOT is_late AND coalesce(contexts, gates, services) IS NOT NULL THEN
        PERFORM fastworker.recompute_5(
            contexts => coalesce(contexts, '{}'), gates => coalesce(gates, '{}'), roots => '{}',
            services => coalesce(services, '{}'), aggregates => '{}', owed_kinds => '{}', owed_keys => '{}',
            owed_times => '{}', note => NULL, patient => false, with_replies => with_replies, with_quotes => with_quotes);
    END IF;
    IF is_owing THEN
        CALL fastworker.pay_2(with_replies, with_quotes, paid);
    END IF;
END $$;
