"""Measure what a distillation step costs, compared with its two networks alone.

    python -m kd.tools.benchmark --detectors fcos retinanet --methods frs pgd --image-size 320 640
    python -m kd.tools.benchmark --methods frs --amp bf16 --json > frs.json
    python -m kd.tools.benchmark --batch-size 1 2 4 8 --boxes 0 100 --classes 91 1204

For each detector, image size, batch size, number of boxes and of classes, these steps are timed in turn in one process,
so that a noisy machine affects all of them:

    a  the student alone: torchvision's own detector, losses, backward, update
    b  the teacher alone: backbone, FPN and the heads that the method needs
    c  the whole distillation step, as in train.py
    m  the method alone: its losses and their gradients with respect to the networks' outputs

c / (a + b) is the cost beyond the two networks. a and b run in float32 and the default memory format. --amp and the
optimisations of train.py apply to c, so values below 1 are possible. The same ratio of floating-point operations, as
torch counts them, does not depend on the machine. Memory is the peak of a step beyond what was allocated before it.
Backbones have frozen norm and stem, as with pretrained weights; weights, images and boxes are random.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from kd.data import CocoFolder, collate
from kd.data.transforms import augmentation
from kd.detectors import DETECTORS, FPN_CHANNELS, STRIDES, build_detector, check_detector
from kd.distiller import Distiller
from kd.evaluation import coco_metrics, detect
from kd.features import DetectorOutput, forward_detector
from kd.methods import METHODS
from kd.run.checkpoint import save
from kd.run.speed import AMP, keep_freed_memory, speed_up_teacher

Step = Callable[[], None]


def main(args: argparse.Namespace) -> None:
    """Measure, and print a table or JSON."""
    torch.manual_seed(0)
    device, deadline = torch.device(args.device), time.monotonic() + 60 * args.minutes
    if device.type == "cpu":
        keep_freed_memory()
    cases = list(itertools.product(args.image_size, args.detectors, args.batch_size, args.boxes, args.classes))
    results = []
    for done, (size, detector, batch_size, boxes, classes) in enumerate(progress := tqdm(cases, dynamic_ncols=True)):
        case = {"detector": detector, "size": size, "batch_size": batch_size, "boxes": boxes, "classes": classes}
        progress.set_description(" ".join(map(str, case.values())))
        if time.monotonic() > deadline:
            progress.write(f"stopped after {args.minutes:g} minutes, {len(cases) - done} cases not measured")
            break
        results += [case | result for result in measure_steps(args, device, case)]
    others = measure_the_rest(args, device) if args.rest else {}
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


def measure_steps(args: argparse.Namespace, device: torch.device, case: dict) -> list[dict]:
    """Time a, b, c and m of all methods in turn; return seconds, ratio, speed and memory of each method."""
    detector, size = case["detector"], tuple(sorted(sides_of(case["size"])))
    images, targets = random_batch(case, device)

    def make(backbone: str) -> nn.Module:
        return build_detector(detector, backbone, case["classes"], image_size=size, from_scratch=False).to(device)

    plain, bare_teacher = make(args.student).train(), make(args.teacher).eval()
    student = make(args.student).to(memory_format=torch.channels_last)
    teacher = speed_up_teacher(make(args.teacher).eval(), AMP[args.amp])
    transformed, scaled_targets = plain.transform(images, targets)

    def teach(needs: tuple[str, ...]) -> None:
        with torch.no_grad():
            output, _ = forward_detector(bare_teacher, transformed, needs=needs)
            if "boxes" in needs:
                output.boxes  # noqa: B018  decoded when first asked for

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off")

    def distill(distiller: Distiller) -> dict[str, Tensor]:
        with autocast():
            detection, distillation = distiller(images, targets)
        return {**detection, **distillation}

    def compare(method: nn.Module, outputs: list[DetectorOutput]) -> None:
        with autocast():
            total = sum(method(*map(as_leaves, outputs), scaled_targets).values())
        total.backward()
        method.zero_grad()

    steps = {"a": step_of(plain, lambda: plain(images, targets))}
    distillers = {}
    for method in (m for m in args.methods if serves(m, detector)):
        module = METHODS[method](detector, FPN_CHANNELS, FPN_CHANNELS, STRIDES[detector])
        distiller = distillers[method] = Distiller(student, teacher, module).to(device).train()
        steps["b", module.needs] = lambda needs=module.needs: teach(needs)
        steps["c", method] = step_of(distiller, lambda d=distiller: distill(d))
        with autocast(), torch.no_grad():
            student_output, _ = forward_detector(student, transformed, scaled_targets, module.needs)
            outputs = [student_output, distiller.run_teacher(transformed)]
        steps["m", method] = lambda module=module, outputs=outputs: compare(module, outputs)

    flops = {name: count_flops(step) for name, step in steps.items()}  # the first calls also fill caches
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    seconds = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            seconds[name].append(time_of(step, device))

    results = []
    for method, distiller in distillers.items():
        names = {"a": "a", "b": ("b", distiller.method.needs), "c": ("c", method), "m": ("m", method)}
        times = {letter: seconds[name] for letter, name in names.items()}
        median = {letter: statistics.median(values) for letter, values in times.items()}
        # The median of the ratios within each round is not affected by a machine that is slow for a while.
        ratio = statistics.median(c / (a + b) for a, b, c in zip(times["a"], times["b"], times["c"]))
        results.append(
            {
                "method": method,
                **median,
                "spread": {letter: (min(values), max(values)) for letter, values in times.items()},
                "ratio": ratio,
                "images_per_second": case["batch_size"] / median["c"],
                "memory_gb": {letter: memory[name] for letter, name in names.items()},
                "flops": {letter: flops[name] for letter, name in names.items()},
            }
        )
    return results


def sides_of(size: str) -> tuple[int, int]:
    """Return height and width in pixels of "640" or "800x1333"."""
    sides = [int(side) for side in size.split("x")]
    return sides[0], sides[-1]


def random_batch(case: dict, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images [3, h, w] of noise, each with `boxes` boxes of 1/20 to 1 of its sides, mostly small."""
    height, width = sides_of(case["size"])
    images, targets = [], []
    for _ in range(case["batch_size"]):
        images.append(torch.rand(3, height, width, device=device))
        extent = 0.05 ** torch.rand(case["boxes"], 2, device=device)
        corner = torch.rand(case["boxes"], 2, device=device) * (1 - extent)
        boxes = torch.cat([corner, corner + extent], dim=1) * torch.tensor([width, height] * 2, device=device)
        targets.append({"boxes": boxes, "labels": torch.randint(1, case["classes"], (len(boxes),), device=device)})
    return images, targets


def as_leaves(output: DetectorOutput) -> DetectorOutput:
    """Return an output detached from the network, whose tensors collect gradients."""

    def detach(value):
        if isinstance(value, list):
            return [detach(item) for item in value]
        if isinstance(value, Tensor):
            return value.detach().requires_grad_(value.is_floating_point())
        return value

    return dataclasses.replace(output, **{f.name: detach(getattr(output, f.name)) for f in dataclasses.fields(output)})


def step_of(module: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> Step:
    """Return a training step: losses, backward, update by SGD with momentum."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-6, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        sum(losses().values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_of(step: Step, device: torch.device) -> float:
    """Return the seconds of a call, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def count_flops(step: Step) -> int:
    """Return the floating-point operations of convolutions and matrix products in a call, backward included."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory(step: Step, device: torch.device) -> float:
    """Return the peak GiB of tensors in a call, beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**30


def measure_the_rest(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Time loading, detection, scoring and saving, with the first detector."""
    size = tuple(sorted(sides_of(args.image_size[0])))
    student = build_detector(args.detectors[0], args.student, 91, image_size=size).to(device)
    optimizer = torch.optim.SGD(student.parameters(), 1e-6, momentum=0.9)
    for parameter in student.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    content = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saving = time_of(lambda: save(content, folder / "checkpoint.pt"), device)
        photographs = write_photographs(folder, count=64)
        loader = DataLoader(photographs, args.batch_size[0], num_workers=args.workers, collate_fn=collate)
        loading = time_of(lambda: list(loader), device)
        detecting = time_of(lambda: detect(student, loader, device), device)
    detections, coco, categories = random_detections(images=5000, each=100, boxes=7)
    scoring = time_of(lambda: coco_metrics(detections, coco, categories), device)
    return {
        f"loading 640x480 JPEG files, images/s ({args.workers} workers)": len(photographs) / loading,
        "detecting, images/s": len(photographs) / detecting,
        "scoring 5,000 images of 100 detections, s": scoring,
        "saving a checkpoint, s": saving,
    }


def write_photographs(folder: Path, count: int) -> CocoFolder:
    """Write and open JPEG files of 640x480 pixels, about as large as COCO's, with annotations."""
    images, annotations = [], []
    for number in range(1, count + 1):
        coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 15, 20), size=(480, 640), mode="bicubic")[0]
        pixels = (255 * (coarse + 0.05 * torch.randn(3, 480, 640))).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number}.jpg", quality=90)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 640, "height": 480})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [100, 100, 200, 200]})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_text(json.dumps(coco))
    return CocoFolder(folder, folder / "instances.json", augmentation(train=True))


def random_detections(images: int, each: int, boxes: int) -> tuple[dict, dict, dict[int, dict]]:
    """Return detections, ground truth in COCO's format and categories: random boxes, some of them nearly right."""
    categories = {label: {"id": label, "name": str(label)} for label in range(1, 81)}
    corner, extent = torch.rand(2, images, each, 2) * torch.tensor([320.0, 240.0])
    truth = extent[:, :boxes] * (0.7 + 0.6 * torch.rand(images, boxes, 2))
    labels, scores = torch.randint(1, 81, (images, each)), torch.rand(images, each)
    found = {
        n: {"boxes": torch.cat([corner[n], corner[n] + extent[n]], dim=1), "labels": labels[n], "scores": scores[n]}
        for n in range(images)
    }
    annotations = [
        {"image_id": n, "bbox": [*corner[n, i].tolist(), *truth[n, i].tolist()], "category_id": labels[n, i].item()}
        for n in range(images)
        for i in range(boxes)
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation.update(id=number, iscrowd=0, area=annotation["bbox"][2] * annotation["bbox"][3])
    images = [{"id": n, "width": 640, "height": 480} for n in range(images)]
    return found, {"images": images, "annotations": annotations, "categories": list(categories.values())}, categories


def print_steps(results: list[dict]) -> None:
    """Print a line for each case and method: medians in seconds, memory in GiB."""
    columns = ("a", "b", "c", "m", "c/(a+b)", "in flops", "m/a", "images/s", "GiB a", "GiB c", "GiB m")
    print(f"method  detector         size batch boxes classes{''.join(f'{name:>9}' for name in columns)}")
    for r in results:
        case = f"{r['method']:7} {r['detector']:11} {r['size']:>8} {r['batch_size']:5} {r['boxes']:5} {r['classes']:7}"
        memory = (r["memory_gb"][letter] for letter in "acm")
        in_flops = r["flops"]["c"] / (r["flops"]["a"] + r["flops"]["b"])
        ratios = (r["ratio"], in_flops, r["m"] / r["a"])
        values = (*(r[letter] for letter in "abcm"), *ratios, r["images_per_second"], *memory)
        print(case + "".join(f"{value:9.3f}" for value in values))


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or a list of its words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detectors", nargs="+", default=["fcos"], help=", ".join(DETECTORS))
    add("--methods", nargs="+", default=["frs"], choices=METHODS, help=", ".join(METHODS))
    add("--teacher", default="r101", help="backbone")
    add("--student", default="r50", help="backbone")
    add("--image-size", nargs="+", default=["320"], help="in pixels: the side of a square, or HEIGHTxWIDTH")
    add("--batch-size", type=int, nargs="+", default=[2], help="images per step")
    add("--boxes", type=int, nargs="+", default=[7], help="boxes per image; 7 is COCO's mean")
    add("--classes", type=int, nargs="+", default=[91], help="background included; 91 for COCO in torchvision")
    add("--repeats", type=int, default=5, help="rounds of all steps")
    add("--minutes", type=float, default=30, help="start no further case after this time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", choices=AMP, default="off", help="autocast of c and m")
    add("--rest", action="store_true", help="also time loading, detection, scoring and saving")
    add("--workers", type=int, default=0, help="data loading processes")
    add("--json", action="store_true", help="print all numbers as JSON")
    return parser.parse_args(words)


if __name__ == "__main__":
    args = parse_args()
    try:
        for detector in args.detectors:
            check_detector(detector)
        main(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
