"""Evaluate a run, show where its method looks, or list all runs.

python eval.py runs/frs-fcos-r101-r50    COCO's twelve numbers of the run's model.pt; draws samples.png again
python eval.py runs/frs-fcos-r101-r50 --explain 139 photo.jpg
                                         explain-139.png and explain-photo.png: the method's maps of two images
python eval.py runs/                     a table of all runs in a folder
python eval.py runs/ --curves ap.png     a picture of their AP against epochs
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

from kd.arguments import build_method
from kd.checkpoint import load, load_model, load_strictly, load_teacher
from kd.compare import collect, compare, format_table
from kd.curves import draw_curves, read_curves
from kd.data import DataError, class_names, collate, open_dataset
from kd.distiller import Distiller, check_pair
from kd.evaluation import draw_samples, evaluate
from kd.explain import draw_explanation
from kd.speed import keep_freed_memory


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or a list of its words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="folder of one run, or of several")
    add("--explain", nargs="+", metavar="IMAGE", help="draw the method's maps of files or image ids")
    add("--curves", metavar="FILE", help="draw AP against epochs of several runs, means over seeds")
    add("--markdown", action="store_true", help="print the table of several runs as Markdown")
    add("--teacher-weights", help="for --explain: the teacher's file, instead of the one trained with")
    add("--val-images", help="folder, instead of the one trained with")
    add("--val-annotations", help="JSON file, instead of the one trained with")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--workers", type=int, default=0, help="data loading processes")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """List several runs, explain one, or evaluate it."""
    folder = Path(args.run)
    if not (folder / "model.pt").exists():
        print(format_table(compare(collect(folder)), args.markdown))
        if args.curves:
            draw_curves(read_curves(folder)).save(args.curves)
    elif args.explain:
        explain(args)
    else:
        detector, settings, dataset = open_run(args)
        device = torch.device(args.device)
        if device.type == "cpu":
            keep_freed_memory()
        loader = DataLoader(dataset, settings["batch_size"], num_workers=args.workers, collate_fn=collate)
        metrics, detections = evaluate(detector.to(device), loader, device, folder.name)
        for name, value in metrics.items():
            print(f"{name:6}{value:8.3f}")
        save_image(draw_samples(dataset, [detections]), folder / "samples.png")


def open_run(args: argparse.Namespace) -> tuple[nn.Module, dict, Dataset]:
    """Return a run's student, its args.json and the validation set.

    Raises:
        ValueError: no such run, or a validation set of other classes.
    """
    folder = Path(args.run)
    detector, content = load_model(folder / "model.pt")
    settings = json.loads((folder / "args.json").read_text())
    dataset = open_dataset(
        args.val_images or settings["val_images"],
        args.val_annotations or settings["val_annotations"],
        content["arguments"]["image_size"],
        train=False,
        skip_bad_images=settings["skip_bad_images"],
    )
    if class_names(dataset.categories) != class_names(content["categories"]):
        raise DataError(f"{folder / 'model.pt'} was trained on other classes than {dataset.summary}")
    return detector, settings, dataset


@torch.no_grad()
def explain(args: argparse.Namespace) -> None:
    """Draw where a run's method looks on each image that is asked for, and print the picture's path.

    Raises:
        ValueError: the run has no method or lacks a file, an image is not there, or the method needs ground truth that
            is not known.
    """
    folder, device = Path(args.run), torch.device(args.device)
    student, settings, dataset = open_run(args)
    distiller = load_distiller(folder, settings, student, dataset.categories, args.teacher_weights)
    distiller.teacher.to(device)
    distiller.to(device)
    for name in args.explain:
        image, target = find_image(name, dataset)
        known = [{key: target[key].to(device) for key in ("boxes", "labels")}] if target else None
        images, targets = student.transform([image.to(device)], known)
        student_output, teacher_output = distiller.outputs(images)
        try:
            maps = distiller.method.maps(student_output, teacher_output, targets or [{}])
        except KeyError as error:
            if error.args != ("boxes",):
                raise
            raise ValueError(
                f"{settings['method']} looks at ground-truth boxes, which are not known for {name}: give the id or the "
                f"file of an image of the validation set"
            ) from error
        names, size = class_names(dataset.categories), images.image_sizes[0]
        path = folder / f"explain-{Path(name).stem}.png"
        save_image(draw_explanation(image, target, names, maps, student_output.strides, size), path)
        print(path)


def load_distiller(
    folder: Path, settings: dict, student: nn.Module, categories: dict[int, dict], teacher_weights: str | None
) -> Distiller:
    """Put a run's student, teacher and trained method together again, in eval mode.

    Args:
        folder: of the run.
        settings: its args.json.
        student: as exported.
        categories: COCO category of each label.
        teacher_weights: where the teacher is now; None for where it was.

    Raises:
        ValueError: the run has no method, the teacher or the checkpoint is gone, or something does not fit.
    """
    if settings["method"] == "none":
        raise ValueError(f"{folder} has no method to explain: it was trained with --method none")
    path = teacher_weights or settings["teacher_weights"]
    if path is None or not Path(path).is_file():
        raise ValueError(f"the teacher of {folder} is not at {path}: give its file as --teacher-weights")
    teacher = load_teacher(path, settings["detector"], settings["teacher"], categories, settings["image_size"])
    check_pair(student, teacher)
    method = build_method(argparse.Namespace(**settings))
    state = load(folder / "checkpoint.pt")["distiller"]  # model.pt has the student alone
    state = {name.removeprefix("method."): value for name, value in state.items() if name.startswith("method.")}
    load_strictly(method, state, folder / "checkpoint.pt")
    return Distiller(student, teacher, method).eval()


def find_image(name: str, dataset: Dataset) -> tuple[Tensor, dict]:
    """Return an image [3, h, w] in 0..1 and its target, empty where the data set does not know it.

    Args:
        name: path of a file, or an image's id in the data set. A file with the name and size of one of the data set's
            images is taken for that image.
        dataset: the validation set.

    Raises:
        ValueError: neither a file nor an id, or a file that is not an image.
    """
    entries = dataset.coco()["images"]
    if not Path(name).is_file():
        ids = [str(entry["id"]) for entry in entries]
        if name not in ids:
            some = ", ".join(ids[:3])
            raise ValueError(f"{name} is neither a file nor an image id of the validation set (ids: {some}, ...)")
        return dataset[ids.index(name)]
    try:
        with Image.open(name) as file:
            image = pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB")) / 255
    except OSError as error:
        raise ValueError(f"{name} is not an image that can be read: {error}") from error
    for index, entry in enumerate(entries):
        if Path(entry.get("file_name", "")).name == Path(name).name:
            known, target = dataset[index]
            if known.shape == image.shape:
                return known, target
    return image, {}


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"error: {error}")
