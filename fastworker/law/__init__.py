"""The state law as a small, slow model, and how tables are compared with it. Never imports `event` or `table`."""
