"""The training loop: `fit`, the recipes it follows, and checkpoints that resume bit for bit."""

import csv
import math
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .data import Images, batch
from .degrade import check_setting
from .files import InputError, whole


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


RECIPES = {"authors": authors, "backbone": backbone}


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def fit(model, images=None, *, setting="cdd11", recipe="authors", steps=400, count=8, size=48, peak=1e-3, warmup=20,
        decay=1e-4, clip=1.0, seed=0, folder=None, save_every=100, validate=None, validate_every=100, device=None,
        autocast=None, progress=True):  # fmt: skip
    """Train a model in place and return the log, a list of one dict per step.

    Args:
        model: a `SIPL`; recipe "authors" needs Proxy Fusion, recipe "backbone" needs `fusion=False`.
        images: None (embedded images), a folder of photos, a list of H x W x 3 arrays, or a `data.Images`.
        setting: which degradations, see `degrade.SETTINGS`. recipe: a name in `RECIPES`, or any function
            (model, x, y) -> estimate whose L1 distance to y is the loss.
        steps, count, size: how many steps, of how many crops, of how many pixels a side (a multiple of 8).
        peak, warmup, decay, clip: AdamW's learning rate and its schedule, weight decay, largest gradient norm.
        folder: where `checkpoint.pt`, `log.csv` and, in the end, `model.safetensors` go. A checkpoint found there is
            resumed, and continues bit for bit on the same machine; Ctrl-C saves one and stops.
        validate: function (model) -> dict of numbers, called every `validate_every` steps and logged.
        device: default CUDA if there, else CPU. autocast: bfloat16, default on CUDA only.
    Raises InputError for arguments that do not fit, or a checkpoint that belongs to another run; and
        FloatingPointError, which names the step, where the loss is no longer finite.
    """
    check_setting(setting)
    step_function = RECIPES.get(recipe, recipe)
    if not callable(step_function):
        raise InputError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}, or pass a function")
    if recipe in RECIPES and (recipe == "authors") != model.settings.fusion:
        raise InputError(f"recipe {recipe!r} needs a model with fusion={recipe == 'authors'}")
    whole_numbers = dict(steps=steps, count=count, size=size, save_every=save_every, validate_every=validate_every)
    for name, value in whole_numbers.items():
        multiple = 8 if name == "size" else 1
        if not isinstance(value, int) or value < 1 or value % multiple:
            raise InputError(f"{name}={value!r} must be a positive whole number" + ", a multiple of 8" * (multiple > 1))
    for name, value in (("warmup", warmup), ("seed", seed)):
        if not isinstance(value, int) or value < 0:
            raise InputError(f"{name}={value!r} must be a whole number >= 0")
    for name, value in (("peak", peak), ("clip", clip)):
        if not 0 < value < math.inf:
            raise InputError(f"{name}={value!r} must be a positive number")
    if not 0 <= decay < math.inf:
        raise InputError(f"decay={decay!r} must be a number >= 0")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    autocast = device.type == "cuda" if autocast is None else autocast
    images = images if isinstance(images, Images) else Images(images, seed=seed)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=decay, fused=device.type == "cuda")
    run = dict(settings=asdict(model.settings), setting=setting, recipe=getattr(recipe, "__name__", recipe),
               steps=steps, count=count, size=size, peak=peak, warmup=warmup, decay=decay, clip=clip, seed=seed,
               images=images.names())  # fmt: skip
    start, log = 0, []
    if folder is not None:
        folder = Path(folder)
        start, log = resume(folder, run, model, optimizer)
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=not progress, unit="step")
    with Stop() as stop:
        for step in bar:
            x, y, _ = batch(images, step, setting=setting, size=size, count=count, seed=seed, device=device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup)
            # no cache: a weight cast inside no_grad would be remembered without its gradient
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
                estimate = step_function(model, x, y).float()
            loss = F.l1_loss(estimate, y)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower peak={peak} or clip={clip}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            mse = F.mse_loss(estimate.detach().clamp(0, 1), y, reduction="none").mean((1, 2, 3)).clamp(min=1e-10)
            row = dict(step=step, loss=loss.item(), psnr=float(-10 * mse.log10().mean()), gradient=float(norm))
            if validate is not None and ((step + 1) % validate_every == 0 or step + 1 == steps):
                model.eval()
                row.update(validate(model))
                model.train()
            log.append(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", psnr=f"{row['psnr']:.2f} dB", refresh=False)
            if folder is not None and ((step + 1) % save_every == 0 or step + 1 == steps or stop.asked):
                save_checkpoint(folder, run, step + 1, model, optimizer, log)
            if stop.asked:
                bar.close()
                raise KeyboardInterrupt(f"stopped after step {step}" + (", saved" if folder is not None else ""))
    model.eval()
    if folder is not None:
        model.save(folder / "model.safetensors")
    return log


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


def save_checkpoint(folder, run, step, model, optimizer, log):
    """Write log.csv and checkpoint.pt (weights, optimizer, step, and the arguments of the run), each whole."""
    names = list(dict.fromkeys(name for row in log for name in row))
    with whole(folder / "log.csv") as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(log)
    state = dict(run=run, step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
    with whole(folder / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def resume(folder, run, model, optimizer):
    """Load checkpoint.pt, if there is one, into model and optimizer; returns (next step, log so far)."""
    path = folder / "checkpoint.pt"
    with whole(folder / ".writable") as temporary:  # a folder that cannot be written is found out now, not at the end
        temporary.touch()
    (folder / ".writable").unlink()
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, never code
        old = state["run"]
    except Exception as e:  # damaged pickles raise anything
        raise InputError(f"{str(path)!r} is not a whole checkpoint: delete it, or pass another folder") from e
    differing = sorted(name for name in {*old, *run} if old.get(name) != run.get(name))
    if differing:
        name = differing[0]
        change = f"{name}={old.get(name)!r}, now {run.get(name)!r}"
        if name == "images" and isinstance(old.get(name), list):
            change = f"its {len(old[name])} images are not the {len(run[name])} given now"
        raise InputError(
            f"{str(path)!r} belongs to another run ({change}): repeat its arguments, or pass another folder"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    log = []
    if (folder / "log.csv").exists():
        with open(folder / "log.csv", newline="") as f:
            for row in csv.DictReader(f):
                log.append({k: int(v) if k == "step" else float(v) for k, v in row.items() if v})
    return state["step"], [row for row in log if row["step"] < state["step"]]
