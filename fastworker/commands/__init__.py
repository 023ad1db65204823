"""One module for each command an operator runs."""
