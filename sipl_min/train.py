"""The training loop: `fit`, the recipes it follows, and checkpoints that resume bit for bit."""

import contextlib
import csv
import json
import math
import os
import signal
import threading
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .data import Images, batch
from .degrade import COLUMNS, check_setting
from .files import InputError, Name, whole
from .sipl import SIPL


def authors(model, x, y):
    """The released training step: P = E(f(y; D)) without gradient, then the guided pass f(x; Read(D, P)).

    What is privileged is not the clean image y but the network's own restoration of it. At test time it will be the
    restoration of the degraded image, P = E(f(x; D)): the same kind of image, from a worse source.
    Only the guided pass is trained; the first pass f(x; D) has no loss of its own.
    """
    with torch.no_grad():
        privileged = model.privileged(model(y))
    return model(x, privileged)


def backbone(model, x, y):
    """The fair baseline: the same backbone without Proxy Fusion, one plain pass."""
    return model(x)


def privilege(model, x, y):
    """Classic privilege learning: the pass guided by features of the clean image, P = E(y), teaches the plain one.

    Both passes have a loss. At test time there is no clean image, so the first pass f(x; D) is all.
    """
    with torch.no_grad():
        privileged = model.privileged(y)
    return [model(x), model(x, privileged)]


def unroll(model, x, y):
    """Ours: the test-time loop itself, y0 and y1, each with a loss, and gradients through the privilege.

    So training sees what test time will see, P = E(y0), and E learns to make features that are worth reading.
    """
    return list(model.estimates(x, steps=1))


RECIPES = {"authors": authors, "backbone": backbone, "privilege": privilege, "unroll": unroll}
# The settings that a recipe needs, or was made for.
DESIGN = {"authors": {}, "backbone": dict(fusion=False), "privilege": {},
          "unroll": dict(identity_start=True, aligned=True)}  # fmt: skip

# How long and how fast, by preset. The authors' schedule for SIPL is not published; `paper` is PromptIR's: batches of
# 32 crops of 128 pixels, 2e-4, warm-up in a tenth of 150 epochs, an epoch of three tasks being some 4,400 batches.
SCHEDULES = {
    "nano": dict(steps=400, count=8, size=48, peak=1e-3, warmup=20),
    "small": dict(steps=400, count=8, size=48, peak=1e-3, warmup=20),
    "paper": dict(steps=660_000, count=32, size=128, peak=2e-4, warmup=66_000),
}


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


class Step(nn.Module):
    """A recipe as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model, recipe):
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, x, y):
        found = self.recipe(self.model, x, y)
        return found[None] if isinstance(found, torch.Tensor) else torch.stack(found)  # (estimates, B, 3, H, W)


def fit(model: SIPL, images: Any = None, *, setting: str = "cdd11", recipe: str | Callable = "authors",
        steps: int = 400, count: int = 8, size: int = 48, peak: float = 1e-3, warmup: int = 20, decay: float = 1e-4,
        clip: float = 1.0, seed: int = 0, folder: Name | None = None, save_every: int = 100, save_minutes: float = 10,
        validate: Callable | None = None, validate_every: int = 100, accumulate: int = 1, ema: float = 0.0,
        mild: float = 0.0, start: str = "", device: Any = None, autocast: bool | None = None,
        progress: bool = True) -> list[dict[str, float]]:  # fmt: skip
    """Train a model in place and return the log, a list of one dict per step.

    Under torchrun every process makes the same batch and works on its share of it; DistributedDataParallel averages the
    gradients, so that the numbers are those of one process, to rounding. The first process writes.

    Args:
        model: a `SIPL`; recipe "backbone" needs `fusion=False`, the others Proxy Fusion; see `DESIGN`.
        images: None (embedded images), a folder of photos, a list of H x W x 3 arrays, or a `data.Images`.
        setting: which degradations, see `degrade.SETTINGS`. recipe: a name in `RECIPES`, or any function
            (model, x, y) -> estimate whose L1 distance to y is the loss, or a list of estimates, with equal weights.
        steps, count, size: how many steps, of how many crops, of how many pixels a side (a multiple of 8).
        peak, warmup, decay, clip: AdamW's learning rate and its schedule, weight decay, largest gradient norm.
        folder: where `checkpoint.pt`, `log.csv` and, in the end, `model.safetensors` go, and TensorBoard's events where
            that is installed. A checkpoint found there is resumed, and continues bit for bit on the same machine (with
            as many processes); Ctrl-C saves one and stops. save_every, save_minutes: what is between checkpoints.
        accumulate: in how many parts a batch is worked on, for lack of memory. ema: decay of an exponential moving
            average of the weights, e.g. 0.999, which is then what is validated and, in the end, what the model holds.
        mild: share of the crops that are degraded only in part, see `data.batch`.
        start: a word for the weights that the model comes with; a checkpoint that began from others is not resumed.
        validate: function (model) -> dict of numbers, called every `validate_every` steps and logged.
        device: default CUDA if there, else CPU. autocast: bfloat16, default on CUDA only.
    Raises InputError for arguments that do not fit, or a checkpoint that belongs to another run; and
        FloatingPointError, which names the step, where loss or gradient is no longer finite; all before that step is
        then in failed.pt, and checkpoint.pt is left as it was.
    """
    check_setting(setting)
    step_function = RECIPES.get(recipe, recipe)
    if not callable(step_function):
        raise InputError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}, or pass a function")
    if recipe in RECIPES and (recipe != "backbone") != model.settings.fusion:
        raise InputError(f"recipe {recipe!r} needs a model with fusion={recipe != 'backbone'}")
    whole_numbers = dict(steps=steps, count=count, size=size, save_every=save_every, validate_every=validate_every,
                         accumulate=accumulate)  # fmt: skip
    for name, value in whole_numbers.items():
        multiple = 8 if name == "size" else 1
        if not isinstance(value, int) or value < 1 or value % multiple:
            raise InputError(f"{name}={value!r} must be a positive whole number" + ", a multiple of 8" * (multiple > 1))
    for name, value in (("warmup", warmup), ("seed", seed)):
        if not isinstance(value, int) or value < 0:
            raise InputError(f"{name}={value!r} must be a whole number >= 0")
    together = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    if count % (world * accumulate):
        raise InputError(f"count={count} must be a multiple of {world} processes times accumulate={accumulate}")
    if not 0 <= ema < 1:
        raise InputError(f"ema={ema!r} must be at least 0 and below 1")
    if not 0 <= mild <= 1:
        raise InputError(f"mild={mild!r} must be between 0 and 1")
    for name, value in (("peak", peak), ("clip", clip), ("save_minutes", save_minutes)):
        if not 0 < value < math.inf:
            raise InputError(f"{name}={value!r} must be a positive number")
    if not 0 <= decay < math.inf:
        raise InputError(f"decay={decay!r} must be a number >= 0")
    label = recipe if isinstance(recipe, str) else getattr(recipe, "__name__", type(recipe).__name__)
    peak, decay, clip, ema, mild = map(float, (peak, decay, clip, ema, mild))  # not NumPy's: no checkpoint holds those
    device = usable(device)
    autocast = device.type == "cuda" if autocast is None else autocast
    images = images if isinstance(images, Images) else Images(images, seed=seed)
    if strange := {*images.pairs} - {*COLUMNS[setting]}:
        raise InputError(f"images.pairs has columns that {setting} has not: {', '.join(sorted(strange))}")
    model.to(device).train()
    forward = Step(model, step_function)
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(forward, find_unused_parameters=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=decay, fused=device.type == "cuda")
    run = dict(settings=asdict(model.settings), setting=setting, recipe=label,
               steps=steps, count=count, size=size, peak=peak, warmup=warmup, decay=decay, clip=clip, seed=seed,
               accumulate=accumulate, ema=ema, processes=world, images=images.names(),
               **{name: value for name, value in (("mild", mild), ("start", start)) if value})  # fmt: skip
    run = json.loads(json.dumps(run, default=str))  # plain text and numbers, as they will be read back
    first, log, writer = 0, [], None
    if folder is not None:
        folder = Path(folder)
        first, log = resume(folder, run, model, optimizer, average)
        writer = tensorboard(folder, first) if rank == 0 else None
    saved = monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not progress or rank > 0, unit="step")
    with Stop() as stop:
        for step in bar:
            x, y, _ = batch(images, step, setting=setting, size=size, count=count, seed=seed, device=device, mild=mild)
            parts = list(zip(x[rank::world].chunk(accumulate), y[rank::world].chunk(accumulate)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup)
            optimizer.zero_grad(set_to_none=True)
            sums = torch.zeros(3, device=device)  # loss, PSNR, and whether somebody asked to stop
            for i, (a, b) in enumerate(parts):
                last = i + 1 == len(parts)
                with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                    # no cache: a weight cast inside no_grad would be remembered without its gradient
                    with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
                        estimates = forward(a, b).float()
                    loss = F.l1_loss(estimates, b.expand_as(estimates)) / len(parts)
                    loss.backward()
                mse = (estimates[-1].detach().clamp(0, 1) - b).square().mean((1, 2, 3)).clamp(min=1e-10)
                sums += torch.stack([loss.detach(), -10 * mse.log10().mean() / len(parts), loss.new_zeros(())])
            sums[2] = float(stop.asked)
            if world > 1:
                dist.all_reduce(sums)
            loss, psnr, stopping = (sums / world).tolist()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
            if not math.isfinite(loss + norm):
                what = f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite at step {step}"
                if folder is not None and rank == 0:
                    save_checkpoint(folder, run, step, model, optimizer, log, average, "failed.pt")
                    what += f" ({folder / 'failed.pt'} holds all before it: as checkpoint.pt it begins there)"
                raise FloatingPointError(f"{what}: lower peak={peak} or clip={clip}")
            optimizer.step()
            if average:
                average.update_parameters(model)
            row = dict(step=step, loss=loss, psnr=psnr, gradient=norm)
            if validate is not None and ((step + 1) % validate_every == 0 or step + 1 == steps):
                tested = average.module if average else model
                tested.eval()
                row.update(validate(tested))
                tested.train()
            log.append(row)
            for name, value in list(row.items())[1:] if writer else ():
                writer.add_scalar(name, value, step)
            bar.set_postfix(loss=f"{loss:.4f}", psnr=f"{psnr:.2f} dB", refresh=False)
            late = monotonic() - saved > 60 * save_minutes
            if (
                folder is not None
                and rank == 0
                and ((step + 1) % save_every == 0 or step + 1 == steps or stopping or late)
            ):
                save_checkpoint(folder, run, step + 1, model, optimizer, log, average)
                saved = monotonic()
            if stopping:
                bar.close()
                raise KeyboardInterrupt(f"stopped after step {step}" + (", saved" if folder is not None else ""))
    if average:
        model.load_state_dict(average.module.state_dict())
    model.eval()
    if folder is not None and rank == 0:
        model.save(folder / "model.safetensors")
    if writer:
        writer.close()
    return log


def usable(device=None):
    """A `torch.device`: the one named, or CUDA if there, else the CPU. Raises InputError where it cannot be used."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {str(device)!r} cannot be used here: choose cpu, or leave it out") from e
    return torch.device(device)


def tensorboard(folder, start):
    """A writer of TensorBoard events in `folder`, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=start)


@contextlib.contextmanager
def processes(device=None):
    """Join the other processes where torchrun started this one: yields (device, whether this is the first of them)."""
    if "LOCAL_RANK" not in os.environ:
        yield device, True
        return
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


class Stop:
    """Within `with Stop() as stop:` the first Ctrl-C only sets `stop.asked`, so that a step is never cut in half."""

    asked = False

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)  # a second Ctrl-C stops at once

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()  # only there can signals be handled
        if self.main:
            self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.before)


# --------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder, run, step, model, optimizer, log, average=None, name="checkpoint.pt"):
    """Write log.csv and checkpoint.pt (weights, their average, optimizer, step, the run's arguments), each whole.

    Raises InputError where the disk is full; what was saved before is then still there.
    """
    names = list(dict.fromkeys(name for row in log for name in row))
    with whole(folder / "log.csv") as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(log)
    state = dict(run=run, step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
    state |= dict(average=average.state_dict()) if average else {}
    with whole(folder / name) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as e:  # how torch says that the disk is full
            raise OSError(f"{str(e).splitlines()[0]}; the one before is kept, and continues once there is room") from e


def resume(folder, run, model, optimizer, average=None):
    """Load checkpoint.pt, if there is one, into model and optimizer; returns (next step, log so far)."""
    path = folder / "checkpoint.pt"
    with whole(folder / ".writable") as temporary:  # a folder that cannot be written is found out now, not at the end
        temporary.touch()
    (folder / ".writable").unlink(missing_ok=True)
    if not path.exists():
        return 0, []
    try:
        with zipfile.ZipFile(path) as z:  # torch does not look at the checksums in it
            if damaged := z.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, never code
        old = state["run"]
    except Exception as e:  # damaged pickles raise anything
        raise InputError(f"{str(path)!r} is not a whole checkpoint: delete it, or pass another folder") from e
    differing = sorted(name for name in {*old, *run} if old.get(name) != run.get(name))
    if differing:
        name = differing[0]
        was, now = old.get(name), run.get(name)
        while isinstance(was, dict) and isinstance(now, dict):  # the first setting that differs
            key = next(key for key in sorted({*was, *now}) if was.get(key) != now.get(key))
            name, was, now = f"{name}.{key}", was.get(key), now.get(key)
        change = f"{name}={was!r}, now {now!r}"
        if name == "images" and isinstance(old.get(name), list):
            change = f"its {len(old[name])} images are not the {len(run[name])} given now"
        raise InputError(
            f"{str(path)!r} belongs to another run ({change}): repeat its arguments, or pass another folder"
        )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
        with open(folder / "log.csv", newline="") as f:
            log = [{k: int(v) if k == "step" else float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        log = [row for row in log if row["step"] < state["step"]]
    except (RuntimeError, KeyError, ValueError, TypeError, OSError) as e:
        raise InputError(f"{str(folder)!r} does not hold one whole run: checkpoint.pt and log.csv must be of the same "
                         "one; put them back, or pass another folder") from e  # fmt: skip
    return state["step"], log
