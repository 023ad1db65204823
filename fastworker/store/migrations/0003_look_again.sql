-- What a process left behind whose last commit arrived after it was dead: docs/invariants.md, "A commit without its look".

-- Tombstones written until `looked_until` were looked at once more, long after they were written.
ALTER TABLE fastworker.horizon ADD COLUMN looked_until timestamptz NOT NULL DEFAULT now();

-- When a purge first found nothing; it is done once more before `purge_pending` is cleared.
ALTER TABLE fastworker.accounts ADD COLUMN purged_at timestamptz;
