r"""Train a detector, plain or distilled from a teacher.

On the built-in shapes, where the teacher is trained first:

    python train.py --method frs --teacher r101 --student r50

On COCO-format data, a teacher or baseline, then a student:

    python train.py --method none --student r101 --pretrained --data /path/to/coco
    python train.py --method frs --teacher r101 --student r50 --pretrained --data /path/to/coco \
        --teacher-weights runs/none-fcos-r101-coco/model.pt

On eight GPUs, and on two machines of eight:

    torchrun --nproc-per-node 8 train.py ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...

Recipe for COCO-format data: SGD with momentum 0.9 and weight decay 1e-4, learning rate 0.01 (Faster R-CNN 0.02) per 16
images, scaled linearly with the images that all processes see in a step, 500 iterations of linear warm-up, 12 epochs
with drops by 10 after two thirds and eleven twelfths. Recipe for the built-in shapes, from scratch: AdamW and one
cycle of the learning rate.

Everything random in a step follows from the seed, the step and the process, so a run that was killed and continued
ends with the same student, bit for bit on a CPU, as one that was not.
"""

import argparse
import json
import math
import shlex
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.utils import save_image
from tqdm import tqdm

from kd.arguments import build_method, run_name, settle
from kd.checkpoint import load_teacher, restore, save, save_model
from kd.data import DataError, class_names, collate, open_dataset
from kd.detectors import DETECTORS, build_detector
from kd.distiller import Distiller, check_pair, check_terms, inherit
from kd.evaluation import METRICS, draw_samples, evaluate
from kd.methods import METHODS
from kd.processes import (
    StopSignal,
    gather,
    ignore_signals,
    join_processes,
    mean_over_processes,
    rank,
    share_buffers,
    wait_for_all,
    world_size,
)
from kd.runs import append_log, check_same_run, cut_log, describe, is_finished, open_folder, read_evaluations
from kd.speed import AMP, keep_freed_memory, speed_up_teacher
from kd.timing import Stopwatch

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
    add("--distill-weight", type=float, default=1.0, help="factor of all of the method's losses")
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
    add("--skip-bad-images", action="store_true", help="train without images that are missing or damaged")
    add("--multi-scale", action="store_true", help="draw the short side of training images from 0.8 to 1.0 of MIN")
    # schedule
    add("--epochs", type=int, help="passes over the training set")
    add("--max-iterations", type=int, help="stop after this many steps, then evaluate and save as at an end")
    add("--batch-size", type=int, help="images per process and step")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd drops the learning rate in steps, adamw runs one cycle")
    add("--lr", type=float, help="learning rate, not scaled further; default: the recipe's")
    add("--clip-grad", type=float, default=35.0, help="largest norm of the gradient")
    add("--eval-interval", type=int, help="epochs between two evaluations; the last epoch is always evaluated")
    add("--ema", type=float, metavar="DECAY", help="evaluate and export a moving average of the student, e.g. 0.9998")
    add("--sync-bn", action="store_true", help="batch norm over the images of all GPUs, for training from scratch")
    # machine
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", choices=AMP, help="autocast; default: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile of backbones and pyramids")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0, help="data loading processes")
    add("--seed", type=int, default=0)
    # files
    add("--output", help="folder of this run; default: runs/METHOD-DETECTOR-TEACHER-STUDENT")
    add(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        help="continue the run in --output; auto: if there is one, and begin it otherwise",
    )
    add("--tensorboard", action="store_true", help="write losses and COCO's numbers for TensorBoard too")
    add("--checkpoint-minutes", type=float, default=10.0, help="time between two checkpoints within an epoch")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Train, evaluate and save one detector as the arguments say; return COCO's twelve numbers."""
    settle(args)
    device = join_processes(args.device)
    say = print if rank() == 0 else lambda *_: None
    output = Path(args.output)

    # data
    train_set = open_dataset(
        args.train_images, args.train_annotations, args.image_size, True, args.seed, args.skip_bad_images
    )
    val_set = open_dataset(
        args.val_images, args.val_annotations, args.image_size, False, skip_bad_images=args.skip_bad_images
    )
    if class_names(train_set.categories) != class_names(val_set.categories):
        raise DataError(f"{args.train_annotations} and {args.val_annotations} list different categories")
    say(f"training on {train_set.summary}\nvalidating on {val_set.summary}")
    steps_per_epoch = len(train_set) // world_size() // args.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"{len(train_set)} training images are fewer than one batch ({world_size()} x {args.batch_size})"
        )
    iterations = args.epochs * steps_per_epoch
    iterations = min(iterations, args.max_iterations or iterations)

    to_resume = open_folder(output, args.resume)
    if is_finished(output):
        say(f"{output} is finished")
        return {name: read_evaluations(output)[-1][name] for name in METRICS}

    if device.type == "cpu":
        keep_freed_memory()

    # teacher
    teacher, teacher_row, teacher_detections = None, None, []
    if args.method != "none":
        teacher, teacher_row, *teacher_detections = get_teacher(args, val_set, device, say)

    # student
    torch.manual_seed(args.seed)
    student = build_detector(
        args.detector,
        args.student,
        train_set.num_classes,
        image_size=args.image_size,
        pretrained=args.pretrained,
        pretrained_weights=args.pretrained_weights,
    ).to(device, memory_format=torch.channels_last)
    if args.multi_scale:
        student.transform.min_size = tuple(round(args.image_size[0] * (0.8 + 0.04 * step)) for step in range(6))
    if teacher is not None:
        check_pair(student, teacher)
    if args.inherit:
        inherit(student, teacher)
    if args.sync_bn:
        student = convert_sync_batchnorm(student)

    # distiller
    method = build_method(args).to(device) if teacher is not None else None
    warmup = min(method.warmup, iterations // 10) if method else 0
    distiller = Distiller(student, teacher, method).to(device)
    module = DistributedDataParallel(distiller) if world_size() > 1 else distiller
    # Decaying faster at first, or a short run's average would be made of its random start.
    ema = ModelEmaV3(student, args.ema, use_warmup=True) if args.ema else None
    evaluated = ema.module if ema else student
    if args.compile:  # in place: weights and their names stay
        for network in filter(None, (student, teacher)):
            network.backbone.compile()

    # optimizer
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(args, parameters, iterations)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # what a checkpoint holds: the state of these parts, and how far the run is
    parts = {"distiller": distiller, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    parts.update({"ema": ema} if ema else {})
    first_epoch = steps = skipped = 0  # steps done in an epoch; steps that fp16 skipped in it
    sums, full = Counter(), Counter()  # each loss over an epoch's steps; the method's before warm-up
    description = describe(args)
    if to_resume:
        check_same_run(output, description)
        content = restore(parts, output / "checkpoint.pt")
        first_epoch, steps, skipped = (content[name] for name in ("epoch", "steps", "skipped"))
        sums, full = Counter(content["sums"]), Counter(content["full"])
        say(f"continuing {output} after {steps} steps of epoch {first_epoch + 1}")
    elif rank() == 0:
        (output / "args.json").write_text(json.dumps(description, indent=1))
    if rank() == 0:
        cut_log(output, first_epoch)
    say(f"{output}: {', '.join(f'{name} {value}' for name, value in description['versions'].items())}")

    def save_checkpoint() -> None:
        if rank() == 0:
            position = {"epoch": epoch, "steps": steps, "skipped": skipped, "sums": dict(sums), "full": dict(full)}
            save({name: part.state_dict() for name, part in parts.items()} | position, output / "checkpoint.pt")

    board = None
    if args.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(output, purge_step=first_epoch * steps_per_epoch + steps)

    # epochs
    stop, saved_at = StopSignal(), time.monotonic()
    unproven = None  # distillation losses that have not yet been seen to reach the student
    for epoch in range(first_epoch, math.ceil(iterations / steps_per_epoch)):
        distiller.train()
        total_steps = min(steps_per_epoch, iterations - epoch * steps_per_epoch)
        loader = train_loader(train_set, args, epoch, steps, total_steps)
        resumed_at, started_at = steps, time.monotonic()
        progress = tqdm(
            loader,
            desc=f"{args.method} {args.student}: epoch {epoch + 1} of {args.epochs}",
            initial=steps,
            total=total_steps,
            disable=rank() > 0,
            dynamic_ncols=True,
        )
        stopping = False
        stopwatch = distiller.stopwatch = Stopwatch(device)
        for images, targets in stopwatch.each("data", progress):
            iteration = epoch * steps_per_epoch + steps
            ramp = min(1.0, (iteration + 1) / warmup) if warmup else 1.0
            torch.manual_seed(int(np.random.SeedSequence([args.seed, iteration, rank()]).generate_state(1)[0]))
            images = [image.to(device, non_blocking=True) for image in images]
            boxes = [{k: t[k].to(device, non_blocking=True) for k in ("boxes", "labels")} for t in targets]
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                losses = module(images, boxes, args.distill_weight * ramp)
            terms = [name for name in losses if name.startswith(f"loss_{args.method}_")]
            unproven = terms if unproven is None else unproven
            if unproven and any(len(target["labels"]) for target in targets):
                unproven = check_terms(losses, terms, unproven, student)
                if unproven and steps - resumed_at >= PATIENCE:
                    raise RuntimeError(
                        f"{', '.join(unproven)} was zero for {PATIENCE} batches: check the teacher; if that was meant, "
                        "as with a weight of 0, give a tiny weight such as 1e-9 instead"
                    )

            with stopwatch.part("backward"):
                scaler.scale(sum(losses.values())).backward()
            with stopwatch.part("optimizer"):
                scaler.unscale_(optimizer)
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                numbers = {**losses, "gradient norm": norm, "stop": norm.new_tensor(stop.number)}
                numbers = mean_over_processes(numbers)
                stopping = numbers.pop("stop") > 0
                if scaler.is_enabled():  # a scale too large for fp16 shows in the gradient; the scaler skips, lowers it
                    skipped += not math.isfinite(numbers.pop("gradient norm"))
                if not all(map(math.isfinite, numbers.values())):
                    refuse_step(output, iteration, numbers, targets)
                nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()  # here, not before backward: the next forward needs the memory
                schedule.step()
                if ema:
                    ema.update(student, iteration)
            steps += 1

            sums.update({name: numbers[name] for name in losses})
            full.update({name: numbers[name] / ramp for name in terms})
            if board:
                for name in losses:
                    board.add_scalar(f"losses/{name}", numbers[name], iteration)
            shown = {"loss": f"{sum(numbers[name] for name in losses):.3f}", "lr": f"{schedule.get_last_lr()[0]:.1e}"}
            progress.set_postfix({**shown, **({"skipped": skipped} if skipped else {})})
            if time.monotonic() - saved_at >= 60 * args.checkpoint_minutes and not stopping:
                save_checkpoint()
                saved_at = time.monotonic()
            if stopping:
                break
        progress.close()
        seconds = time.monotonic() - started_at

        # checkpoint
        save_checkpoint()
        saved_at = time.monotonic()
        if stopping:
            leave(stop, output, epoch * steps_per_epoch + steps)

        # evaluation
        detection = sum(value for name, value in sums.items() if name not in full)
        line = {
            "epoch": epoch + 1,
            "iteration": epoch * steps_per_epoch + steps,
            "losses": {name: value / steps for name, value in sums.items()},
            "without_warmup": {name: value / steps for name, value in full.items()},
            "ratio_to_detection": {name: value / detection for name, value in full.items()},
            "lr": schedule.get_last_lr()[0],
            "skipped_steps": skipped,
            "seconds_per_step": {name: value / (steps - resumed_at or 1) for name, value in stopwatch.read().items()},
            "images_per_second": (steps - resumed_at) * args.batch_size * world_size() / seconds,
            "memory_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        }
        if line["iteration"] == iterations or (args.eval_interval and (epoch + 1) % args.eval_interval == 0):
            share_buffers(evaluated)
            metrics, detections = evaluate(evaluated, eval_loader(val_set, args), device, args.student)
            line.update(metrics)
            line["teacher_AP"] = teacher_row["AP"] if teacher_row else None
            if rank() == 0:
                save_image(draw_samples(val_set, [*teacher_detections, detections]), output / "samples.png")
            if board:
                for name, value in metrics.items():
                    board.add_scalar(f"COCO/{name}", value, line["iteration"])
            say(f"epoch {epoch + 1}: " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        if rank() == 0:
            append_log(output, line)
        steps, skipped, sums, full = 0, 0, Counter(), Counter()
    stop.release()

    # the run's results
    if rank() == 0:
        arguments = {
            "detector": args.detector,
            "backbone": args.student,
            "num_classes": train_set.num_classes,
            "image_size": args.image_size,
            "from_scratch": not (args.pretrained or args.pretrained_weights),
        }
        save_model(evaluated, arguments, val_set.categories, output / "model.pt")
        print_table(args, teacher_row, student, metrics, iterations)
    wait_for_all()  # the files are there before another process looks for them
    return metrics


def train_loader(dataset: Dataset, args: argparse.Namespace, epoch: int, first: int, last: int) -> DataLoader:
    """Return a loader of this process's batches `first` to `last` (excluded) of an epoch."""
    dataset.epoch = epoch
    sampler = DistributedSampler(dataset, world_size(), rank(), seed=args.seed, drop_last=True)
    sampler.set_epoch(epoch)
    return DataLoader(
        dataset,
        args.batch_size,
        sampler=list(sampler)[first * args.batch_size : last * args.batch_size],
        num_workers=args.workers,
        collate_fn=collate,
        pin_memory=args.device.startswith("cuda"),
        worker_init_fn=ignore_signals,
    )


def eval_loader(dataset: Dataset, args: argparse.Namespace, count: int | None = None) -> DataLoader:
    """Return a loader of this process's share of a validation set, or of its first `count` images."""
    share = Subset(dataset, range(rank(), min(count or len(dataset), len(dataset)), world_size()))
    return DataLoader(share, args.batch_size, num_workers=args.workers, collate_fn=collate)


def refuse_step(output: Path, iteration: int, numbers: dict[str, float], targets: list[dict]) -> None:
    """Write nonfinite.json and stop: the optimizer has not seen this batch, and never shall.

    Raises:
        RuntimeError: always; names what is not finite, the iteration, the images and the checkpoint that is left.
    """
    ids = [image_id for share in gather([target["image_id"] for target in targets]) for image_id in share]
    if rank() == 0:
        report = {"iteration": iteration, "values": numbers, "image_ids": ids}
        (output / "nonfinite.json").write_text(json.dumps(report, indent=1))
    wait_for_all()
    names = [name for name, value in numbers.items() if not math.isfinite(value)]
    kept = output / "checkpoint.pt"
    raise RuntimeError(
        f"{', '.join(names)} not finite at iteration {iteration}, images {ids}: all values in "
        f"{output / 'nonfinite.json'}; "
        + (f"the last good state is in {kept}" if kept.exists() else "there is no checkpoint yet")
    )


def leave(stop: StopSignal, output: Path, iteration: int) -> None:
    """End the process after a signal, with the command that continues the run."""
    if rank() == 0:
        launcher = "python" if world_size() == 1 else "torchrun ..."
        command = shlex.join(sys.argv) + ("" if "--resume" in sys.argv else " --resume auto")
        print(f"stopped after iteration {iteration}, saved in {output}. To continue:\n{launcher} {command}", flush=True)
    wait_for_all()
    sys.exit(128 + (stop.number or signal.SIGTERM))


def get_teacher(args: argparse.Namespace, val_set: Dataset, device: torch.device, say) -> tuple[nn.Module, dict, dict]:
    """Load the teacher, or train it first on the built-in shapes; print its AP before anything is distilled.

    Returns:
        The teacher, its row of the final table, and its detections by image id.

    Raises:
        ValueError: no weights given for real data, or weights, classes or detector that do not fit.
    """
    if args.teacher_weights is None and args.train_annotations:
        raise ValueError(
            f"no weights for the teacher {args.teacher}. Either train one (the same command with --method none "
            f"--student {args.teacher}, without --teacher) and give its model.pt as --teacher-weights, or give a "
            f"COCO_V1 checkpoint of torchvision's {args.detector}"
        )
    if args.teacher_weights is None:
        folder = Path(args.output).parent / run_name(args, "none", args.teacher)
        if not is_finished(folder):
            say(f"No teacher yet: training {args.teacher} first; it is kept in {folder} for the next run.")
            changes = {
                "method": "none",
                "student": args.teacher,
                "teacher": None,
                "set": [],
                "distill_weight": 1.0,
                "inherit": False,
                "output": str(folder),
                "resume": "auto",
            }
            main(argparse.Namespace(**{**vars(args), **changes}))
        args.teacher_weights = str(folder / "model.pt")
    path = args.teacher_weights
    teacher = load_teacher(path, args.detector, args.teacher, val_set.categories, args.image_size)
    teacher = teacher.to(device)
    loader = eval_loader(val_set, args, TEACHER_CHECK)
    metrics, detections = evaluate(teacher, loader, device, f"teacher {args.teacher}")
    say(f"Teacher {args.teacher} from {path}: AP {metrics['AP']:.3f} on {len(detections)} validation images.")
    row = {"name": f"teacher {args.teacher}", **metrics, "parameters": count_parameters(teacher)}
    return speed_up_teacher(teacher, AMP[args.amp]), row, detections


def make_optimizer(args: argparse.Namespace, parameters: list[nn.Parameter], iterations: int):
    """Return the optimizer and its learning-rate schedule, stepped once an iteration."""
    if args.optimizer == "adamw":
        lr = args.lr or 1e-3
        optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05, fused=True)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iterations, pct_start=0.15)

    base = 0.02 if args.detector == "faster_rcnn" else 0.01
    lr = args.lr or base * args.batch_size * world_size() / 16
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4, fused=True)

    def factor(iteration: int) -> float:
        drops = sum(iteration >= share * iterations for share in (2 / 3, 11 / 12))
        return min(1.0, (iteration + 1) / 500) * 0.1**drops

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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
        plain = read_evaluations(Path(args.output).parent / run_name(args, "none", args.student))
        if plain:
            rows.insert(0, {"name": f"plain {args.student}", **plain[-1], "parameters": rows[0]["parameters"]})
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
