"""Time, tasks and processes (floor 3)."""
