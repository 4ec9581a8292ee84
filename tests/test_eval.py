"""The command line of eval.py: each mode refuses what it does not read."""

import pytest

import eval as evaluation_script


def mode(*words) -> str:
    return evaluation_script.check(evaluation_script.parse_args([str(word) for word in words]))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.pt").touch()
    return tmp_path / "run"


def test_modes(run):
    assert mode(run) == "the evaluation of a run" and mode(run.parent) == "the table of runs"
    assert mode(run, "--explain", 1, "--teacher-weights", "x.pt", "--device", "cpu") == "--explain"
    assert mode(run, "--predict", "a", "b", "--score-threshold", 0.3) == "--predict"
    assert mode(run, "--export", "x.onnx", "--val-images", "images") == "--export"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher-weights", "a"), "--teacher-weights has no effect on the evaluation of a run, only on --explain"),
        (("--markdown",), "--markdown has no effect on the evaluation of a run, only on the table of runs: leave"),
        (("--predict", "a", "--val-images", "b"), "--val-images has no effect on --predict, only on the evaluation"),
        (("--predict", "a", "--workers", "2"), "--workers has no effect on --predict, only on the evaluation"),
        (("--export", "a", "--predict", "b"), "--export has no effect on --predict, only on --export"),
        (("--explain", "1", "--predict", "b"), "--predict has no effect on --explain, only on --predict"),
        (("--workers", "-1"), "--workers is -1: give a number from 0"),
        (("--score-threshold", "nan"), "--score-threshold is nan: give a number from 0 to 1"),
    ],
)
def test_refused_for_a_run(run, words, message):
    with pytest.raises(ValueError, match=message):
        mode(run, *words)


def test_refused_for_several_runs(run):
    with pytest.raises(ValueError, match="--explain needs a single run, but there is no .*model.pt"):
        mode(run.parent, "--explain", 1)
    with pytest.raises(ValueError, match="--val-images has no effect on the table of runs"):
        mode(run.parent, "--val-images", "a")
    with pytest.raises(ValueError, match=r"model.pt is not a folder: give the folder of its run, .*run$"):
        mode(run / "model.pt")


def test_refused_by_the_parser(run, capsys):
    with pytest.raises(SystemExit):
        mode(run, "--curve", "x.png")
    assert "unrecognized arguments: --curve" in capsys.readouterr().err
