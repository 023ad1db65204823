-- Accounts that several relays tell of: docs/invariants.md, "Two relays".

-- The first TID of a moment: a record whose rev is lower was written before it.
CREATE FUNCTION fastworker.tid(at timestamptz) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT string_agg(substr('234567abcdefghijklmnopqrstuvwxyz', (n.value >> s & 31)::int + 1, 1), '' ORDER BY s DESC)
    FROM (SELECT (extract(epoch FROM least(greatest(at, '1970-01-01Z'), '2200-01-01Z')) * 1000000)::bigint << 10) AS n (value),
        generate_series(0, 60, 5) AS s
$$;

-- Of each relay the newest #account event of each DID; the newest of these is in fastworker.accounts. '' where the
-- entry names no relay.
CREATE TABLE fastworker.account_events (
    did varchar(255) NOT NULL,
    relay text COLLATE "C" NOT NULL,
    seq bigint,
    event_at timestamptz NOT NULL,
    active boolean NOT NULL,
    status text COLLATE "C",
    PRIMARY KEY (did, relay)
);

-- The moment of the newest deletion: a record of another relay is older if its rev is lower.
ALTER TABLE fastworker.accounts ADD COLUMN deleted_at timestamptz;
UPDATE fastworker.accounts SET deleted_at = event_at WHERE deleted_seq IS NOT NULL;

-- What hosts say: each handle that an #identity event named, with the first and the newest event of that relay.
CREATE TABLE fastworker.claims (
    did varchar(255) NOT NULL,
    relay text COLLATE "C" NOT NULL,
    handle text COLLATE "C" NOT NULL,
    first_seq bigint,
    first_at timestamptz NOT NULL,
    last_seq bigint,
    last_at timestamptz NOT NULL,
    PRIMARY KEY (did, relay, handle)
);
CREATE INDEX claims_handle ON fastworker.claims (handle);

-- The newest claim is in `handle`. The handle that last named the DID and was named by it, and when that was found out.
ALTER TABLE fastworker.identities ADD COLUMN verified_handle text;
ALTER TABLE fastworker.identities ADD COLUMN verified_at timestamptz;
CREATE INDEX identities_handle ON fastworker.identities (handle);
CREATE INDEX identities_verified ON fastworker.identities (verified_handle) WHERE verified_handle IS NOT NULL;

-- The handle that a DID would show if nobody else did. The newer of claim and verification, or verified ones only.
CREATE FUNCTION fastworker.wanted_handle(i fastworker.identities, only_verified boolean)
RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN only_verified OR i.handle IS NULL OR i.verified_at >= i.event_at THEN i.verified_handle ELSE i.handle END
$$;

-- Decides who shows which handle, for these DIDs and everybody who wants one of their handles, old and new. A handle is
-- locked while it is decided, in one order; whoever has changed what a DID wants holds the row of its identity.
CREATE FUNCTION fastworker.show_handles(dids varchar[], others text[], only_verified boolean)
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
        ORDER BY handle, is_verified DESC, at DESC, first_at, relay, did COLLATE "C"
    )
    SELECT array_agg(a.did ORDER BY a.did COLLATE "C"), array_agg(coalesce(h.handle, 'handle.invalid') ORDER BY a.did COLLATE "C")
    INTO shown_dids, shown
    FROM (SELECT did FROM wanting UNION SELECT unnest(dids)) AS a (did) LEFT JOIN holders AS h ON h.did = a.did;
    PERFORM did FROM public.users WHERE did = ANY(shown_dids) ORDER BY did COLLATE "C" FOR NO KEY UPDATE;
    UPDATE public.users AS t SET handle = u.handle FROM unnest(shown_dids, shown) AS u (did, handle)
    WHERE t.did = u.did AND t.handle IS DISTINCT FROM u.handle;
END $$;

-- Takes what #identity events claim: one element of each array for each event.
CREATE FUNCTION fastworker.claim_handles(
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
        ) AS r ORDER BY r.did, r.last_at DESC, r.relay DESC
    ) AS n
    WHERE i.did = n.did AND (i.handle, coalesce(i.relay, ''), i.seq, i.event_at)
        IS DISTINCT FROM (n.handle, n.relay, n.last_seq, n.last_at);
    PERFORM fastworker.show_handles(dids, before, only_verified);
END $$;
