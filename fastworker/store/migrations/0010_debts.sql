-- Counters that a committed flush owes, because another flush was paying at that moment: a row for each flush and bucket,
-- written with the rows that are counted, deleted with its payment. No unique key that a writer could wait for.
-- Its dead rows are read again each time until vacuum comes.
CREATE TABLE fastworker.debts (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- paid in this order
    bucket smallint NOT NULL, -- of the keys (fastworker.bucket)
    owed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    deltas fastworker.post_aggregations_row[] NOT NULL, -- a row without any is made where there is none
    recounts varchar[] -- of these keys: counted anew when they are paid
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Where the counters of a post are paid: one payer at a time in each of eight.
CREATE FUNCTION fastworker.bucket(post_uri varchar) RETURNS int LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT hashtext(post_uri) & 7
$$;
