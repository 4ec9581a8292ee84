"""Annotation files that somebody else wrote: what is read, what is refused, and nothing else ever happens."""

import copy
import json
import math
import random

import pytest
import torch
from PIL import Image

from kd.data import CocoFolder
from kd.data.coco import DataError, read_coco
from kd.data.transforms import augmentation
from kd.evaluation import coco_metrics


def valid() -> dict:
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 5, "file_name": "a.jpg", "width": 40, "height": 30, "license": 1},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
        ],
        "categories": [{"id": 9, "name": "dog", "supercategory": "animal"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 9, "bbox": [2, 3, 10, 8], "area": 75.5, "iscrowd": 0},
            {
                "id": 2,
                "image_id": 3,
                "category_id": 4,
                "bbox": [0.5, 1.5, 7.25, 9],
                "segmentation": [[1, 2, 3, 4, 5, 6]],
            },
            {"id": 3, "image_id": 5, "category_id": 4, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
        ],
    }


def changed(key: str, position: int, **fields) -> dict:
    """The valid file with some fields of one entry replaced."""
    coco = valid()
    coco[key][position].update(fields)
    return coco


@pytest.fixture
def write(tmp_path):
    """A function that writes annotations and returns their path."""

    def to_disk(content) -> tuple:
        file = tmp_path / "instances.json"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return file

    return to_disk


def test_what_is_kept(write):
    """The fields that are used, with area and crowd flag filled in: 7.25 x 9 = 65.25."""
    coco = read_coco(write(valid()))
    assert list(coco) == ["images", "categories", "annotations"]
    assert coco["images"][0] == {"id": 5, "file_name": "a.jpg", "width": 40, "height": 30}
    assert coco["annotations"][1] == {
        "id": 2,
        "image_id": 3,
        "category_id": 4,
        "bbox": [0.5, 1.5, 7.25, 9],
        "area": 65.25,
        "iscrowd": 0,
    }


@pytest.mark.parametrize("area", [None, -3])
def test_an_area_that_cannot_be_is_the_box(write, area):
    assert read_coco(write(changed("annotations", 0, area=area, iscrowd=None)))["annotations"][0]["area"] == 80


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode(write, encoding):
    text = json.dumps(changed("categories", 0, name="Hündin"), ensure_ascii=False)
    assert read_coco(write(text.encode(encoding)))["categories"][0]["name"] == "Hündin"


TWICE = "ids that several {} share (1): id {}. Give each its own id."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"{", "is not JSON: Expecting property name"),
        (b"\x89PNG\r\n", "is not JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "is not JSON: maximum recursion depth"),
        (b"1" * 5000, "is not JSON: Exceeds the limit"),
        (b"null", "has no list of images, categories, annotations"),
        ({"images": [], "categories": {}}, "has no list of categories, annotations"),
        ([{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}], "is a results file with 1 detections"),
        ({**valid(), "images": []}, "lists no images"),
        ({**valid(), "categories": []}, "lists no categories"),
        ({**valid(), "images": [None, 7]}, "images that are not JSON objects (2): entry 0, entry 1."),
        (changed("images", 1, id="3"), "images whose id is not an integer below 2^53 (1): entry 1 has '3'."),
        (changed("images", 0, id=True), "entry 0 has True"),
        (changed("categories", 0, id=None), "categories whose id is not an integer below 2^53 (1): entry 0 has None."),
        (changed("annotations", 0, id=1.0), "annotations whose id is not an integer below 2^53 (1): entry 0 has 1.0."),
        (changed("annotations", 0, id=2**53), "entry 0 has 9007199254740992"),
        (changed("images", 1, id=5), TWICE.format("images", 5)),
        (changed("categories", 1, id=9), TWICE.format("categories", 9)),
        (changed("annotations", 2, id=1), TWICE.format("annotations", 1)),
        (changed("images", 0, file_name=7), "images whose file_name is not a string (1): id 5 has 7."),
        (changed("images", 0, width=0), "images whose width is not a number above 0 (1): id 5 has 0."),
        (changed("images", 0, height=None), "images whose height is not a number above 0 (1): id 5 has None."),
        (changed("categories", 0, name=7), "categories whose name is not a string (1): id 9 has 7."),
        (changed("annotations", 0, bbox=[1, 2, 3]), "four finite numbers (1): id 1 has [1, 2, 3]."),
        (changed("annotations", 0, bbox=[1, 2, 3, math.nan]), "four finite numbers (1): id 1 has [1, 2, 3, nan]."),
        (changed("annotations", 0, bbox=[1, 2, math.inf, 4]), "id 1 has [1, 2, inf, 4]."),
        (changed("annotations", 0, bbox=[1, 2, 10**400, 4]), "id 1 has [1, 2, 1000"),
        (changed("annotations", 0, bbox=["1", 2, 3, 4]), "id 1 has ['1', 2, 3, 4]."),
        (changed("annotations", 0, bbox=[True, 2, 3, 4]), "id 1 has [True, 2, 3, 4]."),
        (changed("annotations", 0, bbox=None), "id 1 has None."),
        (changed("annotations", 0, area="80"), "area is not a finite number or absent (1): id 1 has '80'."),
        (changed("annotations", 0, iscrowd=2), "iscrowd is not 0, 1 or absent (1): id 1 has 2."),
        (changed("annotations", 0, image_id=99), "image_id is not among the images (1): id 1 has 99."),
        (changed("annotations", 0, category_id=1), "category_id is not among the categories (1): id 1 has 1."),
    ],
)
def test_errors(write, content, message):
    with pytest.raises(DataError) as error:
        read_coco(write(content))
    assert "instances.json" in str(error.value) and message in str(error.value)


def test_twenty_offenders_are_named(write):
    coco = valid()
    coco["annotations"] = [{**coco["annotations"][0], "id": i, "bbox": []} for i in range(30)]
    with pytest.raises(
        DataError, match=r"\(30\): id 0 has \[\], .*, id 19 has \[\], \.\.\.\. Correct or remove them\."
    ):
        read_coco(write(coco))


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(tmp_path / name)


NASTY = (None, "", "x", "a.jpg", "../a.jpg", "\0", "\ud800", math.nan, math.inf, -math.inf, -1, 0, 1, 3, 4, 5, 9, 2**31)
NASTY += (
    2**53,
    -(2**63),
    2**64,
    10**400,
    1e308,
    -1e15,
    1e-30,
    0.5,
    True,
    False,
    [],
    {},
    [[]],
    [0] * 4,
    {"id": 0},
    [None],
)


def places(value) -> list[tuple]:
    """Every (container, key) of nested lists and dicts."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def mutate(rng: random.Random) -> bytes:
    """Return the valid file after one to three random changes, and sometimes a few more to its text."""
    coco = valid()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        container, key = rng.choice(places(coco) or [([0], 0)])
        value = copy.deepcopy(rng.choice([*NASTY, container[key]]))
        change = rng.choice(("replace", "replace", "delete", "insert"))
        if change == "delete":
            del container[key]
        elif change == "replace":
            container[key] = value
        elif isinstance(container, list):
            container.insert(key, value)
        else:
            container[rng.choice(["id", "bbox", "area", "iscrowd", "width", "other"])] = value
    text = bytearray(json.dumps(coco).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.choice(b'0123456789-.eE"{}[]:, \\\x00\xff')
    return bytes(text[: rng.randrange(len(text))] if rng.random() < 0.05 else text)


def check(folder, content: bytes, skip_bad_images: bool) -> bool:
    """Read a data set, all its items, and evaluate on it; return whether it was accepted."""
    (folder / "instances.json").unlink(missing_ok=True)  # to write over a file waits for the disk
    (folder / "instances.json").write_bytes(content)
    try:
        dataset = CocoFolder(folder, folder / "instances.json", augmentation(True), skip_bad_images=skip_bad_images)
    except DataError as error:
        assert str(folder / "instances.json") in str(error) and str(error).encode()
        return False
    found = {}
    for image, target in (dataset[i] for i in range(len(dataset))):
        (x1, y1, x2, y2), labels = target["boxes"].unbind(1), target["labels"]
        assert (x1 >= 0).all() and (x1 < x2).all() and (x2 <= image.shape[2]).all()
        assert (y1 >= 0).all() and (y1 < y2).all() and (y2 <= image.shape[1]).all()
        assert set(labels.tolist()) <= set(dataset.categories) and (labels < dataset.num_classes).all()
        found[target["image_id"]] = {**target, "scores": torch.ones(len(labels))}
    metrics = coco_metrics(found, dataset.coco(), dataset.categories)
    assert all(-1 <= value <= 1 for value in metrics.values())
    return True


def test_no_other_exception(tmp_path):
    """2,000 damaged files: each is read or refused with a DataError, and both happen often."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    Image.new("L", (20, 20)).save(tmp_path / "b.png")
    rng = random.Random(0)
    accepted = sum(check(tmp_path, mutate(rng), rng.random() < 0.5) for _ in range(2000))
    assert 200 < accepted < 1800
