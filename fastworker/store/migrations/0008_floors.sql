-- Floors: "whatever of this account is older than this revision is superseded by a snapshot of its repository"
-- (docs/invariants.md, Snapshots). `seq`: of what has no revision, everything up to it is older.
CREATE TABLE fastworker.floors (
    did varchar(255) PRIMARY KEY,
    rev text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    written_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX floors_written_at ON fastworker.floors (written_at);

-- What a comparison of one account with its repository found: the truth ratio is made of these. Kept for 90 days.
CREATE TABLE fastworker.samples (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    did varchar(255) NOT NULL,
    host text COLLATE "C" NOT NULL,
    records bigint NOT NULL,
    tables jsonb NOT NULL,
    examples jsonb NOT NULL,
    is_repaired boolean NOT NULL
);
CREATE INDEX samples_at ON fastworker.samples (at);
