"""Self-Improved Privilege Learning for image restoration, small enough to read in an evening."""

from .backbones import BACKBONES
from .files import InputError
from .sipl import PRESETS, SIPL, Settings

__all__ = ["BACKBONES", "PRESETS", "SIPL", "InputError", "Settings"]
__version__ = "0.2.0"
