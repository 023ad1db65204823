-- Takes what #identity events claim: one element of each array for each event.
CREATE OR REPLACE FUNCTION fastworker.claim_handles_1(
    dids varchar[], handles text[], relays text[], seqs bigint[], moments timestamptz[], only_verified boolean
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    before text[];
BEGIN
    -- Their rows' locks order the writers of one identity. What is shown without a claim that we know counts as verified.
    INSERT INTO fastworker.identities AS i (did, event_at, verified_handle, verified_at)
    SELECT DISTINCT ON (d.did COLLATE "C") d.did, '-infinity'::timestamptz, u.handle, '-infinity'::timestamptz
    FROM unnest(dids) AS d (did) LEFT JOIN public.users AS u ON u.did = d.did AND u.handle <> 'handle.invalid'
        AND NOT EXISTS (SELECT 1 FROM fastworker.claims AS c WHERE c.did = u.did)
    ORDER BY d.did COLLATE "C"
    ON CONFLICT (did) DO UPDATE SET verified_handle = coalesce(i.verified_handle, excluded.verified_handle),
        verified_at = coalesce(i.verified_at, excluded.verified_at);
    before := ARRAY(SELECT unnest(ARRAY[handle, verified_handle]) FROM fastworker.identities WHERE did = ANY(dids));
    -- What is in identities too: the release before this one knows no other place.
    INSERT INTO fastworker.claims AS c (did, relay, handle, first_seq, first_at, last_seq, last_at)
    SELECT e.did, e.relay, e.handle,
        (array_agg(e.seq ORDER BY e.seq, e.at))[1], (array_agg(e.at ORDER BY e.seq, e.at))[1],
        (array_agg(e.seq ORDER BY e.seq DESC NULLS LAST, CASE WHEN e.seq IS NULL THEN e.at END DESC, e.at))[1],
        (array_agg(e.at ORDER BY e.seq DESC NULLS LAST, CASE WHEN e.seq IS NULL THEN e.at END DESC, e.at))[1]
    FROM (
        SELECT * FROM unnest(dids, handles, relays, seqs, moments) AS u (did, handle, relay, seq, at)
        UNION ALL SELECT did, handle, coalesce(relay, ''), seq, event_at FROM fastworker.identities
        WHERE did = ANY(dids) AND handle IS NOT NULL
    ) AS e
    GROUP BY e.did, e.relay, e.handle ORDER BY e.did COLLATE "C", e.relay COLLATE "C", e.handle COLLATE "C"
    ON CONFLICT (did, relay, handle) DO UPDATE SET
        (first_seq, first_at) = (SELECT f.seq, f.at FROM (
            VALUES (c.first_seq, c.first_at), (excluded.first_seq, excluded.first_at)) AS f (seq, at)
            ORDER BY f.seq, f.at LIMIT 1),
        (last_seq, last_at) = (SELECT l.seq, l.at FROM (
            VALUES (c.last_seq, c.last_at), (excluded.last_seq, excluded.last_at)) AS l (seq, at)
            ORDER BY l.seq DESC NULLS LAST, CASE WHEN l.seq IS NULL THEN l.at END DESC, l.at LIMIT 1);
    UPDATE fastworker.identities AS i SET handle = n.handle, relay = nullif(n.relay, ''), seq = n.last_seq,
        event_at = n.last_at, resolve_pending = only_verified, resolve_after = '-infinity', attempts = 0,
        marked_at = greatest(i.marked_at + interval '1 microsecond', n.last_at)
    FROM (
        SELECT DISTINCT ON (r.did) r.* FROM (
            SELECT DISTINCT ON (did, relay) * FROM fastworker.claims WHERE did = ANY(dids)
            ORDER BY did, relay, last_seq DESC NULLS LAST, CASE WHEN last_seq IS NULL THEN last_at END DESC, last_at, handle
        -- mutant: older identity wins
        ) AS r ORDER BY r.did, r.last_at DESC, r.relay DESC
    ) AS n
    WHERE i.did = n.did AND (i.handle, coalesce(i.relay, ''), i.seq, i.event_at)
        IS DISTINCT FROM (n.handle, n.relay, n.last_seq, n.last_at);
    PERFORM fastworker.show_handles_1(dids, before, only_verified);
END $$;
