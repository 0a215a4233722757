"""numba's cache when several processes fill it at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

# each process compiles and saves its own signature of one function; then reads those of all
SCRIPT = """
import sys, time
import numpy as np
from numba.core.caching import IndexDataCacheFile
from deltamerge.engine.fused.loops import subtract
load = IndexDataCacheFile._load_index
def slowly(self):  # long enough for another process to choose the same file name
    found = load(self)
    time.sleep(0.3)
    return found
IndexDataCacheFile._load_index = slowly
for code in sys.argv[1:]:
    tune, base = ({"F": np.ones(8, np.float32), "B": np.full(8, 0x3F80, np.uint16)}[c] for c in code)
    out = np.empty(8, np.float32)
    subtract(tune, base, out)
    assert (out == 0).all(), (code, out)
"""


@pytest.mark.slow
def test_processes_that_compile_other_signatures_do_not_read_each_others_code(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    codes = ["FF", "FB", "BF", "BB"]
    running = [subprocess.Popen([sys.executable, "-c", SCRIPT, code], env=env) for code in codes]
    assert [process.wait() for process in running] == [0] * len(codes)
    files = [path.name for path in tmp_path.rglob("loops.subtract*.nbc")]
    assert len(files) == len(codes), files
    subprocess.run([sys.executable, "-c", SCRIPT, *codes], env=env, check=True)


DAMAGED = """
import sys
import numpy as np
from deltamerge.io.jit import compiled
from deltamerge.engine.fused import loops
one = np.ones(8, np.float32)
out = np.empty(8, np.float32)
loops.subtract(one, one, out)
assert (out == 0).all()
print(sum(loops.subtract.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    def hits() -> str:
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", DAMAGED], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert (hits(), hits()) == ("0", "1")
    for pattern in ("loops.subtract*.nbc", "loops.subtract*.nbi"):
        for content in (b"", b"\x80\x04", b"garbage"):
            for path in tmp_path.rglob(pattern):
                path.write_bytes(content)
            assert (hits(), hits()) == ("0", "1")
    folder = next(tmp_path.rglob("*.nbi")).parent
    folder.chmod(0o777)
    assert hits() == "0"
    folder.chmod(0o755)
    assert hits() == "1"
