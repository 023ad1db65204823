-- A debt that cannot be paid is put back with its reason, one row for each counter, and tried again ever more rarely.
ALTER TABLE fastworker.debts ADD COLUMN attempts integer NOT NULL DEFAULT 0;
ALTER TABLE fastworker.debts ADD COLUMN not_before timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE fastworker.debts ADD COLUMN error text;

-- Since when a key is owed: owed_at moves whenever it is owed again.
ALTER TABLE fastworker.recheck ADD COLUMN owed_since timestamptz NOT NULL DEFAULT clock_timestamp();
ALTER TABLE fastworker.notes ALTER COLUMN owed_at SET DEFAULT clock_timestamp();
