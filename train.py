"""Train a detector, either plain or distilled from a teacher.

On a laptop, with the built-in shapes; a teacher and a plain student are trained first:

    python train.py --method frs --teacher r101 --student r50

`python train.py --help` lists the options, shows how to train on COCO-format data and on several GPUs, and states the
recipes. The options are defined in kd/run/options.py, the recipes in kd/run/arguments.py and `make_optimizer`.
"""

import argparse
import math
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd.data import check_same_classes, open_dataset, set_train_scales, summarize
from kd.detectors import ZOO, build_detector, check_pair, fitting_arguments, inherit
from kd.distiller import Distiller, check_not_zero, check_terms, measure_ratios
from kd.evaluation import evaluate, format_metrics
from kd.methods import build_method
from kd.run.arguments import plain_arguments, settle
from kd.run.checkpoint import save_model
from kd.run.distributed import init_distributed, mean_over_processes, rank, say, share_buffers, world_size
from kd.run.errors import one_line_errors
from kd.run.files import locked
from kd.run.folder import (
    append_log,
    best_evaluation,
    check_same_run,
    check_start,
    describe,
    is_finished,
    open_folder,
    read_evaluations,
    started_with,
    teacher_file,
)
from kd.run.options import parse_args
from kd.run.progress import Progress
from kd.run.results import format_ratios, print_results, result
from kd.run.speed import AMP, keep_freed_memory, speed_up_teacher
from kd.run.weights import arguments_of, load_teacher, start_from
from kd.tools.samples import draw_samples

RATIO_BATCHES = 10  # of each process, to compare the losses before training
AUTO_RATIO = 1.0  # of all distillation losses to the detection losses before training, with --distill-weight auto
TEACHER_CHECK = 500  # validation images for the teacher's AP before training
TEACHER_SCHEDULE = 4  # times the epochs of its student, for a teacher on the shapes: at equal epochs it is no better


def main(args: argparse.Namespace) -> dict:
    """Train the requested detector, on the shapes after what it is compared with; return its evaluation."""
    settle(args)
    output = Path(args.output)
    with locked(output):
        if args.teacher and args.teacher_weights is None and args.teacher not in ZOO:
            args.teacher_weights = teacher_file(output, started_with(output)) or train_companions(args)
        if is_finished(output):
            check_same_run(output, describe(args))
            say(f"{output} is finished")
            return read_evaluations(output)[-1]
        return train(args)


def train_companions(args: argparse.Namespace) -> str:
    """Train teacher and plain student on the built-in shapes unless earlier runs did; return the teacher's weights.

    Raises:
        ValueError: the data is not built in, or the earlier runs had other settings.
    """
    if args.train_annotations:
        raise ValueError(
            f"no weights for the teacher {args.teacher}. Train it (the same command with --method none --student "
            f"{args.teacher}, without --teacher and --inherit) and give its model.pt as --teacher-weights, or give a "
            f"checkpoint of mmdetection's zoo, or take a detector of torchvision as --teacher: {', '.join(ZOO)}"
        )
    teacher = plain_arguments(args, "teacher", args.teacher, TEACHER_SCHEDULE * args.epochs)
    teacher.student_weights = None
    for companion in (teacher, plain_arguments(args, "none", args.student, args.epochs)):
        folder = Path(companion.output)
        with locked(folder):
            if is_finished(folder):
                check_same_run(folder, describe(companion))
            else:
                say(f"training {folder.name} first; later runs use it again")
                train(companion)
    return str(Path(teacher.output) / "model.pt")


def train(args: argparse.Namespace) -> dict:
    """Train, evaluate and save one detector; return COCO's twelve numbers and AP_per_class."""
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
    args.images = [len(train_set), len(val_set)]  # recorded in args.json
    check_start(output, args.images)
    images_per_step = args.batch_size * args.accumulate * world_size()
    steps_per_epoch = len(train_set) // images_per_step
    if steps_per_epoch == 0:
        raise ValueError(f"{len(train_set)} training images are fewer than the {images_per_step} of one step")
    iterations = min(args.epochs * steps_per_epoch, args.max_iterations or sys.maxsize)
    score = partial(evaluate, dataset=val_set, device=device, batch_size=args.batch_size, workers=args.workers)

    # teacher
    teacher, results, shown = None, [], {}
    if args.teacher:
        path, name = args.teacher_weights, f"teacher {args.teacher}"
        teacher = load_teacher(path, args.detector, args.teacher, val_set.categories, size, args.method).to(device)
        metrics, detections = score(teacher, limit=TEACHER_CHECK, name=name)
        say(f"{name} from {path or 'torchvision'}: AP {metrics['AP']:.3f} on {len(detections)} validation images")
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
    if args.student_weights:
        arguments |= arguments_of(args.student_weights, args.detector)
    if fitting := fitting_arguments(teacher, args.detector) if teacher else {}:
        arguments |= fitting
        say(f"the student takes from its teacher: {', '.join(f'{name} {value}' for name, value in fitting.items())}")
    student = build_detector(**arguments, pretrained=args.pretrained)
    if args.student_weights:
        left = start_from(student, args.student_weights)
        say(f"started from {args.student_weights}, except: {', '.join(left) or 'nothing'}")
    student = student.to(device, memory_format=torch.channels_last)
    if args.multi_scale:
        say(set_train_scales(student.transform, *args.multi_scale, train_set.aspect_ratios))

    # distiller
    method, warmup = None, 0
    if args.method != "none":
        channels = student.backbone.out_channels, teacher.backbone.out_channels
        method = build_method(args.method, args.detector, *channels, student.backbone.strides, args.set, args.inherit)
        warmup = min(method.warmup, iterations // 10) * args.accumulate
    if teacher:
        check_pair(student, teacher, method.needs if method else ())
    if args.inherit:
        args.not_inherited = inherit(student, teacher)  # recorded in args.json
        say(f"inherited FPN and heads of the teacher, except: {', '.join(args.not_inherited) or 'nothing'}")
    if args.sync_bn:
        student = convert_sync_batchnorm(student)
    distiller = Distiller(student, teacher if method else None, method, warmup=warmup).to(device)
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
    optimizer, schedule, plan = make_optimizer(args, parameters, iterations, images_per_step)
    say(f"{iterations} steps of {images_per_step} images: {plan}")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # progress
    parts = {"distiller": distiller, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    label = args.method if method else "inherit" if args.inherit else "plain"
    run = {"steps_per_epoch": steps_per_epoch, "iterations": iterations, "seed": args.seed}
    progress = Progress(output, parts, **run, title=f"{label} {args.student}")

    # loss weights
    distiller.weights = args.term_weights = started_with(output).get("term_weights", {})  # recorded in args.json
    if method and not distiller.weights:
        loader = progress.loader(train_set, args.batch_size, 0, args.aspect_ratio_group_factor)
        batches = (to_device(*batch, device) for batch in islice(loader, RATIO_BATCHES))
        with autocast():
            ratios = mean_over_processes(measure_ratios(distiller, batches))
        distiller.weights = args.term_weights = term_weights(args.distill_weight, ratios)
        say(format_ratios({name: distiller.weights[name] * ratio for name, ratio in ratios.items()}, "before training"))

    # epochs
    several = args.eval_interval and args.eval_interval < args.epochs
    if open_folder(output, args):
        progress.resume()
    for epoch in range(progress.epoch, progress.epochs):
        loader = progress.loader(
            train_set, args.batch_size * args.accumulate, args.workers, args.aspect_ratio_group_factor
        )
        train_one_epoch(model, loader, optimizer, schedule, scaler, progress, autocast, args, device)
        line = progress.summary()
        if method:
            say(format_ratios(line["ratio_to_detection"], f"epoch {epoch + 1}"))
        if epoch == 0:
            check_not_zero({name: line["losses"][name] for name in progress.terms}, steps=progress.step)
        if epoch + 1 == progress.epochs or (args.eval_interval and (epoch + 1) % args.eval_interval == 0):
            share_buffers(student)
            metrics, detections = score(student, name=args.student)
            line |= {**metrics, "teacher_AP": results[0]["AP"] if teacher else None}
            say(f"epoch {epoch + 1}: {format_metrics(metrics)}")
            if rank() == 0:
                draw_samples(val_set, {**shown, f"student {args.student}": detections}).save(output / "samples.png")
                if several and metrics["AP"] > best_evaluation(output).get("AP", -math.inf):
                    save_model(student, arguments, val_set.categories, output / "best.pt")
        if rank() == 0:
            append_log(output, line)
        progress.next_epoch()

    # results
    if rank() == 0:
        save_model(student, arguments, val_set.categories, output / "model.pt")
        print_results(args, [*results, result(f"{label} {args.student}", metrics, student)], iterations)
    progress.end()  # the files exist before another process looks for them
    return metrics


def train_one_epoch(model, loader, optimizer, schedule, scaler, progress, autocast, args, device) -> None:
    """Train on the batches that the epoch has left.

    images, targets -> Distiller -> {"classification": ..., ...}, {"loss_frs_fpn": ..., ...} -> sum -> backward
    """
    model.train()
    for images, targets in progress.batches(loader):
        images, targets = to_device(images, targets, device)
        for start in range(0, len(images), args.batch_size):  # once, unless --accumulate is given
            part = slice(start, start + args.batch_size)
            with autocast():
                detection, distillation = model(images[part], targets[part])
            loss = sum([*detection.values(), *distillation.values()])
            scaler.scale(loss / args.accumulate).backward()
            progress.add(detection, distillation)

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
        progress.end_step(norm)  # logs the losses; raises if one, or the gradient, is not finite
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()  # here, so that the next forward can use the memory
        schedule.step()


def to_device(images: list[Tensor], targets: list[dict], device: torch.device) -> tuple[list[Tensor], list[dict]]:
    """Return images, and boxes and labels of targets, on a device."""
    images = [image.to(device, non_blocking=True) for image in images]
    return images, [{k: target[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for target in targets]


def term_weights(weight: float | str, ratios: dict[str, float]) -> dict[str, float]:
    """Return the factor of each distillation loss.

    Args:
        weight: a number, the factor of every loss; or "auto:RATIO" ("auto": AUTO_RATIO), which makes them equal before
            training and their sum RATIO times that of the detection losses.
        ratios: each loss relative to the detection losses, before training. A loss of 0 has the factor 1.
    """
    if isinstance(weight, float):
        return dict.fromkeys(ratios, weight)
    share = float(weight.removeprefix("auto").removeprefix(":") or AUTO_RATIO) / len(ratios)
    return {name: share / ratio if ratio else 1.0 for name, ratio in ratios.items()}


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], iterations: int, images_per_step: int):
    """Return the optimizer, its learning-rate schedule, which is stepped every iteration, and both in words."""
    if args.optimizer == "adamw":
        lr, rise = args.lr or 1e-3, 0.15
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations, pct_start=rise)
        return optimizer, schedule, f"AdamW, one cycle with learning rate {lr:g} after {rise * iterations:.0f} steps"

    base = 0.02 if args.detector == "faster_rcnn" else 0.01
    lr = args.lr or base * images_per_step / 16
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4, fused=True)
    warmup, drops = min(500, iterations // 10), [math.ceil(part * iterations) for part in (2 / 3, 11 / 12)]

    def factor(iteration: int) -> float:
        return min(1.0, (iteration + 1) / max(warmup, 1)) * 0.1 ** sum(iteration >= drop for drop in drops)

    plan = f"SGD, {warmup} steps of warm-up, learning rate {lr:g}, divided by 10 after {drops[0]} and {drops[1]} steps"
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor), plan


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
