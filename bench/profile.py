"""`./scripts/profile`: where a worker's time goes."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import uvloop

from bench.corpus import entries, prepare
from bench.end_to_end import worker
from bench.report import ROOT
from bench.servers import fill, servers, tree

EVENTS = 200_000
TOP = 25


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def _record(seconds: int, settings: dict[str, str]) -> None:
    spy = Path(sys.executable).with_name("py-spy")
    out = ROOT / "profile"
    out.mkdir(exist_ok=True)
    with servers() as running:
        await fill(running.redis.url, entries(prepare(7, EVENTS), "native", EVENTS))
        async with worker(running, BATCH_SIZE=500, **settings) as process:
            await asyncio.sleep(3)
            names = {pid: _name(pid) for pid in tree(process.pid)}
            jobs = []
            for pid in names:
                for kind, file in (("flamegraph", f"{pid}.svg"), ("raw", f"{pid}.txt")):
                    command = [str(spy), "record", "--pid", str(pid), "--duration", str(seconds), "--format", kind]
                    command += ["--output", str(out / file), "--native", "--nonblocking"]
                    jobs.append(
                        await asyncio.create_subprocess_exec(
                            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
                        )
                    )
            for job in jobs:
                _, words = await job.communicate()
                if job.returncode:
                    sys.exit(
                        f"py-spy: {words.decode().strip()}\nIt needs the right to trace (SYS_PTRACE in a container)."
                    )
    for pid, name in names.items():
        spent: Counter[str] = Counter()
        for line in (out / f"{pid}.txt").read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            spent[stack.rpartition(";")[2]] += int(count)
        total = sum(spent.values()) or 1
        print(f"\n{name} {pid}: {total} samples, profile/{pid}.svg")
        for function, count in spent.most_common(TOP):
            print(f"  {count / total:6.1%} {function}")


def main() -> None:
    arguments = sys.argv[1:]
    seconds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 10
    settings = dict(argument.split("=", 1) for argument in arguments)
    uvloop.run(_record(seconds, settings))


if __name__ == "__main__":
    main()
