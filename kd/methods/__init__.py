"""The distillation methods by name. Each file stands alone; this is the only place that lists them.

A method is a module called as method(student, teacher, targets), which returns its weighted losses by name. `needs`
names what it reads of the two outputs, `warmup` is the number of iterations over which its losses shall grow, and
`maps`, with the same arguments, returns where it looks, for kd.explain to draw.
"""

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
