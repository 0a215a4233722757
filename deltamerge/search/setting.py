"""What a sweep and a search begin with: opened models, and the identity of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltamerge.calibrate.hub_rows import commit
from deltamerge.calibrate.rows import is_of_hub, local_files
from deltamerge.io import hub
from deltamerge.io.checkpoint import Checkpoint
from deltamerge.io.seals import seal
from deltamerge.recipe.file import TemplateFile
from deltamerge.run.options import Options
from deltamerge.search.candidates import Candidates
from deltamerge.search.outcome import Bench


def candidates_of(file: TemplateFile, options: Options) -> Candidates:
    """The candidates of a template; every model is opened once."""
    opened: dict[str, Checkpoint] = {}
    pickles = bool(file.template.source.data.get("pickles")) or options.pickles

    def opener(reference: str, folder: Path) -> Checkpoint:
        if reference not in opened:
            opened[reference] = hub.open_model(reference, folder, weights=True, pickles=pickles)
        return opened[reference]

    return Candidates(file.path.resolve().parent, opener, options.planning)


def rows_facts(bench: Bench) -> dict[str, Any]:
    """What the rows of a study are, by their files: name, size and time, or a commit of the hub."""
    if bench.judge is None:
        return {}
    test, folder = bench.study.test, bench.folder
    data = [task.calibration.data for task in bench.judge.tasks.values()]
    data += [test] if isinstance(test, str) else list(test.values()) if test is not None else []
    found: dict[str, Any] = {}
    for one in dict.fromkeys(data):
        found |= {str(path): seal(path) for path in local_files(one, folder)}
        if is_of_hub(one, folder):
            found[one] = commit(one)
    return found
