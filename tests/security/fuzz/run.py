"""Both fuzzers in turn, from seeds made of the shipped sample and settings.ini: `make fuzz`."""
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MEMORY = "/dev/shm"  # a file system in memory, where there is one
sys.path.insert(0, str(ROOT))

from medmcqa_lora.core.files import shipped_file  # noqa: E402
from medmcqa_lora.core.recipe import recipe_types  # noqa: E402
from medmcqa_lora.data.schemas import TEXTS  # noqa: E402

NESTED = (
    b'{"data":{"Question":"q","Options":{"A":"1","B":"2","C":"3","D":"4"},"Correct Option":"B"}}')
OWN_RECIPE = (
    b"[a]\nlora_r = 4\n[b]\nseed = 3\nlora_targets = a, b\nmax_rows = none\0lora_r=8\0model=x\"y")
WORDS = {  # for libFuzzer's dictionary
    "rows": [*TEXTS, "data", "Options", "Question", "Correct Option", "NaN", "Infinity", "1e999"],
    "recipes": [*recipe_types(), "none", "nan", "inf", "DEFAULT"],
}


def row_seeds() -> dict[str, bytes]:
    """The first byte of a row file chooses its format; with 4 added, the rest becomes rows."""
    lines = shipped_file("assets/sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:3]]
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    made = {f"made{i}": bytes([4 + i % 4]) + os.urandom(300) for i in range(8)}
    return made | {
        "jsonl": b"\0" + "\n".join(map(json.dumps, rows)).encode(),
        "json": b"\1" + json.dumps(rows).encode(),
        "csv": b"\2" + table.getvalue().encode(),
        "nested": b"\0" + NESTED,
    }


def seeds() -> dict[str, dict[str, bytes]]:
    """Fuzzer -> file -> content."""
    recipes = {"settings": shipped_file("settings.ini").read_bytes(), "own": OWN_RECIPE}
    return {"rows": row_seeds(), "recipes": recipes}


def fuzz(name: str, files: dict[str, bytes], seconds: int) -> int:
    """Run one fuzzer; returns its exit code."""
    place = ROOT / "_runs/fuzz" / name
    place.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (place / file).write_bytes(content)
    words = place.parent / f"{name}.dict"
    words.write_text("".join(f'"{word}"\n' for word in WORDS[name]))
    print(f"{name}: {seconds} s; cases are kept in {place}", flush=True)
    options = [
        f"-max_total_time={seconds}", f"-dict={words}",
        f"-artifact_prefix={place.parent}/{name}-", "-verbosity=0", "-print_final_stats=1",
    ]
    command = [sys.executable, str(HERE / f"fuzz_{name}.py"), *options, str(place)]
    in_memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=in_memory) as scratch:
        return subprocess.run(command, env=os.environ | {"TMPDIR": scratch}).returncode


def main(seconds: int) -> int:
    """Run both fuzzers; 0 if nothing was found."""
    return int(any([fuzz(name, files, seconds) for name, files in seeds().items()]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 600))
