-- What a flush commits before its rows, because others must see it then: users (where identities need them), tombstones,
-- accounts, identities, repairs; NULL where there is nothing. If one of `dids` must not be stored, nothing is, with
-- SQLSTATE FW003. Then the rows that are stored under the uris, each with its table beside it, without locks: `seen` says
-- of each which version of the row it is (uri and xmin).
CREATE OR REPLACE FUNCTION fastworker.first_1(
    {{first_arguments}}
    dids varchar[],
    tables text[],
    uris varchar[],
    {{old_rows}}
    OUT seen text[]
) LANGUAGE plpgsql AS $$
DECLARE
    got text[];
BEGIN
    -- mutant: identities of who must not be stored
    IF EXISTS (SELECT FROM public.user_settings AS s WHERE s.data_collection_forbidden AND s.user_did = ANY(dids)) THEN
        RAISE EXCEPTION 'somebody must not be stored' USING ERRCODE = 'FW003';
    END IF;
{{first_statements}}
{{read_stored}}
END $$;
