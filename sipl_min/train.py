"""Training: recipes, their options, `fit`, and checkpoints from which a training goes on bit for bit."""

import contextlib
import copy
import csv
import itertools
import json
import math
import os
import re
import signal
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import weights
from .data import Images, batch, hash_seed
from .degrade import COLUMNS, SHARES, check_suite, generator
from .fast import FAST, accelerate
from .files import InputError, Name, atomic_write
from .sipl import SIPL, known

# --------------------------------------------------------------------------------------------------------- recipes
# A recipe makes estimates of the clean image y from the degraded image x, both (B, 3, H, W): one estimate, or a list.
# The loss is their mean L1 distance to y. f is the network, E its encoder, D the dictionary, P what is privileged.
# Another loss p >= 0, a number, goes in as an estimate at that distance: [y + p, estimate] has the loss (p + L1) / 2.


def authors(model, x, y):
    """The released network, in training: P = E(f(y; D)), without gradient; estimate f(x; Read(D, P)).

    So P is of the network's own restoration of y, as at test time, P = E(f(x; D)), it will be of that of x.
    The first pass f(x; D) has no loss of its own."""
    with torch.no_grad():
        privileged = model.privileged(model(y))
    return model(x, privileged)


def backbone(model, x, y):
    """The fair baseline, the same backbone without Proxy Fusion: estimate f(x)."""
    return model(x)


def privilege(model, x, y):
    """Classic privilege learning: P = E(y), without gradient; estimates f(x; D) and f(x; Read(D, P)).

    The guided pass teaches the first one, which is all that there is at test time."""
    with torch.no_grad():
        privileged = model.privileged(y)
    return [model(x), model(x, privileged)]


def unroll(model, x, y):
    """The loop of test time: estimates y_0 = f(x; D) and y_1 = f(x; Read(D, E(y_0))).

    Gradients flow through the privilege too, so that E learns to make features that are worth reading."""
    return list(model.estimates(x, steps=1))


def again(model, x, y):
    """A loop for the backbone alone: estimates f(x) and f(f(x)), so that what is restored already is left alone.

    Trained on single degradations, it mends two at once better than one pass does; three at once it leaves worse than
    they came (data/README.md)."""
    return list(model.estimates(x, 1, "again"))


def overview(model, x, y):
    """For photos that are restored in windows: P = E(o), o the whole photo shrunk; estimate f(x; Read(D, P)).

    x: a window of a damaged crop and the whole crop shrunk to its size, as channels, (B, 6, H, W). Our own."""
    x, o = x.chunk(2, dim=1)
    return model(x, model.privileged(o))


RECIPES = {recipe.__name__: recipe for recipe in (authors, backbone, privilege, unroll, again, overview)}
RECIPE_SETTINGS = {name: {} for name in RECIPES}  # the settings that a recipe needs, or was made for
RECIPE_SETTINGS |= {"unroll": dict(identity_start=True)} | dict.fromkeys(("backbone", "again"), dict(fusion=False))


# --------------------------------------------------------------------------------------------------------- options
@dataclass
class Options:
    """How to train; the defaults suit the preset "nano". Raises InputError where a number cannot work."""

    suite: str = "cdd11"  # which degradations are added to clean images, see `degrade.SUITES`
    num_steps: int = 400
    batch_size: int = 8  # of all processes together
    crop_size: int = 48  # pixels a side
    lr: float = 1e-3  # AdamW's highest learning rate
    warmup: int = 20  # steps until it is reached; then half a cosine, down to zero at the end
    weight_decay: float = 1e-4
    grad_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of everything random
    save_every: int = 100  # steps between checkpoints
    save_minutes: float = 10.0  # and minutes
    validate_every: int = 100  # steps
    accumulate: int = 1  # parts in which a batch is worked on, for lack of memory
    num_workers: int = 0  # processes that make batches ahead, on the CPU
    ema: float = 0.0  # decay of a moving average of the weights, e.g. 0.999: what is then validated, saved, and left
    decibels: float = 0.0  # weight of the estimates' PSNR in the loss, beside L1: L1 alone forgets photos nearly right
    shares: dict[str, int] = field(default_factory=dict)  # column -> how often it is met, if not as in `degrade.SHARES`
    window: int = 0  # pixels a side of the random part of each crop, damaged whole, that is learned from; 0: all of it
    mild: float = 0.0  # share of the crops that are degraded only in part, see `data.batch`
    autocast: bool | None = None  # bfloat16; None: on CUDA only
    start: str = ""  # label of the weights that the model comes with
    trained: int = 0  # steps that those have behind them
    command: str = ""  # noted in the weight file

    def __post_init__(self):
        self.shares = dict(self.shares)
        for values in (vars(self), self.shares):  # NumPy's numbers fit no checkpoint
            values |= {name: n.item() for name, n in values.items() if hasattr(n, "item")}
        for name, kind in Options.__annotations__.items():
            if kind in (int, float) and not isinstance(getattr(self, name), int | kind):
                raise InputError(f"{name}={getattr(self, name)!r} must be a {'whole ' * (kind is int)}number")
        for name in ("num_steps", "batch_size", "crop_size", "lr", "grad_clip", "accumulate", *SAVING):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)!r} must be a positive number")
        for name in ("ema", "mild", "window", "seed", "warmup", "weight_decay", "decibels"):
            value, most = getattr(self, name), 1 if name in ("ema", "mild") else math.inf
            if not 0 <= value <= most or (name, value) == ("ema", 1):
                wanted = "0 or more" if most > 1 else "from 0 to 1" + ", less than 1" * (name == "ema")
                raise InputError(f"{name}={value!r} must be {wanted}")


FILES = ("checkpoint.pt", "model.safetensors", "log.csv")  # of a training
SAVING = ("save_every", "save_minutes", "validate_every")
# What may be another when a training goes on: it changes no number, or somebody has a reason.
FREE = (*SAVING, "num_steps", "lr", "grad_clip", "accumulate", "processes", "num_workers", "autocast")

# The authors' schedule is not published. "paper" is PromptIR's: 150 epochs of some 4,400 batches, warm-up in a tenth.
SCHEDULES = {"nano": {}, "small": {}}
SCHEDULES["paper"] = dict(num_steps=660_000, batch_size=32, crop_size=128, lr=2e-4, warmup=66_000, save_every=1000)


def finetune_options(model: SIPL, start: str = "", recipe: str | Callable | None = None) -> dict[str, Any]:
    """For a model with trained weights, as its file or `start` tells: a gentle schedule, its own recipe and suite."""
    about = getattr(model, "about", {})
    if not about.get("num_steps") and not start:
        return {}
    options = dict(trained=about.get("num_steps", 0), batch_size=4, crop_size=128, lr=2e-6, warmup=100, ema=0.99)
    if not callable(recipe):  # such a one may hold a loss of its own
        options["decibels"] = about.get("decibels", 0.0)
    if about.get("suite") in COLUMNS:
        options["suite"] = about["suite"]
    if about.get("recipe") in RECIPES and needs_fusion(about["recipe"]) == bool(model.fusion):
        options["recipe"] = about["recipe"]
    if "window" in about and recipe in (None, "overview"):
        options |= dict(window=about["window"], crop_size=3 * about["window"])
    return options


def learning_rate(step, o):
    """Linear warm-up, then half a cosine."""
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    return o.lr * 0.5 * (1 + math.cos(math.pi * (step - o.warmup) / max(o.num_steps - o.warmup, 1)))


# ------------------------------------------------------------------------------------------------------------- fit
def fit(
    model: SIPL,
    data: Any = None,
    *,
    recipe: str | Callable | None = None,
    folder: Name | None = None,
    validate: Callable | None = None,
    device: Any = None,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, float]]:
    """Train a model in place and return the log, a list of one dict per step.

    Under torchrun each process works on its share of every batch, and the gradients are averaged: the numbers are those
    of one process, to rounding. Each step seeds PyTorch's global random generators.

    Args:
        data: None for the embedded images; a folder of photos, a list of H x W x 3 arrays, or a `data.Images`, to which
            degradations are added; a PyTorch data set of (x, y), degraded and clean, (3, H, W) in [0, 1]; or any
            iterable of batches of these, gone through again and again, and from its start when a training goes on.
        recipe: a name in RECIPES, or a function like those. Default: what the weights were trained with, or "authors",
            and without Proxy Fusion "backbone".
        folder: gets `checkpoint.pt`, `model.safetensors` and `log.csv`. A checkpoint that is there goes on, bit for bit
            on the same CPU (on CUDA, and with a data set that draws random numbers of its own in workers or not from
            PyTorch, nearly); options that are not given are as they were. Ctrl-C saves one and stops.
        validate: function of a copy of the model that returns a dict of numbers for the log.
        device: default CUDA if there, else CPU.
        options: fields of `Options`. Defaults for a model with trained weights: `finetune_options`.
    Raises InputError for what cannot work, and for a checkpoint of another training; and FloatingPointError, which
    names the step, where loss or gradient is not finite, before that reaches a weight or a checkpoint."""
    folder = None if folder is None else Path(folder)
    fresh = dict(run=finetune_options(model, options.get("start"), recipe), step=0, log=[])
    state = (read_checkpoint(folder, model) if folder else None) or fresh
    first, log = state["step"], state["log"]
    o, recipe, data, run = settle(model, data, recipe, state["run"], options)
    changes = compare(folder, state, run) if first else ""
    if isinstance(data, Images):
        check_suite(o.suite, o.shares)
    device, (rank, world) = pick_device(device), ranks()
    if folder and rank == 0:
        clear(folder, log)
        print(changes, end="")
    if rank == 0 and progress and not first and o.trained:
        names = ("lr", "warmup", "ema", "decibels", "batch_size", "crop_size")
        gentle = ", ".join(f"{name}={getattr(o, name)}" for name in names)
        print(f"fine-tuning weights with {o.trained} steps behind them: recipe={run['recipe']}, {gentle}")

    was_fast = any(type(module) in FAST.values() for module in model.modules())
    accelerate(model.to(device).train())  # channels last, also where gradients are recorded
    network = Step(model, recipe, device.type == "cuda" if o.autocast is None else o.autocast, o.decibels)
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=o.weight_decay, fused=device.type == "cuda")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(o.ema), use_buffers=True) if o.ema else None
    result = average.module if average else model
    parts = dict(model=model, optimizer=optimizer) | (dict(average=average) if average else {})

    def save(step):
        model.about = result.about = model.about | dict(num_steps=o.trained + step)
        if folder and rank == 0:
            save_checkpoint(folder, result, log, parts, run=run, step=step, about=model.about)
        return step, monotonic()

    saved, saved_at = first, monotonic()
    source = batches(data, first, o, device, overview=recipe is overview)
    bar = tqdm(range(first, o.num_steps), initial=first, total=o.num_steps, disable=not progress or rank, unit="step")
    with patient() as asked, contextlib.ExitStack() as behind:
        for end in (source.close, model.eval, partial(accelerate, model, was_fast)):
            behind.callback(end)
        if first:
            load_parts(parts, state, folder)
        model.about = result.about = about_weights(model, data, run)  # now: `validate` may ask for it
        for step, (x, y) in zip(bar, source):
            optimizer.param_groups[0]["lr"] = learning_rate(step, o)
            totals = backward(network, x, y, o.accumulate)
            norm = nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
            totals = F.pad(torch.cat([totals, norm[None] / world]), (0, 1), value=float(asked.is_set()))
            if world > 1:
                dist.all_reduce(totals)
            loss, psnr, norm, stopping = totals.tolist()  # the one moment when the processor waits for the device
            if not math.isfinite(loss + norm):
                what = f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite at step {step}"
                again = "begin in another folder" if folder and 0 < saved == step else "call again"
                raise FloatingPointError(f"{what}: lower lr={o.lr} or grad_clip={o.grad_clip}, and {again}")
            optimizer.step()
            if average:
                average.update_parameters(model)
            log.append(dict(step=step, loss=loss, psnr=psnr, gradient=norm))
            if validate and ((step + 1) % o.validate_every == 0 or step + 1 == o.num_steps):
                log[-1] |= {name: float(v) for name, v in validate(copy.deepcopy(result).eval()).items()}
            bar.set_postfix(loss=f"{loss:.4f}", psnr=f"{psnr:.2f} dB", refresh=False)
            if stopping or (step + 1) % o.save_every == 0 or monotonic() - saved_at > 60 * o.save_minutes:
                saved, saved_at = save(step + 1)
            if stopping:
                bar.close()
                model.load_state_dict(result.state_dict())
                raise KeyboardInterrupt(f"stopped after step {step}" + ", saved" * (folder is not None))
    save(o.num_steps)
    model.load_state_dict(result.state_dict())
    return log


def settle(model, data, recipe, before, given):
    """All that is decided before a training begins: its `Options`, recipe, data, and what `describe` says of them.

    given: options of the call; `before` stands for what is not given."""
    for name in given:
        known("option", name, Options.__annotations__)
    o = Options(**{name: before[name] for name in Options.__annotations__ if name in before} | given)
    recipe, label = find_recipe(recipe, before, model)
    data = find_data(data, o, given)
    size = o.crop_size if isinstance(data, Images) else getattr(data, "crop_size", None)
    if recipe is overview and not 0 < o.window < (size or math.inf):
        raise InputError("recipe 'overview' needs --window, and a larger --crop-size: e.g. window=64, crop_size=192")
    if size and o.window > size:  # of other data, found out at the first batch
        raise InputError(f"window={o.window} is larger than the crops: pass a larger crop_size than {size}")
    return o, recipe, data, describe(model, label, data, o)


def about_weights(model, data, run):
    """What a weight file tells of its training, beside the number of steps."""
    about, recipe = getattr(model, "about", {}), run["recipe"]
    if about.get("recipe", recipe) != recipe:  # T and windows were of that
        about = {name: v for name, v in about.items() if name not in ("steps", "window")}
    new = dict(recipe=recipe, command=run["command"], decibels=run["decibels"])
    new |= dict(window=run["window"]) if recipe == "overview" else {}
    new |= dict(suite=run["suite"]) if isinstance(data, Images) else {}
    new |= dict(images=len(data)) if isinstance(data, Images | Dataset) else {}
    return {name: v for name, v in about.items() if name not in new} | {name: v for name, v in new.items() if v}


class Step(nn.Module):
    """A recipe and its loss as one module, which is what DistributedDataParallel wraps."""

    def __init__(self, model, recipe, autocast, decibels=0.0):
        super().__init__()
        self.model, self.recipe, self.autocast, self.decibels = model, recipe, autocast, decibels

    def forward(self, x, y):
        """The loss of a batch, with its gradient, and the PSNR (dB) of the last estimate, without."""
        # no cache: a weight cast inside no_grad would be remembered without its gradient
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            estimates = self.recipe(self.model, x, y)
        estimates = [estimates] if isinstance(estimates, torch.Tensor) else estimates
        several = isinstance(estimates, list | tuple) and estimates
        if not several or any(getattr(e, "shape", None) != y.shape for e in estimates):
            raise InputError("a recipe must return an estimate of y, a tensor of its shape, or a list of them")
        estimates = torch.stack(list(estimates))
        loss = F.l1_loss(estimates.float(), y.expand_as(estimates))
        if self.decibels:  # counted up to 50 dB
            loss = loss + self.decibels * 10 * ((estimates.float() - y).square().mean((2, 3, 4)) + 1e-5).log10().mean()
        mse = (estimates[-1].detach().float().clamp(0, 1) - y).square().mean((1, 2, 3)).clamp(min=1e-10)
        return loss, -10 * mse.log10().mean()


def backward(network, x, y, accumulate):
    """Gradients of a batch, of which each process works on its share, in parts. Returns loss and PSNR."""
    network.zero_grad()
    rank, world = ranks()
    totals = torch.zeros(2, device=x.device)
    if len(x) < world:
        raise InputError(f"a batch of {len(x)} gives no image to some of {world} processes: pass a larger batch_size")
    parts = min(accumulate, len(x) // world)  # as many in each process: they wait for each other
    for a, b in zip(x[rank::world].tensor_split(parts), y[rank::world].tensor_split(parts)):
        loss, psnr = network(a, b)
        share = len(a) / len(x)
        (world * share * loss).backward()  # DistributedDataParallel takes the mean over processes
        totals += share * torch.stack([loss.detach(), psnr])
    return totals


@contextlib.contextmanager
def patient():
    """Yields an event that the first Ctrl-C only sets, so that a step is never cut in half; a second stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda *_: asked.set() or signal.signal(signal.SIGINT, before))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------- recipe, data, devices
def find_recipe(recipe, before, model):
    """The function of a recipe, and its name. Raises InputError where the model does not fit it."""
    if callable(recipe):
        return recipe, getattr(recipe, "__name__", type(recipe).__name__)
    if recipe is None:
        usual = "authors" if model.fusion else "backbone"
        recipe = before.get("recipe") if before.get("recipe") in RECIPES else usual
    if needs_fusion(known("recipe", recipe, RECIPES)) < bool(model.fusion):
        way = "recipe=lambda model, x, y: model.net(x)" if hasattr(model, "net") else "fusion=False, or nano-backbone"
        raise InputError(f"recipe {recipe!r} needs a model without Proxy Fusion: {way}")
    if needs_fusion(recipe) > bool(model.fusion):
        raise InputError(f"recipe {recipe!r} needs Proxy Fusion: add it with SIPL.from_backbone, or pass 'backbone'")
    return RECIPES[recipe], recipe


def needs_fusion(recipe):
    return RECIPE_SETTINGS[recipe].get("fusion", True)


def find_data(data, o, given):
    """`Images` of what stands for images; anything else as it is."""
    if data is None or isinstance(data, Name | list | tuple):
        data = Images(data, seed=o.seed)
    if isinstance(data, Images):
        check_suite(o.suite)
        o.shares = SHARES[o.suite] | o.shares  # so that a checkpoint has them, and goes on with them
        if strange := sorted({*data.pairs} - {*COLUMNS[o.suite]}):
            raise InputError(f"there are pairs of {', '.join(strange)}, not in suite {o.suite!r}: pass one that has it")
    elif wrong := sorted({"shares", "suite", "mild"} & {name for name in given if given[name]}):
        raise InputError(f"{', '.join(wrong)}: of degradations, which pairs bring along: leave that out")
    elif isinstance(data, Dataset) and not (hasattr(data, "__len__") and len(data)):
        raise InputError(f"the data set {type(data).__name__} is empty or has no length: pass a DataLoader of it")
    return data


def batches(data, first, o, device, overview=False):
    """Yield x, y (B, 3, H, W) on the device, from step `first` on. overview: as in `cut`."""
    seeds = (hash_seed(o.seed, step, 3) for step in itertools.count(first))
    torch.manual_seed(seed := next(seeds))  # for data sets that draw random numbers
    pin = o.num_workers > 0 and device.type == "cuda"
    load = partial(DataLoader, num_workers=o.num_workers, pin_memory=pin, worker_init_fn=leave_interrupts)
    if isinstance(data, Images):
        options = dict(suite=o.suite, crop_size=o.crop_size, batch_size=o.batch_size, seed=o.seed)
        options |= dict(mild=o.mild, shares=o.shares)
        make = partial(batch, data, device="cpu" if o.num_workers else device, **options)
        epochs = [load(range(first, o.num_steps), batch_size=None, collate_fn=make)]  # step -> its batch
    else:
        epochs = in_order(data, first, o, load) if isinstance(data, Dataset) else again_and_again(data)
    for epoch in epochs:
        x = None
        for item in epoch:
            x, y = item[:2] if isinstance(data, Images) else checked(item)
            torch.manual_seed(seed)  # for recipes and layers: a DataLoader that begins draws one, too
            yield cut(x.to(device, non_blocking=True), y.to(device, non_blocking=True), o.window, overview)
            torch.manual_seed(seed := next(seeds))
        if x is None:
            raise InputError("there are no more batches: pass what can be gone through again, such as a DataLoader")


def checked(item):
    """A batch of data that is not ours: x, y in float32. Raises InputError where it is no batch of images."""
    x, y = item[:2] if isinstance(item, list | tuple) and len(item) > 1 else (item, None)
    if not all(isinstance(t, torch.Tensor) and t.ndim == 4 and t.shape[1] == 3 for t in (x, y)):
        found = " and ".join(str(tuple(getattr(t, "shape", ())) or type(t).__name__) for t in (x, y))
        raise InputError(f"a batch must be two tensors (B, 3, H, W), degraded and clean images, not {found}")
    x, y = x.float(), y.float()
    if not 0 <= y.min() <= y.max() <= 1:
        raise InputError(f"clean images must have values in [0, 1], not {y.min():.6g} to {y.max():.6g}: scale or clamp")
    if not x.abs().max() <= 10:  # noise may leave [0, 1]; this is 0..255, or not finite
        raise InputError(f"degraded images must have values around [0, 1], not up to {x.abs().max():.3g}")
    return x, y


def cut(x, y, side, overview=False):
    """The same random part, side x side pixels, of degraded and clean crops (B, 3, H, W); side 0: all of them.

    overview: three more channels beside the degraded part, the whole crop shrunk to its size."""
    if x.shape != y.shape:
        raise InputError(f"degraded images {tuple(x.shape)} and clean ones {tuple(y.shape)} must have the same shape")
    H, W = x.shape[-2:]
    if side > min(H, W) - overview:  # an overview shows more than its window
        raise InputError(f"window={side} is too large for the crops, {H} x {W} pixels: pass a larger crop_size")
    top, left = (int(torch.randint(n - side + 1, ())) if side else 0 for n in (H, W))
    part, y = (t[..., top : top + (side or H), left : left + (side or W)] for t in (x, y))
    return (torch.cat([part, F.interpolate(x, part.shape[-2:], mode="area")], 1) if overview else part), y


def again_and_again(data):
    for epoch in itertools.count():
        if hasattr(own := getattr(data, "dataset", None), "set_epoch"):  # of a DataLoader
            own.set_epoch(epoch)
        yield data


def leave_interrupts(_):
    """Ctrl-C reaches the workers too, and only `fit` is to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_order(data, first, o, load):
    """Epochs of a data set, each in an order of its own that follows from the seed, as iterables of batches."""
    per_epoch = max(len(data) // o.batch_size, 1)
    for epoch in itertools.count(first // per_epoch):
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        g = generator(hash_seed(o.seed, epoch, 4))
        order = [indices.tolist() for indices in torch.randperm(len(data), generator=g).split(o.batch_size)]
        skipped = max(first - epoch * per_epoch, 0)
        yield load(data, batch_sampler=order[skipped:per_epoch], generator=g)


def pick_device(name: Any = None) -> torch.device:
    """The device named, or CUDA if there, else the CPU. Raises InputError where it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {str(name)!r} cannot be used here: choose cpu, or leave it out") from e


def ranks():
    """Which process this is, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def processes(device: Any = None):
    """Join the other processes where torchrun started this one: yields (device, whether this is the first of them)."""
    if "LOCAL_RANK" not in os.environ:
        yield device, True
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    alone = cuda and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # NCCL wants a GPU for each
    dist.init_process_group("nccl" if alone else "gloo")
    try:
        yield device, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- checkpoints
def clear(folder, log):
    """Write the log so far, so that a place that cannot be written is found out now, and remove what a killed process
    left half-written. Raises InputError where the log of another training would be lost."""
    path = folder / "log.csv"
    if not log and path.exists() and path.stat().st_size > 2:  # a line's end is written before the first step
        raise InputError(f"{str(path)!r} is of a training whose checkpoint.pt is gone: move it, or pass another folder")
    write_log(folder, log)
    for name in FILES:
        for left in folder.glob(f".[0-9]*.{name}"):
            left.unlink()


def load_parts(parts, state, folder):
    """Give model, optimizer and average what a checkpoint has of them. Raises InputError where it does not fit."""
    try:  # names and shapes first, before the model is touched
        copy.deepcopy(parts["model"]).to("meta").load_state_dict({n: t.to("meta") for n, t in state["model"].items()})
        fused = parts["optimizer"].defaults["fused"]  # of the device of today
        state["optimizer"]["param_groups"][0]["fused"] = fused
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
    except (ValueError, RuntimeError) as e:  # a wrapped network that has changed
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{str(folder / 'checkpoint.pt')!r} is of another model, pass another folder: {reason}") from e


def describe(model, label, data, o):
    """All that a training follows from, as plain text and numbers."""
    images = [type(data).__name__]
    if isinstance(data, Images):
        images = data.names()
    elif isinstance(data, Dataset):
        images = [f"{type(data).__name__}: {len(data)} pairs"]
    run = dict(settings=asdict(model.settings), recipe=label, images=images, processes=ranks()[1]) | asdict(o)
    return json.loads(json.dumps(run))


def counts(images):
    """Images by name, pairs by column: how many there are of each."""
    found = Counter()
    for name in images:
        pairs = re.match("(.+): ([0-9]+) pairs", name)
        found[pairs[1] if pairs else name] += int(pairs[2]) if pairs else 1
    return found


def compare(folder, state, run):
    """What is new in a training that goes on, as a line. Raises InputError where it would not be the same training."""
    path, done = repr(str(folder / "checkpoint.pt")), state["step"]
    was, changes = dict(window=0) | state["run"], []
    if run["num_steps"] < done:
        raise InputError(f"{path} has {done} steps behind it: pass num_steps={done} (--steps {done}) or more")
    for name, new in (run | run["settings"]).items():
        old = (was | was["settings"]).get(name, new)
        if old == new or name in ("settings", "command"):
            continue
        left = counts(old) - counts(new) if name == "images" else Counter()
        made = [column for column in left if column in COLUMNS[run["suite"]] and not counts(new)[column]]
        if left and counts(new) < counts(old) and not made:  # where a column lost all its pairs, it would be made up
            changes.append(f"{left.total()} images or pairs left out")
        elif name in FREE:
            changes.append(f"{name}={new!r} (before: {old!r})")
        else:
            if name == "images":
                old, new = (next((n for n in a if n not in b), "all others") for a, b in ((old, new), (new, old)))
            if name == "shares":
                old, new = ({n: v for n, v in a.items() if b.get(n) != v} for a, b in ((old, new), (new, old)))
            advice = "repeat its arguments, or pass another folder"
            raise InputError(f"{path} is of another training ({name}={old!r}, now {new!r}): {advice}")
    return f"{path} goes on from step {done}, with {', '.join(changes)}\n" if changes else ""


def save_checkpoint(folder, result, log, parts, **state):
    """Write log.csv, model.safetensors and checkpoint.pt, each whole or not at all."""
    write_log(folder, log)
    weights.save(result, folder / "model.safetensors")
    state |= dict(log=log) | {name: part.state_dict() for name, part in parts.items()}
    with atomic_write(folder / "checkpoint.pt") as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as e:  # how torch says that the disk is full
            raise OSError(f"{str(e).splitlines()[0]}; the one before is kept, and goes on once there is room") from e


def write_log(folder, log):
    with atomic_write(folder / "log.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for row in log for name in row)))
        writer.writeheader()
        writer.writerows(log)


def read_checkpoint(folder, model):
    """What `save_checkpoint` wrote, or None. Raises InputError where it is damaged. No code in it is run."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as z:
            if damaged := z.testzip():  # torch does not look at the checksums in it
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if "log" in state else upgrade(state, folder, model)
    except (PermissionError, MemoryError):
        raise
    except Exception as e:  # damaged pickles raise anything
        advice = "delete it and log.csv, or pass another folder"
        raise InputError(f"{str(path)!r} is not a whole checkpoint: {advice}") from e


RENAMED = dict(setting="suite", steps="num_steps", count="batch_size", size="crop_size", peak="lr")
RENAMED |= dict(decay="weight_decay", clip="grad_clip")


def upgrade(state, folder, model):
    """A checkpoint of version 0.1, which had other names and shapes and its log in log.csv alone, as one of today."""

    def new(tensors):
        return weights.modernize(tensors, str(folder / "checkpoint.pt"))

    run = {RENAMED.get(name, name): value for name, value in state["run"].items()}
    run["settings"].pop("aligned", None)
    with open(folder / "log.csv", encoding="utf-8", newline="") as f:
        rows = [{n: float(v) for n, v in row.items() if v} for row in csv.DictReader(f)]
    log = [row | dict(step=int(row["step"])) for row in rows if row["step"] < state["step"]]
    average = new({name.removeprefix("module."): t for name, t in state.get("average", {}).items()})
    average = {name if name == "n_averaged" else f"module.{name}": t for name, t in average.items()}

    # AdamW's moments: the order of the parameters was that of the names in "model"
    buffers, optimizer = {name for name, _ in model.named_buffers()}, state["optimizer"]
    names = [name for name in state["model"] if name not in buffers]
    moments = {}
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        old = {names[i]: values[kind] for i, values in optimizer["state"].items()}
        for name, t in new({name: t for name, t in old.items() if not name.startswith("aligned.")}).items():
            moments.setdefault(name, {})[kind] = t
    order = [name for name, _ in model.named_parameters()]
    optimizer["state"] = {i: moments[name] for i, name in enumerate(order) if name in moments}
    optimizer["param_groups"][0]["params"] = [*range(len(order))]
    return state | dict(run=run, log=log, model=new(state["model"]), average=average, optimizer=optimizer)
