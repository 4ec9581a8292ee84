"""Data folders are recognised by what lies in them; one that is not says what was found and what is known."""

import json

import pytest

import train
from kd.data.coco import DataError
from kd.data.layouts import find_layout
from kd.data.shapes import Shapes
from kd.run.arguments import settle
from tests.conftest import write_coco


def layout(root, *files: str) -> dict[str, str]:
    """The paths found in a folder with these files, relative to it."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return {name: path.replace(str(root), "").lstrip("/") for name, path in find_layout(str(root)).items()}


def paths(*values: str) -> dict[str, str]:
    return dict(zip(("train_images", "train_annotations", "val_images", "val_annotations"), values))


VOC07 = ("VOC2007/ImageSets/Main/trainval.txt", "VOC2007/ImageSets/Main/test.txt")
VOC12 = tuple(f"VOC2012/ImageSets/Main/{name}.txt" for name in ("trainval", "train", "val"))
BOTH = "VOC20[01][27]/ImageSets/Main/trainval.txt"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            ["annotations/instances_val2017.json"],
            ("train2017", "annotations/instances_train2017.json", "val2017", "annotations/instances_val2017.json"),
        ),
        (
            [f"{split}/_annotations.coco.json" for split in ("train", "valid", "test")],
            ("train", "train/_annotations.coco.json", "valid", "valid/_annotations.coco.json"),
        ),
        (
            [f"{split}/_annotations.coco.json" for split in ("train", "test")],
            ("train", "train/_annotations.coco.json", "test", "test/_annotations.coco.json"),
        ),
        (["annotation_val.odgt"], ("Images", "annotation_train.odgt", "Images", "annotation_val.odgt")),
        ([*VOC07, *VOC12], ("", BOTH, "", VOC07[1])),
        ([VOC07[0], VOC07[1]], ("", VOC07[0], "", VOC07[1])),
        ([*VOC12], ("", VOC12[1], "", VOC12[2])),
        ([VOC07[1], *VOC12], ("", VOC12[0], "", VOC07[1])),  # of 2007 the test set only
        (
            [f"VOCdevkit/{name}" for name in (*VOC07, *VOC12)],
            ("VOCdevkit", f"VOCdevkit/{BOTH}", "VOCdevkit", f"VOCdevkit/{VOC07[1]}"),
        ),
    ],
)
def test_recognised(tmp_path, files, found):
    assert layout(tmp_path, *files) == paths(*found)


def test_not_recognised(tmp_path):
    with pytest.raises(DataError, match="--data .*absent: no such folder"):
        find_layout(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no known layout; it contains nothing. Known layouts are COCO .*; VOC "):
        layout(tmp_path)
    with pytest.raises(DataError, match=r"contains a.txt, images/. Known .*Roboflow's .*; CrowdHuman .*instead of --d"):
        layout(tmp_path, "images/1.jpg", "a.txt")
    with pytest.raises(DataError, match="has several layouts; it contains a.txt, annotation_train.odgt, images/, tr"):
        layout(tmp_path, "train2017/1.jpg", "annotation_train.odgt")
    with pytest.raises(DataError, match="Known layouts are"):  # before anything is trained
        settle(train.parse_args(["--device", "cpu", "--data", str(tmp_path / "images")]))


def test_paths_replace_those_of_the_folder(tmp_path):
    layout(tmp_path, "annotation_train.odgt")
    args = train.parse_args(["--device", "cpu", "--data", str(tmp_path), "--val-annotations", "other.json"])
    settle(args)
    assert (args.val_annotations, args.val_images) == ("other.json", str(tmp_path / "Images"))


def test_roboflow_trains(tmp_path):
    """Its category 0 names the project and has no boxes."""
    for split, seed in (("train", 1), ("valid", 0)):
        annotations = tmp_path / "export" / split / "_annotations.coco.json"
        write_coco(Shapes(4, seed, 64), annotations.parent, annotations)
        coco = json.loads(annotations.read_text())
        coco["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        annotations.write_text(json.dumps(coco))
    words = ["--data", str(tmp_path / "export"), "--student", "test_resnet", "--image-size", "64", "64"]
    words += ["--max-iterations", "2", "--device", "cpu", "--amp", "off", "--output", str(tmp_path / "run")]
    metrics = train.main(train.parse_args(words))
    assert list(metrics["AP_per_class"]) == ["shapes", "circle", "square", "triangle", "cross"]
    assert metrics["AP_per_class"]["shapes"] == -1 and "VOC_AP50" not in metrics
