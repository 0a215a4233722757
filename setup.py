"""The compiled kernels (deltamerge/engine/kernels/src); what else there is to build stands in pyproject.toml."""

import ast
import hashlib
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
SOURCES = Path("deltamerge/engine/kernels/src")
# Each product and sum is rounded by itself, as torch does, and no result depends on the processor: no contraction, no
# fast math, no -march.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-g0", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Wno-psabi"]


# Tests of bad disks put their own function in the place of pread; no wheel lets them.
HOOKS = [] if "bdist_wheel" in sys.argv else [("DELTAMERGE_TEST_HOOKS", "1")]
# make sanitize names others here, behind these.
MORE = os.environ.get("DELTAMERGE_FLAGS", "").split()


def write_codes() -> None:
    """src/codes.h: the numbers of engine/fused/codes.py, which is the one table of both languages."""
    tree = ast.parse((HERE / "deltamerge/engine/fused/codes.py").read_text())
    numbers = {
        target.id: eval(compile(ast.Expression(node.value), "codes.py", "eval"), {"__builtins__": {}})
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    names = {name: f"k{name.title().replace('_', '')}" for name, number in numbers.items() if isinstance(number, int)}
    sizes = [name for name in names if name in ("PIECE", "DIRECT", "SLACK")]
    lines = [
        "// Made by setup.py from engine/fused/codes.py.",
        "#pragma once",
        "#include <cstdint>",
        "namespace deltamerge {",
    ]
    lines += [f"constexpr std::int64_t {names[name]} = {numbers[name]};" for name in sizes]
    lines += ["enum Code : std::int64_t {"]
    lines += [f"  {names[name]} = {numbers[name]}," for name in names if name not in sizes]
    text = "\n".join([*lines, "};", "}  // namespace deltamerge", ""])
    path = HERE / SOURCES / "codes.h"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def found(pattern: str) -> list[str]:
    return sorted(path.relative_to(HERE).as_posix() for path in (HERE / SOURCES).glob(pattern))


def sources() -> str:
    """A digest of what is compiled, as engine/kernels/__init__.py computes it."""
    digest = hashlib.sha256((HERE / "deltamerge/engine/fused/codes.py").read_bytes())
    for name in [*found("**/*.cpp"), *found("**/*.h")]:
        if not name.endswith("/codes.h"):
            digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def kernels() -> Extension:
    return Extension(
        "deltamerge.engine.kernels._native",
        sources=found("*.cpp"),
        depends=found("**/*.h"),
        extra_compile_args=FLAGS + MORE,
        extra_link_args=[flag for flag in MORE if flag.startswith("-fsanitize")],
        define_macros=[("Py_LIMITED_API", "0x030B0000"), ("DELTAMERGE_SOURCES", f'"{sources()}"'), *HOOKS],
        py_limited_api=True,
        optional=True,  # where it cannot be compiled, torch computes
        language="c++",
    )


write_codes()
if os.environ.get("DELTAMERGE_PURE"):  # scripts/dist.sh: a wheel for systems that have none of their own
    setup()
else:
    setup(ext_modules=[kernels()], options={"bdist_wheel": {"py_limited_api": "cp311"}})
