"""A run's folder belongs to one process at a time."""

import subprocess
import sys

import pytest

import train
from kd.run.files import locked

# A process that holds the lock of a folder until its input ends, or says that it cannot.
HOLDER = """
import fcntl, sys
with open(sys.argv[1] + "/lock", "r+") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit("refused")
    print("process 7 on elsewhere", end="", file=file, flush=True)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """A function that starts such a process; it does not outlive the test."""
    processes = []

    def start(folder) -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen([sys.executable, "-c", HOLDER, folder], text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def words(*more) -> list[str]:
    return ["--student", "r18", "--device", "cpu", *map(str, more)]


def test_a_second_run_is_refused(tmp_path, holder, monkeypatch):
    """Before a teacher is trained, with the process that has the folder; when that was killed, the folder is free."""
    monkeypatch.setattr(train, "train", lambda args: pytest.fail("training has started"))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").touch()
    process = holder(folder)
    assert process.stdout.readline() == "locked\n"
    distill = words("--method", "frs", "--teacher", "r34", "--output", folder)
    with pytest.raises(ValueError, match="is in use by process 7 on elsewhere: wait for it to end, or choose another"):
        train.main(train.parse_args(distill))
    process.kill()
    process.wait()
    monkeypatch.setattr(train, "train", lambda args: {"AP": 0.5})
    assert train.main(train.parse_args(words("--output", folder))) == {"AP": 0.5}
    assert not folder.exists()


def test_a_second_run_waits_for_the_teacher(tmp_path, holder):
    """Two students that need the same teacher: the second does not train it again at the same time."""
    folder = tmp_path / "teacher-fcos-r34"
    folder.mkdir()
    (folder / "lock").touch()
    assert holder(folder).stdout.readline() == "locked\n"
    distill = words("--method", "frs", "--teacher", "r34", "--output", tmp_path / "frs")
    with pytest.raises(ValueError, match="teacher-fcos-r34 is in use by process 7"):
        train.main(train.parse_args(distill))
    assert not (tmp_path / "frs").exists()


def test_the_lock_ends_with_an_error(tmp_path, holder):
    """Others are refused meanwhile. The folder is removed if nothing was written into it."""
    folder = tmp_path / "run"
    with pytest.raises(KeyError), locked(folder):
        _, error = holder(folder).communicate()
        assert error == "refused\n"
        raise KeyError
    assert not folder.exists()


def test_one_process_locks_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "run"):
        assert not (tmp_path / "run").exists()
