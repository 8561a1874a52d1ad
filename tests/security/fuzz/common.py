"""What both fuzzers share: a file in memory, and what an answer must be."""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))


def scratch() -> Path:
    """A folder for a file a run; libFuzzer ends without cleaning up, so run.py gives a TMPDIR that it removes."""
    return Path(tempfile.mkdtemp(prefix="medmcqa-fuzz-"))


def check_message(e: ValueError, *names: str):
    """A user's error as it is shown: one line of readable length that names the file or the key, without control characters."""
    from medmcqa_lora.cli import one_line

    text = one_line(e)
    assert any(n in text for n in names) and text.isprintable() and len(text) < 2000, text[:300]
