"""FRS against its equations, its authors' numbers and arithmetic done by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from kd.methods.frs import FRS, box_mask, feature_richness, frs_feature_loss, frs_head_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_matches_equation(fake_output):
    """Slow loops over every index, written from the two equations."""
    student, teacher = fake_output(1), fake_output(2)
    for s, t, logits_s, logits_t in zip(student.fpn, teacher.fpn, student.cls_logits, teacher.cls_logits):
        N, C, H, W = s.shape
        fpn = head = weight = 0.0
        for n in range(N):
            for y in range(H):
                for x in range(W):
                    pairs = [
                        (logits_s[n, a, k, y, x].item(), logits_t[n, a, k, y, x].item())
                        for a in range(logits_s.shape[1])
                        for k in range(logits_s.shape[2])
                    ]
                    richness = max(sigmoid(t_logit) for _, t_logit in pairs)
                    fpn += richness * sum((t[n, c, y, x].item() - s[n, c, y, x].item()) ** 2 for c in range(C))
                    for s_logit, t_logit in pairs:
                        p, q = sigmoid(s_logit), sigmoid(t_logit)
                        head += richness * -(q * math.log(p) + (1 - q) * math.log(1 - p))
                    weight += richness
        richness = feature_richness(logits_t)
        assert_close(frs_feature_loss(s, t, richness).item(), fpn / weight)
        assert_close(frs_head_loss(logits_s, logits_t, richness).item(), head / weight)


# Outputs of https://github.com/duzhixing/FRS at decd60c on the inputs of the reference file.
REFERENCE = {
    "single_fcos_like": ("fcos", 1, 0.7868938843528572, 0.41685455190589754),
    "single_retina_9anchors": ("retinanet", 9, 0.4045093447636602, 1.5077202309060107),
    "two_stage_rpn_3anchors": ("faster_rcnn", 3, 0.15737877687057145, 0.8337091038117951),
}


@pytest.mark.parametrize("case", REFERENCE)
def test_matches_reference(golden, fake_output, case):
    detector, A, fpn_loss, head_loss = REFERENCE[case]
    reference = golden("frs")[case]
    inputs, grads = reference["inputs"], reference["grads"]
    method = FRS(detector, 8, 8, (8, 16, 32)).double()
    method.load_state_dict({k.replace("conv.", "adapters."): v for k, v in reference["params"].items()})
    student, teacher = fake_output(0), fake_output(0)
    student.fpn = [f.clone().requires_grad_() for f in inputs["student_feats"]]
    teacher.fpn = inputs["teacher_feats"]
    leaves = [logits.clone().requires_grad_() for logits in inputs["student_cls_logits"]]
    student.cls_logits = [logits.unflatten(1, (A, -1)) for logits in leaves]
    teacher.cls_logits = [logits.unflatten(1, (A, -1)) for logits in inputs["teacher_cls_logits"]]

    losses = method(student, teacher, [])
    tolerance = {"rtol": 1e-5, "atol": 1e-12}
    assert_close(losses["loss_frs_fpn"].item(), fpn_loss, **tolerance)
    assert_close(losses["loss_frs_head"].item(), head_loss, **tolerance)

    parameters = dict(method.named_parameters())
    fpn_grads = torch.autograd.grad(losses["loss_frs_fpn"], [*student.fpn, *parameters.values()])
    for ours, theirs in zip(fpn_grads, grads["feat_loss"]["student_feats"]):
        assert_close(ours, theirs, **tolerance)
    for name, ours in zip(parameters, fpn_grads[len(student.fpn) :]):
        assert_close(ours, grads["adap"][name.replace("adapters.", "conv.")], **tolerance)
    head_grads = torch.autograd.grad(losses["loss_frs_head"], leaves)
    for ours, theirs in zip(head_grads, grads["cls_loss"]["student_cls_logits"]):
        assert_close(ours, theirs, **tolerance)


def test_zero_at_teacher(fake_output):
    """Equal features cost nothing; equal logits cost the teacher's entropy, which no student can undercut."""
    teacher = fake_output(2)
    richness = feature_richness(teacher.cls_logits[0])
    assert frs_feature_loss(teacher.fpn[0], teacher.fpn[0], richness) == 0
    at_teacher = teacher.cls_logits[0].clone().requires_grad_()
    frs_head_loss(at_teacher, teacher.cls_logits[0], richness).backward()
    assert_close(at_teacher.grad, torch.zeros_like(at_teacher))


def test_hand_computed():
    """Two positions, two channels, one anchor and class.

    Teacher logits ln 3 and -ln 3 give richness 0.75 and 0.25, which sum to 1.
    Squared differences: 1 + 4 = 5 and 9 + 0 = 9, so the feature loss is 0.75 * 5 + 0.25 * 9 = 6.
    Student logits 0 cost ln 2 against any probability, so the head loss is ln 2.
    """
    logits_t = torch.tensor([math.log(3), -math.log(3)], dtype=torch.float64).view(1, 1, 1, 1, 2)
    richness = feature_richness(logits_t)
    assert_close(richness, torch.tensor([[[0.75, 0.25]]], dtype=torch.float64))
    teacher = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    student = torch.tensor([[1.0, 3.0], [2.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    assert_close(frs_feature_loss(student, teacher, richness).item(), 6.0)
    assert_close(frs_head_loss(torch.zeros_like(logits_t), logits_t, richness).item(), math.log(2))


def test_gradients(fake_output):
    student, teacher = fake_output(1), fake_output(2)
    richness = feature_richness(teacher.cls_logits[1])
    features, logits = student.fpn[1].requires_grad_(), student.cls_logits[1].requires_grad_()
    assert torch.autograd.gradcheck(lambda f: frs_feature_loss(f, teacher.fpn[1], richness), features)
    assert torch.autograd.gradcheck(lambda x: frs_head_loss(x, teacher.cls_logits[1], richness), logits)

    method = FRS("fcos", 4, 4, (8, 16, 32)).double()
    constants = [t.requires_grad_() for t in (*teacher.fpn, *teacher.cls_logits)]
    sum(method(student, teacher, []).values()).backward()
    assert all(t.grad is None for t in constants)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters())


def test_edge_cases(fake_output, targets):
    method = FRS("faster_rcnn", 4, 6, (8, 16, 32)).double()  # channels may differ
    losses = method(fake_output(1, N=1), fake_output(2, N=1, C=6), targets[1:])
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())

    student, teacher = fake_output(1), fake_output(2)
    half = feature_richness(teacher.cls_logits[0].bfloat16())
    assert half.dtype == torch.float32
    assert frs_feature_loss(student.fpn[0].bfloat16(), teacher.fpn[0].bfloat16(), half).dtype == torch.float32
    assert (
        frs_head_loss(student.cls_logits[0].bfloat16(), teacher.cls_logits[0].bfloat16(), half).dtype == torch.float32
    )


def test_normaliser(fake_output):
    """A mean over the batch's positions: a repeated batch changes nothing, but it is no mean over images."""
    s, t, logits = fake_output(1).fpn[0], fake_output(2).fpn[0], fake_output(2).cls_logits[0]
    richness = feature_richness(logits)
    once = frs_feature_loss(s, t, richness)
    assert_close(frs_feature_loss(torch.cat([s, s]), torch.cat([t, t]), torch.cat([richness, richness])), once)
    one_by_one = sum(frs_feature_loss(s[n : n + 1], t[n : n + 1], richness[n : n + 1]) for n in range(2)) / 2
    assert (once - one_by_one).abs() > 1e-3


def test_maps(fake_output):
    """Both networks' richness; the losses are those that the teacher's gives."""
    student, teacher = fake_output(1), fake_output(2)
    method = FRS("fcos", 4, 4, (8, 16, 32)).double()
    maps = method.maps(student, teacher, [])
    for name, output in (("teacher", teacher), ("student", student)):
        assert_close(maps[f"richness {name}"], [feature_richness(logits) for logits in output.cls_logits])
    losses, levels = method(student, teacher, []), enumerate(maps["richness teacher"])
    pairs = [
        (
            frs_feature_loss(method.adapters[level](student.fpn[level]), teacher.fpn[level], richness),
            frs_head_loss(student.cls_logits[level], teacher.cls_logits[level], richness),
        )
        for level, richness in levels
    ]
    fpn_loss, head_loss = map(sum, zip(*pairs))
    assert_close(losses["loss_frs_fpn"], 0.01 * fpn_loss)
    assert_close(losses["loss_frs_head"], 0.05 * head_loss)


def test_box_mask(fake_output):
    """At stride 8, x from 9 to 16 lies in column 1 and only touches column 2; y from 7 to 25 overlaps rows 0 to 3."""
    targets = [{"boxes": torch.tensor([[9.0, 7, 16, 25], [0, 0, 1, 1]])}, {"boxes": torch.zeros(0, 4)}]
    assert box_mask(targets, 8, (4, 3))[0].tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert not box_mask(targets, 8, (4, 3))[1].any()

    student, teacher = fake_output(1), fake_output(2)
    method = FRS("fcos", 4, 4, (8, 16, 32), mask="boxes").double()
    masks = [box_mask(targets, stride, x.shape[2:]) for stride, x in zip((8, 16, 32), teacher.fpn)]
    assert_close(method.maps(student, teacher, targets)["boxes"], masks)
    losses, fpn_loss, head_loss = method(student, teacher, targets), 0.0, 0.0
    for level, mask in enumerate(masks):
        inside = mask.bool()  # a mean over the cells inside
        difference = method.adapters[level](student.fpn[level]) - teacher.fpn[level]
        fpn_loss += difference.square().sum(dim=1)[inside].mean()
        logits_s, probability = student.cls_logits[level], teacher.cls_logits[level].sigmoid()
        entropy = -(probability * logits_s.sigmoid().log() + (1 - probability) * (1 - logits_s.sigmoid()).log())
        head_loss += entropy.sum(dim=(1, 2))[inside].mean()
    assert_close(losses["loss_frs_fpn"], 0.01 * fpn_loss)
    assert_close(losses["loss_frs_head"], 0.05 * head_loss)
    assert all(loss == 0 for loss in method(student, teacher, [targets[1], targets[1]]).values())


def test_errors(fake_output):
    with pytest.raises(ValueError, match='"richness" or "boxes"'):
        FRS("fcos", 4, 4, (8, 16, 32), mask="box")
    output = fake_output(1)
    richness = feature_richness(output.cls_logits[0])
    with pytest.raises(ValueError, match="must agree"):
        frs_feature_loss(output.fpn[0], output.fpn[1], richness)
    with pytest.raises(ValueError, match="richness"):
        frs_feature_loss(output.fpn[0], output.fpn[0], richness[0])
    with pytest.raises(ValueError, match="must agree"):
        frs_head_loss(output.cls_logits[0], output.cls_logits[0][:, :1], richness)
