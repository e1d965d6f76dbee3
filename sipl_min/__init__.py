"""sipl_min: Self-Improved Privilege Learning (arXiv 2505.24207), small enough to read."""

from .files import InputError
from .published import from_backbone, from_published
from .settings import PRESETS, Settings
from .sipl import SIPL
from .wrap import wrap

# What grows around the module of the method: SIPL.from_backbone(...) and SIPL.wrap(...).
SIPL.from_backbone, SIPL.wrap = staticmethod(from_backbone), staticmethod(wrap)

__all__ = ["SIPL", "Settings", "PRESETS", "InputError", "from_published"]
__version__ = "0.1.0"
