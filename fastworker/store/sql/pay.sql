-- Pays what is owed for counters, bucket by bucket in transactions of their own, until nothing is owed or others are paying.
-- They wait for no disk: a payment that a crash undoes is owed again. Who pays looks once more afterwards, since what was
-- owed meanwhile was left to him; a few times at most, because under load somebody else is at it, too. `paid`: how many.
CREATE OR REPLACE PROCEDURE fastworker.pay_1(with_replies boolean, with_quotes boolean, INOUT paid int)
LANGUAGE plpgsql AS $$
DECLARE
    of_bucket int;
    before int;
BEGIN
    paid := 0;
    FOR again IN 1..8 LOOP
        before := paid;
        FOREACH of_bucket IN ARRAY ARRAY(SELECT DISTINCT bucket FROM fastworker.debts) LOOP
            IF pg_try_advisory_xact_lock({{counters}}, of_bucket) THEN
                PERFORM set_config('synchronous_commit', 'off', true);
                paid := paid + fastworker.pay_bucket_1(of_bucket, with_replies, with_quotes);
            END IF;
            COMMIT;
        END LOOP;
        EXIT WHEN paid = before;
    END LOOP;
END $$;
