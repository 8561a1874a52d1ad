"""Both fuzzers, one after the other, from seeds made of the shipped sample and settings.ini: `make fuzz`."""
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MEMORY = "/dev/shm"  # a file system in memory, where there is one
sys.path.insert(0, str(ROOT))

from medmcqa_lora.data.schemas import TEXTS  # noqa: E402
from medmcqa_lora.core.files import shipped
from medmcqa_lora.core.recipe import recipe_types  # noqa: E402


def seeds() -> dict[str, dict[str, bytes]]:
    """Fuzzer -> file -> content; the first byte of a row file chooses its format, and with 4 added the rest becomes rows."""
    rows = [json.loads(line) for line in shipped("assets/sample.jsonl").read_text(encoding="utf-8").splitlines()[:3]]
    writer = csv.DictWriter(table := io.StringIO(), rows[0])
    writer.writeheader()
    writer.writerows(rows)
    made = {"jsonl": b"\0" + "\n".join(map(json.dumps, rows)).encode(), "json": b"\1" + json.dumps(rows).encode(), "csv": b"\2" + table.getvalue().encode(),
            "nested": b'\0{"data":{"Question":"q","Options":{"A":"1","B":"2","C":"3","D":"4"},"Correct Option":"B"}}'}
    made |= {f"made{i}": bytes([4 + i % 4]) + os.urandom(300) for i in range(8)}
    own = b"[a]\nlora_r = 4\n[b]\nseed = 3\nlora_targets = a, b\nmax_rows = none\0lora_r=8\0model=x\"y"
    return {"rows": made, "recipes": {"settings": shipped("settings.ini").read_bytes(), "own": own}}


def main(seconds: int) -> int:
    """Fuzz; 0 if nothing was found."""
    words = {"rows": [*TEXTS, "data", "Options", "Question", "Correct Option", "NaN", "Infinity", "1e999"], "recipes": [*recipe_types(), "none", "nan", "inf", "DEFAULT"]}
    codes = []
    for name, files in seeds().items():
        place = ROOT / "_runs/fuzz" / name
        place.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (place / file).write_bytes(content)
        (place.parent / f"{name}.dict").write_text("".join(f'"{w}"\n' for w in words[name]))
        print(f"{name}: {seconds} s; cases are kept in {place}", flush=True)
        with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as scratch:
            codes.append(subprocess.run([sys.executable, str(HERE / f"fuzz_{name}.py"), f"-max_total_time={seconds}", f"-dict={place.parent}/{name}.dict", f"-artifact_prefix={place.parent}/{name}-",
                                         "-verbosity=0", "-print_final_stats=1", str(place)], env=os.environ | {"TMPDIR": scratch}).returncode)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 600))
