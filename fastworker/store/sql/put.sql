-- New rows of the hot tables and what follows from them; NULL where there is nothing. `placed`: the uris of the new rows
-- that were inserted, NULL if all of them were. `fresh`: what follows from new rows is new as well, else SQLSTATE 23505.
-- `note`: of the keys that are owed. Counters whose bucket nobody else is paying are written, else they
-- are owed (fastworker.debts); `is_owing`: something is owed, by us or by others, that `pay` pays. `floors`: whether the look found
-- any floor; NULL where it does not matter. If so: `repos` of all changes, the lowest rev and, of what has none, the
-- lowest seq of them, and the floors above those that are known.
CREATE OR REPLACE FUNCTION fastworker.put_8(
    new_users varchar[],
    {{new_rows_arguments}}
    fresh boolean,
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
    with_replies boolean,
    with_quotes boolean,
    owed_kinds text[],
    owed_keys text[],
    of_stream text,
    of_consumer text,
    until_seq bigint,
    until_entry text,
    floors boolean,
    repos varchar[],
    lowest_rev text,
    lowest_seq bigint,
    known_floors text[],
    OUT placed varchar[],
    OUT note bigint,
    OUT is_owing boolean
) LANGUAGE plpgsql AS $$
DECLARE
    got varchar[];
    missing int := 0;
    {{written_variables}}
BEGIN
    IF new_users IS NOT NULL THEN
        INSERT INTO public.users (did, handle) SELECT did, 'handle.invalid' FROM unnest(new_users) AS u (did)
        ON CONFLICT (did) DO NOTHING;
    END IF;
{{insert_new_rows}}
    IF missing = 0 THEN
        placed := NULL;
    ELSIF placed IS NULL THEN
        placed := '{}';
    END IF;

{{written}}
    -- A floor that came since the look: nothing is written. One that comes later waits for this transaction.
    IF floors THEN
        -- mutant: a floor that came since the look
        IF EXISTS (SELECT FROM fastworker.floors AS f WHERE f.did = ANY(repos)
                AND (f.rev > lowest_rev COLLATE "C" OR f.seq >= lowest_seq)
                AND f.did || ' ' || f.rev || ' ' || f.seq <> ALL(known_floors)) THEN
            RAISE EXCEPTION 'a floor came' USING ERRCODE = 'FW002';
        END IF;
    ELSIF NOT floors THEN
        -- mutant: the first floor that came since the look
        IF EXISTS (SELECT FROM fastworker.floors) THEN
            RAISE EXCEPTION 'a floor came' USING ERRCODE = 'FW002';
        END IF;
    END IF;
END $$;
