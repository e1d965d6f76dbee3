"""What the fast forms of the network gain: python -m sipl_min.speed [--device cuda] [--T 1 train] [--output speed.csv]

The same work as released (norms and attention matrices written out, the whole network called each time), plain
(`sipl.py`), fast (`fast.py`) and compiled. Seconds are measured in turns, in one process; each peak of memory in a new
one. Ratios are to the first variant and dtype asked for. With --output, what is in the file is not measured again."""

import argparse
import contextlib
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F

from .evaluate import Rows
from .fast import accelerate
from .files import exit_code
from .sipl import PRESETS, SIPL, CrossAttention, LayerNorm2d, unit
from .train import RECIPES, pick_device


# ------------------------------------------------------------------------------------------------- as released
class ReleasedNorm(LayerNorm2d):
    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        x = (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias
        return x.permute(0, 3, 1, 2).contiguous()


class ReleasedCrossAttention(CrossAttention):
    def attend(self, query, k, v):
        normed = self.norm_query(query)
        q = unit(self.tokens(self.q(normed)))
        attention = (q @ k.mT * self.temperature).softmax(-1)  # (B, heads, H*W, h*w)
        z = self.out((attention @ v).mT.reshape(-1, *query.shape[1:]))
        z = z + (query if self.identity_start else normed)
        return z + self.ffn(self.norm_ffn(z))


class ReleasedSIPL(SIPL):
    def estimates(self, x, steps=1, feedback="privilege"):
        y = self(x)
        yield y
        for _ in range(steps):
            y = self(x, self.privileged(y))
            yield y


RELEASED = {LayerNorm2d: ReleasedNorm, CrossAttention: ReleasedCrossAttention, SIPL: ReleasedSIPL}


def as_released(model):
    for module in model.modules():
        module.__class__ = RELEASED.get(type(module), type(module))
    return model


# --------------------------------------------------------------------------------------------------- measuring
VARIANTS = {"released": as_released, "plain": lambda model: model, "fast": accelerate, "compiled": lambda model: model}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of the network; in training of autocast
KEYS = ["preset", "T", "size", "variant", "dtype"]
VALUES = ["seconds", "faster", "megabytes", "smaller", "difference"]


def job(preset, T, size, variant, dtype, device):
    """A function that refines an image T times, or for T = "train" takes a step with four, and returns the estimate."""
    torch.manual_seed(0)
    model = VARIANTS[variant](SIPL(preset)).to(device)
    x, y = torch.rand(2, 4 if T == "train" else 1, 3, size, size).to(device)
    compiled = partial(torch.compile, dynamic=False, disable=variant != "compiled")
    if T != "train":
        refine, x = compiled(model.eval().to(DTYPES[dtype]).refine), x.to(DTYPES[dtype])
        return lambda: refine(x, int(T))
    recipe, optimizer = compiled(RECIPES["authors"]), torch.optim.AdamW(model.parameters(), lr=0.0)

    def step():
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, dtype == "bfloat16", cache_enabled=False):
            estimate = recipe(model, x, y)
        F.l1_loss(estimate.float(), y).backward()
        optimizer.step()
        return estimate.detach()

    return step


def race(work, kinds, repeats, device):
    """Jobs of one work (preset, T, size) in turns, one for each kind (variant, dtype): a dict of numbers for each.

    difference: the largest one from the first kind's output, over the largest value there."""
    jobs = [job(*work, *kind, device) for kind in kinds]
    outputs = [function().float() for function in jobs]  # the first calls also warm up
    times = np.array([[seconds(function) for function in jobs] for _ in range(repeats)])  # (repeats, kinds)
    faster = np.median(times[:, :1] / times, axis=0).tolist()
    differences = [float((output - outputs[0]).abs().max() / outputs[0].abs().max()) for output in outputs]
    numbers = zip(np.median(times, axis=0).tolist(), faster, differences)
    return [dict(seconds=s, faster=f, difference=d) for s, f, d in numbers]


def seconds(function):
    start = perf_counter()
    function().flatten()[0].item()  # which waits for the device
    return perf_counter() - start


def peak(work, kind, device):
    """Megabytes above the weights at the peak of a job; None where the system, or a compiler at work, hides it."""
    if "cuda" in device:
        function, weights = job(*work, *kind, device), torch.cuda.memory_allocated(device)
        function()  # the first call also compiles, and tries algorithms
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - weights) / 1e6
    if "compiled" in kind or not STATUS.exists():
        return None
    job("nano", work[1], 16, *kind, device)()  # what PyTorch itself takes at its first call
    function, weights = job(*work, *kind, device), resident("VmRSS")  # now
    function()
    return resident("VmHWM") - weights  # the most there has been


STATUS = Path("/proc/self/status")  # on Linux; the module `resource` would count the peak of the parent process, too


def resident(name):
    return int(re.search(rf"{name}:\s+(\d+)", STATUS.read_text(encoding="utf-8"))[1]) * 1024 / 1e6


@contextlib.contextmanager
def without_ctrl_c():
    """Ctrl-C waits for the end of the block, and never reaches a process that begins in it (on Windows it does)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def alone(function, *args):
    """function(*args) in a new process, which remembers no earlier work."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            with without_ctrl_c():
                future = pool.submit(function, *args)
            return future.result()
        except KeyboardInterrupt:
            for process in active_children():
                process.kill()
            raise


def measure(rows, work, kinds, repeats, device):
    """Rows of all kinds (variant, dtype) of one work (preset, T, size), measured and added where `rows` lacks any."""
    names = [dict(zip(KEYS, (*work, *kind))) for kind in kinds]
    if not all(rows.find(**name) for name in names):
        peaks = [alone(peak, work, kind, device) for kind in kinds]
        for name, megabytes, result in zip(names, peaks, alone(race, work, kinds, repeats, device)):
            smaller = peaks[0] / megabytes if megabytes and peaks[0] else None
            rows.add(**name, **result, megabytes=megabytes, smaller=smaller)
    return [rows.find(**name) for name in names]


def line(row):
    cells = [row.get(name, "-") for name in KEYS + VALUES]
    return "".join(f"{cell:>11}" if isinstance(cell, str) else f"{cell:11.4g}" for cell in cells)


def main(arguments=None):
    parser = argparse.ArgumentParser("python -m sipl_min.speed", description="Seconds and memory of each variant.")
    several = partial(parser.add_argument, nargs="+")
    several("--presets", choices=PRESETS, default=["nano", "small"])
    several("--T", choices=["train", *"0123456789"], default=["1"], help="refinement steps, or train: a training step")
    several("--sizes", type=int, default=[256, 512], help="pixels a side")
    several("--variants", choices=VARIANTS, default=["released", "plain", "fast"])
    several("--dtypes", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, of which the median counts")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there)")
    parser.add_argument("--output", help="a CSV file; what it holds is not measured again")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or min(options.sizes) < 16:
        parser.error("--repeats must be at least 1, and --sizes at least 16")
    kinds = list(product(options.variants, options.dtypes))

    def compare():
        device = str(pick_device(options.device))
        name = torch.cuda.get_device_name(device) if "cuda" in device else device
        about = dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__, repeats=options.repeats)
        rows = Rows(options.output, KEYS, VALUES, **about, ratios_to=", ".join(kinds[0]))
        print(rows.run, line({name: name for name in KEYS + VALUES}), sep="\n")
        for work in product(options.presets, options.T, options.sizes):
            print(*map(line, measure(rows, work, kinds, options.repeats, device)), sep="\n", flush=True)

    return exit_code(compare)


if __name__ == "__main__":
    sys.exit(main())
