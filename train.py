r"""Train a detector, either plain or distilled from a teacher.

On a laptop, with the built-in shapes; a teacher and a plain student are trained first:

    python train.py --method frs --teacher r101 --student r50

On one GPU with COCO-format data, first a teacher (or baseline), then a student:

    python train.py --method none --student r101 --pretrained --data /path/to/coco
    python train.py --method frs --teacher r101 --student r50 --pretrained --data /path/to/coco \
        --teacher-weights runs/none-fcos-r101-coco/model.pt

On eight GPUs, and on two machines of eight:

    torchrun --nproc-per-node 8 train.py ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...

Recipe for COCO-format data: SGD with momentum 0.9, weight decay 1e-4, and learning rate 0.01 (Faster R-CNN 0.02) per 16
images, scaled linearly with the images of all processes; 500 iterations of warm-up; 12 epochs, with the learning rate
divided by 10 after 2/3 and 11/12 of them. Recipe for the shapes: from scratch with AdamW and a one-cycle schedule.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd.data import check_same_classes, open_dataset, summarize
from kd.detectors import DETECTORS, build_detector, check_pair, inherit
from kd.distiller import Distiller, check_not_zero, check_terms
from kd.evaluation import evaluate
from kd.methods import METHODS, build_method
from kd.run.arguments import plain_arguments, settle
from kd.run.checkpoint import load_teacher, save_model
from kd.run.distributed import barrier, init_distributed, rank, say, share_buffers, world_size
from kd.run.errors import one_line_errors
from kd.run.files import locked
from kd.run.folder import (
    append_log,
    check_same_run,
    describe,
    is_finished,
    open_folder,
    read_evaluations,
    started_with,
)
from kd.run.progress import Progress
from kd.run.results import print_results, result
from kd.run.speed import AMP, keep_freed_memory, speed_up_teacher
from kd.tools.samples import draw_samples

TEACHER_CHECK = 500  # validation images for the teacher's AP before training
TEACHER_SCHEDULE = 4  # times the epochs of its student, for a teacher on the shapes: at equal epochs it is no better


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or a list of its words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # model
    add("--method", default="none", help=f"none, {', '.join(METHODS)}")
    add("--detector", default="fcos", help=", ".join(DETECTORS))
    add("--student", default="r50", help="backbone: r18 r34 r50 r101 r152 or any timm model with feature maps")
    add("--teacher", help="backbone of the teacher")
    add("--teacher-weights", help="model.pt of a teacher's run, or a COCO_V1 state_dict of torchvision")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyper-parameters of the method")
    add("--distill-weight", type=float, default=1.0, help="multiplies every distillation loss")
    add("--inherit", action="store_true", help="initialise the student's FPN and heads from the teacher")
    add("--pretrained", nargs="?", const=True, default=False, metavar="FILE", help="ImageNet backbone, timm's or FILE")
    # data
    add("--data", help="folder with train2017/ val2017/ annotations/instances_*2017.json; default: built-in shapes")
    add("--train-images", help="folder, instead of the one in --data")
    add("--train-annotations", help="JSON file, instead of the one in --data")
    add("--val-images", help="folder, instead of the one in --data")
    add("--val-annotations", help="JSON file, instead of the one in --data")
    add("--image-size", type=int, nargs=2, metavar=("SHORT", "LONG"), help="in pixels; default: 800 1333, shapes 64 64")
    add("--skip-bad-images", action="store_true", help="train without images that are missing or damaged")
    add("--multi-scale", type=int, nargs=2, metavar=("LOW", "HIGH"), help="random short side of training images")
    add("--aspect-ratio-group-factor", type=int, default=3, help="form batches of similar aspect ratio; 0: off")
    # schedule
    add("--epochs", type=int, help="passes over the training set; default: 12, shapes 1")
    add("--max-iterations", type=int, help="stop after this many steps, then evaluate and save")
    add("--batch-size", type=int, help="images per process; default: 2, shapes 8")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd, with step decay, or adamw, with one cycle (shapes)")
    add("--lr", type=float, help="learning rate, not scaled further; default: the recipe's")
    add("--clip-grad", type=float, default=35.0, help="maximum norm of the gradient; 0: off")
    add("--eval-interval", type=int, help="epochs between evaluations; the last epoch is always evaluated")
    add("--sync-bn", action="store_true", help="batch norm over the images of all GPUs, for training from scratch")
    # machine
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", choices=AMP, help="autocast; default: bf16 where the hardware has it")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0, help="data loading processes")
    add("--seed", type=int, default=0, help="of all random numbers")
    # run
    add("--output", help="folder of the run; default: named by its settings, in runs/")
    resume = {"nargs": "?", "const": "required", "choices": ("required", "auto")}
    add("--resume", **resume, help="continue the run in --output; auto: start it if it does not exist")
    return parser.parse_args(words)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train what the shapes need for comparison, then the requested detector; return COCO's twelve numbers."""
    settle(args)
    output = Path(args.output)
    with locked(output):
        if is_finished(output):
            say(f"{output} is finished")
            return read_evaluations(output)[-1]
        if args.method != "none" and args.teacher_weights is None:
            args.teacher_weights = started_with(output).get("teacher_weights") or train_companions(args)
        return train(args)


def train_companions(args: argparse.Namespace) -> str:
    """Train teacher and plain student on the built-in shapes unless earlier runs did; return the teacher's weights.

    Raises:
        ValueError: the data is not built in, or the earlier runs had other settings.
    """
    if args.train_annotations:
        raise ValueError(
            f"no weights for the teacher {args.teacher}. Either train it (the same command with --method none "
            f"--student {args.teacher}, without --teacher) and give its model.pt as --teacher-weights, or give a "
            f"COCO_V1 checkpoint of torchvision's {args.detector}"
        )
    teacher = plain_arguments(args, "teacher", args.teacher, TEACHER_SCHEDULE * args.epochs)
    for companion in (teacher, plain_arguments(args, "none", args.student, args.epochs)):
        folder = Path(companion.output)
        with locked(folder):
            if is_finished(folder):
                check_same_run(folder, describe(companion))
            else:
                say(f"training {folder.name} first; later runs use it again")
                train(companion)
    return str(Path(teacher.output) / "model.pt")


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train, evaluate and save one detector; return COCO's twelve numbers."""
    device, output = init_distributed(args.device), Path(args.output)
    autocast = partial(torch.autocast, device.type, AMP[args.amp], enabled=args.amp != "off")
    if device.type == "cpu":
        keep_freed_memory()

    # data
    size, skip = args.image_size, args.skip_bad_images
    train_set = open_dataset(args.train_images, args.train_annotations, size, True, args.seed, skip)
    val_set = open_dataset(args.val_images, args.val_annotations, size, False, args.seed, skip)
    check_same_classes(train_set, val_set)
    say(summarize(train_set, val_set))
    steps_per_epoch = len(train_set) // (args.batch_size * world_size())
    if steps_per_epoch == 0:
        raise ValueError(f"{len(train_set)} training images are fewer than one batch of {args.batch_size} per process")
    iterations = min(args.epochs * steps_per_epoch, args.max_iterations or sys.maxsize)
    score = partial(evaluate, dataset=val_set, device=device, batch_size=args.batch_size, workers=args.workers)

    # teacher
    teacher, results, shown = None, [], {}
    if args.method != "none":
        path, name = args.teacher_weights, f"teacher {args.teacher}"
        teacher = load_teacher(path, args.detector, args.teacher, val_set.categories, size).to(device)
        metrics, detections = score(teacher, limit=TEACHER_CHECK, name=name)
        say(f"{name} from {path}: AP {metrics['AP']:.3f} on {len(detections)} validation images")
        some = f", {len(detections)} images" if len(detections) < len(val_set) else ""
        results.append(result(f"{name}{some}", metrics, teacher))
        shown[name] = detections
        teacher = speed_up_teacher(teacher, AMP[args.amp])

    # student
    torch.manual_seed(args.seed)
    arguments = {
        "detector": args.detector,
        "backbone": args.student,
        "num_classes": train_set.num_classes,
        "image_size": size,
        "from_scratch": not args.pretrained,
    }
    student = build_detector(**arguments, pretrained=args.pretrained).to(device, memory_format=torch.channels_last)
    if args.multi_scale:
        low, high = args.multi_scale
        student.transform.min_size = (*range(low, high + 1), size[0])  # evaluation takes the last

    # distiller
    method, warmup = None, 0
    if teacher:
        channels = student.backbone.out_channels, teacher.backbone.out_channels
        method = build_method(args.method, args.detector, *channels, student.backbone.strides, args.set)
        warmup = min(method.warmup, iterations // 10)
        check_pair(student, teacher, method.needs)
    if args.inherit:
        args.not_inherited = inherit(student, teacher)  # recorded in args.json
        say(f"inherited FPN and heads of the teacher, except: {', '.join(args.not_inherited) or 'nothing'}")
    if args.sync_bn:
        student = convert_sync_batchnorm(student)
    distiller = Distiller(student, teacher, method, weight=args.distill_weight, warmup=warmup).to(device)
    if method:
        image, target = next(sample for sample in train_set if len(sample[1]["labels"]))
        images, targets = to_device([image], [target], device)
        with autocast():
            zero = check_terms(distiller, images, targets)
        if zero:
            say(f"{', '.join(zero)} is zero on the first image, and must not stay so for the first epoch")
    model = DistributedDataParallel(distiller) if world_size() > 1 else distiller

    # optimizer
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(args, parameters, iterations)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # epochs
    parts = {"distiller": distiller, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    run = {"steps_per_epoch": steps_per_epoch, "iterations": iterations, "seed": args.seed}
    progress = Progress(output, parts, **run, title=f"{args.method} {args.student}")
    if open_folder(output, args):
        progress.resume()
    for epoch in range(progress.epoch, progress.epochs):
        loader = progress.loader(train_set, args.batch_size, args.workers, args.aspect_ratio_group_factor)
        train_one_epoch(
            model, loader, optimizer, schedule, scaler, progress, autocast, args.clip_grad or math.inf, device
        )
        line = progress.summary()
        if epoch == 0:
            check_not_zero({name: line["losses"][name] for name in progress.terms}, steps=progress.step)
        if epoch + 1 == progress.epochs or (args.eval_interval and (epoch + 1) % args.eval_interval == 0):
            share_buffers(student)
            metrics, detections = score(student, name=args.student)
            line |= {**metrics, "teacher_AP": results[0]["AP"] if teacher else None}
            say(f"epoch {epoch + 1}: " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
            if rank() == 0:
                draw_samples(val_set, {**shown, f"student {args.student}": detections}).save(output / "samples.png")
        if rank() == 0:
            append_log(output, line)
        progress.next_epoch()
    progress.signal.release()

    # results
    results.append(result(f"{args.method if teacher else 'plain'} {args.student}", metrics, student))
    if rank() == 0:
        save_model(student, arguments, val_set.categories, output / "model.pt")
        print_results(args, results, iterations)
    barrier()  # the files exist before another process looks for them
    return metrics


def train_one_epoch(model, loader, optimizer, schedule, scaler, progress, autocast, clip_grad, device) -> None:
    """Train on the batches that the epoch has left.

    images, targets -> Distiller -> {"classification": ..., ...}, {"loss_frs_fpn": ..., ...} -> sum -> backward
    """
    model.train()
    for images, targets in progress.batches(loader):
        images, targets = to_device(images, targets, device)
        with autocast():
            detection, distillation = model(images, targets)
        loss = sum([*detection.values(), *distillation.values()])

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        progress.record(detection, distillation, norm)  # raises if a loss or the gradient is not finite
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # here, so that the next forward can use the memory
        schedule.step()


def to_device(images: list[Tensor], targets: list[dict], device: torch.device) -> tuple[list[Tensor], list[dict]]:
    """Return images, and boxes and labels of targets, on a device."""
    images = [image.to(device, non_blocking=True) for image in images]
    return images, [{k: target[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for target in targets]


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], iterations: int):
    """Return the optimizer and its learning-rate schedule, which is stepped every iteration."""
    if args.optimizer == "adamw":
        lr = args.lr or 1e-3
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05, fused=True)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations, pct_start=0.15)

    base = 0.02 if args.detector == "faster_rcnn" else 0.01
    lr = args.lr or base * args.batch_size * world_size() / 16
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4, fused=True)

    def factor(iteration: int) -> float:
        drops = sum(iteration >= part * iterations for part in (2 / 3, 11 / 12))
        return min(1.0, (iteration + 1) / 500) * 0.1**drops

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
