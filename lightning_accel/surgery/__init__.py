"""Change a model and know exactly what changed."""

from lightning_accel.surgery.cut import Cut
from lightning_accel.surgery.follow import follow
from lightning_accel.surgery.receipt import Change, Kept, Moved, Receipt
from lightning_accel.surgery.select import Select
from lightning_accel.surgery.stage import Stage
from lightning_accel.surgery.structure import Structure
from lightning_accel.surgery.swap import swap
from lightning_accel.surgery.twin import twin

__all__ = [
    "Change",
    "Cut",
    "Kept",
    "Moved",
    "Receipt",
    "Select",
    "Stage",
    "Structure",
    "follow",
    "swap",
    "twin",
]
