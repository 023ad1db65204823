-- What a small flush changes beside new rows of the hot tables: existing rows, and the cold tables behind their gate. The
-- caller has decided it by what `first` read. Here that is read once more under the locks, of which none is waited for: if
-- a row or a twin is not as it was read (`seen`), is locked, or is there although it was not, nothing is written, with
-- SQLSTATE FW001; so, too, if an operation is not the newest of its cold record. `read_uris`: each row that was
-- read, and each record that was not there and must not be; `gone_uris`: those of them that are deleted; `read_pairs`:
-- those that change. `read_uris_ends` and the like: where each table's begin and end.
CREATE OR REPLACE FUNCTION fastworker.change_2(
    {{change_arguments}}
    OUT held int
) LANGUAGE plpgsql AS $$
DECLARE
    mine varchar[];
    places text[];
    dead varchar[];
    got int;
    there int;
    waiting int;
    as_seen int;
    changed int;
BEGIN
    held := 0;
{{change_hot}}
    IF gated_uris IS NOT NULL THEN
        WITH newest AS ({{gate}}) SELECT count(*) INTO got FROM newest;
        -- mutant: the gate of a small flush open
        IF got <> cardinality(gated_uris) THEN
            RAISE EXCEPTION 'not the newest' USING ERRCODE = 'FW001';
        END IF;
    END IF;
{{change_cold}}
    -- mutant: a row that is gone since it was read
    IF held <> cardinality(seen) THEN
        RAISE EXCEPTION 'not as it was read' USING ERRCODE = 'FW001';
    END IF;
    IF no_twins IS NOT NULL THEN
        {{twins_delete}};
    END IF;
    IF new_twins IS NOT NULL THEN
        {{twins_put}};
    END IF;
    IF gated_uris IS NULL THEN
        RETURN;
    END IF;
    IF user_profiles IS NOT NULL THEN
        {{profiles}};
    END IF;
{{of_gates}}
    IF label_events IS NOT NULL THEN
        {{label_events}};
    END IF;
END $$;
