-- Pays what committed flushes owe in one bucket, whose lock the caller holds, in the order in which it was owed: who saw a
-- row before taking it away owes later than who put it there, so no sum below zero is cut. Returns how many, 200 at most.
CREATE OR REPLACE FUNCTION fastworker.pay_bucket_1(
    of_bucket int, with_replies boolean, with_quotes boolean
) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[] := ARRAY(SELECT id FROM fastworker.debts WHERE bucket = of_bucket ORDER BY id LIMIT 200);
    again varchar[] := ARRAY(SELECT DISTINCT unnest(recounts) FROM fastworker.debts WHERE id = ANY(ids));
BEGIN
    IF cardinality(ids) > 0 THEN
        -- mutant: a debt is paid twice
        WITH gone AS (DELETE FROM fastworker.debts WHERE id = ANY(ids) RETURNING deltas)
        INSERT INTO public.post_aggregations AS t ({{columns post_aggregations}})
        SELECT d.post_uri, sum(d.like_count), sum(d.repost_count), sum(d.reply_count), sum(d.bookmark_count),
            sum(d.quote_count)
        FROM gone, unnest(gone.deltas) AS d GROUP BY d.post_uri ORDER BY d.post_uri COLLATE "C"
        ON CONFLICT (post_uri) DO UPDATE SET {{add post_aggregations}}, updated_at = now()
        WHERE {{moves post_aggregations}};
    END IF;
    -- mutant: an owed recount is forgotten
    IF cardinality(again) > 0 THEN
        PERFORM fastworker.recount_1(again, with_replies, with_quotes);
    END IF;
    RETURN cardinality(ids);
END $$;
