"""`python -m bench.stream_memory`: bytes of Redis memory per stream entry, by form, in a server of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from redis import Redis

from fastworker.edge.embedded import EmbeddedRedis
from fastworker.event import Event
from fastworker.event.entry import Fields, encode_frame_entry, encode_json, encode_native
from fastworker.event.frame import decode_frame
from fastworker.simulator.network import Network

HOST = "relay.example"


def entry(form: str, data: bytes) -> Fields | None:
    event = decode_frame(data, HOST)
    assert isinstance(event, Event)
    if form == "frame":
        return encode_frame_entry(data, HOST)
    return encode_json(event) if form == "json" else encode_native(event)


@click.command()
@click.option("--entries", default=20_000, show_default=True)
@click.option("--history", default=14_000, show_default=True, help="Records per repository; decides the frames' size.")
def main(entries: int, history: int) -> None:
    frames = [frame.data for frame in Network(1, history=history).frames(entries)]
    print(f"{entries:,} frames of {sum(map(len, frames)) / entries:,.0f} bytes")
    for form in ("json", "native", "frame"):
        with (
            tempfile.TemporaryDirectory() as folder,
            EmbeddedRedis(Path(folder) / "redis", aof=False) as server,
            Redis.from_url(server.url) as client,
        ):
            version = client.info("server")["valkey_version"]
            before = int(client.info("memory")["used_memory"])
            pipe = client.pipeline(transaction=False)
            for data in frames:
                if fields := entry(form, data):
                    pipe.xadd("firehose:events", dict(fields))
            pipe.execute()
            count = client.xlen("firehose:events")
            used = int(client.info("memory")["used_memory"]) - before
        print(f"{form}: {used / count:,.0f} bytes per entry (Valkey {version})")


if __name__ == "__main__":
    main()
