"""Start-up seconds: `medmcqa-lora --help` and `import medmcqa_lora` beside an empty Python.

    .venv/bin/python benchmarks/speed/startup.py [REPEATS]

Targets: --help below 1 s, import below 0.3 s.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.common import alternate, record, timed
from medmcqa_lora.bench.profile import median_and_range

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import medmcqa_lora": [sys.executable, "-c", "import medmcqa_lora"],
    "medmcqa-lora --help": [str(Path(sys.executable).parent / "medmcqa-lora"), "--help"],
}

if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    taken = alternate(
        {name: partial(timed, partial(run, command)) for name, command in COMMANDS.items()}, repeats
    )
    record("startup", {}, {name: median_and_range(t) for name, t in taken.items()})
