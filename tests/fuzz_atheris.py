"""Coverage-guided fuzzing of one reader with atheris (pip install atheris), for as long as libFuzzer is told to.

    python tests/fuzz_atheris.py recipe -max_total_time=300       every other argument is libFuzzer's

Targets: those of fuzz_targets.py. The corpus is kept in .fuzz/NAME; a finding is left as .fuzz/crash-… and is run again
by `python tests/fuzz_atheris.py NAME .fuzz/crash-…`. `make atheris` runs every target for an hour.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["deltamerge", "yaml"]):
    from fuzz_targets import NAMES, Targets, make_valid_files


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python tests/fuzz_atheris.py {'|'.join(NAMES)} [libFuzzer arguments]")
    name, arguments = sys.argv[1], sys.argv[2:]
    scratch = Path(tempfile.mkdtemp(prefix="deltamerge-fuzz-"))
    make_valid_files(scratch / "valid")
    (scratch / "work").mkdir()
    targets = Targets(scratch / "valid", scratch / "work")
    corpus = ROOT / ".fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(targets.seeds(name)):
        (corpus / f"seed-{i}").write_bytes(data)
    files = [a for a in arguments if not a.startswith("-")]
    defaults = [f"-artifact_prefix={ROOT}/.fuzz/", "-timeout=10", "-rss_limit_mb=4000", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *defaults, *arguments, *([] if files else [str(corpus)])], getattr(targets, name))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
