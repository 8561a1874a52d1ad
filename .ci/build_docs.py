"""The site in _docs/: by Quarto through nbdev-docs where it is installed, else a preview by smalldocs."""
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

if shutil.which("quarto"):
    sys.exit(subprocess.run([BIN / "nbdev-docs"], cwd=ROOT).returncode)
print("Quarto is not installed: building a preview with smalldocs")
subprocess.run([BIN / "nbdev-proc-nbs"], cwd=ROOT, check=True)
sys.exit(subprocess.run([BIN / "smalldocs", "render", "_proc"], cwd=ROOT).returncode)
