"""Who can write a file: code kept between runs is loaded only from where nobody else can put it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def trusted(path: Path) -> bool:
    """Whether only this user, root or the owner of this package can write `path`. OSError: no such file."""
    if os.name != "posix":
        return True
    found = path.lstat()
    owners = {0, os.geteuid(), Path(__file__).stat().st_uid}
    shared = stat.S_IWOTH | (0 if found.st_gid == os.getegid() else stat.S_IWGRP)
    return found.st_uid in owners and not found.st_mode & shared and not stat.S_ISLNK(found.st_mode)
