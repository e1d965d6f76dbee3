"""sipl_min: Self-Improved Privilege Learning (arXiv 2505.24207), small enough to read."""

from .files import InputError
from .published import from_published
from .settings import PRESETS, Settings
from .sipl import SIPL

__all__ = ["SIPL", "Settings", "PRESETS", "InputError", "from_published"]
__version__ = "0.1.0"
