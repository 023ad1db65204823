"""Sockets, one driver per file (floor 2)."""
