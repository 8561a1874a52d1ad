"""Shared fixtures. Tests skip, and say so, where real rows or the small model are not there."""
import os
import random
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may ask a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `make test` runs two files at a time; the processes they start inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import pytest  # noqa: E402

ALL = bool(os.environ.get("MEDMCQA_TEST_ALL"))  # make test-all: every repetition

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_FLAGS = (
    "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync",
)


def sampled(cases, n, seed=0):
    """All cases in `make test-all`, n of them, always the same, in `make test`."""
    cases = list(cases)
    return cases if ALL else random.Random(seed).sample(cases, min(n, len(cases)))


def real_rows(name: str) -> Path:
    """A file of real MedMCQA rows; skips the test where it is not there."""
    if not (REAL / name).exists():
        pytest.skip("real MedMCQA rows are not here (../shared/data)")
    return REAL / name


@pytest.fixture(scope="session")
def validation() -> Path:
    return real_rows("medmcqa_validation.jsonl")


@pytest.fixture(scope="session")
def train_rows() -> Path:
    return real_rows("medmcqa_train_partial.jsonl")


@pytest.fixture(scope="session")
def smollm2() -> str:
    from medmcqa_lora.model.resolve import resolve_model

    try:
        return resolve_model("smollm2-135m-instruct")
    except ValueError as e:
        pytest.skip(f"SmolLM2-135M can't be had here: {e}")


@pytest.fixture
def one_thread():
    """Dividing small matrices among threads slows them down, on a busy machine many times over."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, the installed one: playwright's own is not downloaded."""
    missing = "playwright is not installed (extra dev)"
    playwright = pytest.importorskip("playwright.sync_api", reason=missing)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip("no Chromium here: apt-get install chromium")
    flags = [f"--{flag}" for flag in BROWSER_FLAGS]
    with playwright.sync_playwright() as p:
        # with a fresh profile
        started = p.chromium.launch(executable_path=path, headless=True, args=flags)
        yield started
        started.close()


@pytest.fixture
def cli(capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""
    from medmcqa_lora.cli import main

    def run(*words):
        capsys.readouterr()
        try:
            main([str(w) for w in words])
            code = 0
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def processes_with(mark: str) -> list[str]:
    """Command lines of live processes whose environment or command line holds `mark`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) == os.getpid() or is_zombie(process):
                continue
            command = (process / "cmdline").read_bytes()
            environment = (process / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        if mark.encode() in environment + command:
            found.append(f"{process.name}: {command.decode(errors='replace')}")
    return found


def is_zombie(process: Path) -> bool:
    """Whether a process in /proc has ended and only waits for its parent."""
    after_name = (process / "stat").read_text().rpartition(")")[2]
    return "Z" in after_name.split()[0]
