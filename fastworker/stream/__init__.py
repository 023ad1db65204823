"""Redis: the stream as reader, worker and operator see it. The only importer of redis."""
