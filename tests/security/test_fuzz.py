"""In `make test-all`, where atheris is installed: both fuzzers for a minute each. `make fuzz` runs
them longer.
"""
import subprocess
import sys

import pytest
from conftest import ALL, ROOT


@pytest.mark.skipif(not ALL, reason="fuzzing is for make test-all and make fuzz")
def test_fuzzers_find_nothing():
    pytest.importorskip("atheris", reason="atheris is not installed (extra fuzz)")
    command = [sys.executable, ROOT / "tests/security/fuzz/run.py", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
