-- After the commit of a flush: what overtook its records (as in `look`; of twins those that are in the table as well, with
-- another pair, because two writers moved them), and which rows that join two records it may
-- have changed: thread contexts of its `posts`, of replies to them, and of posts that their root's author liked
-- (`like_posts`, `like_users`); gate flags of its posts; like counts of the feed generators and labelers it liked.
-- Of the replies to one post, `crowd` + 1 at most, with the post in `rev`: so many are not recomputed at once.
CREATE OR REPLACE FUNCTION fastworker.look_back_3(
    uris text[],
    repos varchar[],
    posts varchar[],
    like_posts varchar[],
    like_users varchar[],
    crowd int,
    with_contexts boolean,
    with_gates boolean,
    with_services boolean
) RETURNS TABLE (kind text, key text, rev text, seq bigint) LANGUAGE sql STABLE AS $$
    {{beats}}
    UNION ALL
    -- mutant: a record in two places, step by step
    {{in_two_places}}
    UNION ALL
    SELECT 'context', p.uri, NULL, NULL FROM public.posts AS p
    WHERE with_contexts AND p.uri = ANY(posts) AND p.root_uri <> p.uri
    UNION ALL
    SELECT 'context', p.uri, r.uri, NULL FROM unnest(posts) AS r (uri), LATERAL (
        SELECT q.uri FROM public.posts AS q WHERE q.root_uri = r.uri AND q.uri <> r.uri LIMIT crowd + 1) AS p
    WHERE with_contexts
    UNION ALL
    SELECT 'context', p.uri, NULL, NULL FROM unnest(like_posts, like_users) AS l (post, did)
    JOIN public.posts AS p ON p.uri = l.post
    WHERE with_contexts AND starts_with(p.root_uri, 'at://' || l.did || '/')
    UNION ALL
    SELECT 'gate', g.post_uri, NULL, NULL FROM fastworker.gates AS g
    WHERE with_gates AND g.post_uri = ANY(posts)
    UNION ALL
    SELECT 'like_count', l.post, NULL, NULL FROM unnest(like_posts) AS l (post)
    WHERE with_services
        AND (strpos(l.post, '/app.bsky.feed.generator/') > 0 OR strpos(l.post, '/app.bsky.labeler.service/') > 0)
$$;
