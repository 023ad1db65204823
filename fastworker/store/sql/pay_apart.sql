-- Writes these deltas, for which nothing is owed any more, and recounts `again`. Where the database refuses some of them, in
-- halves, until it is known which: those are returned, with the reason, and not written. After a timeout all of them: the call
-- has no other, and whoever comes next tries each alone.
CREATE OR REPLACE FUNCTION fastworker.pay_apart_1(
    sums fastworker.post_aggregations_row[], again varchar[], with_replies boolean, with_quotes boolean
) RETURNS TABLE (key varchar, error text) LANGUAGE plpgsql AS $$
DECLARE
    half int := cardinality(sums) / 2;
BEGIN
    INSERT INTO public.post_aggregations AS t ({{columns post_aggregations}})
    SELECT * FROM unnest(sums) ON CONFLICT (post_uri) DO UPDATE SET {{add post_aggregations}}, updated_at = now()
    WHERE {{moves post_aggregations}};
    -- mutant: an owed recount is forgotten
    IF cardinality(again) > 0 THEN
        PERFORM fastworker.recount_1(
            ARRAY(SELECT s.post_uri FROM unnest(sums) AS s WHERE s.post_uri = ANY(again)), with_replies, with_quotes);
    END IF;
-- mutant: a counter that is refused stops the others
EXCEPTION WHEN {{refused}} OR query_canceled THEN
    IF half = 0 OR SQLSTATE = '57014' THEN
        RETURN QUERY SELECT s.post_uri, SQLERRM || ' (SQLSTATE ' || SQLSTATE || ')' FROM unnest(sums) AS s;
    ELSE
        RETURN QUERY SELECT * FROM fastworker.pay_apart_1(sums[:half], again, with_replies, with_quotes);
        RETURN QUERY SELECT * FROM fastworker.pay_apart_1(sums[half + 1:], again, with_replies, with_quotes);
    END IF;
END $$;
