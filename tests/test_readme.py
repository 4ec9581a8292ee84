"""What the READMEs say to type works: commands in a shortened form, Python as it stands. Links and numbers hold."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation_script
import kd.data
import kd.methods
import train
from kd.data import Shapes
from kd.run.arguments import settle
from kd.tools import benchmark
from tests.conftest import write_coco

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "kd" / "methods"
PAGES = [ROOT / "README.md", METHODS / "README.md", METHODS / "RESULTS.md"]
PAGES += [ROOT / "kd" / "tools" / "README.md", ROOT / "kd" / "data" / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language; those of the shell have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def commands(page: Path) -> list[list[str]]:
    """Every Python and torchrun command of a page, in blocks and in the text, but the tests'."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`(python [^`]*)`", prose.replace("\n", " "))
    parts = [part.strip() for line in lines for part in line.split("&&") if "..." not in part]
    found = [shlex.split(part) for part in parts if part.startswith(("python ", "torchrun "))]
    return [words[1:] for words in found if words[1:] != ["-m", "pytest"]]


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """A working folder with few shapes, and shapes as photographs for /path/to/coco."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kd.data, "SHAPES_TRAIN", 8)
    monkeypatch.setattr(kd.data, "SHAPES_VAL", 6)
    annotations = tmp_path / "coco" / "annotations"
    for split, seed in (("train2017", 1), ("val2017", 0)):
        write_coco(Shapes(4, seed, 64), tmp_path / "coco" / split, annotations / f"instances_{split}.json")
    shutil.copytree(METHODS, tmp_path / "kd" / "methods", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path


def test_commands_of_the_readme(small_world):
    """One step each on small pictures, training before what looks at runs; --pretrained would ask the model hub."""
    done = set()
    for script, *words in sorted(commands(PAGES[0]), key=lambda words: words[0] != "train.py"):
        words = [{"/path/to/coco": str(small_world / "coco"), "METHOD": "l2"}.get(word, word) for word in words]
        if script == "train.py":
            words = [word for word in words if word != "--pretrained"]
            words += ["--max-iterations", "1", "--image-size", "64", "64", "--batch-size", "2", "--device", "cpu"]
            args = train.parse_args(words)
            settle(args)
            if args.output not in done:  # a command may be shown twice
                train.main(train.parse_args([*words, "--amp", "off", "--resume", "auto"]))
            done.add(args.output)
        else:
            assert script == "eval.py"
            evaluation_script.main(evaluation_script.parse_args([*words, "--device", "cpu"]))
    assert len(done) >= 4


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.parent.name + "/" + page.name)
def test_commands_of_the_other_pages(page, small_world, monkeypatch):
    """Training commands are complete and legal; the benchmark and tables run."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("kd.run.arguments.check_paths", lambda args: None)  # the teachers are not here
    for script, *words in commands(page):
        words = [word.replace("$COCO", str(small_world / "coco")) for word in words]
        while script.startswith("--") or script.isdigit():  # of torchrun
            script, *words = words
        if script == "train.py":
            words = [word for word in words if not word.startswith("$")]
            settle(train.parse_args([*words, "--device", "cpu"]))
        elif script == "eval.py":
            args = evaluation_script.parse_args([*words, "--device", "cpu"])
            if Path(args.run).suffix == ".jsonl":
                evaluation_script.main(args)
        else:
            assert [script, words.pop(0)] == ["-m", "kd.tools.benchmark"]
            benchmark.parse_args(words)
            words += [
                "--detectors",
                "fcos",
                "--image-size",
                "64",
                "--repeats",
                "1",
                "--batch-size",
                "1",
                "--device",
                "cpu",
            ]
            words += ["--teacher", "test_resnet", "--student", "test_resnet", "--boxes", "2"]
            benchmark.main(benchmark.parse_args(words))


def test_copying_a_method(tmp_path):
    """The example runs in a folder that holds nothing but the method's file."""
    (example,) = [block for block in blocks(PAGES[0], "python") if "from frs import" in block]
    shutil.copy(METHODS / "frs.py", tmp_path)
    (tmp_path / "example.py").write_text("import sys\nsys.path.insert(0, '.')\n" + example + "\nprint(list(losses))")
    result = subprocess.run([sys.executable, "-I", "example.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "['loss_frs_fpn', 'loss_frs_head']\n", result.stderr


def test_loading_a_student(small_world):
    """The example loads the student of the README's first command."""
    (example,) = [block for block in blocks(PAGES[0], "python") if "load_model" in block]
    words = ["--student", "test_resnet", "--max-iterations", "1", "--batch-size", "2", "--device", "cpu"]
    train.main(train.parse_args([*words, "--output", "runs/frs-fcos-r101-r50"]))
    names = {"image": torch.rand(3, 64, 64)}
    with torch.no_grad():
        exec(example, names)
    assert names["detections"][0].keys() == {"boxes", "scores", "labels"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_links_and_pictures(page):
    """Local links lead to files and headings, and pictures are small."""
    text = page.read_text()
    for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if picture:
            assert file.stat().st_size < 300_000, target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, target


def test_length():
    """As long as a first reader was promised."""
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1600
    for file, lines in (("train.py", 300), ("eval.py", 200), *((f, 200) for f in METHODS.glob("*.py"))):
        assert len((ROOT / file).read_text().splitlines()) <= lines, file


def test_every_method_has_a_row_and_a_page():
    for file in METHODS.glob("*.py"):
        if file.name != "__init__.py":
            assert f"(kd/methods/{file.name})" in PAGES[0].read_text()
            assert f"({file.name})" in PAGES[1].read_text()
