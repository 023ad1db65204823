"""Settings that operators bring along must run well, too: those of the guide, and an old environment file."""

from __future__ import annotations

PRESETS: dict[str, dict[str, int]] = {
    "default": {},
    "high throughput": {"DB_POOL_SIZE": 50, "BATCH_SIZE": 20, "PARALLEL_CONSUMERS": 10},
    "low memory": {"DB_POOL_SIZE": 10, "BATCH_SIZE": 5, "PARALLEL_CONSUMERS": 3},
    "old environment file": {"BATCH_SIZE": 10, "PARALLEL_CONSUMERS": 5, "DB_POOL_SIZE": 20},
}
