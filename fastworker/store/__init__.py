"""PostgreSQL: how batches become rows, and what looks after the schema. The only importer of asyncpg."""
