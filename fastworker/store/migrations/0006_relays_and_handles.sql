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
