"""`stream_loop.run` as machine code, kept in a file: a process that finds it there imports no compiler.

numba and what it has to set up take longer to start than all the rest of a small merge. The code is found by what it
was made of: the files of this folder, the processor, and the library that loads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.io.ownership import trusted

Loop = Callable[[Sequence[NDArray[Any]]], bool]

NAME = "run"
COMPILING = "compiling loops for this processor: some 15 seconds, once"
# What the code may call: the reading of files, and what compilers call by themselves.
CALLED = frozenset({"pread", "memset", "memcpy", "memmove"})
# numba has code to free arrays in every loop; no array of these owns memory.
NOTHING_TO_FREE = "define void @NRT_MemInfo_call_dtor(i64 %0) { ret void }"
DIGEST_BYTES = 16

_alone = threading.Lock()


def loop() -> Loop:
    """`stream_loop.run`, given the arrays of a job in their order; whether everything could be read."""
    with _alone:
        return _loop()


@cache
def _loop() -> Loop:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    processor, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=processor, features=features, opt=3, jit=True)
    madeof = (llvm.__name__, _version(), target.triple, processor, features)
    name = f"{NAME}-{_digest(*(x.encode() for x in madeof), *_sources()).hex()}.code"
    code = next(filter(None, (_read(folder / name) for folder in _folders())), None)
    if code is None:
        logging.getLogger("deltamerge").info(COMPILING)
        code = _compile(llvm, machine)
        _keep(name, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return _called(engine)


def _called(engine: Any) -> Loop:
    """The function of a loaded object, in numba's convention: status f(address of the result, of an exception, ...)."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function = prototype(engine.get_function_address(NAME))

    def call(arrays: Sequence[NDArray[Any]], engine: Any = engine) -> bool:
        rows = [(x.__array_interface__["data"][0], *x.shape, 0)[:3] for x in arrays]
        table = np.array(rows, np.int64)
        went, fault = ctypes.c_int64(), ctypes.c_void_p()
        status = function(ctypes.byref(went), ctypes.byref(fault), table.ctypes.data)
        return status == 0 and went.value != 0

    return call


def _compile(llvm: Any, machine: Any) -> bytes:
    """The object file of `stream_loop.run`, under the name `NAME`."""
    from deltamerge.engine.fused import stream_loop

    module = llvm.parse_assembly(stream_loop.llvm())
    (entry,) = (f for f in module.functions if not f.is_declaration and f.linkage is llvm.Linkage.external)
    entry.name = NAME
    module.link_in(llvm.parse_assembly(NOTHING_TO_FREE))
    foreign = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")} - CALLED
    if foreign:  # LLVM ends the process when it loads code that calls what it does not know
        raise AssertionError(f"compiled code calls {', '.join(sorted(foreign))}")
    return bytes(machine.emit_object(module))


def _version() -> str:
    import llvmlite

    return str(llvmlite.__version__)


def _sources() -> Iterator[bytes]:
    """What the code is made of; what the files of loops import from elsewhere never changes."""
    return (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))


def _digest(*parts: bytes) -> bytes:
    hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()


def _folders() -> Iterator[Path]:
    """Where numba would keep code too: where it is told to, beside Python's own, or in the user's cache."""
    told = os.environ.get("NUMBA_CACHE_DIR")
    if told:
        yield Path(told)
        return
    yield Path(cache_from_source(__file__)).parent
    with suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltamerge"


def _read(path: Path) -> bytes | None:
    """The code in a file after its digest; None: there is none, not all of it, or others may have written it.

    What is not whole is deleted.
    """
    with suppress(OSError):
        if not (trusted(path.parent) and trusted(path)):
            return None
        content = path.read_bytes()
        digest, code = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if code and digest == _digest(code):
            return code
        path.unlink()
    return None


def _keep(name: str, code: bytes) -> None:
    """Write the code where that is possible, whole or not at all; without it the next process compiles again."""
    for folder in _folders():
        passing = folder / f"{name}.{os.getpid()}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                passing.write_bytes(_digest(code) + code)
                passing.replace(folder / name)
            except OSError:
                passing.unlink(missing_ok=True)
                raise
            return
