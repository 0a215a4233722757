"""Lets torch's autograd run on the simulated GPU: python gpu_guard.py FOLDER MODULE FUNCTION ARGUMENT…

This build of torch has no CUDA, and its engine refuses tensors of a device that it does not know. `gpu_guard.cpp` says
that there is one; torch has to find it when it is imported, so what needs it is called in a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

SOURCE = Path(__file__).with_suffix(".cpp")


def torch_folder() -> Path:
    """Torch's, which is not imported for it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def call(folder: Path, module: str, function: str, *arguments: str) -> None:
    """Call `module.function(*arguments)` where autograd knows the device; the library is made in `folder`."""
    torch = torch_folder()
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    library = folder / "gpu_guard.so"
    subprocess.run(["g++", *options, str(SOURCE), "-o", str(library), "-lc10", "-ltorch_cpu"], check=True)
    done = subprocess.run(
        [sys.executable, __file__, str(library), module, function, *arguments],
        capture_output=True,
        text=True,
        cwd=SOURCE.parent.parent,
    )
    assert not done.returncode, done.stderr


def main(library: str, module: str, function: str, *arguments: str) -> Any:
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)
    import torch

    run = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with torch.autograd.set_multithreading_enabled(False):
            run(thread)

    # the engine's own threads would want a driver
    with mock.patch.object(threading.Thread, "run", within), torch.autograd.set_multithreading_enabled(False):
        getattr(importlib.import_module(module), function)(*arguments)


if __name__ == "__main__":
    sys.path[:0] = [
        str(SOURCE.parents[1]),
        str(SOURCE.parent),
        *(str(p) for p in SOURCE.parent.iterdir() if p.is_dir()),
    ]
    main(*sys.argv[1:])
