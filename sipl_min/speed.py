"""What the loop costs: our path against the naive one, in seconds and bytes, as ratios measured in one run.

The naive path is the network as it was released: the whole of it called each time, norms and attention written out,
every layer for the whole image. It uses our weights, so that the outputs can be compared.
"""

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from . import sipl, train
from .data import Images, batch
from .files import InputError, whole
from .settings import choose
from .tiles import pad

# ------------------------------------------------------------------------------------------------ the naive path


def norm(self, x):
    b, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    x = (x - mean) / torch.sqrt(variance + self.eps) * self.weight + self.bias
    return x.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous()


def channel_attention(self, x, norm):
    b, c, h, w = x.shape
    q, k, v = self.qkv(norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
    return x + self.out((attention @ v).reshape(b, c, h, w))


def feed_forward(self, x, norm):
    a, b = self.inner(norm(x)).chunk(2, dim=1)
    return x + self.out(F.gelu(a) * b + F.gelu(b) * a if self.dual else F.gelu(a) * b)


def block(self, x):
    return self.ffn(self.attention(x, self.norm1), self.norm2)


def cross_attention(self, query, context):
    """With the (H*W) x (h*w) attention matrix."""
    b, (h, w) = max(len(query), len(context)), query.shape[-2:]
    first, query, context = query, self.norm_query(query), self.norm_context(context)
    k, v = self.kv(context).chunk(2, dim=1)
    q, k, v = (t.reshape(len(t), self.heads, -1, t.shape[2] * t.shape[3]) for t in (self.q(query), k, v))
    q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)  # (B, heads, C/heads, pixels)
    attention = (q.transpose(-2, -1) @ k * self.temperature).softmax(-1)
    z = (attention @ v.transpose(-2, -1)).transpose(-2, -1).reshape(b, -1, h, w)
    return self.ffn((first if self.identity else query) + self.out(z), self.norm_ffn)


def encoder(self, x):
    features = [self.levels[0](self.embed(x))]
    for down, blocks in zip(self.down, self.levels[1:]):
        features.append(blocks(down(features[-1])))
    return features


PARTS = {sipl.ChannelNorm: norm, sipl.ChannelAttention: channel_attention, sipl.FeedForward: feed_forward,
         sipl.Block: block, sipl.CrossAttention: cross_attention, sipl.Encoder: encoder}  # fmt: skip


@contextlib.contextmanager
def naive():
    """Inside, every model on the PromptIR skeleton computes as released."""
    ours = {part: part.forward for part in PARTS}
    try:
        for part, forward in PARTS.items():
            part.forward = forward
        yield
    finally:
        for part, forward in ours.items():
            part.forward = forward


@torch.no_grad()
def refine_naive(model, x, steps, feedback="privilege"):
    """The estimates of `model.refine(x, steps, feedback, return_all=True)`, the whole network called each time."""
    h, w = x.shape[-2:]
    with naive():
        x = pad(x, 16 if feedback == "chain" else 8)
        estimates = [model(x)]
        for _ in range(steps):
            if feedback == "chain":
                x = model(x, model.privileged(model(x)))
                estimates.append(x)
            else:
                estimates.append(model(x, model.privileged(estimates[-1])))
    return [e[..., :h, :w] for e in estimates]


# -------------------------------------------------------------------------------------------------- measuring


def task(preset, size, steps, device):
    """Two functions that do the same work, ours and naive: refinement with T = steps, or steps="train" a step of 4."""
    torch.manual_seed(0)
    model = sipl.SIPL(preset).to(device)
    x = torch.rand(1 if steps != "train" else 4, 3, size, size, device=device)
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False)
    if steps != "train":
        model.eval()

        def ours():
            with half:
                return model.refine(x, steps).float()

        return ours, lambda: refine_naive(model, x, steps)[-1]
    y = torch.rand(x.shape, device=device)

    def step(fast):
        optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=fast and device == "cuda")

        def run():
            with half if fast else naive():
                estimate = train.authors(model, x, y).float()
                optimizer.zero_grad(set_to_none=True)
                F.l1_loss(estimate, y).backward()
            optimizer.step()
            return estimate.detach()

        return run

    return step(True), step(False)


class Operations(TorchDispatchMode):
    """Counts additions and multiplications of matrix products, convolutions and attention; nothing else."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kind = function.overloadpacket
        if kind is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # q k^T and its product with v
            self.total += 4 * args[0].numel() * args[1].shape[-2]
        elif kind in flop_registry:
            self.total += flop_registry[kind](*args, **(kwargs or {}), out_val=result)
        return result


def seconds(function, device):
    start = perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start, result


def time(preset, size, steps, repeats, device):
    """Ours and naive in turn: median seconds, their ratio with its range, and how far the outputs differ."""
    ours, theirs = task(preset, size, steps, device)
    with Operations() as counted:
        a = ours()  # the first call of each also warms up
    b = theirs()
    runs = [(seconds(ours, device)[0], seconds(theirs, device)[0]) for _ in range(repeats)]
    ratios = sorted(n / o for o, n in runs)
    fast, slow = (median(column) for column in zip(*runs))
    return dict(seconds=fast, naive_seconds=slow, faster=median(ratios), least=ratios[0], most=ratios[-1],
                difference=float((a - b).abs().max() / b.abs().max()),
                gflops=None if steps == "train" else counted.total / fast / 1e9,
                data=data_seconds(size, device) / fast if steps == "train" else None)  # fmt: skip


def data_seconds(size, device, repeats=20):
    """Median seconds to cut and degrade a batch of four crops from the embedded photos."""
    images, times = Images(), []
    for step in range(2 * repeats):  # the first half also reads the photos
        times.append(seconds(lambda: batch(images, step, size=size, count=4, device=device), device)[0])
    return median(times[repeats:])


def peak(preset, size, steps, kind, device):
    """Bytes above the weights at the peak of one call, in a process of its own."""
    command = [sys.executable, "-m", "sipl_min.speed", preset, str(size), str(steps), kind, device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None  # most likely there is not so much memory
    return json.loads(done.stdout)


def peak_here(preset, size, steps, kind, device):
    function = task(preset, size, steps, device)[kind == "naive"]
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(kind):
    """Bytes of this process in memory: now (VmRSS), or at most so far (VmHWM), which elsewhere than on Linux is all."""
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(kind)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matrix_rate(device, n=2048, repeats=10):
    """What the machine reaches in a matrix product of the precision that ours uses, in GFLOP/s."""
    a = torch.rand(n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    return 2 * n**3 / min(seconds(lambda: a @ a, device)[0] for _ in range(repeats)) / 1e9


def measure(presets, sizes, steps, repeats=3, device=None, progress=True, keep=None):
    """Yields one dict for each preset, T (or "train") and size: seconds, bytes and ratios.

    Args:
        keep: a JSON file for the rows so far; those of an interrupted run are not measured again.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for preset in presets:
        choose(preset)
    for name, values, least in (("size", sizes, 8), ("repeats", [repeats], 1)):
        if any(value < least for value in values):
            raise InputError(f"{name}={min(values)} is too small: it must be at least {least}")
    rows = []
    with contextlib.suppress(OSError, ValueError, TypeError):  # none there, or not one of ours
        rows = [dict(row) for row in json.loads(Path(keep or "").read_text())]
    about = dict(device=device, threads=torch.get_num_threads(), repeats=repeats)
    for preset, t, size in tqdm([(p, t, s) for p in presets for t in steps for s in sizes], disable=not progress):
        row = about | dict(preset=preset, T=t, size=size)
        done = next((r for r in rows if row.items() <= r.items()), None)
        if done is None:
            done = row | time(preset, size, t, repeats, device)
            for name, kind in (("bytes", "ours"), ("naive_bytes", "naive")):
                done[name] = peak(preset, size, t, kind, device)
            rows.append(done)
            if keep:
                with whole(keep) as temporary:
                    temporary.write_text(json.dumps(rows))
        yield done


HEAD = (f"{'preset':8s}{'T':>6s}{'size':>6s} | {'naive':>9s}{'ours':>9s}{'faster':>8s}  {'(range)':14s}| "
        f"{'naive':>9s}{'ours':>9s}{'less':>7s} | {'GFLOP/s':>8s}{'data':>7s}{'differ':>9s}")  # fmt: skip


def line(r):
    """A row of `measure` as text, to stand below `HEAD`."""
    many, few = r["naive_bytes"], r["bytes"]
    mega = ["-" if b is None else f"{b / 1e6:.0f} MB" for b in (many, few)]
    less = f"{many / few:.1f}x" if many and few else "-"
    spread = f"({r['least']:.2f}-{r['most']:.2f})"
    rate = f"{r['gflops']:.0f}" if r["gflops"] else "-"
    share = f"{r['data']:.1%}" if r["data"] else "-"
    return (f"{r['preset']:8s}{r['T']!s:>6s}{r['size']:6d} | {r['naive_seconds']:7.2f} s{r['seconds']:7.2f} s"
            f"{r['faster']:7.2f}x  {spread:14s}| {mega[0]:>9s}{mega[1]:>9s}{less:>7s} | "
            f"{rate:>8s}{share:>7s}{r['difference']:9.1e}")  # fmt: skip


def exponent(rows, value):
    """k in value ~ pixels^k, fitted on log scales; None with fewer than two sizes."""
    points = [(r["size"] ** 2, r[value]) for r in rows if r[value]]
    return float(np.polyfit(*np.log(points).T, 1)[0]) if len({p for p, _ in points}) > 1 else None


def draw(rows, path):
    """Seconds and bytes against pixels on log scales, one line for each preset and path, the exponent beside it."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kinds = sorted({(r["preset"], str(r["T"])) for r in rows}, key=lambda k: k[1] != "1")
    top = kinds[0][1]  # one T is enough to see the slopes
    for ax, value, label, unit in (
        (axes[0], "seconds", "seconds", 1),
        (axes[1], "bytes", "peak GB above weights", 1e9),
    ):
        for colour, preset in enumerate(dict.fromkeys(r["preset"] for r in rows)):
            mine = [r for r in rows if r["preset"] == preset and str(r["T"]) == top]
            for name, style in ((f"naive_{value}", "--"), (value, "-")):
                points = [(r["size"] ** 2, r[name] / unit) for r in mine if r[name]]
                k = exponent(mine, name)
                who = f"{preset}, {'naive' if 'naive' in name else 'ours'}" + (f": pixels^{k:.2f}" if k else "")
                ax.loglog(*zip(*points), f"o{style}", color=f"C{colour}", label=who)
        ax.set(xlabel="pixels", ylabel=label, title=f"T = {top}")
        ax.legend(fontsize=7, handlelength=4)
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    preset, size, steps, kind, device = sys.argv[1:]
    print(json.dumps(peak_here(preset, int(size), steps if steps == "train" else int(steps), kind, device)))
