"""A process that has deltamerge imported and forks a child for each command, in which kill_shim.c counts and kills.

    LD_PRELOAD=kill_shim.so python kill_server.py    # a request, a line of JSON on stdin; an answer, one on stdout

A request: `arguments` of the command line, `cwd`, `root` (calls below it count), `at` (the call that kills), `when`
(0 never, 1 before it, 2 after it, 3 amid it if it writes, 4: Ctrl-C before it), `part` (of a path: the first call of
such kills), `log` and `err` (files); or `warm`: run them here and import the modules named, so that children find
everything. An answer: `code`, negative a signal's.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from typing import Any

import deltamerge.formats.safetensors as writer
from deltamerge.cli import main

SECONDS = 120  # after which a command is taken to hang
warnings.simplefilter("ignore")


def child(request: dict[str, Any]) -> None:
    """Run the command and leave the process as Python does, without the time that its end takes."""
    signal.alarm(SECONDS)
    err = os.open(request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd, place in ((nothing, 0), (nothing, 1), (err, 2)):
        os.dup2(fd, place)
    os.chdir(request["cwd"])
    root, part = os.fsencode(request["root"]), os.fsencode(request["part"])
    ctypes.CDLL(None).kill_arm(root, request["at"], request["when"], part, log)
    code = 99
    try:
        main(request["arguments"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def warm(request: dict[str, Any]) -> int:
    """Run the command in this process and import more; RuntimeError if that left threads, which no child would have."""
    home = os.getcwd()
    os.chdir(request["cwd"])
    code = 0
    try:
        main(request["arguments"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    os.chdir(home)
    for name in request["warm"]:
        with suppress(ImportError):
            importlib.import_module(name)
    until = time.monotonic() + 10  # the system may take a moment to end a thread that was joined
    while (threads := len(os.listdir("/proc/self/task"))) != 1 and time.monotonic() < until:
        time.sleep(0.01)
    if threads != 1:
        raise RuntimeError(f"{threads} threads: children would hang")
    gc.collect()
    gc.freeze()  # so that children share it
    return code


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        tempfile.tempdir = request["temporary"]
        writer.SAVE_SECONDS = request["save"]
        if "warm" in request:
            code = warm(request)
        elif pid := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        else:
            child(request)
        print(json.dumps({"code": code}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
