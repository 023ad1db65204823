"""What a release writes, kept for those that follow: `python tests/releases/make.py` writes <version>.json.zst.

Run it when a release is made, and as long as it is not published; never again after that. A file holds the migrations
with their checksums, and events of the simulated network, chosen for variety: each as the neutral event, which is the
truth, and as this release's stream entries in every form.
"""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import zstandard

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parent.parent)]

import fastworker  # noqa: E402
from fastworker.event.entry import encode_frame_entry, encode_json, encode_native  # noqa: E402
from fastworker.event.frame import decode_frame  # noqa: E402
from fastworker.simulator.network import Network  # noqa: E402
from fastworker.store.migrate import packaged  # noqa: E402

RELAY = "relay.test"
OF_A_SORT = 2  # events of each collection and action
OF_A_SORT_AS_FRAMES = 1  # they are large


def text_of(fields: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): base64.b85encode(value).decode() for name, value in fields}


def kept(seen: Counter[Any], event: dict[str, Any], at_most: int) -> bool:
    sorts: set[tuple[Any, ...]] = {(op["action"], op["path"].split("/")[0]) for op in event.get("ops", ())} or {
        (event["kind"], event.get("status"), event.get("handle") is None)
    }
    wanted = any(seen[sort] < at_most for sort in sorts)
    if wanted:
        seen.update(sorts)
    return wanted


def document() -> dict[str, Any]:
    seen: Counter[Any] = Counter()
    seen_frames: Counter[Any] = Counter()
    events = []
    frames = [*Network(1, accounts=40).frames(1_500), *Network(2, mix="adversarial", start_seq=2_000_000).frames(600)]
    for frame in frames:
        if frame.event is None or not kept(seen, frame.event, OF_A_SORT):
            continue
        decoded: Any = decode_frame(frame.data, RELAY)
        forms = {"native": text_of(encode_native(decoded))}
        if (as_json := encode_json(decoded)) is not None:
            forms["json"] = text_of(as_json)
        if kept(seen_frames, frame.event, OF_A_SORT_AS_FRAMES):
            forms["frame"] = text_of(encode_frame_entry(frame.data, RELAY))
        events.append({"event": frame.event, "entries": forms})
    migrations = [[one.number, one.name, one.checksum] for one in packaged()]
    return {"version": fastworker.__version__, "migrations": migrations, "events": events}


def main() -> None:
    found = document()
    path = FOLDER / f"{found['version']}.json.zst"
    path.write_bytes(zstandard.compress(json.dumps(found, separators=(",", ":")).encode(), 19))
    sys.stdout.write(f"{path.name}: {len(found['events'])} events, {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
