"""Evaluate a run, draw where its method looks, or list many runs.

python eval.py runs/frs-fcos-r101-r50    COCO's twelve numbers of the run's model.pt; draws samples.png
python eval.py runs/frs-fcos-r101-r50 --explain 139 photo.jpg
                                         explain-139.png and explain-photo.png: the method's maps of two images
python eval.py runs/                     a table of all runs in a folder
python eval.py runs/ --curves ap.png     also a picture of their AP against epochs
python eval.py runs/ --pack runs.jsonl   also a text file with a line per run, which can be given instead of a folder
"""

import argparse
from pathlib import Path

import torch
from PIL import ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from kd.data import DataError, class_names, open_dataset, open_image
from kd.evaluation import evaluate
from kd.features import forward_detector
from kd.run.arguments import check_machine
from kd.run.checkpoint import load_distiller, load_model
from kd.run.errors import one_line_errors
from kd.run.folder import read_settings
from kd.run.speed import keep_freed_memory
from kd.tools.curves import draw_curves, read_curves
from kd.tools.explain import draw_explanation
from kd.tools.samples import draw_samples
from kd.tools.table import collect, compare, format_table, pack


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or a list of its words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="folder of a run or of several, or a file of --pack")
    add("--explain", nargs="+", metavar="IMAGE", help="draw the method's maps of image files or ids")
    add("--curves", metavar="FILE", help="draw AP against epochs of several runs, means over seeds")
    add("--markdown", action="store_true", help="print the table of several runs as Markdown")
    add("--under", metavar="FOLDER", default="", help="list only runs whose folder begins with FOLDER")
    add("--pack", metavar="FILE", help="write several runs to a text file, a line each")
    add("--teacher-weights", help="for --explain: file of the teacher, instead of the one trained with")
    add("--val-images", help="folder, instead of the one trained with")
    add("--val-annotations", help="JSON file, instead of the one trained with")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--workers", type=int, default=0, help="data loading processes")
    return parser.parse_args(words)


def main(args: argparse.Namespace) -> None:
    """List several runs, explain one, or evaluate it."""
    folder = Path(args.run)
    check_machine(args)
    if not (folder / "model.pt").exists():
        list_runs(args)
    elif args.explain:
        explain(args)
    else:
        detector, settings, dataset = open_run(args)
        device = torch.device(args.device)
        if device.type == "cpu":
            keep_freed_memory()
        options = {"batch_size": settings["batch_size"], "workers": args.workers, "name": folder.name}
        metrics, detections = evaluate(detector.to(device), dataset, device, **options)
        for name, value in metrics.items():
            print(f"{name:6}{value:8.3f}")
        draw_samples(dataset, {folder.name: detections}).save(folder / "samples.png")


def list_runs(args: argparse.Namespace) -> None:
    """Print the table of several runs; draw their curves and pack them if asked."""
    runs = [run for run in collect(Path(args.run)) if run["folder"].startswith(args.under)]
    if not runs:
        raise ValueError(f"{args.run} has no run under {args.under}")
    print(format_table(compare(runs), args.markdown))
    if args.curves:
        draw_curves(read_curves(runs)).save(args.curves)
    if args.pack:
        pack(runs, Path(args.pack))


def open_run(args: argparse.Namespace) -> tuple[nn.Module, dict, Dataset]:
    """Return the student of a run, its args.json and the validation set.

    Raises:
        ValueError: the run cannot be loaded, or the validation set has other classes.
    """
    folder = Path(args.run)
    detector, content = load_model(folder / "model.pt")
    settings = read_settings(folder)
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
    """Draw where the method of a run looks on each image, and print the path of the picture.

    Raises:
        ValueError: the run has no method or lacks a file, an image does not exist, or the method needs ground truth
            that is unknown.
    """
    folder, device = Path(args.run), torch.device(args.device)
    student, settings, dataset = open_run(args)
    distiller = load_distiller(folder, settings, student, dataset.categories, args.teacher_weights)
    distiller.teacher.to(device)
    distiller.to(device)
    method, names = distiller.method, class_names(dataset.categories)
    for name in args.explain:
        image, target = find_image(name, dataset)
        known = [{key: target[key].to(device) for key in ("boxes", "labels")}] if target else None
        images, targets = student.transform([image.to(device)], known)
        output, _ = forward_detector(student, images, needs=method.needs)
        try:
            maps = method.maps(output, distiller.run_teacher(images), targets or [{}])
        except KeyError as error:
            if error.args != ("boxes",):
                raise
            raise ValueError(
                f"{settings['method']} needs ground-truth boxes, which are unknown for {name}: give the id or the file "
                "of an image in the validation set"
            ) from error
        path, title = folder / f"explain-{Path(name).stem}.png", f"{folder.name}, image {Path(name).name}"
        size = images.image_sizes[0]
        draw_explanation(title, image, target, names, maps, student.backbone.strides, size).save(path)
        print(path)


def find_image(name: str, dataset: Dataset) -> tuple[Tensor, dict]:
    """Return an image [3, h, w] in 0..1 and its target, which is empty if the data set does not have it.

    Args:
        name: path of a file, or id of an image in the data set. A file with the name and size of an image in the data
            set is taken for that image.
        dataset: the validation set.

    Raises:
        ValueError: it is neither an image file nor an id.
    """
    entries = dataset.coco()["images"]
    if not Path(name).is_file():
        ids = [str(entry["id"]) for entry in entries]
        if name not in ids:
            some = ", ".join(ids[:3])
            raise ValueError(f"{name} is neither a file nor an image id of the validation set (ids: {some}, ...)")
        return dataset[ids.index(name)]
    try:
        with open_image(name) as file:
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
    with one_line_errors():
        main(parse_args())
