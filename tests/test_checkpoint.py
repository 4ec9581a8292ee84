"""A run's files: written whole or not at all; read only if they are what they should be, and nothing in them is run."""

import pickle

import pytest
import torch
from torch import nn

from kd.detectors import build_detector
from kd.run.checkpoint import load, load_model, restore, save

ARGUMENTS = dict(detector="fcos", backbone="test_resnet", num_classes=4, image_size=(64, 96), from_scratch=True)


class Malicious:
    """Pickles to a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_executed(tmp_path, kind):
    file, content = tmp_path / "model.pt", {"model": Malicious(tmp_path / "executed")}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match="model.pt is not a checkpoint that can be loaded safely"):
        load_model(file)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\x89PNG\r\n\x1a\n" + bytes(50), b"PK\x03\x04" + bytes(50), bytes(1000), b"version https://git-lfs"],
    ids=["empty", "JSON", "PNG", "ZIP", "zeros", "LFS pointer"],
)
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match="model.pt is not a checkpoint"):
        load_model(tmp_path / "model.pt")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99, 0.9999])
def test_truncated_files_are_refused(tmp_path, share):
    save({"model": torch.zeros(100_000)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cut.pt is not a checkpoint"):
        load(tmp_path / "cut.pt")


def test_absent_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read the checkpoint .*absent.pt: No such file"):
        load_model(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*: Is a directory"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """Every tensor must be there, and no other."""
    weights = build_detector(**ARGUMENTS).state_dict()
    save({"model": dict(list(weights.items())[:-1]), "arguments": ARGUMENTS, "categories": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="(?s)model.pt do not fit the FCOS: .*Missing key"):
        load_model(tmp_path / "model.pt")
    save({"model": {**weights, "x": torch.zeros(1)}, "arguments": ARGUMENTS, "categories": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="(?s)model.pt do not fit the FCOS: .*Unexpected key"):
        load_model(tmp_path / "model.pt")
    save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt was not written by train.py"):
        load_model(tmp_path / "other.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    save({"value": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(AttributeError):
        save({"large": torch.zeros(100_000), "unsaveable": lambda: 0}, tmp_path / "checkpoint.pt")
    assert load(tmp_path / "checkpoint.pt") == {"value": 1}


def test_restore(tmp_path):
    """Each part gets its state back, and what else was saved is returned; a file of something else is refused."""
    trained, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    save({"model": trained.state_dict(), "steps": 3}, tmp_path / "checkpoint.pt")
    assert restore({"model": fresh}, tmp_path / "checkpoint.pt")["steps"] == 3
    assert torch.equal(fresh.weight, trained.weight)
    with pytest.raises(ValueError, match="checkpoint.pt is not a checkpoint of this run: it lacks scaler"):
        restore({"model": fresh, "scaler": fresh}, tmp_path / "checkpoint.pt")
