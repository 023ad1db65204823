-- How long after one repair of an account the next one waits that an event asks for: doubled each time, a day at most.
ALTER TABLE fastworker.repos ADD COLUMN apart_s integer NOT NULL DEFAULT 720;
