"""A teacher and a student that fit each other: checked, and the student initialised from the teacher."""

from torch import nn


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless the outputs of teacher and student correspond position by position.

    Detector, number of classes, strides and anchors must agree. Backbones and input normalisation may differ.
    """
    differences = []
    for name, read in {
        "detector": lambda m: type(m).__name__,
        "number of classes (background included)": num_classes,
        "strides": lambda m: m.backbone.strides,
        "anchor sizes": lambda m: anchor_generator(m).sizes,
        "anchor aspect ratios": lambda m: anchor_generator(m).aspect_ratios,
    }.items():
        if read(student) != read(teacher):
            differences.append(f"{name}: student {read(student)}, teacher {read(teacher)}")
    if differences:
        raise ValueError("teacher and student do not fit. " + "; ".join(differences))


def inherit(student: nn.Module, teacher: nn.Module) -> None:
    """Initialise the student's FPN and heads from the teacher, everything but the body of the backbone.

    PGD, FGD and others report results of students that start this way.

    Raises:
        ValueError: a tensor has another shape or is missing; the message names the first one.
    """
    theirs = {name: value for name, value in teacher.state_dict().items() if not name.startswith("backbone.body.")}
    ours = {name: value for name, value in student.state_dict().items() if not name.startswith("backbone.body.")}
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [tuple(held[name].shape) if name in held else "absent" for held in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the student cannot inherit {name}: its shape is {shapes[0]}, the teacher's {shapes[1]}")
    student.load_state_dict(theirs, strict=False)  # not strict because of the body


def anchor_generator(detector: nn.Module) -> nn.Module:
    """Return the anchor generator of a detector, the RPN's for Faster R-CNN."""
    return detector.rpn.anchor_generator if hasattr(detector, "rpn") else detector.anchor_generator


def num_classes(detector: nn.Module) -> int:
    """Return the number of classes of a detector, background included."""
    if hasattr(detector, "roi_heads"):
        return detector.roi_heads.box_predictor.cls_score.out_features
    return detector.head.classification_head.num_classes
