"""Servers of the versions under test: the wheels', or what the environment names (scripts/test-matrix sets it).

TEST_POSTGRES_BIN is a `bin` directory with `initdb` and `postgres`, TEST_REDIS_BIN a server's executable.
"""

from __future__ import annotations

import os
from functools import partial

from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis

POSTGRES_BIN = os.environ.get("TEST_POSTGRES_BIN") or None
REDIS_BIN = os.environ.get("TEST_REDIS_BIN") or None

PostgresUnderTest = partial(EmbeddedPostgres, binary=POSTGRES_BIN)
RedisUnderTest = partial(EmbeddedRedis, binary=REDIS_BIN)
