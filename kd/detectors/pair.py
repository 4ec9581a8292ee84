"""A teacher and a student that fit each other: checked, and the student initialised from the teacher."""

from collections.abc import Collection

from torch import nn


def check_pair(student: nn.Module, teacher: nn.Module, needs: Collection[str]) -> None:
    """Raise ValueError unless what a method reads of teacher and student corresponds position by position.

    For FPN features alone, the strides must agree. Otherwise also detector, number of classes and anchors. Backbones
    and input normalisation may differ.

    Args:
        student: a detector.
        teacher: a detector.
        needs: names of the DetectorOutput attributes that the method reads.
    """
    compared = {"strides": lambda m: m.backbone.strides}
    if set(needs) != {"fpn"}:
        compared |= {
            "detector": lambda m: type(m).__name__,
            "number of classes (background included)": num_classes,
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
    """Initialise the student's FPN and heads from the teacher wherever shapes agree; return what was left out.

    The body of the backbone is never inherited. Lateral convolutions of the FPN are left out where the channels of the
    backbones differ. PGD, FGD and others report results of students that start this way.

    Raises:
        ValueError: not a single tensor fits.
    """
    theirs = teacher.state_dict()
    ours = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.body.")}
    fitting = {name: theirs[name] for name, v in ours.items() if name in theirs and theirs[name].shape == v.shape}
    if not fitting:
        raise ValueError("the student cannot inherit: no tensor of the teacher's FPN and heads has the same shape")
    student.load_state_dict(fitting, strict=False)
    return [name for name in ours if name not in fitting]


def anchor_generator(detector: nn.Module) -> nn.Module:
    """Return the anchor generator of a detector, the RPN's for Faster R-CNN."""
    return detector.rpn.anchor_generator if hasattr(detector, "rpn") else detector.anchor_generator


def num_classes(detector: nn.Module) -> int:
    """Return the number of classes of a detector, background included."""
    if hasattr(detector, "roi_heads"):
        return detector.roi_heads.box_predictor.cls_score.out_features
    return detector.head.classification_head.num_classes
