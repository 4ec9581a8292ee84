"""Data sets: labels, boxes, pictures as other people save them, and random numbers that can be repeated."""

import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.testing import assert_close

from kd.data import CocoFolder, collate, group_batches, open_dataset, open_image, set_train_scales, summarize
from kd.data.coco import DataError
from kd.data.folder import COCO_NAMES, label_categories
from kd.data.shapes import Shapes
from kd.data.transforms import augmentation
from kd.detectors import build_detector
from kd.evaluation import coco_metrics


def valid() -> dict:
    return {
        "images": [
            {"id": 5, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 9, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 4, "bbox": [30, 20, 20, 20], "area": 400, "iscrowd": 0},
            {"id": 3, "image_id": 5, "category_id": 4, "bbox": [50, 50, 5, 5], "area": 25, "iscrowd": 0},
            {"id": 4, "image_id": 5, "category_id": 4, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
        ],
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes annotations and two images, and returns the paths."""

    def to_disk(coco: dict) -> tuple:
        Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "a.jpg", quality=95)
        Image.new("L", (20, 20), 128).save(tmp_path / "b.png")
        (tmp_path / "instances.json").write_text(json.dumps(coco))
        return tmp_path, tmp_path / "instances.json"

    return to_disk


@pytest.fixture
def read(tmp_path):
    """A function that saves a picture, annotates it with a size and one box, and returns its pixels as read."""

    def through_disk(picture: Image.Image, name: str, size: tuple[int, int] | None = None, **options) -> torch.Tensor:
        picture.save(tmp_path / name, **options)
        width, height = size or picture.size
        coco = {
            "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
            "categories": [{"id": 1, "name": "thing"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3]}],
        }
        (tmp_path / "instances.json").write_text(json.dumps(coco))
        return torch.as_tensor(CocoFolder(tmp_path, tmp_path / "instances.json")[0][0])

    return through_disk


def test_boxes_and_labels(write):
    """Category ids 4 and 9 become 1 and 2; a box past the edge is cut, one outside and the crowd are left out."""
    dataset = CocoFolder(*write(valid()), transforms=augmentation(train=False))
    assert dataset.num_classes == 3
    assert {label: c["name"] for label, c in dataset.categories.items()} == {1: "cat", 2: "dog"}
    (empty, no_boxes), (image, target) = dataset[0], dataset[1]  # by ascending image id
    assert_close(target["boxes"], torch.tensor([[2.0, 3.0, 12.0, 11.0], [30.0, 20.0, 40.0, 30.0]]))
    assert target["labels"].tolist() == [2, 1] and target["image_id"] == 5
    assert image.shape == (3, 30, 40) and image.dtype == torch.float32
    assert_close(image[:, 15, 20], torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)
    assert no_boxes["boxes"].shape == (0, 4) and no_boxes["labels"].shape == (0,)
    assert empty.shape == (3, 20, 20) and (empty == 128 / 255).all()
    assert "2 images (1 without boxes), 2 boxes of 2 categories" in dataset.summary
    assert "left out: 1 crowd regions, 1 boxes without area, 0 bad images" in dataset.summary
    images, targets = collate([dataset[0], dataset[1]])
    assert isinstance(images, list) and isinstance(targets, list)


@pytest.mark.parametrize(
    "bbox", [[5, 5, 0, 4], [5, 5, 4, 0], [12, 5, -4, 4], [-9, 5, 9, 4], [40, 5, 9, 4], [5, 30, 4, 4], [0, 0, 1e-9, 9]]
)
def test_boxes_without_area(write, bbox):
    """Zero or negative width or height, outside, at the edge, or too thin for float32: in neither task."""
    coco = valid()
    coco["annotations"].append({"id": 5, "image_id": 5, "category_id": 9, "bbox": bbox})
    dataset = CocoFolder(*write(coco))
    assert "2 boxes without area" in dataset.summary
    assert len(dataset[1][1]["boxes"]) == 2 and len(dataset.coco()["annotations"]) == 3


def test_thin_boxes_survive_a_flip(write):
    """COCO's thinnest boxes have a hundredth of a pixel."""
    coco = valid()
    coco["annotations"].append({"id": 5, "image_id": 5, "category_id": 9, "bbox": [0, 0, 0.01, 0.01]})
    dataset = CocoFolder(*write(coco), transforms=augmentation(train=True))
    for dataset.epoch in range(10):
        boxes = dataset[1][1]["boxes"]
        assert len(boxes) == 3 and (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("annotations", [[], valid()["annotations"][2:]])
def test_a_data_set_without_boxes(write, annotations):
    with pytest.raises(DataError, match=r"has no box.*2 images \(2 without boxes\)"):
        CocoFolder(*write({**valid(), "annotations": annotations}))


def test_coco_keeps_its_own_ids():
    """COCO's 80 categories are labels 1..90 with gaps, as in torchvision; any subset is contiguous."""
    coco = [{"id": i, "name": name} for i, name in enumerate(COCO_NAMES) if i and name != "N/A"]
    assert len(coco) == 80
    labels = label_categories(coco)
    assert max(labels) == 90 and all(label == c["id"] for label, c in labels.items())
    assert list(label_categories(coco[10:])) == list(range(1, 71))


def test_categories_with_one_name_are_two_classes(write):
    dataset = CocoFolder(*write({**valid(), "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "dog"}]}))
    assert dataset.num_classes == 3 and dataset[1][1]["labels"].tolist() == [2, 1]


def detections(dataset) -> dict[int, dict]:
    """The ground truth as detections."""
    targets = [dataset[index][1] for index in range(len(dataset))]
    return {t["image_id"]: {**t, "scores": torch.ones(len(t["labels"]))} for t in targets}


def test_annotation_zero_can_be_found(write):
    """pycocotools notes the id of what a detection matches, and 0 where it matches nothing."""
    coco = valid()
    coco["annotations"] = [{**coco["annotations"][0], "id": 0}]
    dataset = CocoFolder(*write(coco))
    assert coco_metrics(detections(dataset), dataset.coco(), dataset.categories)["AP"] == pytest.approx(1)
    assert coco_metrics(detections(dataset), coco, dataset.categories)["AP"] == 0  # the trap


def test_evaluation_does_not_change_the_data_set(write):
    dataset = CocoFolder(*write(valid()))
    before = json.dumps(dataset.coco())
    coco_metrics(detections(dataset), dataset.coco(), dataset.categories)
    assert json.dumps(dataset.coco()) == before


def test_bad_images(write):
    """All are named with a reason; or left out, with their annotations, and what is left fits together."""
    coco = valid()
    folder, file = write(coco)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png", "cut.bmp"):
        noise.save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("404: not found")
    (folder / "zero.jpg").touch()
    Image.new("F", (20, 20)).save(folder / "float.tiff")
    names = ["gone.jpg", "", "\0", "b.png/x", "text.jpg", "zero.jpg", "cut.jpg", "cut.png", "cut.bmp", "float.tiff"]
    for name in [*names, "b.png"]:
        number = 10 + len(coco["images"])
        coco["images"].append({"id": number, "file_name": name, "width": 90, "height": 90})
        coco["annotations"].append({"id": number, "image_id": number, "category_id": 9, "bbox": [0, 0, 9, 9]})
    file.write_text(json.dumps(coco))
    with pytest.raises(DataError) as error:
        CocoFolder(folder, file)
    for reason in (
        "cannot be used (11): 'gone.jpg': file not found, '': file not found, ",
        "'text.jpg': not a JPEG, PNG, WEBP, BMP, TIFF, GIF or MPO file (14 bytes), ",
        "GIF or MPO file (0 bytes), ",
        "'cut.jpg': image file is truncated",
        "'cut.png': image file is truncated",
        "'cut.bmp': image file is truncated",
        "'float.tiff': floating-point pixels of unknown range, ",
        "'b.png': 20x20 pixels, but annotated as 90x90. Repair them",
    ):
        assert reason in str(error.value)
    dataset = CocoFolder(folder, file, skip_bad_images=True)
    assert "2 images (1 without boxes), 2 boxes" in dataset.summary and "11 bad images" in dataset.summary
    truth = dataset.coco()
    assert [image["id"] for image in truth["images"]] == [3, 5] and len(truth["annotations"]) == 3
    coco_metrics(detections(dataset), truth, dataset.categories)


def test_twenty_bad_images_are_named(write):
    coco = valid()
    coco["images"] += [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(100, 130)]
    with pytest.raises(DataError, match=r"\(30\): '100.jpg': .*, .*'119.jpg': file not found, \.\.\.\. Repair"):
        CocoFolder(*write(coco))


def test_no_folder_and_no_image_left(write):
    folder, file = write(valid())
    with pytest.raises(DataError, match="absent is not a folder"):
        CocoFolder(folder / "absent", file)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="has no box.*2 bad images"):
        CocoFolder(folder / "empty", file, skip_bad_images=True)


def test_an_image_that_breaks_later(write):
    """Damage that the check does not see, or that comes after it, names the file."""
    folder, file = write(valid())
    dataset = CocoFolder(folder, file)
    content = (folder / "b.png").read_bytes()
    start = content.index(b"IDAT") + 4
    (folder / "b.png").write_bytes(content[:start] + b"\xff" * 9 + content[start + 9 :])
    dataset_again = CocoFolder(folder, file)
    with pytest.raises(DataError, match="b.png cannot be used: .*Repair it"):
        dataset_again[0]
    (folder / "a.jpg").unlink()
    with pytest.raises(DataError, match="a.jpg cannot be used: .*No such file"):
        dataset[1]


def test_trailing_bytes_are_not_truncation(write):
    folder, file = write(valid())
    for name in ("a.jpg", "b.png"):
        with (folder / name).open("ab") as image:
            image.write(b"\0" * 100)
    assert len(CocoFolder(folder, file)) == 2


def test_subfolders_and_absolute_paths(write):
    folder, file = write(valid())
    (folder / "sub").mkdir()
    (folder / "a.jpg").rename(folder / "sub" / "a.jpg")
    coco = valid()
    coco["images"][0]["file_name"] = "sub/a.jpg"
    coco["images"][1]["file_name"] = str(folder / "b.png")
    file.write_text(json.dumps(coco))
    assert len(CocoFolder(folder, file)) == 2


def test_formats_of_photographs(write):
    """Files are judged by their content. An EPS would start Ghostscript; two pictures in one JPEG are read as one."""
    folder, file = write(valid())
    Image.new("RGB", (40, 30)).save(folder / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    assert CocoFolder(folder, file)[1][0].shape == (3, 30, 40)
    for name in ("EPS", "PPM", "PDF"):
        Image.new("RGB", (40, 30)).save(folder / "a.jpg", name)
        with pytest.raises(DataError, match=r"\(1\): 'a.jpg': not a JPEG, PNG, WEBP, BMP, TIFF, GIF or MPO file"):
            CocoFolder(folder, file)


def test_too_many_pixels(write, recwarn):
    """91 million: one error, and no warning of Pillow's."""
    coco = valid()
    coco["images"][1] |= {"width": 9600, "height": 9500}
    folder, file = write(coco)
    Image.new("1", (9600, 9500)).save(folder / "b.png")
    with pytest.raises(DataError, match=r"\(1\): 'b.png': more than 89 million pixels: scale it down"):
        CocoFolder(folder, file)
    with pytest.raises(OSError, match="more than 89 million pixels"):
        open_image(folder / "b.png")
    assert not [warning for warning in recwarn if "pixels" in str(warning.message)]


def test_a_hole_in_a_file(write):
    """In the header, the check finds it. In the pixels of a JPEG, nobody can tell: the rest is read."""
    folder, file = write(valid())
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / "a.jpg")
    content = (folder / "a.jpg").read_bytes()
    for start, end in ((2, 300), (len(content) - 300, len(content) - 100)):
        (folder / "a.jpg").write_bytes(content[:start] + bytes(end - start) + content[end:])
        if start == 2:
            with pytest.raises(DataError, match="'a.jpg': not a JPEG"):
                CocoFolder(folder, file)
        else:
            assert CocoFolder(folder, file)[1][0].shape == (3, 30, 40)


def test_images_in_both_sets(write):
    """One line of warning names the first; a set of its own has none."""
    folder, file = write(valid())
    both = CocoFolder(folder, file)
    assert summarize(both, both).splitlines()[2] == (
        f"warning: 2 of 2 validation images are also training images, first {folder.resolve() / 'a.jpg'}: AP will be "
        "too high"
    )
    (folder / "other").mkdir()
    for name in ("a.jpg", "b.png"):
        (folder / "other" / name).write_bytes((folder / name).read_bytes())
    assert len(summarize(both, CocoFolder(folder / "other", file)).splitlines()) == 2
    assert len(summarize(Shapes(2, 0, 64), Shapes(2, 0, 64)).splitlines()) == 2


GRAY = np.tile(np.arange(0, 250, 10, dtype=np.uint8), (8, 1))  # [8, 25], 0 to 240 from left to right


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "x.png"), ("LA", "x.png"), ("P", "x.png"), ("P", "x.gif"), ("RGBA", "x.png"), ("CMYK", "x.tiff")],
)
def test_modes_become_rgb(read, mode, name):
    picture = Image.fromarray(GRAY).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    assert_close(read(picture, name), torch.from_numpy(GRAY).expand(3, -1, -1))


def test_transparent_palette(read, recwarn):
    """Transparency is dropped: the color behind it is the palette's."""
    picture = Image.fromarray(GRAY).convert("P")
    pixels = read(picture, "x.png", transparency=bytes(range(256)))
    assert_close(pixels, torch.from_numpy(GRAY).expand(3, -1, -1))
    assert not recwarn.list


@pytest.mark.parametrize("name", ["x.png", "x.tiff"])
def test_sixteen_bits_are_scaled(read, name):
    """65535 / 257 = 255."""
    pixels = read(Image.fromarray(GRAY.astype(np.uint16) * 257), name)
    assert_close(pixels, torch.from_numpy(GRAY).expand(3, -1, -1))


def test_thirty_two_bits_are_cut_off(read):
    """Integers beyond 16 bits are white, negative ones black."""
    pixels = read(Image.fromarray(np.array([[-5, 257 * 9, 2**30]] * 4, dtype=np.int32)), "x.tiff")
    assert pixels[0, 0].tolist() == [0, 9, 255]


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tiff", "x.webp"])
def test_orientation(read, tag, name):
    """What is read is upright: a picture stored turned the other way comes back, whatever its tag."""
    upright = Image.new("RGB", (48, 32), (0, 0, 0))
    upright.paste((255, 0, 0), (0, 0, 24, 16))
    upright.paste((0, 0, 255), (24, 16, 48, 32))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose by number; 6 and 8 are each other's inverse
    stored = upright.transpose(Image.Transpose(undo[tag])) if tag > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    pixels = read(stored, name, size=(48, 32), exif=exif)
    assert pixels.shape == (3, 32, 48)
    assert_close(pixels[:, 8, 12], torch.tensor([255, 0, 0], dtype=torch.uint8), atol=9, rtol=0)
    assert_close(pixels[:, 24, 36], torch.tensor([0, 0, 255], dtype=torch.uint8), atol=9, rtol=0)


def test_orientation_that_the_annotations_ignore(read):
    """Boxes drawn on the picture as stored keep it so; if neither size agrees, it is a bad image."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.new("RGB", (48, 32))
    assert read(stored, "x.jpg", exif=exif).shape == (3, 32, 48)
    assert read(stored, "x.jpg", size=(32, 48), exif=exif).shape == (3, 48, 32)
    with pytest.raises(DataError, match="'x.jpg': 48x32 pixels, but annotated as 33x48"):
        read(stored, "x.jpg", size=(33, 48), exif=exif)


def test_a_broken_tag_is_none(read):
    for broken in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0"):
        assert read(Image.new("RGB", (48, 32)), "x.jpg", exif=broken).shape == (3, 32, 48)


@pytest.mark.parametrize("kind", ["shapes", "folder"])
def test_random_numbers_depend_on_seed_epoch_and_index(write, kind):
    """The same item twice is the same, whatever was drawn before; over epochs and seeds it changes."""

    def opened(seed: int):
        if kind == "shapes":
            return Shapes(4, 0, 64, augmentation(train=True), seed)
        return CocoFolder(*write(valid()), transforms=augmentation(train=True), seed=seed)

    def items(seed: int) -> list[torch.Tensor]:
        dataset = opened(seed)
        return [dataset[1][1]["boxes"] for dataset.epoch in range(8)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, other = items(seed=0), items(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, items(seed=0)))
    assert not all(map(torch.equal, first, other))
    assert len({tuple(boxes.flatten().tolist()) for boxes in first}) == 2  # flipped and not


def test_flip(write):
    """x becomes w - x: the box from 2 to 12 of a 40-pixel image is from 28 to 38."""
    dataset = CocoFolder(*write(valid()), transforms=augmentation(train=True))
    seen = {tuple(dataset[1][1]["boxes"][0].tolist()) for dataset.epoch in range(20)}
    assert seen == {(2, 3, 12, 11), (28, 3, 38, 11)}


def test_workers_draw_the_same(write):
    dataset = CocoFolder(*write(valid()), transforms=augmentation(train=True), seed=3)
    for dataset.epoch in range(3):
        alone, two = (
            [t["boxes"] for _, (t,) in torch.utils.data.DataLoader(dataset, num_workers=n, collate_fn=collate)]
            for n in (0, 2)
        )
        assert all(map(torch.equal, alone, two))


def test_open_dataset(write):
    images, annotations = write(valid())
    folder = open_dataset(str(images), str(annotations), (64, 64), train=True, seed=7, skip_bad_images=True)
    assert isinstance(folder, CocoFolder) and (folder.seed, folder.epoch) == (7, 0)
    shapes = open_dataset(None, None, (64, 64), train=False, seed=7)
    image, _ = shapes[3]
    assert image.shape == (3, 64, 64) and image.min() >= 0 and image.max() <= 1
    assert shapes.num_classes == 5 and "built-in shapes" in shapes.summary and (shapes.seed, shapes.epoch) == (7, 0)


def test_batches_of_similar_aspect_ratio():
    """Factor 1 has groups below 1/2, to 1, to 2 and above. Full batches in order, then what is left, by group."""
    ratios = np.array([0.7, 1.5, 0.8, 1.4, 3.0, 0.6, 1.6, 0.3, 1.5, 0.9])
    assert group_batches(list(range(10)), ratios, 2, 1) == [[0, 2], [1, 3], [6, 8], [5, 9], [7, 4]]
    assert group_batches(list(range(10)), ratios, 3, 1) == [[0, 2, 5], [1, 3, 6], [7, 8, 4]]  # without 9
    assert group_batches([3, 1, 2, 0, 4], ratios, 2, 0) == [[3, 1], [2, 0]]
    for count in range(20):  # the number of batches depends on nothing but the number of images
        indices = np.random.default_rng(count).permutation(10)[: count % 11].tolist()
        batches = group_batches(indices, ratios, 3, 3)
        assert len(batches) == len(indices) // 3 and all(len(batch) == 3 for batch in batches)
        assert len({index for batch in batches for index in batch}) == 3 * len(batches)


def test_images_of_a_rare_aspect_ratio_are_seen():
    """Of 101 images one is left out of 50 batches: over 300 epochs each about three times, the only panorama too."""
    ratios, generator = np.array([1.3] * 100 + [3.0]), np.random.default_rng(0)
    seen = np.zeros(101)
    for _ in range(300):
        seen[sum(group_batches(generator.permutation(101).tolist(), ratios, 2, 3), [])] += 1
    assert seen.sum() == 300 * 100 and seen.min() > 280


def test_a_line_is_refused(tmp_path):
    """700x2 pixels, resized to a width of 320, would be less than one pixel high."""
    Image.new("RGB", (700, 2)).save(tmp_path / "line.png")
    coco = {
        "images": [{"id": 1, "file_name": "line.png", "width": 700, "height": 2}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 300, 2], "iscrowd": 0}],
        "categories": [{"id": 1, "name": "line"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    paths = str(tmp_path), str(tmp_path / "boxes.json")
    with pytest.raises(DataError, match="line.png: 700x2 pixels would have no height or width left .* side of 320"):
        open_dataset(*paths, (320, 320), train=True)
    assert len(open_dataset(*paths, (320, 350), train=True)) == 1


def test_scales():
    """A short side of 60..80 with a long side of 100: 4:3 is limited from 76 on (100 / 76 < 4 / 3), 3:4 likewise."""
    transform = build_detector("fcos", "test_resnet", 2, image_size=(64, 100)).transform
    line = set_train_scales(transform, 60, 80, np.array([4 / 3, 3 / 4, 1.0]))
    assert line == "short sides of 60 to 80 pixels in training; the long side 100 limits 16% of them"  # 2 * 5 / 63
    assert sorted(transform.min_size) == list(range(60, 81)) and transform.min_size[-1] == 64
    transform.min_size = (64,)
    for ratios in ([2.0, 0.5], [5 / 3]):  # 100 / 60, at which every draw ends at 60x100
        with pytest.raises(ValueError, match="--multi-scale 60 80 has no effect, .* the long side to 100 pixels"):
            set_train_scales(transform, 60, 80, np.array(ratios))
