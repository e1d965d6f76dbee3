"""What several tests need: tiny models, a photo, a count for the summary, and a watch over files left behind."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the processor: a thread for each, in notebooks too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture
def counted(record_property):
    """`counted("what was tried", 500)`: the terminal summary prints it, once the test has passed."""
    return lambda what, number: record_property("counted", (what, number))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


ROOT = Path(__file__).parent.parent
CACHES = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis", "runs"}


def files():
    return {p for p in ROOT.rglob("*") if not CACHES & {*p.relative_to(ROOT).parts} and p.is_file()}


def pytest_sessionstart(session):
    session.files = files()


def pytest_sessionfinish(session):
    """Tests and notebooks leave no file in the project."""
    if "PYTEST_XDIST_WORKER" not in os.environ and (left := files() - session.files):
        print("\nleft behind:", *sorted(left), sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.stats.get("passed", [])
    lines = [value for report in passed for name, value in report.user_properties if name == "counted"]
    if lines:
        terminalreporter.section("tried, and survived")
    for what, number in sorted(lines):
        terminalreporter.line(f"{number:6d}  {what}")
