-- Pays what committed flushes owe in one bucket, whose lock the caller holds, in the order in which it was owed: who saw a
-- row before taking it away owes later than who put it there, so no sum below zero is cut. What is owed for a row that a
-- stranger has locked stays owed: nobody waits for it. Returns how many debts are gone; it looks at 200 at most.
CREATE OR REPLACE FUNCTION fastworker.pay_bucket_1(
    of_bucket int, with_replies boolean, with_quotes boolean
) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    ids bigint[] := ARRAY(SELECT id FROM fastworker.debts WHERE bucket = of_bucket ORDER BY id LIMIT 200);
    keys varchar[] := ARRAY(
        SELECT DISTINCT d.post_uri FROM fastworker.debts, unnest(deltas) AS d WHERE id = ANY(ids));
    free varchar[] := ARRAY(
        SELECT f.post_uri FROM (
            SELECT post_uri FROM public.post_aggregations WHERE post_uri = ANY(keys) ORDER BY post_uri COLLATE "C"
            -- mutant: a payment waits for a stranger
            FOR NO KEY UPDATE SKIP LOCKED) AS f);
    busy varchar[] := ARRAY(
        SELECT post_uri FROM public.post_aggregations WHERE post_uri = ANY(keys) AND post_uri <> ALL(free));
    again varchar[] := ARRAY(
        SELECT DISTINCT r FROM fastworker.debts, unnest(recounts) AS r WHERE id = ANY(ids) AND r <> ALL(busy));
    stays bigint[] := ARRAY(
        SELECT id FROM fastworker.debts AS o
        WHERE id = ANY(ids) AND EXISTS (SELECT FROM unnest(o.deltas) AS d WHERE d.post_uri = ANY(busy)));
BEGIN
    IF cardinality(ids) > 0 THEN
        WITH owed AS (SELECT id, deltas FROM fastworker.debts WHERE id = ANY(ids)),
        -- mutant: a debt is paid twice
        gone AS (DELETE FROM fastworker.debts WHERE id = ANY(ids) AND id <> ALL(stays)),
        rest AS (
            UPDATE fastworker.debts AS o SET
                deltas = ARRAY(SELECT d FROM unnest(o.deltas) AS d WHERE d.post_uri = ANY(busy)),
                recounts = ARRAY(SELECT r FROM unnest(o.recounts) AS r WHERE r = ANY(busy))
            WHERE id = ANY(stays))
        INSERT INTO public.post_aggregations AS t ({{columns post_aggregations}})
        SELECT d.post_uri, sum(d.like_count), sum(d.repost_count), sum(d.reply_count), sum(d.bookmark_count),
            sum(d.quote_count)
        FROM owed, unnest(owed.deltas) AS d WHERE d.post_uri <> ALL(busy) GROUP BY d.post_uri ORDER BY d.post_uri COLLATE "C"
        ON CONFLICT (post_uri) DO UPDATE SET {{add post_aggregations}}, updated_at = now()
        WHERE {{moves post_aggregations}};
    END IF;
    -- mutant: an owed recount is forgotten
    IF cardinality(again) > 0 THEN
        PERFORM fastworker.recount_1(again, with_replies, with_quotes);
    END IF;
    RETURN cardinality(ids) - cardinality(stays);
END $$;
