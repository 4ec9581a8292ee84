"""Damaged files of a run, and errors that end a script: one line that says what is wrong, where, and what to do."""

import json

import pytest
import torch
from PIL import Image

import eval as evaluation_script
import train
from kd.data import CocoFolder, DataError, collate
from kd.distiller import TrainingError
from kd.run.errors import one_line_errors
from kd.run.folder import append_log, cut_log, describe, read_evaluations, read_settings
from kd.tools.table import collect

SETTINGS = {
    **{"method": "none", "detector": "fcos", "student": "r18", "teacher": None, "data": None, "seed": 0, "set": []},
    **{"train_annotations": None, "image_size": [64, 64], "distill_weight": 1.0, "inherit": False},
}
LINE = {"epoch": 1, "AP": 0.5}
RESTORE = "Restore it, or delete the run"


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two epochs."""
    folder = tmp_path / "runs" / "good"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(SETTINGS))
    (folder / "log.jsonl").write_text(2 * (json.dumps(LINE) + "\n"))
    return folder


DAMAGED_SETTINGS = {
    "truncated": (json.dumps(SETTINGS)[:50].encode(), f"args.json is damaged: .*{RESTORE}"),
    "empty": (b"", f"args.json is damaged: .*{RESTORE}"),
    "list": (b"[]", f"args.json is damaged: it is not a JSON object. {RESTORE}"),
    "binary": (b"\x80\xff\x00", f"args.json is damaged: it is not text. {RESTORE}"),
    "nested": (b"[" * 100_000, f"args.json is damaged: .*{RESTORE}"),
    "others": (b"{}", "args.json was not written by train.py: it lacks data, detector, .*"),
}
DAMAGED_LOGS = {
    "truncated": (json.dumps(LINE).encode() + b"\n{", f"line 2 of .*log.jsonl is damaged: .*{RESTORE}"),
    "number": (b"7\n", f"line 1 of .*log.jsonl is damaged: it is not a JSON object. {RESTORE}"),
    "binary": (b"\x80\xff\x00", f"log.jsonl is damaged: it is not text. {RESTORE}"),
}


@pytest.mark.parametrize("kind", DAMAGED_SETTINGS)
def test_damaged_settings(run, kind):
    content, message = DAMAGED_SETTINGS[kind]
    (run / "args.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_settings(run)


@pytest.mark.parametrize("kind", DAMAGED_LOGS)
def test_damaged_logs(run, kind):
    content, message = DAMAGED_LOGS[kind]
    (run / "log.jsonl").write_bytes(content)
    for read in (read_evaluations, lambda folder: cut_log(folder, 1)):
        with pytest.raises(ValueError, match=message):
            read(run)


def test_a_log_that_is_too_short(run):
    """A run that continues after its third epoch has three lines; more are cut off."""
    with pytest.raises(ValueError, match="log.jsonl has 2 lines, but 3 epochs are completed: restore the file"):
        cut_log(run, 3)
    cut_log(run, 1)
    append_log(run, {"epoch": 2})
    assert [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] == [LINE, {"epoch": 2}]
    assert {file.name for file in run.iterdir()} == {"args.json", "log.jsonl"}


def test_a_damaged_run_is_left_out(run, capsys):
    """It is named on stderr; the table has the others."""
    for kind, (content, _) in {**DAMAGED_SETTINGS, "no log": (b"{}", "")}.items():
        folder = run.parent / kind
        folder.mkdir()
        (folder / "args.json").write_bytes(content)
    assert [found["folder"] for found in collect(run.parent)] == ["good"]
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == len(DAMAGED_SETTINGS) + 1
    assert f"left out: {run.parent / 'truncated' / 'args.json'} is damaged" in captured.err


@pytest.mark.parametrize("content", [b"\x80\xff", b"7", b"{}", b"PK"])
def test_a_file_is_not_a_folder_of_runs(run, content):
    (run / "packed").write_bytes(content)
    with pytest.raises(ValueError, match="packed is not a file of --pack: give one, the folder of a run, or a folder"):
        evaluation_script.main(evaluation_script.parse_args([str(run / "packed")]))


def test_paths_are_absolute(tmp_path, monkeypatch):
    """So a run can be evaluated from any folder. Words that are no paths stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    args = train.parse_args(["--train-annotations", "a.json", "--val-images", "../x", "--pretrained", "--output", "y"])
    described = describe(args)
    assert described["train_annotations"] == str(tmp_path / "a.json")
    assert described["val_images"] == str(tmp_path.parent / "x")
    assert (described["pretrained"], described["data"], described["output"]) == (True, None, str(tmp_path / "y"))


def test_no_git(monkeypatch):
    """A run without git has no revision, and is not refused."""
    monkeypatch.setenv("PATH", "")
    assert describe(train.parse_args([]))["versions"]["revision"] is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "error: a b"),
        (TrainingError("diverged"), "error: diverged"),
        (FileNotFoundError(2, "No such file or directory", "/nope/x.png"), "error: .* '/nope/x.png'"),
        (ValueError(), "error: ValueError"),
    ],
    ids=repr,
)
def test_one_line(error, line):
    with pytest.raises(SystemExit, match=f"^{line}$"), one_line_errors():
        raise error


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("of torch"), torch.OutOfMemoryError("CUDA")], ids=repr)
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_one_line_from_a_data_loading_process(tmp_path):
    """torch adds its traceback to the message."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(coco))
    dataset = CocoFolder(tmp_path, tmp_path / "a.json")
    (tmp_path / "a.png").unlink()
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, collate_fn=collate)
    line = r"^error: \S+a.png cannot be used: .*No such file.*annotations$"
    with pytest.raises(SystemExit, match=line), one_line_errors():
        list(loader)
    with pytest.raises(DataError, match="Original Traceback"):
        list(loader)


def test_a_picture_that_cannot_be_written(run):
    log = {"AP": 0.5, "AP50": 0.6, "epoch": 1, "iteration": 9}
    (run / "log.jsonl").write_text(json.dumps(log))
    args = evaluation_script.parse_args([str(run.parent), "--curves", "/nope/x.png", "--device", "cpu"])
    with pytest.raises(SystemExit, match="^error: .*No such file or directory: '/nope/x.png'$"), one_line_errors():
        evaluation_script.main(args)
