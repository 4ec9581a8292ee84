"""Errors that end a script with one line instead of a traceback."""

import contextlib
import sys
from collections.abc import Iterator

from torch import distributed

from kd.data import DataError
from kd.distiller import TrainingError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on an error that the message explains, and leave the process group.

    These are invalid arguments and files (ValueError), files that cannot be read or written (OSError), and training
    that must not go on (TrainingError). Others, such as torch's RuntimeError, keep their traceback.
    """
    try:
        yield
    except (ValueError, OSError, TrainingError) as error:
        sys.exit(f"error: {one_line(error)}")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks, and without the traceback of a data loading process."""
    message = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")[2]
    return " ".join(message.split()) or type(error).__name__
