-- What is kept beside the dead letters, and maintenance whose pieces fail one by one.

-- Records whose entry is in no dead letter: their account has as many as it may have, or the letter had to make room. A
-- repair of the account brings them back.
CREATE TABLE fastworker.refused (
    uri text COLLATE "C" PRIMARY KEY,
    did text NOT NULL,
    cid text,
    rev text,
    seq bigint,
    reason text NOT NULL,
    detail text,
    refused_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX refused_did ON fastworker.refused (did);

-- An owed key, a deleted account or a tombstone whose turn failed is put back: not before then, and why.
ALTER TABLE fastworker.recheck ADD COLUMN attempts integer NOT NULL DEFAULT 0;
ALTER TABLE fastworker.recheck ADD COLUMN not_before timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE fastworker.recheck ADD COLUMN error text;
ALTER TABLE fastworker.accounts ADD COLUMN purge_after timestamptz NOT NULL DEFAULT '-infinity';
ALTER TABLE fastworker.accounts ADD COLUMN purge_error text;
