"""What the README says to type works: its commands in a shortened form, its Python as it stands."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from kd.arguments import settle
from PIL import Image

import eval as evaluation_script
import kd.data
import kd.methods
import train
from kd.data.shapes import Shapes
from kd.tools import benchmark

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language; those of the shell have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands() -> list[list[str]]:
    """Every Python command but the tests', in blocks and in the text; torchrun's leave something out."""
    lines = [line for block in blocks("") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python [^`]*)`", README)
    parts = [part.replace("OMP_NUM_THREADS=1", "").strip() for line in lines for part in line.split("&&")]
    found = [shlex.split(part)[1:] for part in parts if part.startswith("python ")]
    return [words for words in found if words != ["-m", "pytest"]]


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A working folder with few shapes, shapes as photographs in place of /path/to/coco, and the logs of our runs."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(ROOT / ".github" / "runs.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setattr(kd.data, "SHAPES_TRAIN", 8)
    monkeypatch.setattr(kd.data, "SHAPES_VAL", 6)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split, seed in (("train2017", 1), ("val2017", 0)):
        shapes = Shapes(4, seed, 64)
        coco = shapes.coco()
        (tmp_path / "coco" / split).mkdir()
        for image in coco["images"]:
            image["file_name"] = f"{image['id']}.png"
            pixels = shapes[image["id"]][0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / "coco" / split / image["file_name"])
        (tmp_path / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return tmp_path


def test_commands(small_world):
    """One step each on small pictures, training before what looks at runs; --pretrained would ask the model hub."""
    done = set()
    for script, *words in sorted(commands(), key=lambda words: words[0] != "train.py"):
        words = [str(small_world / "coco") if word == "/path/to/coco" else word for word in words]
        if script == "train.py":
            words = [word for word in words if word != "--pretrained"]
            words += ["--max-iterations", "1", "--image-size", "64", "64", "--batch-size", "2", "--device", "cpu"]
            args = train.parse_args(words)
            settle(args)
            if args.output not in done:  # the README may show a command twice
                train.main(train.parse_args([*words, "--amp", "off", "--resume", "auto"]))
            done.add(args.output)
        elif script == "eval.py":
            evaluation_script.main(evaluation_script.parse_args([*words, "--device", "cpu"]))
        else:
            assert [script, words.pop(0)] == ["-m", "kd.benchmark"]
            words += ["--image-size", "64", "--repeats", "1", "--batch-size", "1", "--device", "cpu"]
            words += ["--teacher", "test_resnet", "--student", "test_resnet"]
            benchmark.main(benchmark.parse_args(words))
    assert len(done) >= 5


def test_copying_a_method(tmp_path):
    """The example runs in a folder that holds nothing but the method's file."""
    (example,) = [block for block in blocks("python") if "from frs import" in block]
    shutil.copy(Path(kd.methods.__file__).parent / "frs.py", tmp_path)
    (tmp_path / "example.py").write_text("import sys\nsys.path.insert(0, '.')\n" + example + "\nprint(list(losses))")
    result = subprocess.run([sys.executable, "-I", "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "['loss_frs_fpn', 'loss_frs_head']\n", result.stderr


def test_loading_a_student(small_world):
    """The example loads the student of the README's first command."""
    (example,) = [block for block in blocks("python") if "load_model" in block]
    words = [
        "--student",
        "test_resnet",
        "--max-iterations",
        "1",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--amp",
        "off",
    ]
    train.main(train.parse_args([*words, "--output", "runs/frs-fcos-r101-r50"]))
    names = {"image": torch.rand(3, 64, 64)}
    with torch.no_grad():
        exec(example, names)
    assert names["detections"][0].keys() == {"boxes", "scores", "labels"}


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 300_000, picture


def test_every_file_is_in_the_tree():
    folder = ROOT / "kd"
    for file in (*folder.glob("*.py"), *(folder / "methods").glob("*.py")):
        assert file.name == "__init__.py" or file.name in README, file
