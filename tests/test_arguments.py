"""Invalid arguments are rejected, with what is possible, before a folder is created or anything is computed."""

import pytest

import eval as evaluation_script
import train
from kd.methods import METHODS, build_method
from kd.run.arguments import settle

DISTILL = ("--teacher", "r18", "--method")
DEVICES = ("gpu", "mps", "xpu", "meta", "cpu:3", "cuda:x", "cuda:-1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "fsr", "--teacher", "r18"], "unknown method 'fsr': choose frs"),
        (["--method", "FRS", "--teacher", "r18"], "unknown method 'FRS': choose frs"),
        (["--method", "frs"], "--method frs needs a teacher: add --teacher"),
        (["--teacher", "r18"], "none does not distil: leave out --teacher"),
        (["--set", "alpha=1"], "none does not distil: leave out --set"),
        (["--inherit"], "--inherit needs a teacher: add --teacher"),
        (["--inherit", "--teacher", "r18", "--set", "alpha=1"], "none does not distil: leave out --set"),
        (["--distill-weight", "2"], "none does not distil: leave out --distill-weight"),
        ([*DISTILL, "frs", "--distill-weight", "0"], "--distill-weight is 0.0: give a finite number above 0"),
        ([*DISTILL, "frs", "--set", "gamma=1"], "one of alpha, beta"),
        ([*DISTILL, "frs", "--set", "alpha=1", "--set", "alpha=2"], "--set alpha=2: alpha is given twice"),
        ([*DISTILL, "frs", "--set", "alpha"], "takes NAME=VALUE"),
        ([*DISTILL, "frs", "--set", "alpha=small"], r"takes alpha as float \| None"),
        ([*DISTILL, "pgd", "--set", "xi=0.8"], r"takes xi as tuple\[float, float\], default \(0.8, 0.6\)"),
        ([*DISTILL, "pgd", "--set", "xi=(1, 1, 1)"], r"takes xi as tuple\[float, float\]"),
        ([*DISTILL, "ssim", "--set", "normalize=3"], "takes normalize as str"),
        ([*DISTILL, "ssim", "--set", "normalize=all"], "normalize must be .* not 'all'"),
        ([*DISTILL, "ssim", "--set", "window=0"], "window must be odd and positive, sigma positive, not 0 and 1.5"),
        ([*DISTILL, "ssim", "--set", "window=8"], "window must be odd and positive, sigma positive, not 8 and 1.5"),
        ([*DISTILL, "ssim", "--set", "sigma=0"], "sigma positive, not 11 and 0"),
        ([*DISTILL, "frs", "--set", "alpha=-1"], "--set alpha=-1: give finite numbers from 0"),
        ([*DISTILL, "frs", "--set", "alpha=1e400"], "--set alpha=1e400: give finite numbers from 0"),
        ([*DISTILL, "pgd", "--set", "xi=(0.5, 1e400)"], "give finite numbers from 0"),
        ([*DISTILL, "pgd", "--set", "xi=(0.5, 2)"], r"xi=\(0.5, 2\) <= 1"),
        ([*DISTILL, "pgd", "--set", "top_k=0"], "top_k=0 > 0"),
        ([*DISTILL, "pgd", "--set", "temperature=0"], "temperature=0 > 0"),
        ([*DISTILL, "pgd", "--set", "level_weights=(1,)"], r"level_weights=\(1,\) of all levels"),
        ([*DISTILL, "drkd", "--set", "nodes=(9, 9, 9, 9, 0)"], "5 levels need as many nodes, 1 or more each"),
        ([*DISTILL, "frs", "--distill-weight", "inf"], "--distill-weight is inf: give a finite number above 0"),
        (["--lr", "inf"], "--lr is inf: give a finite number above 0"),
        (["--clip-grad", "inf"], "--clip-grad is inf: give a number from 0"),
        (["--seed", "18446744073709551616"], "--seed is 18446744073709551616: give a number from 0 to 4294967295"),
        (["--epochs", "100000000000000000000"], "--epochs is 100000000000000000000: give a number from 1"),
        (["--image-size", "99999", "99999"], "--image-size 99999 99999: give .* from 32 to 10000 pixels"),
        (["--workers", "5000"], "--workers is 5000: give a number from 0 to .* this machine has .* processors"),
        (["--data", ""], "--data is empty: give a value, or leave it out"),
        (["--output", ""], "--output is empty: give a value, or leave it out"),
        (["--data", __file__], "test_arguments.py is a file: give the folder that contains train2017/"),
        (["--pretrained", "absent.pth"], "--pretrained absent.pth: no such file"),
        (["--student-weights", "absent.pt"], "--student-weights absent.pt: no such file"),
        (["--student-weights", __file__, "--pretrained"], "replaces the whole student: leave out --pretrained"),
        (["--accumulate", "0"], "--accumulate is 0: give a number from 1"),
        ([*DISTILL, "frs", "--distill-weight", "auto:0"], "--distill-weight is 0.0: give a finite number above 0"),
        ([*DISTILL, "frs", "--teacher-weights", "absent.pt"], "--teacher-weights absent.pt: no such file"),
        ([*DISTILL, "l1", "--set", "p=2"], "one of loss_weight"),
        ([*DISTILL, "pgd", "--detector", "faster_rcnn"], "faster_rcnn"),
        (["--detector", "retina"], "unknown detector 'retina': choose retinanet"),
        (["--student", "resnet5O"], "did you mean.*resnet50"),
        ([*DISTILL, "l2", "--teacher", "resnet5O"], "did you mean.*resnet50"),
        (
            [*DISTILL, "l2", "--teacher", "fcos_resnet50"],
            "timm has no model .* Detectors of torchvision are fcos_",
        ),
        (
            [*DISTILL, "l2", "--teacher", "fcos_resnet50_fpn", "--detector", "gfl"],
            "--teacher fcos_resnet50_fpn is a detector of the family fcos: leave out --detector gfl",
        ),
        (["--epochs", "0"], "--epochs is 0: give a number from 1 to 1000000000"),
        (["--batch-size", "-1"], "--batch-size is -1: give a number from 1"),
        (["--max-iterations", "0"], "--max-iterations is 0"),
        (["--eval-interval", "0"], "--eval-interval is 0"),
        (["--workers", "-2"], "--workers is -2: give a number from 0 to"),
        (["--seed", "-2"], "--seed is -2"),
        (["--lr", "0"], "--lr is 0.0: give a finite number above 0"),
        (["--lr", "nan"], "--lr is nan: give a finite number above 0"),
        (["--clip-grad", "-1"], "--clip-grad is -1.0: give a number from 0"),
        (["--clip-grad", "nan"], "--clip-grad is nan: give a number from 0"),
        (["--aspect-ratio-group-factor", "-1"], "--aspect-ratio-group-factor is -1: give a number from 0 to 100"),
        (["--multi-scale", "800", "640"], "--multi-scale 800 640: give the lower side first"),
        (["--multi-scale", "96", "128"], "96 128: give a range that includes the short side of --image-size, 64"),
        (["--image-size", "64", "96"], "shapes are square: give --image-size 64 64"),
        (["--image-size", "16", "16"], "--image-size 16 16: give the short side, then the long side, from 32 to 10000"),
        (["--image-size", "96", "64", "--data", "x"], "--image-size 96 64: give the short side"),
        (["--train-images", "x"], "all four paths are needed: --train-annotations, --val-images, --val-annotations"),
        *((["--device", name], f"--device {name}: give cuda, cuda:NUMBER or cpu") for name in DEVICES),
        (["--sync-bn"], "--sync-bn needs several GPUs"),
    ],
    ids=" ".join,
)
def test_refused(words, message):
    with pytest.raises(ValueError, match=message):
        settle(train.parse_args(["--device", "cpu", *words]))


def test_no_such_gpu(monkeypatch):
    """Of train.py and eval.py: none at all, a number beyond theirs, more processes than GPUs."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="torch finds no GPU; give --device cpu"):
        settle(train.parse_args(["--device", "cuda"]))
    with pytest.raises(ValueError, match="torch finds no GPU; give --device cpu"):
        evaluation_script.main(evaluation_script.parse_args(["runs", "--device", "cuda"]))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match="--device cuda:2: there is no GPU 2 for this process; torch finds 2"):
        settle(train.parse_args(["--device", "cuda:2"]))
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="--device cuda: there is no GPU 3 for this process"):
        settle(train.parse_args(["--device", "cuda"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "foo"], "--device foo: give cuda, cuda:NUMBER or cpu"),
        (["--workers", "-1"], "--workers is -1: give a number from 0"),
    ],
    ids=" ".join,
)
def test_refused_by_evaluation(words, message):
    with pytest.raises(ValueError, match=message):
        evaluation_script.main(evaluation_script.parse_args(["runs", *words]))


@pytest.mark.parametrize(
    "words",
    [
        *(["--optimizer", "adam"], ["--amp", "fp8"], ["--resume", "yes"], ["--epochs", "two"]),
        *(["--meth", "frs"], ["--help-method", "fsr"], ["--distill-weight", "auto:half"]),
    ],
    ids=" ".join,
)
def test_refused_while_parsing(words, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(words)
    assert words[0] in capsys.readouterr().err


def test_hyper_parameters_reach_the_method():
    """Numbers, tuples, names and None as Python reads them; an integer serves where a float is asked for."""
    assert train.parse_args(["--set", "a=1", "b=2", "--set", "c=3"]).set == ["a=1", "b=2", "c=3"]

    def build(name: str, *settings: str):
        return build_method(name, "fcos", 8, 8, (8, 16), list(settings))

    pgd = build("pgd", "xi=(0.5, 1)", "top_k=9", "alpha=1")
    assert (pgd.xi, pgd.top_k, pgd.alpha) == ((0.5, 1), 9, 1)
    ssim = build("ssim", "normalize=channel", "loss_weight=None")
    assert (ssim.options["normalize"], ssim.loss_weight) == ("channel", 4.0)


def test_default_hyper_parameters():
    """They are those of the papers or the public code; each method's file names its source."""
    frs = {d: METHODS["frs"](d, 8, 8, (8,)) for d in ("retinanet", "fcos", "faster_rcnn")}
    assert [(m.alpha, m.beta) for m in frs.values()] == [(0.005, 0.02), (0.01, 0.05), (0.002, 0.1)]
    assert frs["fcos"].warmup == 500 and frs["fcos"].adapters[0].weight.shape == (8, 8, 3, 3)
    pgd = METHODS["pgd"]("fcos", 8, 8, (8,))
    assert (pgd.alpha, pgd.beta, pgd.gamma, pgd.delta) == (0.04, 0.02, 0.064, 0.0008)
    assert (pgd.temperature, pgd.top_k, pgd.xi) == (0.8, 30, (0.8, 0.6))
    assert pgd.level_weights == (1.0, 1.25, 1.5, 1.75, 2.0)
    ssim = METHODS["ssim"]("fcos", 8, 8, (8,))
    assert ssim.options == {"normalize": "image", "window": 11, "sigma": 1.5}


def test_recipes(coco_folder):
    """The data decide what is not given."""
    shapes, coco = (train.parse_args(["--device", "cpu", *words]) for words in ([], ["--data", str(coco_folder)]))
    for args in (shapes, coco):
        settle(args)
    assert (shapes.image_size, shapes.optimizer, shapes.output) == ([64, 64], "adamw", "runs/none-fcos-r50")
    assert (coco.image_size, coco.optimizer, coco.output) == ([800, 1333], "sgd", "runs/none-fcos-r50-coco")
    assert coco.val_annotations == str(coco_folder / "annotations" / "instances_val2017.json")
