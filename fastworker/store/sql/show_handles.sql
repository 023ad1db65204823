-- Decides who shows which handle, for these DIDs and everybody who wants one of their handles, old and new. A handle is
-- locked while it is decided, in one order; whoever has changed what a DID wants holds the row of its identity.

-- Only rows whose handle changes are locked: anybody's accounts may claim a handle, as many as they like.
CREATE OR REPLACE FUNCTION fastworker.show_handles_1(dids varchar[], others text[], only_verified boolean)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    contested text[];
    one bigint;
    shown_dids varchar[];
    shown text[];
BEGIN
    contested := ARRAY(
        SELECT h FROM (
            SELECT unnest(others) UNION SELECT handle FROM public.users WHERE did = ANY(dids)
            UNION SELECT unnest(ARRAY[handle, verified_handle]) FROM fastworker.identities WHERE did = ANY(dids)
        ) AS a (h) WHERE h <> 'handle.invalid');
    FOR one IN SELECT DISTINCT hashtextextended(h, 0) FROM unnest(contested) AS a (h) ORDER BY 1 LOOP
        -- mutant: handles are not locked
        PERFORM pg_advisory_xact_lock(one);
    END LOOP;
    -- Who shows one of them without a claim that we know (an older worker or the API wrote it) keeps it until somebody
    -- else's is verified.
    INSERT INTO fastworker.identities AS i (did, handle, event_at, verified_handle, verified_at)
    SELECT u.did, u.handle, '-infinity', u.handle, '-infinity' FROM public.users AS u
    WHERE u.handle = ANY(contested) AND NOT EXISTS (SELECT 1 FROM fastworker.claims AS c WHERE c.did = u.did)
        AND NOT EXISTS (SELECT 1 FROM public.user_settings AS s WHERE s.user_did = u.did AND s.data_collection_forbidden)
    ORDER BY u.did COLLATE "C"
    ON CONFLICT (did) DO UPDATE SET verified_handle = excluded.verified_handle, verified_at = excluded.verified_at
    WHERE i.verified_handle IS NULL;
    -- A verified one before all others, the latest. Else each relay's lowest seq, and of these the earliest moment.
    WITH wanting AS (
        SELECT i.did, w.handle, w.handle IS NOT DISTINCT FROM i.verified_handle AS is_verified, i.verified_at
        FROM fastworker.identities AS i, LATERAL fastworker.wanted_handle(i, only_verified) AS w (handle)
        WHERE (i.handle = ANY(contested) OR i.verified_handle = ANY(contested)) AND w.handle = ANY(contested)
    ), first AS (
        SELECT DISTINCT ON (w.handle, w.is_verified, c.relay)
            w.handle, w.did, w.is_verified, CASE WHEN w.is_verified THEN w.verified_at END AS at, c.first_at, c.relay
        FROM wanting AS w LEFT JOIN fastworker.claims AS c
            ON c.did = w.did AND c.handle = w.handle AND NOT w.is_verified
        ORDER BY w.handle, w.is_verified, c.relay, CASE WHEN w.is_verified THEN w.verified_at END DESC, c.first_seq,
            c.first_at, w.did COLLATE "C"
    ), holders AS (
        SELECT DISTINCT ON (handle) handle, did FROM first
        ORDER BY handle,
            -- mutant: a claim takes a verified handle
            is_verified DESC,
            -- mutant: the last claim shows a handle
            at DESC, first_at, relay, did COLLATE "C"
    )
    SELECT array_agg(a.did ORDER BY a.did COLLATE "C"), array_agg(coalesce(h.handle, 'handle.invalid') ORDER BY a.did COLLATE "C")
    INTO shown_dids, shown
    FROM (SELECT did FROM wanting UNION SELECT unnest(dids)) AS a (did) JOIN public.users AS u ON u.did = a.did
        -- mutant: a handle shown by two
        LEFT JOIN holders AS h ON h.did = a.did
    WHERE u.handle IS DISTINCT FROM coalesce(h.handle, 'handle.invalid');
    PERFORM did FROM public.users WHERE did = ANY(shown_dids) ORDER BY did COLLATE "C" FOR NO KEY UPDATE;
    UPDATE public.users AS t SET handle = u.handle FROM unnest(shown_dids, shown) AS u (did, handle)
    WHERE t.did = u.did AND t.handle IS DISTINCT FROM u.handle;
END $$;
