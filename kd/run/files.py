"""Write a run's files whole, and keep other runs out of its folder."""

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from kd.run.distributed import rank, say

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and keep other runs out of it; process 0 holds the lock for all processes of a run.

    The operating system releases the lock of a process that is killed.

    Args:
        folder: of the run. It is removed at the end if it is empty.

    Raises:
        ValueError: another run uses the folder, or it cannot be written.
    """
    if rank() > 0 or fcntl is None:
        yield
        return
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    with open(path, "r+") as file:
        if not lock(file, path):
            file.seek(0)
            holder = file.read() or "another process"
            raise ValueError(f"{folder} is in use by {holder}: wait for it to end, or choose another --output")
        file.truncate()
        print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()


def lock(file: TextIO, path: Path) -> bool:
    """Lock an open file; return False if another process holds the lock.

    It is a record lock: unlike those of flock, data loading processes do not inherit it and outlive their parent.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samefile(file.fileno(), path)  # the holder may have removed the file in between
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False
    except OSError as error:  # network file systems without locks
        say(f"{path.parent} cannot be locked ({error.strerror}): make sure that no other run uses it")
        return True


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. It gets its name when it is complete: a crash leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = ". Free some space, then start again with --resume auto" if error.errno == errno.ENOSPC else ""
        raise OSError(f"cannot write {path}: {error.strerror}{full}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a text file whole."""
    with whole(path) as file:
        file.write(text.encode())
