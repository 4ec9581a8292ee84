"""Knowledge distillation for object detectors, native to torchvision and timm.

Reading order: methods/frs.py (or another method), distiller.py, features.py, ../train.py, detectors/, evaluation.py;
then, as needed, data/, run/ and tools/. methods/, detectors/ and data/ import nothing of each other or of the rest;
features.py imports detectors/, distiller.py features.py, evaluation.py data/, *_metrics.py; run/ and tools/ come last.

Letters in all docstrings: N images of a batch, L pyramid levels (finest first), C channels, H and W height and width of
a level in positions, h and w height and width of an image in pixels, A anchors per position, K classes (background
included, as in torchvision; 1 for an RPN), M ground-truth boxes of an image, R proposals, D detections.
"""
