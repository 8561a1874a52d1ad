"""Start-up seconds: `medmcqa-lora --help` and `import medmcqa_lora` beside an empty Python.

    python benchmarks/speed/startup.py [REPEATS]

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


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    quietly = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    runs = {name: partial(timed, partial(quietly, words)) for name, words in COMMANDS.items()}
    taken = alternate(runs, repeats)
    record("startup", {}, {name: median_and_range(t) for name, t in taken.items()})


if __name__ == "__main__":
    main()
