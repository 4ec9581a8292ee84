r"""The command line of train.py.

On a laptop, with the built-in shapes; a teacher and a plain student are trained first:

    python train.py --method frs --teacher r101 --student r50

On one GPU with COCO-format data, first a teacher (or baseline), then a student:

    python train.py --method none --student r101 --pretrained --data /path/to/coco
    python train.py --method frs --teacher r101 --student r50 --pretrained --data /path/to/coco \
        --teacher-weights runs/none-fcos-r101-coco/model.pt

With a detector of torchvision as teacher, which is downloaded:

    python train.py --method frs --teacher retinanet_resnet50_fpn_v2 --student r18 --pretrained --data /path/to/coco

On eight GPUs, and on two machines of eight:

    torchrun --nproc-per-node 8 train.py ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...

Recipe for COCO-format data: SGD with momentum 0.9, weight decay 1e-4, and learning rate 0.01 (Faster R-CNN 0.02) per 16
images, scaled linearly with the images of a step; 500 steps of warm-up, or a tenth of the run if that is less; 12
epochs, with the learning rate divided by 10 after 2/3 and 11/12 of them. Recipe for the shapes: from scratch with AdamW
and a one-cycle schedule.
"""

import argparse

import torch

from kd.detectors import DETECTORS, ZOO
from kd.methods import METHODS, describe_method
from kd.run.speed import AMP

AUTO = """\
--distill-weight auto measures each distillation loss on ten batches before training and gives it a factor, kept in
args.json: all losses start equal, and their sum starts at that of the detection losses, with auto:0.5 at half of it.
"""

LAYOUTS = """
--data recognises
  COCO        train2017/ val2017/ annotations/instances_train2017.json annotations/instances_val2017.json
  Roboflow    train/ valid/ (or test/), each with _annotations.coco.json
  CrowdHuman  annotation_train.odgt annotation_val.odgt Images/; its AP, MR^-2 and JI are printed too
  VOC         VOCdevkit/ with VOC2007/ and VOC2012/ (07+12, tested on 07), or one of them; its AP50 is printed too
"""


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or a list of its words."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=AUTO + LAYOUTS, formatter_class=raw, allow_abbrev=False
    )

    add = parser.add_argument_group("model").add_argument
    add("--method", default="none", help=f"none (default), {', '.join(METHODS)}")
    add("--detector", help=f"{', '.join(DETECTORS)}; default: that of a --teacher of torchvision, else fcos")
    add("--student", default="r50", help="backbone: r18 r34 r50 (default) r101 r152 or a timm model with feature maps")
    add("--student-weights", metavar="FILE", help="model.pt or state_dict of torchvision to start from")
    add("--teacher", help=f"its backbone, or a detector of torchvision with its weights: {', '.join(ZOO)}")
    weights_help = "model.pt of a teacher's run, a state_dict of torchvision, or a checkpoint of mmdetection's zoo"
    add("--teacher-weights", metavar="FILE", help=weights_help)
    add("--pretrained", nargs="?", const=True, default=False, metavar="FILE", help="ImageNet backbone, timm's or FILE")
    inherit_help = "start with the teacher's FPN and heads (adapters as the identity); --method none does no more"
    add("--inherit", action="store_true", help=inherit_help)

    add = parser.add_argument_group("distillation").add_argument
    add("--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE", help="hyper-parameters of the method")
    add("--help-method", action=HelpMethod, metavar="METHOD", help="print a method's hyper-parameters and exit")
    weight_help = "multiplies the distillation losses (default: 1); auto: see the end"
    add("--distill-weight", type=number_or_auto, default=1.0, metavar="NUMBER|auto", help=weight_help)

    add = parser.add_argument_group("data").add_argument
    data_help = (
        "folder laid out as COCO, Roboflow's COCO export, CrowdHuman or VOC; default: built-in shapes; see the end"
    )
    add("--data", metavar="FOLDER", help=data_help)
    add("--train-images", metavar="FOLDER", help="instead of the one in --data")
    add("--train-annotations", metavar="FILE", help="COCO's .json, CrowdHuman's .odgt or VOC's list .txt")
    add("--val-images", metavar="FOLDER", help="instead of the one in --data")
    add("--val-annotations", metavar="FILE", help="as --train-annotations")
    add("--image-size", type=int, nargs=2, metavar=("SHORT", "LONG"), help="in pixels; default: 800 1333, shapes 64 64")
    add("--skip-bad-images", action="store_true", help="train without images that are missing or damaged")
    add("--multi-scale", type=int, nargs=2, metavar=("LOW", "HIGH"), help="range of the random short side in training")
    group_help = "groups of similar aspect ratio per octave, for batches that need less padding (default: 3); 0: off"
    add("--aspect-ratio-group-factor", type=int, default=3, metavar="N", help=group_help)

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=int, metavar="N", help="passes over the training set; default: 12, shapes 1")
    add("--max-iterations", type=int, metavar="N", help="shorten the run, with its schedule, to this many steps")
    add("--batch-size", type=int, metavar="N", help="images that a process has in memory; default: 2, shapes 8")
    add("--accumulate", type=int, default=1, metavar="N", help="batches of a process per step (default: 1)")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd, with step decay, or adamw, with one cycle (shapes)")
    add("--lr", type=float, metavar="NUMBER", help="learning rate, not scaled further; default: the recipe's")
    add("--clip-grad", type=float, default=35.0, metavar="NUMBER", help="maximum norm (default: 35); 0: off")
    add("--eval-interval", type=int, metavar="N", help="epochs between evaluations; the last is always evaluated")
    add("--sync-bn", action="store_true", help="batch norm over the images of all GPUs, for training from scratch")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda (default, if any) or cpu")
    add("--amp", choices=AMP, help="autocast; default: bf16 where the hardware has it")
    workers_help = "data loading processes; default: 4 with a GPU, 0 without"
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0, metavar="N", help=workers_help)
    add("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")

    add = parser.add_argument_group("run").add_argument
    add("--output", metavar="FOLDER", help="of the run; default: named by its settings, in runs/")
    resume = {"nargs": "?", "const": "required", "choices": ("required", "auto")}
    add("--resume", **resume, help="continue the run in --output; auto: start it if it does not exist")
    return parser.parse_args(words)


def number_or_auto(text: str) -> float | str:
    """Return the number in a text, or "auto" or "auto:RATIO" as it is."""
    try:
        number = 1.0 if text == "auto" else float(text.removeprefix("auto:"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number, auto or auto:NUMBER") from error
    return text if text.startswith("auto") else number


class HelpMethod(argparse.Action):
    """Print the hyper-parameters of a method and exit, as --help does for the options."""

    def __call__(self, parser, namespace, method, option_string=None):
        """Called by argparse."""
        if method not in METHODS:
            parser.error(f"--help-method {method}: give one of {', '.join(METHODS)}")
        print(describe_method(method))
        parser.exit()
