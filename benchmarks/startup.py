"""Start-up times: `medmcqa-lora --help` and `import medmcqa_lora` beside an empty Python, in alternation.

    .venv/bin/python benchmarks/startup.py [REPEATS]

Prints a line a command and appends a record to benchmarks/startup.jsonl. Targets: --help below 1 s, import below 0.3 s.
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from medmcqa_lora.training import git_commit, hardware, versions

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import medmcqa_lora": [sys.executable, "-c", "import medmcqa_lora"],
    "medmcqa-lora --help": [str(Path(sys.executable).parent / "medmcqa-lora"), "--help"],
}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for command in COMMANDS.values():
        seconds(command)  # warm the disk's cache
    taken = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    rows = {name: dict(median_s=round(statistics.median(t), 3), min_s=round(min(t), 3), max_s=round(max(t), 3)) for name, t in taken.items()}
    for name, row in rows.items():
        print(f"{name:<22} median {row['median_s']:.3f} s  ({row['min_s']:.3f} to {row['max_s']:.3f}, n = {repeats})")
    record = dict(benchmark="startup", n=repeats, commit=git_commit(), date=time.strftime("%Y-%m-%d"), hardware=hardware(), python=versions()["python"], results=rows)
    with open(Path(__file__).with_suffix(".jsonl"), "a") as f:
        f.write(json.dumps(record) + "\n")
