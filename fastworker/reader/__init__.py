"""Relay to Redis: the firehose's frames, in order, onto the stream."""
