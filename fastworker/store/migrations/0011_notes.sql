-- Joined rows that the removals of one flush owe: one row for each flush, deleted when they are recomputed after its commit. No
-- unique key that another flush could wait for; what is left goes to fastworker.recheck.
CREATE TABLE fastworker.notes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    owed_at timestamptz NOT NULL DEFAULT now(),
    kinds text[] NOT NULL,
    keys text[] NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
