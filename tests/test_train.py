"""The scripts, end to end on a small model: what a run writes, what it prints, and how it refuses."""

import functools
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import eval as evaluation_script
import kd.distiller
import kd.run.progress
import train
from kd.detectors import build_detector
from kd.distiller import Distiller
from kd.evaluation import METRICS
from kd.run.checkpoint import load, load_model, save, save_model
from kd.run.folder import changes_since, read_evaluations
from kd.run.weights import arguments_of, load_torchvision, start_from

SMALL = [
    *("--student", "test_resnet", "--image-size", "64", "64", "--batch-size", "4"),
    *("--max-iterations", "3", "--device", "cpu", "--amp", "off"),
]


pytestmark = pytest.mark.usefixtures("few_shapes")


def run(*words: str) -> dict:
    return train.main(train.parse_args([*SMALL, *map(str, words)]))


def test_teacher_student_table(tmp_path, capsys):
    """Teacher, for four times as long, and plain student are trained first and kept; the table compares all three."""
    teacher = ("--teacher", "r18", "--max-iterations", 100)  # more than the epoch of 4 steps
    metrics = run("--method", "frs", *teacher, "--output", tmp_path / "frs")
    printed = capsys.readouterr().out
    assert "training teacher-fcos-r18 first" in printed and "training none-fcos-test_resnet first" in printed
    assert "teacher r18 from" in printed and "on 6 validation images" in printed
    table = printed[printed.rindex("AP50") :].splitlines()[1:4]
    assert [row.split()[:2] for row in table] == [["teacher", "r18"], ["plain", "test_resnet"], ["frs", "test_resnet"]]
    logs = {
        folder.name: json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in tmp_path.iterdir()
    }
    assert {name: log["iteration"] for name, log in logs.items()} == {
        **{"frs": 4, "none-fcos-test_resnet": 4, "teacher-fcos-r18": 16}
    }
    shown = [logs["frs"]["teacher_AP"], logs["none-fcos-test_resnet"]["AP"], metrics["AP"]]
    assert [row.split()[2] for row in table] == [f"{value:.3f}" for value in shown]

    assert {f.name for f in (tmp_path / "frs").iterdir()} == {
        "args.json", "log.jsonl", "checkpoint.pt", "model.pt", "samples.png"
    }  # fmt: skip
    settings = json.loads((tmp_path / "frs" / "args.json").read_text())
    assert settings["method"] == "frs" and settings["versions"]["torch"] == torch.__version__
    line = json.loads((tmp_path / "frs" / "log.jsonl").read_text().splitlines()[-1])
    assert line["AP"] == metrics["AP"]
    detection, terms = {"classification", "bbox_regression", "bbox_ctrness"}, {"loss_frs_fpn", "loss_frs_head"}
    assert line["losses"].keys() == detection | terms and line["ratio_to_detection"].keys() == terms
    total = sum(line["losses"][name] for name in detection)
    for name in terms:
        assert line["ratio_to_detection"][name] == pytest.approx(line["losses"][name] / total)
    assert line["images_per_second"] > 0 and 0 < line["waiting_for_data"] < 1
    with Image.open(tmp_path / "frs" / "samples.png") as picture:
        assert picture.width > 6 * 256 and picture.height > 3 * 256

    run("--method", "l2", *teacher, "--output", tmp_path / "l2")
    assert "first; later runs" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="teacher-fcos-r18 was started differently: lr was None, is 0.1.*delete"):
        run("--method", "l2", *teacher, "--output", tmp_path / "l2 again", "--lr", 0.1)

    evaluate(tmp_path / "frs")
    numbers = [f"{name:6}{metrics[name]:8.3f}" for name in METRICS if metrics[name] >= 0]
    printed = capsys.readouterr().out
    assert all(number in printed.splitlines() for number in numbers) and len(numbers) == 10
    assert printed.count("no such objects") == 2 and "AP per class\n" in printed  # AP_L and AR_L
    evaluate(tmp_path)
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith("detector: fcos") and len(rows) == 5  # a heading, three in the table above, l2
    assert sum(row.startswith("frs ") for row in rows) == 1
    evaluate(tmp_path, "--pack", str(tmp_path / "runs.jsonl"))
    by_folder = capsys.readouterr().out
    evaluate(tmp_path / "runs.jsonl")
    assert capsys.readouterr().out == by_folder


def evaluate(folder, *words) -> None:
    evaluation_script.main(evaluation_script.parse_args([str(folder), "--device", "cpu", *words]))


def test_the_exported_student_is_the_trained_one(tmp_path):
    """model.pt holds the student alone; checkpoint.pt also the adapters; the teacher is in neither."""
    run("--method", "frs", "--teacher", "r18", "--output", tmp_path / "frs")
    student, _ = load_model(tmp_path / "frs" / "model.pt")
    checkpoint = torch.load(tmp_path / "frs" / "checkpoint.pt", weights_only=True)["distiller"]
    exported = {f"student.{name}": value for name, value in student.state_dict().items()}
    assert all(torch.equal(checkpoint[name], value) for name, value in exported.items())
    assert {n.split(".")[0] for n in checkpoint.keys() - exported.keys()} == {"method", "iteration"}


@pytest.fixture
def random_teacher(tmp_path) -> tuple:
    """Words for a teacher that was not trained."""
    teacher = build_detector("fcos", "test_resnet", 5, image_size=(64, 64))
    save(teacher.state_dict(), tmp_path / "teacher.pth")
    return "--teacher", "test_resnet", "--teacher-weights", tmp_path / "teacher.pth"


def test_inheriting_alone(tmp_path, capsys, random_teacher):
    """Without a method, the student starts with its teacher's FPN and heads, and sees no more of it."""
    words = ("--max-iterations", 1, "--lr", 1e-9, "--seed", 1, "--output", tmp_path / "x")
    run("--method", "none", "--inherit", *random_teacher, *words)
    student, _ = load_model(tmp_path / "x" / "model.pt")
    teacher = load(random_teacher[3])
    for name, value in student.state_dict().items():
        if name.startswith(("head.", "backbone.fpn.")):
            assert_close(value, teacher[name], atol=1e-7, rtol=0)
    stem = "backbone.body.conv1.0.weight"
    assert not torch.equal(student.state_dict()[stem], teacher[stem])
    (line,) = (json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines())
    assert line["losses"].keys() == {"classification", "bbox_regression", "bbox_ctrness"}
    printed = capsys.readouterr().out
    assert "inherit test_resnet" in printed and "plain test_resnet" not in printed
    settings = train.parse_args([*map(str, (*SMALL, "--inherit", *random_teacher))])
    train.settle(settings)
    assert Path(settings.output) == Path("runs/inherit-fcos-test_resnet-test_resnet")


def test_what_inheriting_does_alone_is_shown(tmp_path, capsys, random_teacher):
    """Beside a student that inherits, and only there, the table has the one that does nothing else."""
    run("--method", "none", "--inherit", *random_teacher, "--output", tmp_path / "inherit-fcos-test_resnet-test_resnet")
    assert capsys.readouterr().out.count("inherit test_resnet ") == 1
    (alone,) = read_evaluations(tmp_path / "inherit-fcos-test_resnet-test_resnet")
    run("--method", "frs", "--inherit", *random_teacher, "--output", tmp_path / "inheriting")
    assert re.search(rf"\ninherit test_resnet +{alone['AP']:.3f}.*\nfrs test_resnet ", capsys.readouterr().out)
    adapter = load(tmp_path / "inheriting" / "checkpoint.pt")["distiller"]["method.adapters.0.weight"]
    assert_close(adapter[:, :, 1, 1], torch.eye(256), atol=0.02, rtol=0)  # where it began, after three steps
    run("--method", "frs", *random_teacher, "--output", tmp_path / "without")
    assert "\ninherit test_resnet " not in capsys.readouterr().out

    (tmp_path / "inherit-fcos-test_resnet-test_resnet" / "args.json").write_text("{}")  # does not end another run
    run("--method", "frs", "--inherit", *random_teacher, "--output", tmp_path / "after")
    printed = capsys.readouterr().out
    assert "not compared with " in printed and "\nfrs test_resnet " in printed


def test_distill_weight(tmp_path, random_teacher):
    """A factor of every loss of the method: on the same first batch, half of each, and all of the detection losses."""
    logged = []
    for weight in (1, 0.5):
        words = ("--distill-weight", weight, "--output", tmp_path / str(weight), "--max-iterations", 1)
        run("--method", "frs", *random_teacher, *words)
        logged.append(json.loads((tmp_path / str(weight) / "log.jsonl").read_text())["losses"])
    whole, half = logged
    for name, value in whole.items():
        assert half[name] == pytest.approx(value * (0.5 if name.startswith("loss_frs_") else 1), rel=1e-5)


def test_automatic_weights(tmp_path, capsys, monkeypatch, random_teacher):
    """The losses start at the wanted ratio to the detection losses; a resumed run keeps the factors of the first."""
    words = ("--method", "frs", *random_teacher, "--epochs", 2, "--max-iterations", 5, "--output", tmp_path / "x")
    words += ("--distill-weight", "auto:1.5")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(train, "append_log", Mock(side_effect=InterruptedError))
        run(*words)
    weights = json.loads((tmp_path / "x" / "args.json").read_text())["term_weights"]
    assert len(set(weights.values())) == len(weights) == 2
    expected = "loss_frs_fpn 0.75, loss_frs_head 0.75"
    assert f"before training, relative to the detection loss: {expected}\n" in capsys.readouterr().out
    monkeypatch.setattr(train, "measure_ratios", Mock(side_effect=AssertionError))
    run(*words, "--resume")
    assert json.loads((tmp_path / "x" / "args.json").read_text())["term_weights"] == weights
    lines = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert all(0.05 < ratio < 2 for line in lines for ratio in line["ratio_to_detection"].values())


def test_the_same_seed_gives_the_same_student(tmp_path):
    for name in ("a", "b"):
        run("--output", tmp_path / name)
    first, second = (torch.load(tmp_path / n / "model.pt", weights_only=True)["model"] for n in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_coco_folder(coco_folder, tmp_path, detector, capsys):
    """COCO's recipe on a real folder, multi-scale, the teacher by its file; eval.py prints the numbers of training."""
    common = ("--detector", detector, "--data", coco_folder, "--multi-scale", 48, 64)
    run(*common, "--output", tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.pt"
    teacher = ("--teacher", "test_resnet", "--teacher-weights", weights)
    metrics = run(*common, "--method", "l1", *teacher, "--output", tmp_path / "l1", "--set", "adapter=True")
    assert json.loads((tmp_path / "l1" / "args.json").read_text())["optimizer"] == "sgd"
    capsys.readouterr()
    evaluate(tmp_path / "l1")
    data, first, *_ = capsys.readouterr().out.splitlines()
    assert data.startswith("instances_val2017.json: 8 images") and first == f"AP    {metrics['AP']:8.3f}"

    with pytest.raises(ValueError, match="no weights for the teacher r18.*--method none.*torchvision"):
        run(*common, "--method", "l1", "--teacher", "r18", "--output", tmp_path / "x")
    with pytest.raises(ValueError, match="detector: student FCOS"):
        run("--method", "frs", *teacher, "--data", coco_folder, "--output", tmp_path / "z")
    for file in (coco_folder / "annotations").iterdir():
        file.write_text(file.read_text().replace("circle", "disc"))
    with pytest.raises(ValueError, match="model.pt does not know the classes disc, whose predictions frs reads"):
        run(*common, "--method", "frs", *teacher, "--output", tmp_path / "y")
    run(*common, "--method", "l1", *teacher, "--output", tmp_path / "y")  # reads features alone


def test_lists_of_categories_are_compared(coco_folder, tmp_path):
    file = coco_folder / "annotations" / "instances_val2017.json"
    coco = json.loads(file.read_text())
    coco["categories"][0]["name"] = "disc"
    file.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="different categories"):
        run("--data", coco_folder, "--output", tmp_path / "x")


def test_too_few_images(tmp_path):
    with pytest.raises(ValueError, match="16 training images are fewer than the 64 of one step"):
        run("--output", tmp_path / "x", "--batch-size", 64)
    assert not (tmp_path / "x").exists()


def test_a_loss_that_stays_zero_stops_training(tmp_path, monkeypatch, capsys):
    """It is announced before the first step, and an error after the first epoch; a tiny weight leaves a term out."""
    monkeypatch.setattr(kd.distiller, "PATIENCE", 3)
    teacher = ("--method", "frs", "--teacher", "test_resnet")
    with pytest.raises(RuntimeError, match="loss_frs_head was zero in all of 3 steps.* 1e-9"):
        run(*teacher, "--set", "beta=0", "--output", tmp_path / "zero")
    assert "loss_frs_head is zero on the first image" in capsys.readouterr().out
    run(*teacher, "--set", "beta=1e-9", "--output", tmp_path / "tiny")


def test_warmup_reaches_the_distiller(tmp_path, monkeypatch):
    """FRS has 500 iterations of warm-up, at most a tenth of the run."""
    run("--output", tmp_path / "teacher")
    built = Mock(side_effect=ValueError("far enough"))
    monkeypatch.setattr(train, "Distiller", built)
    teacher = ("--teacher", "test_resnet", "--teacher-weights", tmp_path / "teacher" / "model.pt")
    words = ("--epochs", 10, "--max-iterations", 35, "--output", tmp_path / "frs")
    with pytest.raises(ValueError, match="far enough"):
        run("--method", "frs", *teacher, *words)
    assert built.call_args.kwargs == {"warmup": 3}


def test_a_plain_student_of_another_schedule_is_not_shown(tmp_path, capsys):
    plain = tmp_path / "none-fcos-test_resnet"
    run("--output", plain, "--max-iterations", 2)
    assert "plain test_resnet" in capsys.readouterr().out
    teacher = ("--teacher", "test_resnet", "--teacher-weights", plain / "model.pt")
    run("--method", "l2", *teacher, "--output", tmp_path / "l2")
    assert "plain test_resnet" not in capsys.readouterr().out


def test_an_unfinished_plain_student_is_not_shown(tmp_path, capsys):
    run("--output", tmp_path / "none-fcos-test_resnet")
    model = (tmp_path / "none-fcos-test_resnet" / "model.pt").rename(tmp_path / "teacher.pt")
    capsys.readouterr()
    teacher = ("--teacher", "test_resnet", "--teacher-weights", model)
    run("--method", "l2", *teacher, "--output", tmp_path / "l2")
    for file in (tmp_path / "none-fcos-test_resnet").iterdir():
        file.unlink()
    save({}, tmp_path / "none-fcos-test_resnet" / "model.pt")  # or one of which nothing else was kept
    run("--method", "l2", *teacher, "--output", tmp_path / "again")
    assert "plain test_resnet" not in capsys.readouterr().out


def test_pretrained_or_not_is_another_run(tmp_path):
    """The path of the weights may change, not whether there are any."""
    run("--output", tmp_path / "x")
    settings = json.loads((tmp_path / "x" / "args.json").read_text())
    assert changes_since(tmp_path / "x", {**settings, "pretrained": True}) == ["pretrained was False, is True"]
    (tmp_path / "x" / "args.json").write_text(json.dumps({**settings, "pretrained": "a.pth"}))
    assert changes_since(tmp_path / "x", {**settings, "pretrained": "b.pth"}) == []


def test_multi_scale(tmp_path, monkeypatch):
    """Training draws the short side from a range; evaluation, here and by eval.py, is at --image-size."""
    evaluated = Mock(side_effect=ValueError("far enough"))
    monkeypatch.setattr(train, "evaluate", evaluated)
    with pytest.raises(ValueError, match="far enough"):
        run("--multi-scale", 48, 96, "--max-iterations", 1, "--output", tmp_path / "x")
    transform = evaluated.call_args.args[0].eval().transform
    assert sorted(transform.min_size) == list(range(48, 97))  # each as often as the others
    assert transform([torch.rand(3, 32, 32)])[0].image_sizes == [(64, 64)]


def test_gradients_are_clipped(tmp_path):
    """With a tiny maximum norm, one step of SGD moves the parameters by no more than the learning rate times it."""
    words = ("--max-iterations", 1, "--optimizer", "sgd", "--lr", 1, "--clip-grad", 1e-3, "--output", tmp_path / "x")
    run(*words)
    torch.manual_seed(0)
    start = train.build_detector("fcos", "test_resnet", 5, image_size=(64, 64)).state_dict()
    moved = load_model(tmp_path / "x" / "model.pt")[0]
    names = [name for name, _ in moved.named_parameters()]
    step = torch.cat([(moved.state_dict()[name] - start[name] * (1 - 1e-4)).flatten() for name in names])
    assert 0.5e-3 < step.norm() < 1.01e-3


def test_a_loss_that_is_not_finite_stops_training(tmp_path, monkeypatch):
    """The optimizer does not step on it; the terms, the iteration and the images are named and written."""

    class Broken(Distiller):
        calls = 0

        def forward(self, images, targets):
            self.calls += 1
            detection, distillation = super().forward(images, targets)
            if self.calls == 3:
                Broken.before = {name: value.clone() for name, value in self.student.state_dict().items()}
                Broken.student = self.student
                detection["bbox_regression"] = detection["bbox_regression"] * float("nan")
            return detection, distillation

    monkeypatch.setattr(train, "Distiller", Broken)
    monkeypatch.setattr(kd.run.progress, "CHECKPOINT_MINUTES", 0)
    words = ("--output", tmp_path / "x", "--max-iterations", "8")
    message = r"^bbox_regression, gradient norm not finite at iteration 2, images \[.*\]: "
    with pytest.raises(RuntimeError, match=message):
        run(*words)
    assert all(torch.equal(Broken.before[name], value) for name, value in Broken.student.state_dict().items())
    report = json.loads((tmp_path / "x" / "nonfinite.json").read_text())
    assert report["iteration"] == 2 and len(report["image_ids"]) == 4 and report["values"]["classification"] > 0
    assert torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_gradient_that_is_not_finite_stops_training(tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite at iteration \d+, images \[.*there is no checkpoint yet"):
        run("--output", tmp_path / "x", "--lr", "1e30", "--optimizer", "sgd", "--max-iterations", "20", "--epochs", "9")


def test_fp16_skips_steps(tmp_path, monkeypatch):
    """A scale that overflows fp16 is lowered, and the step it cost is counted."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    small = ("--image-size", 32, 32, "--batch-size", 2)
    run("--output", tmp_path / "x", "--amp", "fp16", "--max-iterations", 2, *small)
    (line,) = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert line["skipped_steps"] == 2
    state = torch.load(tmp_path / "x" / "checkpoint.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0**38
    assert all(parameter["step"] == 0 for parameter in state["optimizer"]["state"].values())


def test_learning_rate_of_the_coco_recipe():
    """16 images: 0.01, Faster R-CNN 0.02; the first of 500 warm-up steps; drops at 8 and 11 of 12 epochs."""
    args = train.parse_args(["--optimizer", "sgd"])
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    optimizer, schedule, plan = train.make_optimizer(args, parameter, iterations=12_000, images_per_step=16)
    assert plan == "SGD, 500 steps of warm-up, learning rate 0.01, divided by 10 after 8000 and 11000 steps"
    rates = []
    for _ in range(12_000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert_close(rates[0], 0.01 / 500)
    assert_close(rates[499], 0.01)
    assert_close([rates[7999], rates[8000], rates[10999], rates[11000]], [0.01, 0.001, 0.001, 0.0001])
    args.detector = "faster_rcnn"
    optimizer, _, plan = train.make_optimizer(args, parameter, iterations=216, images_per_step=2)
    assert_close(optimizer.param_groups[0]["initial_lr"], 0.0025)
    assert "21 steps of warm-up" in plan  # a tenth of a short run


def test_accumulated_batches_are_one_step(tmp_path):
    """RetinaNet's losses are means over images: one step of 4 images, or of twice 2, gives the same student."""
    torch.manual_seed(1)
    start = build_detector("retinanet", "test_resnet", 5, image_size=(64, 64), from_scratch=False)
    save(start.state_dict(), tmp_path / "start.pth")
    words = ("--detector", "retinanet", "--optimizer", "sgd", "--max-iterations", 1)
    students = []
    for size, times in ((4, 1), (2, 2)):
        folder = tmp_path / str(times)
        batches = ("--batch-size", size, "--accumulate", times)
        run(*words, *batches, "--student-weights", tmp_path / "start.pth", "--output", folder)
        students.append(torch.load(folder / "model.pt", weights_only=True)["model"])
        (line,) = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        students[-1]["loss"] = torch.tensor(line["losses"]["bbox_regression"])
    assert_close(*students, rtol=1e-4, atol=1e-6)
    name = "head.regression_head.bbox_reg.weight"
    assert not torch.equal(students[0][name], start.state_dict()[name])


def test_start_from_a_detector_with_other_classes(tmp_path, capsys):
    """All weights are taken over but those of the class head; another backbone is refused."""
    words = ("--max-iterations", 1)
    other = build_detector("fcos", "test_resnet", 91, image_size=(64, 64))
    save(other.state_dict(), tmp_path / "coco.pth")
    run(*words, "--student-weights", tmp_path / "coco.pth", "--output", tmp_path / "x")
    head = ("head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias")
    assert f"started from {tmp_path / 'coco.pth'}, except: {', '.join(head)}\n" in capsys.readouterr().out
    ours = build_detector("fcos", "test_resnet", 5, image_size=(64, 64))
    assert set(start_from(ours, tmp_path / "coco.pth")) == set(head)
    ours, theirs = ours.state_dict(), other.state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set(head)

    run(*words, "--student-weights", tmp_path / "x" / "model.pt", "--output", tmp_path / "y")
    assert "model.pt, except: nothing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="coco.pth do not fit"):
        run(*words, "--student-weights", tmp_path / "coco.pth", "--student", "r18", "--output", tmp_path / "z")


def test_start_as_what_the_weights_were_trained_for(tmp_path):
    """Trained or frozen normalisation, group norm and anchors are those of the file, not of the images' size."""
    built = {"from_scratch": True, "anchors": "half", "tower_norm": False, "giou": True}
    detector = build_detector("retinanet", "test_resnet", 5, image_size=(64, 64), **built)
    arguments = {"detector": "retinanet", "backbone": "test_resnet", "num_classes": 5, "image_size": (64, 64), **built}
    categories = {label: {"id": label, "name": str(label)} for label in range(1, 5)}
    save_model(detector, arguments, categories, tmp_path / "model.pt")
    assert arguments_of(tmp_path / "model.pt", "retinanet") == built | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    frozen = build_detector("retinanet", "test_resnet", 5, image_size=(64, 64), from_scratch=False)
    save(frozen.state_dict(), tmp_path / "plain.pth")
    assert arguments_of(tmp_path / "plain.pth", "retinanet") == {"from_scratch": False, "anchors": "torchvision"}

    words = ("--detector", "retinanet", "--image-size", 400, 400, "--max-iterations", 1, "--batch-size", 1)
    run(*words, "--student-weights", tmp_path / "model.pt", "--output", tmp_path / "x")
    started, _ = load_model(tmp_path / "x" / "model.pt")
    assert started.anchor_generator.sizes == detector.anchor_generator.sizes


def test_best_model(tmp_path, monkeypatch, capsys):
    """best.pt is the student of the evaluation with the highest AP, and has its row beside the last."""
    values = iter((0.2, 0.5, 0.3))
    monkeypatch.setattr(train, "evaluate", lambda *args, **_: ({**dict.fromkeys(METRICS, 0.0), "AP": next(values)}, []))
    monkeypatch.setattr(train, "draw_samples", lambda *_: Image.new("RGB", (1, 1)))
    saved = []
    monkeypatch.setattr(train, "save_model", lambda *args: saved.append(args[-1].name) or save({}, args[-1]))
    run("--epochs", 3, "--max-iterations", 12, "--eval-interval", 1, "--output", tmp_path / "x")
    assert saved == ["best.pt", "best.pt", "model.pt"]
    *_, last, best = capsys.readouterr().out.splitlines()
    assert last.split()[:3] == ["plain", "test_resnet", "0.300"]
    assert best.split()[:6] == ["plain", "test_resnet,", "epoch", "2", "(best.pt)", "0.500"]


def test_torchvision_weights_as_teacher(coco_folder, tmp_path, capsys):
    """A plain state_dict is accepted if every tensor fits; the number of classes is the data's."""
    run("--data", coco_folder, "--output", tmp_path / "teacher")
    weights = torch.load(tmp_path / "teacher" / "model.pt", weights_only=True)["model"]
    save(weights, tmp_path / "plain.pth")
    assert load_torchvision(tmp_path / "plain.pth", "fcos", "test_resnet", 5, (64, 64))
    words = ("--teacher", "test_resnet", "--teacher-weights", tmp_path / "plain.pth")
    run("--method", "l2", *words, "--data", coco_folder, "--output", tmp_path / "l2")
    assert "teacher test_resnet from" in capsys.readouterr().out
    with pytest.raises(ValueError, match="do not fit"):
        load_torchvision(tmp_path / "plain.pth", "fcos", "r18", 5, (64, 64))
