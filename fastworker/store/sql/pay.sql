-- Pays what committed flushes left owed, until nothing is owed or others are paying: counters by bucket, then joined rows by the
-- same hash of their keys, each bucket in a transaction of its own that waits for nothing and for no disk: a payment that a
-- crash undoes is owed again. A bucket that another one is at is left to him, a post that is locked stays owed, and so does
-- what reads counters that are being paid. Who pays looks once more afterwards, since what was owed meanwhile was left to
-- him; a few times at most, because under load somebody else is at it, too. Of joined rows 200 of a bucket at most, the
-- longest owed first; roots are the caller's, whose replies may be many. Where one of them is refused or not ready
-- in time, its bucket stays owed, and who pays without a flush finds out which one it is. After 10 s the rest is left to
-- the next: after a timeout the same call has none. `paid`: how many; NULL: joined rows were refused.
CREATE OR REPLACE PROCEDURE fastworker.pay_2(with_replies boolean, with_quotes boolean, INOUT paid int)
LANGUAGE plpgsql AS $$
DECLARE
    of_bucket int;
    before int;
    kinds text[];
    keys text[];
    times timestamptz[];
    is_refused boolean := false;
    until timestamptz := statement_timestamp() + interval '10 seconds';
BEGIN
    paid := 0;
    FOR again IN 1..8 LOOP
        before := paid;
        FOREACH of_bucket IN ARRAY ARRAY(SELECT DISTINCT bucket FROM fastworker.debts WHERE not_before <= now()) LOOP
            EXIT WHEN clock_timestamp() > until;
            IF pg_try_advisory_xact_lock({{counters}}, of_bucket) THEN
                PERFORM set_config('synchronous_commit', 'off', true);
                paid := paid + fastworker.pay_bucket_2(of_bucket, with_replies, with_quotes);
            END IF;
            COMMIT;
        END LOOP;
        EXIT WHEN paid = before;
    END LOOP;
    FOREACH of_bucket IN ARRAY ARRAY(
        SELECT DISTINCT fastworker.bucket(key) FROM fastworker.recheck WHERE not_before <= now() AND kind <> 'root'
    ) LOOP
        EXIT WHEN clock_timestamp() > until;
        IF pg_try_advisory_xact_lock({{joined}}, of_bucket) THEN
            PERFORM set_config('synchronous_commit', 'off', true);
            SELECT array_agg(r.kind), array_agg(r.key), array_agg(r.owed_at) INTO kinds, keys, times FROM (
                SELECT kind, key, owed_at FROM fastworker.recheck
                WHERE not_before <= now() AND kind <> 'root' AND fastworker.bucket(key) = of_bucket
                ORDER BY owed_since LIMIT 200) AS r;
            -- mutant: joined rows that are owed wait for maintenance
            IF keys IS NOT NULL THEN
                BEGIN
                    paid := paid + fastworker.recompute_5(
                        contexts => ARRAY(SELECT o.key FROM unnest(kinds, keys) AS o (kind, key) WHERE o.kind = 'context'),
                        gates => ARRAY(SELECT o.key FROM unnest(kinds, keys) AS o (kind, key) WHERE o.kind = 'gate'),
                        roots => '{}',
                        services => ARRAY(SELECT o.key FROM unnest(kinds, keys) AS o (kind, key) WHERE o.kind = 'like_count'),
                        aggregates => ARRAY(SELECT o.key FROM unnest(kinds, keys) AS o (kind, key) WHERE o.kind = 'aggregate'),
                        owed_kinds => kinds, owed_keys => keys, owed_times => times, note => NULL, patient => false,
                        with_replies => with_replies, with_quotes => with_quotes);
                -- mutant: a joined row that is refused stops who pays
                EXCEPTION WHEN {{refused}} OR query_canceled THEN
                    is_refused := true;
                END;
            END IF;
        END IF;
        COMMIT;
    END LOOP;
    IF is_refused THEN
        paid := NULL;
    END IF;
END $$;
