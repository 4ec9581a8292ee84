"""The distillation methods by name. Each file stands alone; this is the only place that lists them."""

from functools import partial

from kd.methods.drkd import DRKD
from kd.methods.frs import FRS
from kd.methods.imitation import Imitation
from kd.methods.pgd import PGD
from kd.methods.ssim import SSIM
from kd.methods.tid import TID

METHODS = {
    "l1": partial(Imitation, p=1),
    "l2": partial(Imitation, p=2),
    "frs": FRS,
    "pgd": PGD,
    "ssim": SSIM,
    "drkd": DRKD,
    "tid": TID,
}
