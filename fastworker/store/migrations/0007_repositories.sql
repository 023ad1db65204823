-- Accounts that are made equal to their repositories, beside the stream: docs/repair.md and docs/history.md.

-- One row for each account that is to be fetched, or was. waiting: from next_at on. fetching: by the process that holds
-- the advisory lock `owner`, until claimed_until at most. done; gone (its host or its document says so); refused.
CREATE TABLE fastworker.repos (
    did varchar(255) PRIMARY KEY,
    host text COLLATE "C" NOT NULL DEFAULT '',
    state text COLLATE "C" NOT NULL DEFAULT 'waiting',
    reason text COLLATE "C" NOT NULL,
    priority smallint NOT NULL,
    sweep bigint,
    want_rev text COLLATE "C",
    rev text COLLATE "C",
    seq bigint,
    attempts integer NOT NULL DEFAULT 0,
    next_at timestamptz NOT NULL DEFAULT '-infinity',
    owner integer,
    claimed_until timestamptz,
    error text,
    records bigint,
    bytes bigint,
    differences bigint,
    queued_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz
);
CREATE INDEX repos_waiting ON fastworker.repos (host, priority, next_at) WHERE state = 'waiting';
CREATE INDEX repos_fetching ON fastworker.repos (host) WHERE state = 'fetching';
CREATE INDEX repos_open ON fastworker.repos (sweep) WHERE state IN ('waiting', 'fetching', 'refused');
CREATE INDEX repos_ended ON fastworker.repos (ended_at);

-- When a host may be asked next, by whomever: so that it sees no more than its rate from any number of processes.
CREATE TABLE fastworker.hosts (
    host text COLLATE "C" PRIMARY KEY,
    next_at timestamptz NOT NULL
);

-- Lists of accounts that are read page by page: a page and its cursor are one transaction.
CREATE TABLE fastworker.sweeps (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source text COLLATE "C" NOT NULL,
    collection text COLLATE "C" NOT NULL DEFAULT '',
    host text COLLATE "C" NOT NULL DEFAULT '',
    reason text COLLATE "C" NOT NULL,
    priority smallint NOT NULL,
    since_rev text COLLATE "C" NOT NULL DEFAULT '',
    cursor text,
    listed bigint NOT NULL DEFAULT 0,
    queued bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT now(),
    done_at timestamptz
);
CREATE UNIQUE INDEX sweeps_open ON fastworker.sweeps (source, collection, reason) WHERE done_at IS NULL;

-- A gap is closed when a sweep that began after it is done, and every repair that it queued.
ALTER TABLE fastworker.gaps ADD COLUMN reason text;
ALTER TABLE fastworker.gaps ADD COLUMN sweep bigint;
ALTER TABLE fastworker.gaps ADD COLUMN closed_at timestamptz;
