"""Instructions of each micro-benchmark, counted by valgrind: the same on a busy machine as on a quiet one.

`./scripts/bench --instructions [--save] [WORD]`. One Python runs all of them under callgrind, which writes what it has
counted at every call of getppid(2), one before and one after each body. An empty body's count is subtracted.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.micro import COUNT, ROUNDS
from bench.report import PACKAGES, ROOT, versions

KEPT = ROOT / "bench" / "instructions.json"
THRESHOLD = 0.05


def measure(folder: Path, word: str) -> dict[str, int]:
    """Instructions per event of each body whose name has the word."""
    ran = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--dump-before=getppid",
            f"--callgrind-out-file={folder}/out",
            sys.executable,
            "-c",
            "import sys; from bench.micro import run_between_marks; run_between_marks(sys.argv[1])",
            word,
        ],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise SystemExit(f"valgrind ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    names = ran.stdout.splitlines()
    if names == [""]:
        raise SystemExit(f"no micro-benchmark's name has {word!r} in it")
    sums = [_sum(folder / f"out.{n}") for n in range(1, 2 * len(names) + 1)]
    counts = sums[1::2]  # the first one of each pair is what came before its body
    return {
        name: round((found - counts[0]) / ROUNDS / COUNT) for name, found in zip(names, counts, strict=True) if name
    }


def _sum(path: Path) -> int:
    found = re.search(r"^(?:summary|totals): (\d+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"{path} has no sum")
    return int(found[1])


def setting() -> dict[str, str]:
    """What the counts depend on beside our code: other versions cannot be compared."""
    found = versions()
    return {name: found[name] for name in ("python", *PACKAGES)} | {"machine": platform.machine()}


def compare(now: dict[str, int], kept: dict[str, int], threshold: float = THRESHOLD) -> tuple[str, bool]:
    """A line for each body, and whether none has become more expensive by more than the threshold."""
    lines, well = [], True
    for name, found in now.items():
        before = kept.get(name)
        if before is None:
            lines.append(f"  {name:<40} {found:>10,}  new: --save keeps it")
            well = False
            continue
        is_more = found > before * (1 + threshold)
        well = well and not is_more
        verdict = "  MORE than the threshold" if is_more else ""
        lines.append(f"  {name:<40} {found:>10,}  {before:>10,}  {found / before - 1:+7.1%}{verdict}")
    for name in kept.keys() - now.keys():
        lines.append(f"  {name:<40} is gone: --save forgets it")
        well = False
    return "\n".join(lines), well


def main(arguments: list[str]) -> int:
    if shutil.which("valgrind") is None:
        print("Instruction counts need valgrind: apt-get install valgrind", file=sys.stderr)
        return 3
    save = "--save" in arguments
    words = [argument for argument in arguments if argument != "--save"]
    if len(words) > 1 or any(word.startswith("-") for word in words):
        print("usage: bench --instructions [--save] [WORD]", file=sys.stderr)
        return 2
    word = words[0] if words else ""
    print("counting; this takes a minute or two", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="fw-callgrind-") as folder:
        now = measure(Path(folder), word)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"setting": None, "instructions per event": {}}
    comparable = kept["setting"] == setting()
    counts = {name: found for name, found in kept["instructions per event"].items() if word in name}
    text, well = compare(now, counts)
    print(f"  {'instructions per event':<40} {'now':>10}  {'kept':>10}\n{text}")
    if save:
        others = {name: found for name, found in kept["instructions per event"].items() if word not in name}
        both = now if not comparable else {**others, **now}
        KEPT.write_text(json.dumps({"setting": setting(), "instructions per event": both}, indent=2) + "\n")
        print(f"kept in {KEPT.relative_to(ROOT)}")
        return 0
    if not comparable:
        print(f"They were kept with {kept['setting']}\nthis is {setting()}\nnot comparable: --save keeps them anew")
        return 1
    print("within" if well else "NOT within", f"{THRESHOLD:.0%} of what was kept")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
