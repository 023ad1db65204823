-- Pays what committed flushes owe in one bucket, whose lock the caller holds, in the order in which it was owed: who saw a
-- row before taking it away owes later than who put it there, so no sum below zero is cut. What is owed for a row that a
-- stranger has locked stays owed: nobody waits for it. What the database refuses is put back, a debt for each counter, with
-- its reason, and what is owed for that counter meanwhile is added to it; tried again later, from half a minute to a day;
-- alone, if it was not ready in time.
-- Returns how many debts are gone; it looks at 200 at most.
CREATE OR REPLACE FUNCTION fastworker.pay_bucket_2(
    of_bucket int, with_replies boolean, with_quotes boolean
) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    alone bigint := (
        SELECT id FROM fastworker.debts
        WHERE bucket = of_bucket AND error LIKE '%57014%' AND not_before <= now() ORDER BY id LIMIT 1);
    ids bigint[] := CASE WHEN alone IS NOT NULL THEN ARRAY[alone] ELSE ARRAY(
        SELECT id FROM fastworker.debts WHERE bucket = of_bucket AND not_before <= now() ORDER BY id LIMIT 200) END;
    sums fastworker.post_aggregations_row[] := ARRAY(
        SELECT (d.post_uri, sum(d.like_count), sum(d.repost_count), sum(d.reply_count), sum(d.bookmark_count),
            sum(d.quote_count))::fastworker.post_aggregations_row
        FROM fastworker.debts, unnest(deltas) AS d WHERE id = ANY(ids) GROUP BY d.post_uri ORDER BY d.post_uri COLLATE "C");
    keys varchar[] := ARRAY(SELECT s.post_uri FROM unnest(sums) AS s);
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
    tried varchar[];
    attempted int[];
    since timestamptz;
    bad varchar[];
    why text[];
BEGIN
    IF cardinality(ids) = 0 THEN
        RETURN 0;
    END IF;
    SELECT min(owed_at), array_agg((deltas[1]).post_uri) FILTER (WHERE attempts > 0), array_agg(attempts) FILTER (WHERE attempts > 0)
    INTO since, tried, attempted FROM fastworker.debts WHERE id = ANY(ids);
    IF cardinality(stays) > 0 THEN
        UPDATE fastworker.debts AS o SET
            deltas = ARRAY(SELECT d FROM unnest(o.deltas) AS d WHERE d.post_uri = ANY(busy)),
            recounts = ARRAY(SELECT r FROM unnest(o.recounts) AS r WHERE r = ANY(busy))
        WHERE id = ANY(stays);
        sums := ARRAY(SELECT s FROM unnest(sums) AS s WHERE s.post_uri <> ALL(busy));
    END IF;
    -- mutant: a debt is paid twice
    DELETE FROM fastworker.debts WHERE id = ANY(ids) AND id <> ALL(stays);
    IF EXISTS (SELECT FROM fastworker.debts WHERE bucket = of_bucket AND attempts > 0) THEN
        WITH added AS (
            UPDATE fastworker.debts AS o SET
                recounts = CASE WHEN s.post_uri = ANY(again) THEN ARRAY[s.post_uri] ELSE o.recounts END,
                deltas = ARRAY[(s.post_uri, s.like_count + (o.deltas[1]).like_count,
                    s.repost_count + (o.deltas[1]).repost_count, s.reply_count + (o.deltas[1]).reply_count,
                    s.bookmark_count + (o.deltas[1]).bookmark_count, s.quote_count + (o.deltas[1]).quote_count
                    )::fastworker.post_aggregations_row]
            FROM unnest(sums) AS s
            -- mutant: a debt overtakes one that is put back
            WHERE o.bucket = of_bucket AND o.attempts > 0 AND (o.deltas[1]).post_uri = s.post_uri RETURNING s.post_uri
        ) SELECT array_agg(post_uri) INTO bad FROM added;
        sums := ARRAY(SELECT s FROM unnest(sums) AS s WHERE s.post_uri <> ALL(coalesce(bad, '{}')));
        again := ARRAY(SELECT r FROM unnest(again) AS r WHERE r <> ALL(coalesce(bad, '{}')));
    END IF;
    SELECT array_agg(p.key), array_agg(p.error) INTO bad, why
    FROM fastworker.pay_apart_1(sums, again, with_replies, with_quotes) AS p;
    IF bad IS NOT NULL THEN
        INSERT INTO fastworker.debts (bucket, owed_at, deltas, recounts, attempts, not_before, error)
        SELECT of_bucket, since, ARRAY[s], CASE WHEN s.post_uri = ANY(again) THEN ARRAY[s.post_uri] END,
            coalesce(t.attempts, 0) + 1,
            now() + least(interval '1 day', interval '30 seconds' * 2.0 ^ least(coalesce(t.attempts, 0), 12)), b.error
        FROM unnest(sums) AS s JOIN unnest(bad, why) AS b (key, error) ON b.key = s.post_uri
        LEFT JOIN unnest(tried, attempted) AS t (key, attempts) ON t.key = s.post_uri;
    END IF;
    RETURN cardinality(ids) - cardinality(stays);
END $$;
