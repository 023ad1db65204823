-- A bulk load of history into an empty or nearly empty database: docs/history.md and store/bulk.py.

-- The one that is going on. staging: repositories are fetched and their rows staged, beside the live stream. loading:
-- nobody else may write. settling: the tables are whole again, what needs a comparison is settled one by one.
CREATE TABLE fastworker.bulk (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    phase text COLLATE "C" NOT NULL,
    folder text NOT NULL,
    derive text[] NOT NULL,
    since_rev text COLLATE "C",
    collections text[],
    began_at timestamptz NOT NULL DEFAULT now()
);

-- Its repositories, as files. `entry_id`: what was on the stream when the host was asked. `later`: why it is settled one
-- by one after the load. waiting, staged, refused (`error`), done.
CREATE TABLE fastworker.bulk_repos (
    did varchar(255) PRIMARY KEY,
    file text NOT NULL,
    rev text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    entry_id text,
    taken_at timestamp NOT NULL,
    bytes bigint NOT NULL,
    state text COLLATE "C" NOT NULL DEFAULT 'waiting',
    records bigint NOT NULL DEFAULT 0,
    later text,
    error text
);
CREATE INDEX bulk_repos_waiting ON fastworker.bulk_repos (did) WHERE state = 'waiting';

-- Steps of the load that are committed.
CREATE TABLE fastworker.bulk_steps (
    name text PRIMARY KEY,
    rows bigint NOT NULL,
    seconds real NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);

-- While a load goes on a trigger on every table it writes calls this: whoever else writes has to wait.
CREATE FUNCTION fastworker.refuse_while_loading() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('fastworker.loading', true) IS DISTINCT FROM 'on' THEN
        RAISE EXCEPTION 'history is being loaded: writers wait until `fastworker backfill --bulk` is done'
            USING ERRCODE = 'object_in_use';
    END IF;
    RETURN NULL;
END $$;

-- What of an account is compared (table/chosen.py, Part): NULL, all of it. Of one that is done: what was.
ALTER TABLE fastworker.repos ADD COLUMN since_rev text COLLATE "C";
ALTER TABLE fastworker.repos ADD COLUMN collections text[];

-- History as a whole: whether it is paused, and what a variable of the environment has asked for, once.
CREATE TABLE fastworker.backfill (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    is_paused boolean NOT NULL DEFAULT false,
    asked text,
    asked_at timestamptz,
    fed_at timestamptz,
    done_at timestamptz
);
INSERT INTO fastworker.backfill DEFAULT VALUES;
