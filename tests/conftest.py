"""What several tests need: tiny models, a photo, small files."""

import numpy as np
import pytest
import torch

from sipl_min import SIPL

TINY = dict(dim=8, heads=(1, 2, 2, 4), prompt_channels=(8, 8, 8), prompt_size=(4, 2, 2), dictionary_size=(6, 4, 2))


def tiny(**overrides):
    """A nano model made even smaller, with weights far from their start so that every part matters."""
    torch.manual_seed(1)
    model = SIPL("nano", **{**TINY, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(p[0].numel(), 1) ** 0.5)
    return model.eval()


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def photo():
    """A uint8 photo with odd sides."""
    y, x = np.mgrid[:45, :53]
    return np.stack([100 + 80 * np.sin(x / 5), 120 + 60 * np.cos(y / 7), 2 * x + y], 2).astype(np.uint8)
