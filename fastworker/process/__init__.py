"""Processes: the supervisor, its children, the shared memory in which they report, waiting and signals."""
