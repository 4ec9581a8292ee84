"""What a distillation step costs, beside the least that it could cost.

    python -m kd.benchmark --detectors fcos retinanet --methods frs pgd --image-size 320 640
    python -m kd.benchmark --methods frs --amp bf16 --json > frs.json

For each detector, method and size, in one process and in turn, so that a noisy machine disturbs all alike:

    a  the student's bare step: torchvision's own detector, its losses, backward, update
    b  the teacher's bare forward: backbone, pyramid and the heads that the method reads, no more
    c  the whole distillation step, as train.py makes it

c / (a + b) is what distilling costs beyond its two networks. a and b are always plain float32 in torch's usual memory
format; --amp and what train.py does by itself count in c alone, so values below 1 are possible. Backbones have the
frozen norm and stem of pretrained ones; their weights are random.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from kd.checkpoint import save
from kd.data import collate
from kd.detectors import DETECTORS, FPN_CHANNELS, STRIDES, build_detector, check_detector
from kd.distiller import Distiller
from kd.evaluation import evaluate
from kd.features import forward_detector
from kd.methods import METHODS
from kd.shapes import Shapes
from kd.speed import AMP, keep_freed_memory, speed_up_teacher
from kd.timing import Stopwatch
from kd.transforms import augmentation


def main(args: argparse.Namespace) -> None:
    """Measure what the arguments ask for, and print a table or JSON."""
    keep_freed_memory()
    torch.manual_seed(0)
    device, deadline = torch.device(args.device), time.monotonic() + 60 * args.minutes
    cases = [
        (detector, size, method)
        for size in args.image_size
        for detector in args.detectors
        for method in args.methods
        if serves(method, detector)
    ]
    results = []
    for detector, size, method in (progress := tqdm(cases, dynamic_ncols=True)):
        progress.set_description(f"{method} {detector} {size}")
        if time.monotonic() > deadline:
            progress.write(f"stopped after {args.minutes:g} minutes, {len(cases) - len(results)} cases left out")
            break
        results.append(measure_step(args, device, detector, size, method))
    others = measure_the_rest(args, device)
    if args.json:
        print(json.dumps({"arguments": vars(args), "torch": torch.__version__, "steps": results, "rest": others}))
        return
    print_steps(results)
    print("\n" + "\n".join(f"{name}: {value:.3g}" for name, value in others.items()))


def serves(method: str, detector: str) -> bool:
    """Return whether a method can be built for a detector."""
    try:
        METHODS[method](detector, FPN_CHANNELS, FPN_CHANNELS, STRIDES[detector])
    except ValueError:
        return False
    return True


def measure_step(args: argparse.Namespace, device: torch.device, detector: str, size: int, method: str) -> dict:
    """Time a, b and c of one case in turn; return seconds, their ratio, speed, memory and c's parts."""
    images, targets = batch(size, args.batch_size, device)

    def make(backbone: str) -> nn.Module:
        return build_detector(detector, backbone, 5, image_size=(size, size), from_scratch=False).to(device)

    plain, student, teacher = make(args.student).train(), make(args.student), make(args.teacher).eval()
    distiller = Distiller(
        student.to(memory_format=torch.channels_last),
        speed_up_teacher(make(args.teacher).eval(), AMP[args.amp]),
        METHODS[method](detector, FPN_CHANNELS, FPN_CHANNELS, STRIDES[detector]),
    )
    distiller.to(device).train()
    transformed, _ = plain.transform(images, targets)
    needs = distiller.method.needs

    def bare_teacher() -> None:
        with torch.no_grad():
            output, _ = forward_detector(teacher, transformed, needs=needs)
            if "boxes" in needs:
                output.boxes  # noqa: B018  decoded when first asked for

    def distill() -> dict:
        with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
            return distiller(images, targets)

    steps = {
        "a": step_of(plain, lambda: plain(images, targets), Stopwatch(device)),
        "b": bare_teacher,
        "c": step_of(distiller, distill, distiller.stopwatch),
    }
    for step in steps.values():  # the first of each fills caches and allocates
        time_of(step, device)
    before = distiller.stopwatch.read()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            seconds[name].append(time_of(step, device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **{"detector": detector, "method": method, "size": size},
        **median,
        "spread": {name: (min(values), max(values)) for name, values in seconds.items()},
        # The ratio within each round, then the median: what slows the machine for a while does not touch it.
        "ratio": statistics.median(c / (a + b) for a, b, c in zip(*(seconds[name] for name in "abc"))),
        "images_per_second": args.batch_size / median["c"],
        "memory_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "parts": {n: (value - before[n]) / args.repeats for n, value in distiller.stopwatch.read().items()},
    }


def batch(size: int, batch_size: int, device: torch.device) -> tuple[list, list]:
    """Return images [3, size, size] of the built-in shapes with their targets."""
    shapes = Shapes(batch_size, 0, size, augmentation(train=False))
    images, targets = collate([shapes[index] for index in range(batch_size)])
    targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets]
    return [image.to(device) for image in images], targets


def step_of(module: nn.Module, losses: Callable[[], dict], stopwatch: Stopwatch) -> Callable[[], None]:
    """Return a training step: losses, backward, update by SGD with momentum."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-6, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        total = sum(losses().values())
        with stopwatch.part("backward"):
            optimizer.zero_grad()
            total.backward()
        with stopwatch.part("optimizer"):
            optimizer.step()

    return step


def time_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_the_rest(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Time what stands around the step, at the first detector and size: loading, evaluating, saving."""
    size = args.image_size[0]
    shapes = Shapes(32, 0, size, augmentation(train=True))
    loader = DataLoader(shapes, args.batch_size, num_workers=args.workers, collate_fn=collate)
    student = build_detector(args.detectors[0], args.student, 5, image_size=(size, size)).to(device)
    optimizer = torch.optim.SGD(student.parameters(), 1e-6, momentum=0.9)
    for parameter in student.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        content = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
        saving = time_of(lambda: save(content, Path(folder, "checkpoint.pt")), device)
    return {
        f"loading, images/s ({args.workers} workers)": len(shapes) / time_of(lambda: list(loader), device),
        "evaluating, images/s": len(shapes) / time_of(lambda: evaluate(student, loader, device), device),
        "saving a checkpoint, s": saving,
    }


def print_steps(results: list[dict]) -> None:
    """Print a line for each case: medians in seconds, and what c's time goes to."""
    print(f"{'':28}{'a':>8}{'b':>8}{'c':>8}{'c/(a+b)':>9}{'images/s':>10}  parts of c, s")
    for r in results:
        name = f"{r['method']} {r['detector']} {r['size']}"
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in r["parts"].items())
        memory = f", {r['memory_gb']:.1f} GB" if r["memory_gb"] else ""
        numbers = f"{r['a']:8.3f}{r['b']:8.3f}{r['c']:8.3f}{r['ratio']:9.3f}{r['images_per_second']:10.2f}"
        print(f"{name:28}{numbers}  {parts}{memory}")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detectors", nargs="+", default=["fcos"], help=", ".join(DETECTORS))
    add("--methods", nargs="+", default=["frs"], choices=METHODS, help=", ".join(METHODS))
    add("--teacher", default="r101", help="backbone")
    add("--student", default="r50", help="backbone")
    add("--image-size", type=int, nargs="+", default=[320], help="sides of square images in pixels")
    add("--batch-size", type=int, default=2, help="images per step")
    add("--repeats", type=int, default=5, help="rounds of a, b and c")
    add("--minutes", type=float, default=30, help="no case is begun after this time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", choices=AMP, default="off", help="autocast of c")
    add("--workers", type=int, default=0, help="data loading processes")
    add("--json", action="store_true", help="print JSON, all numbers in it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse_args()
    try:
        for detector in args.detectors:
            check_detector(detector)
        main(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
