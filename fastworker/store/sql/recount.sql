-- Counts these posts anew, less what is owed for them in the same snapshot: the payment adds it. The caller has locked their
-- aggregates in an earlier statement, so that a delta of a transaction that is not committed yet lands on top.
CREATE OR REPLACE FUNCTION fastworker.recount_1(keys varchar[], with_replies boolean, with_quotes boolean)
RETURNS void LANGUAGE sql AS $$
    UPDATE public.post_aggregations AS a SET
        like_count = (SELECT count(*) FROM public.likes AS r WHERE r.post_uri = a.post_uri) - coalesce(o.likes, 0),
        repost_count = (SELECT count(*) FROM public.reposts AS r WHERE r.post_uri = a.post_uri) - coalesce(o.reposts, 0),
        bookmark_count = (SELECT count(*) FROM public.bookmarks AS r WHERE r.post_uri = a.post_uri) - coalesce(o.bookmarks, 0),
        reply_count = CASE WHEN with_replies
            THEN (SELECT count(*) FROM public.posts AS r WHERE r.parent_uri = a.post_uri) - coalesce(o.replies, 0)
            ELSE a.reply_count END,
        quote_count = CASE WHEN with_quotes
            THEN (SELECT count(*) FROM public.quotes AS r WHERE r.quoted_uri = a.post_uri) - coalesce(o.quotes, 0)
            ELSE a.quote_count END,
        updated_at = now()
    FROM unnest(keys) AS k (uri) LEFT JOIN (
        SELECT d.post_uri, sum(d.like_count)::int, sum(d.repost_count)::int, sum(d.bookmark_count)::int,
            sum(d.reply_count)::int, sum(d.quote_count)::int
        -- mutant: a recount counts what is owed
        FROM fastworker.debts, unnest(deltas) AS d WHERE d.post_uri = ANY(keys) GROUP BY d.post_uri
    ) AS o (uri, likes, reposts, bookmarks, replies, quotes) ON o.uri = k.uri
    WHERE a.post_uri = k.uri
$$;
