"""Knowledge distillation for object detectors, native to torchvision and timm.

Letters used in every docstring:

N images of a batch, L pyramid levels (finest first), C channels, H and W height and width of a level in positions,
h and w height and width of an image in pixels, A anchors per position, K classes (background included, as in
torchvision; 1 for an RPN), M ground-truth boxes of an image, R proposals.
"""
