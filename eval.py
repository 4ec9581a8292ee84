"""Evaluate a run or a detector of torchvision, draw where a method looks, predict, export a student, or list runs.

python eval.py runs/frs-fcos-r101-r50    COCO's numbers of the run's model.pt, AP per class; draws samples.png
python eval.py runs/frs-fcos-r101-r50 --explain 139 photo.jpg
                                         explain-139.png and explain-photo.png: the method's maps of two images
python eval.py runs/frs-fcos-r101-r50 --predict photo.jpg folder
                                         predictions/: the images with boxes, and detections.json in COCO's format
python eval.py runs/frs-fcos-r101-r50 --export student.onnx
                                         an ONNX file, compared with torch on images of the validation set
python eval.py retinanet_resnet50_fpn_v2 --data /path/to/coco
                                         the same numbers of a detector of torchvision
python eval.py runs/                     a table of all runs in a folder
python eval.py runs/ --curves ap.png     also a picture of their AP against epochs
python eval.py runs/ --pack runs.jsonl   also a text file with a line per run, which can be given instead of a folder
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from kd.data import DataError, class_names, find_layout, open_dataset
from kd.detectors import ZOO
from kd.evaluation import evaluate, format_evaluation
from kd.run.arguments import COCO_RECIPE, check_machine
from kd.run.checkpoint import load_model
from kd.run.errors import one_line_errors
from kd.run.folder import read_settings
from kd.run.speed import keep_freed_memory
from kd.run.weights import load_distiller, load_teacher
from kd.tools.curves import draw_curves, read_curves
from kd.tools.explain import explain_image
from kd.tools.export import compare_onnx, export_onnx
from kd.tools.predict import predict
from kd.tools.samples import THRESHOLD, draw_samples
from kd.tools.table import collect, compare, format_table, pack

# What each mode reads besides the run and --device.
FLAGS = {
    "the evaluation of a run": ("val_images", "val_annotations", "workers", "score_threshold"),
    "--explain": ("explain", "teacher_weights", "val_images", "val_annotations"),
    "--predict": ("predict", "score_threshold"),
    "--export": ("export", "val_images", "val_annotations"),
    "a detector of torchvision": ("data", "val_images", "val_annotations", "workers"),
    "the table of runs": ("curves", "markdown", "pack"),
}
COMPARED = 8  # images on which an exported file is compared with torch


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or a list of its words."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("run", help=f"folder of a run or of several, a file of --pack, or {', '.join(ZOO)}")
    add("--data", help="for a detector of torchvision: folder in a layout that train.py knows")
    several = {"nargs": "+", "action": "extend", "metavar": "IMAGE"}
    add("--explain", **several, help="draw the method's maps of image files or ids")
    add("--predict", **several, help="draw the detections on image files or folders of them")
    add("--export", metavar="FILE", help="write the student as an ONNX file; needs the package onnx")
    add("--curves", metavar="FILE", help="draw AP against epochs of several runs, means over seeds")
    add("--markdown", action="store_true", help="print the table of several runs as Markdown")
    add("--pack", metavar="FILE", help="write several runs to a text file, a line each")
    add("--teacher-weights", help="for --explain: file of the teacher, instead of the one trained with")
    add("--val-images", help="folder, instead of the one trained with")
    add("--val-annotations", help="file, instead of the one trained with")
    add("--score-threshold", type=float, default=THRESHOLD, help="draw detections from this score (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda (default, if any) or cpu")
    add("--workers", type=int, default=0, help="data loading processes")
    return parser.parse_args(words)


def main(args: argparse.Namespace) -> None:
    """List several runs; or evaluate one, explain it, predict with it or export it."""
    functions = {"--explain": explain, "--predict": predict_images, "--export": export, "the table of runs": list_runs}
    functions |= {"the evaluation of a run": evaluate_run, "a detector of torchvision": evaluate_zoo}
    mode = check(args)
    if args.device == "cpu":
        keep_freed_memory()
    functions[mode](args)


def check(args: argparse.Namespace) -> str:
    """Return the mode, a key of FLAGS.

    Raises:
        ValueError: the mode does not read a flag that was given or cannot run, or a number or device is not possible.
    """
    check_machine(args)
    if Path(args.run).suffix == ".pt":
        raise ValueError(f"{args.run} is not a folder: give the folder of its run, {Path(args.run).parent}")
    modes = [f"--{name}" for name in ("explain", "predict", "export") if getattr(args, name)]
    single = (Path(args.run) / "model.pt").is_file()
    if modes and not single:
        raise ValueError(f"{modes[0]} needs a single run, but there is no {Path(args.run) / 'model.pt'}")
    other = "a detector of torchvision" if args.run in ZOO else "the table of runs"
    mode = modes[0] if modes else "the evaluation of a run" if single else other
    defaults = vars(parse_args([args.run]))
    for name, value in vars(args).items():
        if value != defaults[name] and name not in ("device", *FLAGS[mode]):
            readers = ", ".join(other for other, flags in FLAGS.items() if name in flags)
            raise ValueError(f"--{name.replace('_', '-')} has no effect on {mode}, only on {readers}: leave it out")
    if not 0 <= args.score_threshold <= 1:
        raise ValueError(f"--score-threshold is {args.score_threshold}: give a number from 0 to 1")
    return mode


def evaluate_run(args: argparse.Namespace) -> None:
    """Print COCO's numbers of a run's student on the validation set, and draw samples.png."""
    folder, device = Path(args.run), torch.device(args.device)
    detector, settings, dataset = open_run(args)
    options = {"batch_size": settings["batch_size"], "workers": args.workers, "name": folder.name}
    metrics, detections = evaluate(detector.to(device), dataset, device, **options)
    print(dataset.summary, format_evaluation(metrics), sep="\n")
    draw_samples(dataset, {folder.name: detections}, args.score_threshold).save(folder / "samples.png")


def evaluate_zoo(args: argparse.Namespace) -> None:
    """Print COCO's numbers of a detector of torchvision on a validation set, with images of COCO's usual size."""
    if not args.data and not (args.val_images and args.val_annotations):
        raise ValueError(f"{args.run} needs a validation set: give --data, or --val-images and --val-annotations")
    device, size = torch.device(args.device), COCO_RECIPE["image_size"]
    paths = find_layout(args.data) if args.data else {}
    images, annotations = args.val_images or paths["val_images"], args.val_annotations or paths["val_annotations"]
    dataset = open_dataset(images, annotations, size, train=False)
    detector = load_teacher(None, ZOO[args.run], args.run, dataset.categories, size).to(device)
    print(format_evaluation(evaluate(detector, dataset, device, batch_size=1, workers=args.workers, name=args.run)[0]))


def predict_images(args: argparse.Namespace) -> None:
    """Draw the detections of a run's student on images; neither args.json nor the validation set is needed."""
    output = Path(args.run) / "predictions"
    detector, content = load_model(Path(args.run) / "model.pt")
    detector.to(args.device)
    print(predict(detector, content["categories"], args.predict, output, args.score_threshold), output, sep="\n")


def export(args: argparse.Namespace) -> None:
    """Write a run's student as an ONNX file; compare it with torch where ONNX Runtime is installed."""
    detector, _ = load_model(Path(args.run) / "model.pt")
    export_onnx(detector, args.export)
    print(f"{args.export}: image [3, height, width] in 0..1 -> boxes, scores, labels")
    if find_spec("onnxruntime") is None or not (Path(args.run) / "args.json").exists():
        print("not compared with torch: that needs args.json of the run and pip install onnxruntime")
        return
    _, _, dataset = open_run(args)
    images = (dataset[index][0] for index in range(min(COMPARED, len(dataset))))
    print(compare_onnx(detector, args.export, images))


def list_runs(args: argparse.Namespace) -> None:
    """Print the table of several runs; draw their curves and pack them if asked."""
    runs = collect(Path(args.run))
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
    paths = [getattr(args, name) or settings[name] for name in ("val_images", "val_annotations")]
    if paths.count(None) == 1:
        raise ValueError("the run had the built-in shapes: give --val-images and --val-annotations, or neither")
    size, skip = content["arguments"]["image_size"], settings["skip_bad_images"]
    dataset = open_dataset(*paths, size, train=False, skip_bad_images=skip)
    if class_names(dataset.categories) != class_names(content["categories"]):
        raise DataError(f"{folder / 'model.pt'} was trained on other classes than {dataset.summary}")
    return detector, settings, dataset


def explain(args: argparse.Namespace) -> None:
    """Draw where the method of a run looks on each image, and print the path of the picture."""
    folder = Path(args.run)
    pictures = {folder / f"explain-{Path(name).stem}.png": name for name in args.explain}
    if len(pictures) < len(args.explain):
        raise ValueError("two images of --explain have one name without folder and suffix: explain one at a time")
    student, settings, dataset = open_run(args)
    distiller = load_distiller(folder, settings, student, dataset.categories, args.teacher_weights)
    distiller.teacher.to(args.device)
    distiller.to(args.device)
    for path, name in pictures.items():
        explain_image(distiller, name, dataset, f"{folder.name}, method {settings['method']}").save(path)
        print(path)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
