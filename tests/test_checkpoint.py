"""A run's files: written whole or not at all; read only if they are what they should be, and nothing in them is run."""

import errno
import os
import pickle

import pytest
import torch
from torch import nn

from kd.detectors import build_detector
from kd.distiller import TrainingError
from kd.run.checkpoint import load, load_model, save, save_model
from kd.run.weights import load_teacher

ARGUMENTS = dict(detector="fcos", backbone="test_resnet", num_classes=4, image_size=(64, 96), from_scratch=True)
BIAS = "head.classification_head.cls_logits.bias"
NAN, INF = float("nan"), float("inf")


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
    with pytest.raises(ValueError, match="cannot read the checkpoint .*absent.pt: no such file"):
        load_model(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*: not a file"):
        load_model(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*pipe: not a file"):
        load_model(tmp_path / "pipe")


def test_torch_is_not_quoted(tmp_path):
    """Its errors advise to load such files without weights_only."""
    file = tmp_path / "model.pt"
    torch.save({"model": nn.Linear(1, 1)}, file)
    contents = [file.read_bytes(), pickle.dumps({"model": 1}, protocol=2), bytes(1000), b"hello world"]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load(file)
        assert "weights_only" not in str(error.value) and "Copy or download it again" in str(error.value)


def test_flipped_bytes_are_found(tmp_path):
    """torch would load them: they are inside a tensor."""
    file = tmp_path / "model.pt"
    save({"model": torch.arange(1000.0)}, file)
    content = bytearray(file.read_bytes())
    start = content.index(torch.arange(500.0, 510.0).numpy().tobytes())
    content[start : start + 8] = bytes(255 - byte for byte in content[start : start + 8])
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)["model"].isfinite().all()
    with pytest.raises(
        ValueError, match=r"model.pt is damaged: the checksum of \S+ differs. Copy or download it again"
    ):
        load(file)


@pytest.fixture(scope="module")
def weights() -> dict:
    return build_detector(**ARGUMENTS).state_dict()


MISFITS = {
    "absent": (lambda w: dict(list(w.items())[4:]), r"missing \S+, missing \S+, missing \S+ and 1 more"),
    "others": (lambda w: {**w, "x": torch.zeros(1), "y": torch.zeros(1)}, "unexpected x, unexpected y$"),
    "shape": (lambda w: {**w, BIAS: torch.zeros(5)}, rf"{BIAS} is \(5,\), not \(4,\)"),
    "NaN": (lambda w: {n: torch.full_like(t, NAN) if t.is_floating_point() else t for n, t in w.items()}, "not finite"),
    "none": (lambda w: None, "model has type NoneType, not dict"),
    "list": (lambda w: list(w.values()), "model has type list, not dict"),
    "numbers": (lambda w: {1: torch.zeros(1)}, "they are not tensors with names"),
    "values": (lambda w: dict.fromkeys(w, 1.0), "they are not tensors with names"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, name):
    """Every tensor must be there, and no other, with finite numbers; the first three are named."""
    change, message = MISFITS[name]
    torch.save({"model": change(weights), "arguments": ARGUMENTS, "categories": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"model.pt .*{message}") as error:
        load_model(tmp_path / "model.pt")
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_teacher_sees_images_of_the_students_size(tmp_path, weights):
    """Its AP before training is that of what it teaches, whatever size it was trained at."""
    names = {1: {"name": "thing"}, 2: {"name": "other"}, 3: {"name": "more"}}
    content = {"model": weights, "arguments": ARGUMENTS, "categories": names}
    torch.save(content, tmp_path / "model.pt")
    teacher = load_teacher(tmp_path / "model.pt", ARGUMENTS["detector"], ARGUMENTS["backbone"], names, (96, 160))
    assert teacher.transform([torch.rand(3, 120, 160)])[0].image_sizes == [(96, 128)]


@pytest.mark.parametrize("content", [7, torch.zeros(3), {1: torch.zeros(3)}, None, [], {}, {"other": 1}], ids=str)
def test_files_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt was not written by train.py: it (has type|lacks) "):
        load_model(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt (was not written by train.py|do not fit the FCOS: missing)"):
        load_teacher(tmp_path / "model.pt", "fcos", "test_resnet", {1: {"name": "thing"}}, (64, 96))


def test_normalisation_is_kept(tmp_path):
    """Of the weights trained with, also where timm has given the model another mean and std since."""
    trained = build_detector(**ARGUMENTS, image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.1]).eval()
    save_model(trained, ARGUMENTS, {1: {"id": 1, "name": "thing"}}, tmp_path / "model.pt")
    loaded, _ = load_model(tmp_path / "model.pt")
    assert (loaded.transform.image_mean, loaded.transform.image_std) == ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1])
    assert build_detector(**ARGUMENTS).transform.image_mean == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": None}, "arguments has type NoneType, not dict"),
        ({"arguments": {}}, "detector is None, not one of fcos"),
        ({"arguments": {"color": 1}}, "its arguments 'color' are unknown"),
        ({"arguments": {"pretrained": True}}, "its arguments 'pretrained' are unknown"),
        ({"arguments": {"pretrained": "/any/path"}}, "its arguments 'pretrained' are unknown"),
        ({"arguments": {"pretrained_weights": "/any/path"}}, "its arguments 'pretrained_weights' are unknown"),
        ({"arguments": {7: 7}}, "its arguments 7 are unknown"),
        ({"detector": torch.zeros(2)}, "detector is tensor.*, not one of fcos"),
        ({"backbone": None}, "backbone is None, not a string"),
        ({"backbone": "/any/path"}, "timm has no model named '/any/path'"),
        ({"num_classes": 10**9}, "num_classes is 1000000000, not an integer from 2 to 20000"),
        ({"num_classes": 4.0}, "num_classes is 4.0, not an integer"),
        ({"image_size": [10**6, 10**6]}, r"image_size is \[1000000, 1000000\], not .* from 32 to 10000 pixels"),
        ({"image_size": [96, 64]}, "image_size is .*, not the short and the long side"),
        ({"image_size": 64}, "image_size is 64, not the short"),
        ({"from_scratch": "yes"}, "from_scratch is 'yes', not True or False"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], not three numbers from 0 to 1"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is .*nan.*, not three numbers from 0 to 1"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std is .*, not three numbers above 0"),
        ({"categories": ["thing"]}, "categories has type list, not dict"),
        ({"categories": {4: {"id": 4, "name": "thing"}}}, "label 4 is .* but labels are 1 to 3"),
        ({"categories": {1: "thing"}}, "label 1 is 'thing', but .* a category has a name"),
    ],
    ids=str,
)
def test_arguments_of_a_file_are_checked(tmp_path, monkeypatch, changes, message):
    """Before anything is built: a file could otherwise ask for all memory, or for another file."""
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("something was built"))
    content = {"model": {}, "arguments": ARGUMENTS, "categories": {}}
    content |= {name: value for name, value in changes.items() if name in content}
    if content["arguments"]:
        own = {name: value for name, value in changes.items() if name not in content}
        content["arguments"] = {**ARGUMENTS, **content["arguments"], **own}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    save({"value": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(AttributeError):
        save({"large": torch.zeros(100_000), "unsaveable": lambda: 0}, tmp_path / "checkpoint.pt")
    assert load(tmp_path / "checkpoint.pt") == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk(tmp_path, size):
    """One line says so; the old file stays, and no other."""
    save({"value": 1}, tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"cannot write .*checkpoint.pt: {os.strerror(errno.ENOSPC)}. Free some space"):
        save({"value": torch.zeros(size)}, tmp_path / "checkpoint.pt")
    assert load(tmp_path / "checkpoint.pt") == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    """The first three are named, wherever they are."""
    content = {
        "model": {"a": torch.ones(2), "b": torch.tensor([NAN])},
        "optimizer": {"state": [torch.tensor(-INF)] * 3},
    }
    message = r"model.pt is not written, .* diverged: model.b, optimizer.state.0, optimizer.state.1 and 1 more are not"
    with pytest.raises(TrainingError, match=message):
        save(content, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
