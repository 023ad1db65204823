"""A Redis that is too old is refused in one sentence. No such server can be had here, so only its answers are made."""

from __future__ import annotations

import os
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INFO = b"# Server\r\nredis_version:5.0.14\r\nredis_mode:standalone\r\nrole:master\r\nloading:0\r\n"


class OldRedis(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while head := self.rfile.readline():
            words = []
            for _ in range(int(head[1:])):
                size = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(size + 2)[:-2])
            name = words[0].upper()
            if name == b"INFO":
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(INFO), INFO))
            elif name == b"PING":
                self.wfile.write(b"+PONG\r\n")
            elif name in {b"AUTH", b"CLIENT", b"SELECT"}:
                self.wfile.write(b"+OK\r\n")
            elif name == b"TIME":
                self.wfile.write(b"*2\r\n$10\r\n1700000000\r\n$1\r\n0\r\n")
            elif name == b"GET":
                self.wfile.write(b"$-1\r\n")
            elif name == b"TYPE":
                self.wfile.write(b"+none\r\n")
            else:
                self.wfile.write(b"-ERR unknown command `%s`\r\n" % words[0])


@pytest.mark.parametrize("command", ["worker", "reader"])
def test_an_old_redis_is_refused_in_one_sentence(command: str, postgres_url: str) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OldRedis) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "REDIS_URL": f"redis://:hunter2@127.0.0.1:{server.server_address[1]}",
            "DATABASE_URL": postgres_url,
            "RELAY_URL": "ws://127.0.0.1:1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "fastworker", command],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        server.shutdown()
    assert done.returncode == 3, done.stderr
    assert "5.0.14" in done.stderr
    assert "6.2" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    sentences = [line for line in done.stderr.splitlines() if not line.startswith("[")]
    assert len(sentences) == 1, "beside how it is set"
