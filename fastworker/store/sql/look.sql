-- What beats records of the hot tables (`uris`) and of the accounts `repos`: tombstones, deletions of accounts; which of
-- the uris are among the twins; which of `dids` may not be stored; and which of the repos have a floor above the lowest
-- revision, or, of what has none, the lowest seq of what is to be written; `tell`: whether there is any floor at all.
-- Reads only, in one snapshot.
CREATE OR REPLACE FUNCTION fastworker.look_3(
    uris text[],
    repos varchar[],
    lowest_rev text,
    lowest_seq bigint,
    dids varchar[],
    tell boolean
) RETURNS TABLE (kind text, key text, rev text, seq bigint) LANGUAGE sql STABLE AS $$
    {{beats}}
    UNION ALL
    {{waiting}}
    UNION ALL
    SELECT 'forbidden', s.user_did, NULL, NULL FROM public.user_settings AS s
    WHERE s.data_collection_forbidden AND s.user_did = ANY(dids)
    UNION ALL
    SELECT 'floor', f.did, f.rev, f.seq FROM fastworker.floors AS f WHERE (SELECT true FROM fastworker.floors LIMIT 1)
        AND f.did = ANY(repos) AND (f.rev > lowest_rev COLLATE "C" OR f.seq >= lowest_seq)
    UNION ALL
    SELECT 'floors', NULL, NULL, NULL WHERE tell AND EXISTS (SELECT FROM fastworker.floors)
$$;
