"""Where methods are found: one file each, imported when a recipe names it, known by the signature of its function."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from deltamerge.methods import registry
from deltamerge.methods.parameters import Density, Lambda, Param, Weights, parameters_of
from deltamerge.methods.registry import MERGE, PRUNE, Methods, PruneMethod
from deltamerge.tensors import traits as of_functions
from deltamerge.tensors.traits import traits, traits_of

METHODS = Path(registry.__file__).parent


def test_every_method_is_the_file_of_its_name() -> None:
    for methods, order in ((MERGE, registry.MERGE_ORDER), (PRUNE, registry.PRUNE_ORDER)):
        assert methods.own_names() == order
        assert [methods[name].name for name in order] == list(order)
        assert all((methods.folder / f"{name}.py").is_file() for name in order)
    assert "sums" not in MERGE  # shared mathematics
    assert "bits" not in PRUNE
    assert "Ties" not in MERGE
    assert "../merge/ties" not in MERGE


def test_a_new_file_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed after the others, without being imported; it needs no other line."""
    package = tmp_path / "some_prunes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "shared.py").write_text("raise AssertionError('imported')\n")
    for name in ("second", "first"):
        (package / f"{name}.py").write_text(
            "from deltamerge.methods.registry import prune_method\n\n\n"
            f"@prune_method('all')\ndef {name}(delta, *, tile, density):\n    return delta\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    methods = Methods("some_prunes", PruneMethod, ("second",))
    methods.folder = package
    assert methods.own_names() == ("second", "first")
    assert not {"some_prunes.first", "some_prunes.second"} & sys.modules.keys()
    assert methods["first"].parameters.keys() == {"density", "q"}
    assert "some_prunes.second" not in sys.modules
    with pytest.raises(KeyError):
        methods["third"]


@pytest.mark.parametrize(
    ("recipe", "imported"),
    [
        ("merge_method: linear", {"merge.linear", "prune.none"}),
        (
            "merge_method: dare_ties\nbase_model: ./base",
            {"merge.dare_ties", "merge.dare_linear", "merge.ties", "merge.task_arithmetic", "prune.dare"},
        ),
        (
            "base_model: ./base\nprune: {method: magnitude, density: 0.1, group: row}",
            {"merge.task_arithmetic", "prune.magnitude"},
        ),
    ],
)
def test_a_recipe_imports_the_files_that_it_names(recipe: str, imported: set[str], tmp_path: Path) -> None:
    """And neither torch nor other methods."""
    (tmp_path / "r.yaml").write_text(f"{recipe}\nmodels: [{{model: ./a, parameters: {{weight: 1}}}}]\n")
    script = (
        "import sys\nfrom pathlib import Path\nfrom deltamerge.recipe.load import load\n"
        f"load(Path({str(tmp_path / 'r.yaml')!r}))\n"
        "print(*(m.removeprefix('deltamerge.methods.') for m in sys.modules if m.startswith('deltamerge.methods.')))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {f"merge.{name}" for name in MERGE} | {f"prune.{name}" for name in PRUNE}
    assert set(done.stdout.split()) & names == imported


def test_the_engine_names_no_method() -> None:
    """Neither by an import nor by a string."""
    for file in (METHODS.parent / "engine").rglob("*.py"):
        assert "deltamerge.methods" not in file.read_text(), file


def test_neither_torch_nor_numpy_is_imported_at_the_top_of_a_method() -> None:
    for file in [*(METHODS / "merge").glob("*.py"), *(METHODS / "prune").glob("*.py"), METHODS / "ops.py"]:
        for line in ast.parse(file.read_text()).body:
            names = [line.module] if isinstance(line, ast.ImportFrom) else []
            names += [name.name for name in line.names] if isinstance(line, ast.Import) else []
            assert not {"torch", "numpy", "numpy.typing"} & set(names), file


Many = Annotated[int, Param("so many", kind="integer", low=1, scalar=True)]


def test_parameters_are_those_of_the_signature() -> None:
    def method(base, *deltas, tile, weights: Weights, density: Density = 0.5, many: Many = 3, lambda_: Lambda = 1.0):
        pass

    found = parameters_of(method)
    assert list(found) == ["weight", "density", "many", "lambda"]
    assert [param.default for param in found.values()] == [None, 0.5, 3, 1.0]
    assert found["weight"].per_model
    assert found["density"].prunes
    assert found["many"] == Param("so many", 3, "integer", low=1, scalar=True)


def half(sources, *, form): ...


def half_needs(*, form) -> tuple[int, float]:
    return 2 * form, 1.0


@traits(needs=half_needs, rare=True)
def declared(sources, *, form): ...


def test_what_a_function_needs_is_declared_or_told_by_a_suffix_as_before() -> None:
    assert traits_of(f"{__name__}:declared") == of_functions.Traits(needs=half_needs, rare=True)
    with pytest.warns(FutureWarning, match=r"half: declare it by @traits\(needs=half_needs\)"):
        found = traits_of(f"{__name__}:half")
    assert found.needs is half_needs
    assert traits_of(f"{__name__}:half_needs") == of_functions.PLAIN
    assert traits_of("read") == of_functions.PLAIN
