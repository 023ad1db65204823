"""Ops to rows to batches (floor 1, pure). No clock, no environment, no logging, no await."""
