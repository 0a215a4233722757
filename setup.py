"""The compiled kernels (deltamerge/io/kernels/src); what else there is to build stands in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
SOURCES = Path("deltamerge/io/kernels/src")
# Each product and sum is rounded by itself, as torch does, and no result depends on the processor: no contraction, no
# fast math, no -march.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-g0", "-fno-exceptions", "-fno-rtti", "-Wall", "-Wextra", "-Wno-psabi"]


def found(pattern: str) -> list[str]:
    return sorted(path.relative_to(HERE).as_posix() for path in (HERE / SOURCES).glob(pattern))


setup(
    ext_modules=[
        Extension(
            "deltamerge.io.kernels._native",
            sources=found("*.cpp"),
            depends=found("**/*.h"),
            extra_compile_args=FLAGS,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,  # where it cannot be compiled, torch computes
            language="c++",
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
