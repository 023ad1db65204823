-- What is kept of the network (FASTWORKER_COLLECTIONS, FASTWORKER_ACCOUNTS) as it was last seen: what is added to the choice later
-- is fetched. NULL: never seen. collections: NSIDs with *, none for all. is_widening: something added is not fetched yet.
ALTER TABLE fastworker.backfill ADD COLUMN collections text[];
ALTER TABLE fastworker.backfill ADD COLUMN is_everybody boolean;
ALTER TABLE fastworker.backfill ADD COLUMN is_widening boolean NOT NULL DEFAULT false;

-- The accounts of the choice, unless it is everybody.
CREATE TABLE fastworker.kept_accounts (
    did varchar(255) PRIMARY KEY
);
