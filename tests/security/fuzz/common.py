"""What both fuzzers share: a folder for their files, and what a message must be."""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))


def scratch() -> Path:
    """A folder for a run's file; libFuzzer deletes nothing, so run.py gives a TMPDIR and does."""
    return Path(tempfile.mkdtemp(prefix="medmcqa-fuzz-"))


def check_message(e: ValueError, *names: str):
    """A user's error is one printable line of readable length that names the file or a key."""
    from medmcqa_lora.cli import error_line

    text = error_line(e)
    assert any(name in text for name in names), text[:300]
    assert text.isprintable() and len(text) < 2000, text[:300]
