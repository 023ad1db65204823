"""fastworker: the AT Protocol firehose, through a Redis stream, into PostgreSQL."""

__version__ = "0.2.0"
