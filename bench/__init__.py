"""Benchmarks on servers of their own: `./scripts/bench`."""
