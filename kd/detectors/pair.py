"""A teacher and a student that fit each other: checked, and the student initialised from the teacher."""

import copy
import re
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

from kd.detectors.anchors import ExactAnchors
from kd.detectors.classes import NEVER, num_classes
from kd.detectors.gfl import GFL
from kd.detectors.mmdet import LinearP6P7

FEATURES = {"fpn", "cls_tower", "reg_tower"}  # DetectorOutput attributes that know neither classes nor boxes

# Tensors that are inherited together or not at all, if the teacher names others there: a predictor is of no use behind
# another head.
PARTS = re.compile(r"backbone\.fpn\.\w+\.\w+|head\.\w+\.\w+|rpn|roi_heads")


def fitting_arguments(teacher: nn.Module, detector: str) -> dict[str, object]:
    """Return the arguments of `build_detector` that give a student the anchors of its teacher, and RetinaNet's head.

    Args:
        teacher: a detector.
        detector: of the student; nothing is taken from a teacher of another family.
    """
    families = {"fcos": FCOS, "gfl": GFL, "retinanet": RetinaNet, "faster_rcnn": FasterRCNN}
    if type(teacher) is not families[detector]:
        return {}
    generator = anchor_generator(teacher)
    if isinstance(generator, ExactAnchors):
        anchors = "mmdet"
    else:
        anchors = "half" if generator.sizes[0][0] == 16 else "torchvision"
    if detector != "retinanet":
        return {"anchors": anchors}
    head = teacher.head.regression_head
    return {
        "anchors": anchors,
        "tower_norm": isinstance(head.conv[0][1], nn.GroupNorm),
        "giou": head._loss_type == "giou",
    }


def check_pair(student: nn.Module, teacher: nn.Module, needs: Collection[str]) -> None:
    """Raise ValueError unless what a method reads of teacher and student corresponds position by position.

    The strides must agree; for towers also the detector; for logits and boxes also number of classes and anchors.
    Backbones and input normalisation may differ.

    Args:
        student: a detector.
        teacher: a detector.
        needs: names of the DetectorOutput attributes that the method reads.
    """
    compared = {"strides": lambda m: m.backbone.strides}
    if set(needs) != {"fpn"}:
        compared["detector"] = lambda m: type(m).__name__
    if set(needs) - FEATURES:
        compared |= {
            "number of classes (background included)": num_classes,
            "anchors": lambda m: type(anchor_generator(m)).__name__,
            "anchor sizes": lambda m: anchor_generator(m).sizes,
            "anchor aspect ratios": lambda m: anchor_generator(m).aspect_ratios,
        }
    differences = [
        f"{name}: student {read(student)}, teacher {read(teacher)}"
        for name, read in compared.items()
        if read(student) != read(teacher)
    ]
    if differences:
        raise ValueError("teacher and student do not fit. " + "; ".join(differences))


def inherit(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy the teacher's FPN and heads to the student wherever they agree; return the names of what was left out.

    The body of the backbone is never copied, and not listed. Left out are lateral convolutions between other numbers of
    channels, parts that are built otherwise in the teacher, and the scores of classes that it does not know. Batch norm
    of its FPN is folded into the convolutions. PGD, FGD and others report results of students that start this way.
    """
    ours = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.body.")}
    theirs = {name: value for name, value in teacher.state_dict().items() if not name.startswith("backbone.")}
    theirs |= {f"backbone.fpn.{name}": value for name, value in plain_fpn(teacher).state_dict().items()}
    others = {PARTS.match(name)[0] for name in ours.keys() ^ theirs.keys()}
    p6, p7 = (f"backbone.fpn.extra_blocks.{level}" for level in ("p6", "p7"))
    if f"{p6}.weight" in theirs and theirs[f"{p6}.weight"].shape != ours[f"{p6}.weight"].shape:
        others |= {p6, p7}  # P6 is computed from another map, and P7 from P6
    if isinstance(teacher.backbone.fpn.extra_blocks, LinearP6P7):
        others.add(p7)  # without the ReLU before it
    fitting = {
        name: theirs[name]
        for name, value in ours.items()
        if name in theirs and theirs[name].shape == value.shape and PARTS.match(name)[0] not in others
    }
    left = [name for name in ours if name not in fitting]
    for bias in [name for name in fitting if name.endswith(".bias")]:
        label = torch.arange(len(fitting[bias]), device=fitting[bias].device) % num_classes(student)
        unknown = (fitting[bias] == NEVER) & (label > 0)  # a student that starts there would not learn these classes
        if not unknown.any():
            continue
        for name in (bias, bias.removesuffix("bias") + "weight"):
            fitting[name] = fitting[name].clone()
            fitting[name][unknown] = ours[name][unknown]
        left.append(f"{bias.removesuffix('.bias')} for classes that the teacher does not know")
    student.load_state_dict(fitting, strict=False)
    return left


def plain_fpn(detector: nn.Module) -> nn.Module:
    """Return a copy of a detector's FPN with batch norm, in eval mode, folded into the convolutions before it."""
    fpn = copy.deepcopy(detector.backbone.fpn)
    for blocks in (fpn.inner_blocks, fpn.layer_blocks):
        for index, block in enumerate(blocks):
            if isinstance(block[-1], nn.BatchNorm2d):
                blocks[index] = nn.Sequential(fuse_conv_bn_eval(*block))
    return fpn


def anchor_generator(detector: nn.Module) -> nn.Module:
    """Return the anchor generator of a detector, the RPN's for Faster R-CNN."""
    return detector.rpn.anchor_generator if hasattr(detector, "rpn") else detector.anchor_generator
