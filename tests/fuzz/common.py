"""What both fuzzers share: a file in memory, and what an answer must be."""
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
MEMORY = Path("/dev/shm")  # a file system in memory, where there is one: a file a run


def scratch() -> Path:
    place = Path(tempfile.mkdtemp(prefix="medmcqa-fuzz-", dir=MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def check_message(e: ValueError, *names: str):
    """A user's error as it is shown: one line of readable length that names the file or the key, without control characters."""
    from medmcqa_lora.cli import one_line

    text = one_line(e)
    assert any(n in text for n in names) and text.isprintable() and len(text) < 2000, text[:300]
