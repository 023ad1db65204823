-- What a flush commits before its rows, because others must see it then: users (where identities need them), tombstones,
-- accounts, identities, repairs; NULL where there is nothing. If one of `dids` must not be stored, nothing is, with
-- SQLSTATE FW003. Then, without locks, what is stored of `read_uris` and of the `read_pairs`: rows, twins, and CIDs of rows
-- that do not carry their own and may become twins (uri and cid). `fresh_uris` are taken to be new: those of a table are read
-- only if one of its pairs is taken, and then the table is in `taken`. `read_uris_ends` and the like: where each table's
-- begin and end. `seen` says of each row and twin which version of it this is (uri and xmin). A twin that is in the table as
-- well: SQLSTATE FW003.
CREATE OR REPLACE FUNCTION fastworker.first_2(
    {{first_arguments}}
    dids varchar[],
    {{read_arguments}}
    {{old_rows}}
    OUT taken text[],
    OUT old_twins fastworker.twins[],
    OUT cids text[],
    OUT seen text[]
) LANGUAGE plpgsql AS $$
DECLARE
    mine varchar[];
    places text[];
    winners varchar[];
    strays varchar[];
    got text[];
    more fastworker.twins[];
BEGIN
    -- mutant: identities of who must not be stored
    IF EXISTS (SELECT FROM public.user_settings AS s WHERE s.data_collection_forbidden AND s.user_did = ANY(dids)) THEN
        RAISE EXCEPTION 'somebody must not be stored' USING ERRCODE = 'FW003';
    END IF;
{{first_statements}}
{{read_stored}}
END $$;
