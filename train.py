"""Train a detector, plain or distilled from a teacher.

    python train.py --method frs --teacher r101 --student r50                   built-in shapes; trains the teacher
    first python train.py --method none --student r101 --data /path/to/coco           a teacher, or a baseline python
    train.py --method frs --teacher r101 --student r50 --data /path/to/coco \
        --teacher-weights runs/none-fcos-r101-coco/model.pt                     one GPU
    torchrun --nproc-per-node 8 train.py ...                                    eight GPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...    two machines

Recipe for COCO-format data: SGD with momentum 0.9 and weight decay 1e-4, learning rate 0.01 (Faster R-CNN 0.02) per 16
images, scaled linearly with the images that all processes see in a step, 500 iterations of linear warm-up, 12 epochs
with drops by 10 after two thirds and eleven twelfths. Recipe for the built-in shapes, from scratch: AdamW and one
cycle of the learning rate.
"""

import argparse
import ast
import difflib
import inspect
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torchvision
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.utils import save_image
from tqdm import tqdm

from kd.checkpoint import load, load_model, load_torchvision, read_run, save, save_model
from kd.data import DataError, class_names, collate, open_dataset
from kd.detectors import DETECTORS, FPN_CHANNELS, STRIDES, build_detector, check_detector, timm_name
from kd.distiller import Distiller, check_pair, check_terms, inherit
from kd.evaluation import draw_samples, evaluate
from kd.methods import METHODS

# What an argument is when it is not given; learning rates are in make_optimizer.
SHAPES_RECIPE = {"epochs": 2, "batch_size": 8, "image_size": [64, 64], "optimizer": "adamw", "eval_interval": 1000}
COCO_RECIPE = {"epochs": 12, "batch_size": 2, "image_size": [800, 1333], "optimizer": "sgd", "eval_interval": 1}
PATIENCE = 50  # batches after which each distillation loss must have been above zero once
TEACHER_CHECK = 500  # validation images on which the teacher's AP is measured before training


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or a list of its words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--method", default="none", help=f"none, {', '.join(METHODS)}")
    add("--detector", default="fcos", help=", ".join(DETECTORS))
    add("--student", default="r50", help="backbone: r18 r34 r50 r101 r152 or any timm model with feature maps")
    add("--teacher", help="the teacher's backbone, likewise")
    add("--teacher-weights", help="model.pt of a teacher's run, or a COCO_V1 state_dict of torchvision")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyper-parameters of the method")
    add("--inherit", action="store_true", help="start the student from the teacher's pyramid and heads")
    add("--pretrained", action="store_true", help="start the student's backbone from timm's ImageNet weights")
    add("--pretrained-weights", metavar="FILE", help="the same from a local timm state_dict")
    # data
    add("--data", help="folder in COCO's layout: train2017/ val2017/ annotations/instances_*2017.json; default: shapes")
    add("--train-images", help="folder, instead of --data's")
    add("--train-annotations", help="JSON file, instead of --data's")
    add("--val-images", help="folder, instead of --data's")
    add("--val-annotations", help="JSON file, instead of --data's")
    add("--image-size", type=int, nargs=2, metavar=("MIN", "MAX"), help="short side and longest side in pixels")
    add("--multi-scale", action="store_true", help="draw the short side of training images from 0.8 to 1.0 of MIN")
    # schedule
    add("--epochs", type=int, help="passes over the training set")
    add("--max-iterations", type=int, help="stop after this many steps, then evaluate and save as at an end")
    add("--batch-size", type=int, help="images per process and step")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd drops the learning rate in steps, adamw runs one cycle")
    add("--lr", type=float, help="learning rate, not scaled further; default: the recipe's")
    add("--clip-grad", type=float, default=35.0, help="largest norm of the gradient")
    add("--eval-interval", type=int, help="epochs between two evaluations; the last epoch is always evaluated")
    # machine
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", choices=("bf16", "off"), help="autocast; default: bf16 where the hardware has it")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0, help="data loading processes")
    add("--seed", type=int, default=0)
    # files
    add("--output", help="folder of this run; default: runs/METHOD-DETECTOR-TEACHER-STUDENT")
    add("--resume", action="store_true", help="continue the run in --output after its last finished epoch")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train, evaluate and save one detector as the arguments say; return COCO's twelve numbers."""
    settle(args)
    rank, world_size, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), start_process(args)
    say = print if rank == 0 else lambda *_: None
    output = Path(args.output)

    # data
    train_set = open_dataset(args.train_images, args.train_annotations, args.image_size, train=True)
    val_set = open_dataset(args.val_images, args.val_annotations, args.image_size, train=False)
    if class_names(train_set.categories) != class_names(val_set.categories):
        raise DataError(f"{args.train_annotations} and {args.val_annotations} list different categories")
    say(f"training on {train_set.summary}\nvalidating on {val_set.summary}")
    train_sampler = DistributedSampler(train_set, world_size, rank, seed=args.seed, drop_last=True)
    train_loader = DataLoader(
        train_set,
        args.batch_size,
        sampler=train_sampler,
        num_workers=args.workers,
        collate_fn=collate,
        drop_last=True,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(args.seed),
    )
    if len(train_loader) == 0:
        raise ValueError(
            f"{len(train_set)} training images are fewer than one batch ({world_size} x {args.batch_size})"
        )

    if rank == 0:
        start_folder(args)

    # teacher
    teacher = teacher_row = None
    if args.method != "none":
        teacher, teacher_row, teacher_detections = get_teacher(args, val_set, device, say)

    # student
    torch.manual_seed(args.seed)
    student = build_detector(
        args.detector,
        args.student,
        train_set.num_classes,
        image_size=args.image_size,
        pretrained=args.pretrained,
        pretrained_weights=args.pretrained_weights,
    ).to(device)
    if args.multi_scale:
        student.transform.min_size = tuple(round(args.image_size[0] * (0.8 + 0.04 * step)) for step in range(6))

    if teacher is not None:
        check_pair(student, teacher)
    if args.inherit:
        inherit(student, teacher)

    # distiller
    iterations = args.epochs * len(train_loader)
    iterations = min(iterations, args.max_iterations or iterations)
    method = None
    if teacher is not None:
        method = build_method(args).to(device)
    warmup = min(method.warmup, iterations // 10) if method else 0
    distiller = Distiller(student, teacher, method, warmup).to(device)
    module = DistributedDataParallel(distiller) if world_size > 1 else distiller

    # optimizer
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(args, parameters, iterations)
    first_epoch = resume(args, distiller, optimizer, schedule) if args.resume else 0

    # epochs
    iteration = first_iteration = first_epoch * len(train_loader)
    unproven = []  # distillation losses that have not yet been seen to reach the student
    for epoch in range(first_epoch, math.ceil(iterations / len(train_loader))):
        distiller.train()
        train_sampler.set_epoch(epoch)
        # Every epoch from its own seed: a resumed run draws what an uninterrupted one does, and a method's adapters
        # do not change what the student sees.
        torch.manual_seed(1000 * args.seed + epoch)
        train_loader.generator.manual_seed(1000 * args.seed + epoch)
        sums, steps, started = {}, 0, time.time()
        progress = tqdm(
            train_loader,
            desc=f"{args.method} {args.student}: epoch {epoch + 1} of {args.epochs}",
            total=min(len(train_loader), iterations - iteration),
            disable=rank > 0,
            dynamic_ncols=True,
        )
        for images, targets in progress:
            images = [image.to(device, non_blocking=True) for image in images]
            boxes = [{k: t[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for t in targets]
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                losses = module(images, boxes)
            if iteration == first_iteration:
                unproven = [name for name in losses if name.startswith(f"loss_{args.method}_")]
            if unproven and any(len(target["labels"]) for target in targets):
                unproven = check_terms(losses, unproven, student)
                if unproven and steps >= PATIENCE:
                    raise RuntimeError(f"{', '.join(unproven)} was zero for {steps} batches: check the teacher")
            total = sum(losses.values())
            values = {name: loss.item() for name, loss in losses.items()}
            if not math.isfinite(sum(values.values())):
                ids = [target["image_id"] for target in targets]
                raise RuntimeError(f"the loss is not finite at iteration {iteration}, images {ids}: {values}")
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, args.clip_grad)
            optimizer.step()
            schedule.step()
            iteration, steps = iteration + 1, steps + 1
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
            progress.set_postfix({"loss": f"{sum(values.values()):.3f}", "lr": f"{schedule.get_last_lr()[0]:.1e}"})
            if iteration == iterations:
                break
        progress.close()
        seconds = time.time() - started
        line = {
            "epoch": epoch + 1,
            "iteration": iteration,
            "losses": {name: value / steps for name, value in sums.items()},
            "lr": schedule.get_last_lr()[0],
            "images_per_second": steps * args.batch_size * world_size / seconds,
            "memory_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        }

        # evaluation
        last = iteration == iterations
        if last or (epoch + 1) % args.eval_interval == 0:
            metrics, detections = evaluate(student, eval_loader(val_set, args), device, args.student)
            line.update(metrics)
            say(f"epoch {epoch + 1}: " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))

        # checkpoint
        if rank == 0:
            with open(output / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            content = {
                "distiller": distiller.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
            }
            save(content, output / "checkpoint.pt")

    # the run's results
    if rank == 0:
        arguments = {
            "detector": args.detector,
            "backbone": args.student,
            "num_classes": train_set.num_classes,
            "image_size": args.image_size,
            "from_scratch": not (args.pretrained or args.pretrained_weights),
        }
        save_model(student, arguments, val_set.categories, output / "model.pt")
        rows = [detections] if teacher is None else [teacher_detections, detections]
        save_image(draw_samples(val_set, rows), output / "samples.png")
        print_table(args, teacher_row, student, metrics, iteration)
    if world_size > 1:
        distributed.barrier()  # the files are there before another process looks for them
    return metrics


def settle(args: argparse.Namespace) -> None:
    """Fill in what was not given, and refuse what cannot be meant."""
    recipe = COCO_RECIPE if args.data or args.train_annotations else SHAPES_RECIPE
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.method not in ("none", *METHODS):
        close = difflib.get_close_matches(args.method, METHODS, n=1)
        raise ValueError(
            f"unknown method {args.method!r}: choose {close[0] if close else ', '.join(('none', *METHODS))}"
        )
    if args.method != "none" and not args.teacher:
        raise ValueError(f"--method {args.method} needs a teacher: add --teacher BACKBONE")
    if args.method == "none" and (args.teacher or args.teacher_weights or args.set or args.inherit):
        raise ValueError("--method none has no teacher: leave out --teacher, --teacher-weights, --set and --inherit")
    for backbone in filter(None, (args.student, args.teacher)):
        timm_name(backbone)
    check_detector(args.detector)
    if args.method != "none":
        with torch.device("meta"):  # a wrong hyper-parameter shall not be found after an hour of training a teacher
            build_method(args)
    for name in ("epochs", "batch_size", "eval_interval", "max_iterations"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give 1 or more")
    if args.data is None and args.train_annotations is None and args.image_size[0] != args.image_size[1]:
        raise ValueError(f"the built-in shapes are square: give --image-size {args.image_size[0]} {args.image_size[0]}")
    if args.data:
        root = Path(args.data)
        args.train_images = args.train_images or str(root / "train2017")
        args.val_images = args.val_images or str(root / "val2017")
        args.train_annotations = args.train_annotations or str(root / "annotations" / "instances_train2017.json")
        args.val_annotations = args.val_annotations or str(root / "annotations" / "instances_val2017.json")
    paths = ("train_images", "train_annotations", "val_images", "val_annotations")
    absent = [f"--{p.replace('_', '-')}" for p in paths if getattr(args, p) is None]
    if 0 < len(absent) < 4:
        raise ValueError(f"without --data, all four paths are needed: {', '.join(absent)} missing")
    if args.amp is None:
        has_bf16 = args.device.startswith("cuda") or torch.cpu.get_capabilities().get("avx512_bf16", False)
        args.amp = "bf16" if has_bf16 else "off"
    if args.output is None:
        args.output = str(Path("runs", run_name(args, args.method, args.student)))


def run_name(args: argparse.Namespace, method: str, student: str) -> str:
    """Return the name of the run of a method and student in the setting of `args`."""
    teacher = [args.teacher] if method != "none" else []
    data = [Path(args.data).resolve().name] if args.data else []
    return "-".join([method, args.detector, *teacher, student, *data])


def build_method(args: argparse.Namespace) -> nn.Module:
    """Build the method with the hyper-parameters of --set NAME=VALUE.

    Raises:
        ValueError: a name that the method does not have, text that is not NAME=VALUE, or a detector it does not serve.
    """
    legal = list(inspect.signature(METHODS[args.method]).parameters)[4:]
    values = {}
    for text in args.set:
        name, _, value = text.partition("=")
        if name not in legal or not value:
            raise ValueError(f"--set {text}: {args.method} takes NAME=VALUE with NAME one of {', '.join(legal)}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return METHODS[args.method](args.detector, FPN_CHANNELS, FPN_CHANNELS, STRIDES[args.detector], **values)


def start_process(args: argparse.Namespace) -> torch.device:
    """Join the other processes where torchrun started several; return this one's device."""
    device = torch.device(args.device)
    if "RANK" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def eval_loader(dataset: Dataset, args: argparse.Namespace) -> DataLoader:
    """Return a loader of this process's share of a validation set."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sampler = DistributedSampler(dataset, world_size, rank, shuffle=False)
    return DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=args.workers, collate_fn=collate)


def get_teacher(args: argparse.Namespace, val_set: Dataset, device: torch.device, say) -> tuple[nn.Module, dict, dict]:
    """Load the teacher, or train it first on the built-in shapes; print its AP before anything is distilled.

    Returns:
        The teacher, its row of the final table, and its detections by image id.

    Raises:
        ValueError: no weights given for real data, or weights, classes or detector that do not fit.
    """
    path = args.teacher_weights
    if path is None and args.train_annotations:
        raise ValueError(
            f"no weights for the teacher {args.teacher}. Either train one (the same command with --method none "
            f"--student {args.teacher}, without --teacher) and give its model.pt as --teacher-weights, or give a "
            f"COCO_V1 checkpoint of torchvision's {args.detector}"
        )
    if path is None:
        folder = Path(args.output).parent / run_name(args, "none", args.teacher)
        path = folder / "model.pt"
        if not path.exists():
            say(f"No teacher yet: training {args.teacher} first; it is kept in {folder} for the next run.")
            changes = {
                "method": "none",
                "student": args.teacher,
                "teacher": None,
                "set": [],
                "inherit": False,
                "output": str(folder),
            }
            changes["resume"] = (folder / "checkpoint.pt").exists()
            main(argparse.Namespace(**{**vars(args), **changes}))

    content = load(path)
    if "arguments" in content:
        teacher, content = load_model(path)
        theirs, ours = class_names(content["categories"]), class_names(val_set.categories)
        if theirs != ours:
            differing = sorted(label for label in theirs.keys() | ours.keys() if theirs.get(label) != ours.get(label))
            raise ValueError(f"the teacher {path} knows other classes than the data, at labels {differing[:10]}")
        backbone = content["arguments"]["backbone"]
        if timm_name(backbone) != timm_name(args.teacher):
            raise ValueError(f"{path} holds a {backbone}, but --teacher says {args.teacher}")
    else:
        teacher = load_torchvision(path, args.detector, args.teacher, val_set.num_classes, args.image_size)

    teacher = teacher.to(device)
    sample = Subset(val_set, range(min(TEACHER_CHECK, len(val_set))))
    metrics, detections = evaluate(teacher, eval_loader(sample, args), device, f"teacher {args.teacher}")
    say(f"Teacher {args.teacher} from {path}: AP {metrics['AP']:.3f} on {len(sample)} validation images.")
    return teacher, {"name": f"teacher {args.teacher}", **metrics, "parameters": count_parameters(teacher)}, detections


def start_folder(args: argparse.Namespace) -> None:
    """Create the run's folder and write args.json.

    Raises:
        ValueError: the folder holds another run, or there is nothing to resume.
    """
    output = Path(args.output)
    if args.resume and not (output / "checkpoint.pt").exists():
        raise ValueError(f"nothing to resume: {output / 'checkpoint.pt'} does not exist")
    if args.resume and (output / "model.pt").exists():
        raise ValueError(f"nothing to resume: the run in {output} is finished")
    if not args.resume and (output / "checkpoint.pt").exists():
        raise ValueError(f"{output} holds a run: continue it with --resume, choose another --output, or delete it")
    output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        (output / "log.jsonl").unlink(missing_ok=True)  # of a run that was stopped before its first checkpoint
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(command, capture_output=True, text=True, check=False)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "revision": revision.stdout.strip() or None,
    }
    (output / "args.json").write_text(json.dumps({**vars(args), "versions": versions}, indent=1))
    print(f"{output}: {', '.join(f'{name} {value}' for name, value in versions.items())}")


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], iterations: int):
    """Return the optimizer and its learning-rate schedule, stepped once an iteration."""
    if args.optimizer == "adamw":
        lr = args.lr or 1e-3
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05, fused=True)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations, pct_start=0.15)

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    base = 0.02 if args.detector == "faster_rcnn" else 0.01
    lr = args.lr or base * args.batch_size * world_size / 16
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)

    def factor(iteration: int) -> float:
        drops = sum(iteration >= share * iterations for share in (2 / 3, 11 / 12))
        return min(1.0, (iteration + 1) / 500) * 0.1**drops

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def resume(args: argparse.Namespace, distiller: Distiller, optimizer, schedule) -> int:
    """Restore the state after the last finished epoch; return the number of finished epochs."""
    content = load(Path(args.output) / "checkpoint.pt")
    distiller.load_state_dict(content["distiller"])
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    return content["epoch"]


def count_parameters(detector: nn.Module) -> int:
    """Return the number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in detector.parameters())


def print_table(
    args: argparse.Namespace, teacher_row: dict | None, student: nn.Module, metrics: dict[str, float], iteration: int
) -> None:
    """Print teacher, plain student (if that run exists) and this run's student."""
    name = f"{args.method} {args.student}" if teacher_row else f"plain {args.student}"
    rows = [{"name": name, **metrics, "parameters": count_parameters(student)}]
    if teacher_row:
        plain = read_run(Path(args.output).parent / run_name(args, "none", args.student))
        if plain:
            rows.insert(0, {"name": f"plain {args.student}", **plain, "parameters": rows[0]["parameters"]})
        rows.insert(0, teacher_row)
    width = max(len(row["name"]) for row in rows)
    print(f"\n{args.detector}, {iteration} iterations\n\n{'':{width}}{'AP':>8}{'AP50':>8}{'AP75':>8}{'parameters':>14}")
    for row in rows:
        numbers = "".join(f"{row[key]:8.3f}" for key in ("AP", "AP50", "AP75"))
        print(f"{row['name']:{width}}{numbers}{row['parameters'] / 1e6:12.1f} M")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
