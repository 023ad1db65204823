"""Redis to PostgreSQL: entries become batches, batches are written, then acknowledged."""
