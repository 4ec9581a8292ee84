"""Evaluate a run, or list all runs.

python eval.py runs/frs-fcos-r101-r50    COCO's twelve numbers of the run's model.pt; draws samples.png again
python eval.py runs/                     a table of all runs in a folder
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.utils import save_image

from kd.checkpoint import load_model, read_run
from kd.data import DataError, class_names, collate, open_dataset
from kd.evaluation import draw_samples, evaluate


def main(args: argparse.Namespace) -> None:
    """Evaluate one run or list several."""
    folder = Path(args.run)
    if not (folder / "model.pt").exists():
        return print_runs(folder)

    detector, content = load_model(folder / "model.pt")
    settings = json.loads((folder / "args.json").read_text())
    dataset = open_dataset(
        args.val_images or settings["val_images"],
        args.val_annotations or settings["val_annotations"],
        content["arguments"]["image_size"],
        train=False,
    )
    if class_names(dataset.categories) != class_names(content["categories"]):
        raise DataError(f"{folder / 'model.pt'} was trained on other classes than {dataset.summary}")
    device = torch.device(args.device)
    loader = DataLoader(dataset, settings["batch_size"], num_workers=args.workers, collate_fn=collate)
    metrics, detections = evaluate(detector.to(device), loader, device, folder.name)
    for name, value in metrics.items():
        print(f"{name:6}{value:8.3f}")
    save_image(draw_samples(dataset, [detections]), folder / "samples.png")


def print_runs(folder: Path) -> None:
    """Print a line for each run in a folder that has been evaluated."""
    runs = {run.parent: read_run(run.parent) for run in sorted(folder.glob("*/args.json"))}
    if not any(runs.values()):
        raise ValueError(f"{folder} is neither a run (no model.pt) nor a folder of evaluated runs")
    width = max(len(run.name) for run in runs)
    print(f"{'run':{width}}{'iterations':>12}{'AP':>8}{'AP50':>8}{'AP75':>8}")
    for run, line in runs.items():
        if line:
            numbers = "".join(f"{line[key]:8.3f}" for key in ("AP", "AP50", "AP75"))
            print(f"{run.name:{width}}{line['iteration']:12}{numbers}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of one run, or of several")
    parser.add_argument("--val-images", help="folder, instead of the one trained with")
    parser.add_argument("--val-annotations", help="JSON file, instead of the one trained with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--workers", type=int, default=0, help="data loading processes")
    try:
        main(parser.parse_args())
    except ValueError as error:
        sys.exit(f"error: {error}")
