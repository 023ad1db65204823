-- What beats records of the hot tables (`uris`) and of the accounts `repos`: tombstones, deletions of accounts; which of
-- the uris are among the twins; and which of `dids` may not be stored. Reads only, in one snapshot.
CREATE OR REPLACE FUNCTION fastworker.look_2(uris text[], repos varchar[], dids varchar[])
RETURNS TABLE (kind text, key text, rev text, seq bigint) LANGUAGE sql STABLE AS $$
    {{beats}}
    UNION ALL
    SELECT 'forbidden', s.user_did, NULL, NULL FROM public.user_settings AS s
    WHERE s.data_collection_forbidden AND s.user_did = ANY(dids)
$$;
