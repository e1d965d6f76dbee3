"""Training: it learns, goes on bit for bit, stops when told, and refuses what would be another training."""

import csv
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import rand, tiny
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sipl_min import SIPL, InputError, train
from sipl_min.data import Degraded, Images
from sipl_min.degrade import SHARES
from sipl_min.fast import accelerate

FLAT = [np.full((40, 40, 3), v, np.uint8) for v in (60, 120, 200)]
SMALL = dict(batch_size=1, crop_size=8, save_every=2)


def run(folder=None, num_steps=8, model=None, data=FLAT, **overrides):
    model = model or tiny()
    options = dict(batch_size=2, crop_size=16, warmup=2, save_every=3, progress=False)
    options |= dict(suite="three_task") if isinstance(data, list | Images) else {}
    log = train.fit(model, data, folder=folder, num_steps=num_steps, **{**options, **overrides})
    return model, log


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def at(number, action):
    """The authors' recipe, which does something else the given time it is called: raises it, or calls it."""
    calls = []

    def authors(model, x, y):
        calls.append(0)
        if len(calls) == number:
            if isinstance(action, type):
                raise action
            return action(train.authors(model, x, y))
        return train.authors(model, x, y)

    return authors


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder, weights and log of a training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    model, log = run(folder)
    return folder, flat(model), log


def press_ctrl_c(estimate):
    signal.raise_signal(signal.SIGINT)
    return estimate


# --------------------------------------------------------------------------------------------------------- recipes
def gradients(model, step, x, y):
    model.zero_grad()
    F.l1_loss(step(model, x, y), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_no_gradient_reaches_the_privileged_branch(model):
    x, y = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)

    def constant(model, x, y):
        return model(x, [p.detach() for p in model.privileged(model(y).detach())])

    def through(model, x, y):
        return model(x, model.privileged(model(y)))

    ours, constant, through = (gradients(model, step, x, y) for step in (train.authors, constant, through))
    assert all(torch.equal(ours[n], constant[n]) for n in ours)
    assert any(not torch.allclose(ours[n], through[n], rtol=1e-3) for n in ours)


def test_recipes_make_the_estimates_that_they_say(model):
    x, y = rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1)
    guided = model(x, model.privileged(y))
    for found, expected in (
        (train.privilege(model, x, y), [model(x), guided]),
        (train.unroll(model, x, y), model.refine(x, 1, return_all=True)),
    ):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    plain = tiny(fusion=False)
    assert torch.equal(train.backbone(plain, x, y), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(train.again(plain, x, y), (plain(x), plain(plain(x))), strict=True))
    both, right = train.cut(x, y, 8, overview=True)
    assert both.shape == (1, 6, 8, 8) and torch.equal(both[:, 3:], F.avg_pool2d(x, 2)) and right.shape == (1, 3, 8, 8)
    window, small = both.chunk(2, 1)
    assert torch.equal(train.overview(model, both, right), model(window, model.privileged(small)))


def test_a_zero_dictionary_explodes_once_and_a_random_one_does_not():
    """With D = 0 the query is LN(0) = 0, and to make it a unit vector divides it by 1e-12."""

    def norm(std):
        torch.manual_seed(0)
        found = gradients(SIPL("nano", dictionary_std=std), train.authors, rand(1, 3, 16, 16), rand(1, 3, 16, 16))
        return torch.stack([g.norm() for g in found.values()]).norm()

    assert norm(0.0) > 1e6 and norm(0.02) < 1e3


@pytest.mark.parametrize("recipe, fusion", [("authors", True), ("backbone", False)])
def test_training_lowers_the_loss(recipe, fusion):
    _, log = run(None, 24, tiny(fusion=fusion), recipe=recipe, lr=5e-3)
    first, last = (np.mean([row["loss"] for row in part]) for part in (log[:6], log[-6:]))
    assert last < 0.8 * first


def test_schedule():
    o = train.Options(num_steps=100, lr=1e-3, warmup=10)
    rates = [train.learning_rate(step, o) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == pytest.approx(1e-3) == rates[9]
    assert rates[-1] < 1e-6 and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_bfloat16_trains_every_weight():
    """Casting weights inside no_grad must not hide them from the gradient of the guided pass."""
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(None, 2, model, autocast=True, weight_decay=0.0)
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]


def test_the_loss_is_l1_and_a_share_of_psnr():
    x, y = rand(2, 2, 3, 16, 16)
    loss = [train.Step(tiny(), train.RECIPES["unroll"], False, decibels)(x, y)[0] for decibels in (0.0, 0.002)]
    estimates = torch.stack(list(tiny().estimates(x)))
    assert torch.allclose(loss[0], (estimates - y).abs().mean())
    psnr = -10 * ((estimates - y).square().mean((2, 3, 4))).log10().mean()
    assert (loss[0] - loss[1]).item() == pytest.approx(0.002 * psnr.item(), rel=1e-3)
    perfect = train.Step(torch.nn.Identity(), lambda model, x, y: model(y), False, 0.002)(x, y)[0]
    assert perfect.item() == pytest.approx(-0.002 * 50), "no more than 50 dB count"


# -------------------------------------------------------------------------------------------------- stop and go on
def test_same_seed_same_weights_and_the_model_comes_back_as_it_was():
    a, b, c = run(None, 3)[0], run(None, 3, accelerate(tiny()))[0], run(None, 3, seed=1)[0]
    assert torch.equal(flat(a), flat(b)) and not torch.equal(flat(a), flat(c))
    classes = [{type(module) for module in model.modules()} for model in (a, b, tiny(), accelerate(tiny()))]
    assert classes[:2] == classes[2:] and classes[0] != classes[1] and not a.training


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resume_is_bit_for_bit(tmp_path, unbroken, stop_at):
    folder, weights, log = unbroken
    with pytest.raises(SystemExit):
        run(tmp_path, recipe=at(stop_at, SystemExit))
    resumed, again = run(tmp_path, recipe="authors")  # at 1 nothing was saved yet: it starts anew
    assert torch.equal(weights, flat(resumed)) and again == log
    for name in ("model.safetensors", "log.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    with open(tmp_path / "log.csv", encoding="utf-8", newline="") as f:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)] == log


def test_whatever_validation_does_to_its_model_training_goes_on_the_same(tmp_path, unbroken):
    def spoil(model):
        assert not model.training
        accelerate(model, fast=False)
        torch.rand(3)
        model.requires_grad_(False)
        return dict(held=model.refine(rand(1, 3, 8, 8)).mean().numpy())

    with pytest.raises(SystemExit):
        run(tmp_path, recipe=at(7, SystemExit), validate=spoil, validate_every=3)
    model, log = run(tmp_path, recipe="authors", validate=spoil, validate_every=3)
    assert [row["step"] for row in log if "held" in row] == [2, 5, 7]
    assert torch.equal(flat(model), unbroken[1])


def test_ctrl_c_saves_weights_that_load_and_the_next_call_goes_on(tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt, match="after step 4, saved"):
        run(tmp_path, recipe=at(5, press_ctrl_c))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5
    interrupted = SIPL.load(tmp_path / "model.safetensors")
    assert interrupted.about["num_steps"] == 5
    assert torch.equal(flat(interrupted), flat(SIPL.load(tmp_path / "checkpoint.pt")))
    resumed, _ = run(tmp_path, recipe="authors")
    assert torch.equal(flat(resumed), unbroken[1]) and not torch.equal(flat(resumed), flat(interrupted))
    assert resumed.about == dict(recipe="authors", suite="three_task", num_steps=8, images=3)
    assert SIPL.load(tmp_path / "model.safetensors").about == resumed.about


def test_what_is_interrupted_leaves_the_average_and_a_model_as_it_was(tmp_path):
    model = tiny()
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        run(tmp_path, model=model, recipe=at(5, press_ctrl_c), ema=0.9)
    assert torch.equal(flat(model), flat(SIPL.load(tmp_path / "model.safetensors"))), "the average, as the file has it"
    assert not model.training and type(model.encoder.levels[0][0]).__name__ == "Block", "plain, in evaluation mode"


def test_in_another_thread_it_trains_too():
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(run, None, 1).result()[1]) == 1
    handler = signal.getsignal(signal.SIGINT)
    run(None, 1)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_finished_training_is_not_repeated_and_goes_on_without_its_arguments(tmp_path):
    recipe = functools.partial(train.authors)  # has no name
    model, log = run(tmp_path, 3, lr=np.float64(2e-3), seed=np.int64(3), recipe=recipe)
    again, same = run(tmp_path, 3, lr=2e-3, seed=3, recipe=recipe)
    assert torch.equal(flat(model), flat(again)) and same == log
    again = tiny()
    train.fit(again, FLAT, folder=tmp_path, recipe=recipe, progress=False)  # options not given are as they were
    assert torch.equal(flat(model), flat(again))
    train.fit(again, FLAT, folder=tmp_path, recipe=recipe, progress=False, num_steps=5)
    assert again.about["num_steps"] == 5  # not 3 + 5
    assert len(train.fit(tiny(), FLAT, folder=tmp_path, recipe=recipe, progress=False)) == 5


def quick_start():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sipl_min.train", "conftest"])
    return context


def life(folder):
    torch.set_num_threads(1)
    run(folder, STEPS, **SMALL)


STEPS, KILLS = 30, 6


def test_killed_at_random_moments_it_ends_the_same(tmp_path, counted):
    """kill -9, many times in a row, at any moment, also while a checkpoint is written."""
    context, rng, kills = quick_start(), np.random.default_rng(0), 0
    while kills < KILLS:
        process = context.Process(target=life, args=(tmp_path / "b",))
        process.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "b" / "checkpoint.pt").exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)  # the first life gets far enough to have something to lose
        process.join(rng.uniform(0.05, 0.3))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
    torch.set_num_threads(1)  # as in the lives before
    (tmp_path / "b" / ".123.checkpoint.pt").write_text("half")  # what a life killed while it saved leaves behind
    resumed, again = run(tmp_path / "b", STEPS, **SMALL)
    unbroken, log = run(None, STEPS, **SMALL)
    assert torch.equal(flat(unbroken), flat(resumed)) and again == log
    assert kills >= 3 and {path.name for path in (tmp_path / "b").iterdir()} == {*train.FILES}
    counted("training killed by kill -9, resumed, the same weights in the end", kills)


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, counted):
    resource = pytest.importorskip("resource")
    whole, log = run(tmp_path / "whole", 12, **SMALL)
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    weights = (tmp_path / "whole" / "model.safetensors").stat().st_size
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    rooms = [0, weights // 2, size - 1000]
    for stop, room in enumerate(rooms):
        with pytest.raises(KeyboardInterrupt):  # some steps with room enough
            run(tmp_path / "b", 12, recipe=at(3, press_ctrl_c), **SMALL)
        before = (tmp_path / "b" / "checkpoint.pt").read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # no file may grow larger
            with pytest.raises(InputError, match="cannot write") as e:
                run(tmp_path / "b", 12, recipe="authors", **SMALL)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(e.value) and (tmp_path / "b" / "checkpoint.pt").read_bytes() == before
        assert not [p for p in (tmp_path / "b").iterdir() if p.name.startswith(".")]
    signal.signal(signal.SIGXFSZ, handler)
    resumed, again = run(tmp_path / "b", 12, recipe="authors", **SMALL)
    assert torch.equal(flat(whole), flat(resumed)) and again == log
    counted("disk full while a training saves: what was saved stays, the end is the same", len(rooms))


# ------------------------------------------------------------------------------------------------------ not finite
def test_a_loss_that_is_not_finite_names_the_step_and_a_lower_rate_goes_on(tmp_path, unbroken, capsys):
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 4: lower lr=0.001 .* and call again"):
        run(tmp_path, recipe=at(5, lambda estimate: estimate * torch.nan))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3  # the last good one, untouched
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["checkpoint.pt", "log.csv", "model.safetensors"]
    model, log = run(tmp_path, recipe="authors", lr=1e-4)
    assert "goes on from step 3, with lr=0.0001 (before: 0.001)" in capsys.readouterr().out
    assert len(log) == 8 and log[:4] == unbroken[2][:4] and not torch.equal(flat(model), unbroken[1])


def test_where_the_checkpoint_is_at_that_step_another_folder_is_advised(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at step 3: .*, and begin in another folder"):
        run(tmp_path, recipe=at(4, lambda estimate: estimate * torch.nan))
    assert SIPL.load(tmp_path / "model.safetensors").about["num_steps"] == 3


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path):
    def broken(model, x, y):  # sqrt at 0: the loss is 0, its gradient is not a number
        return train.authors(model, x, y) + (0 * model.encoder.embed.weight.sum()).sqrt()

    model = tiny()
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 0"):
        run(tmp_path, model=model, recipe=broken)
    assert flat(model).isfinite().all() and not (tmp_path / "checkpoint.pt").exists()
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny().modules()}, "plain again"


# ------------------------------------------------------------------------------- parts, averages, several processes
def test_a_checkpoint_that_does_not_fit_leaves_the_model_alone(tmp_path):
    def wrapped(width):
        layers = [nn.Conv2d(a, b, 1) for a, b in ((3, 8), (8, 8), (8, width), (width, 3))]
        return SIPL.wrap(nn.Sequential(*layers), ["0"], ["1"], rand(1, 3, 16, 16))

    run(tmp_path, 2, wrapped(4))
    model = wrapped(6)
    before = flat(model)
    with pytest.raises(InputError, match="checkpoint.pt' is of another model, pass another folder"):
        run(tmp_path, 3, model.eval())
    assert torch.equal(flat(model), before)
    assert not model.training and {type(f.read).__name__ for f in model.fusion} == {"CrossAttention"}, "plain"


def test_processes_work_on_as_many_parts_each(monkeypatch):
    parts, x = [], rand(3, 3, 16, 16)

    def network(a, b):
        parts.append(len(a))
        return (a - b).abs().mean().requires_grad_(), torch.tensor(0.0)

    network.zero_grad = lambda: None
    for rank in (0, 1):
        monkeypatch.setattr(train, "ranks", lambda rank=rank: (rank, 2))
        train.backward(network, x, x, 2)
    assert parts == [2, 1], "they wait for each other after each part"
    with pytest.raises(InputError, match="a batch of 1 gives no image to some of 2 processes"):
        train.backward(network, x[:1], x[:1], 1)


def test_a_batch_in_parts_is_the_same_batch():
    whole, log = run(None, 4, batch_size=5)
    parts, again = run(None, 4, batch_size=5, accumulate=2)  # of 3 and of 2
    assert torch.allclose(flat(whole), flat(parts), atol=2e-5)
    for a, b in zip(log, again):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["psnr"] == pytest.approx(b["psnr"], rel=1e-3)


def test_the_average_of_the_weights_is_what_comes_out(tmp_path):
    seen, expected = [], None

    def watch(model, x, y):
        seen.append(flat(model))
        return train.authors(model, x, y)

    last, _ = run(None, 5, recipe=watch)
    for now in (*seen[1:], flat(last)):  # the weights after each step, averaged by hand
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    validated = []
    options = dict(ema=0.9, validate=lambda m: validated.append(flat(m)) or {}, validate_every=1)
    averaged, _ = run(tmp_path / "a", 5, **options)
    assert torch.allclose(flat(averaged), expected, atol=1e-6) and torch.equal(flat(averaged), validated[-1])
    assert torch.equal(flat(SIPL.load(tmp_path / "a" / "model.safetensors")), flat(averaged))
    with pytest.raises(SystemExit):
        run(tmp_path / "b", 5, ema=0.9, recipe=at(5, SystemExit))
    assert torch.equal(flat(SIPL.load(tmp_path / "b" / "model.safetensors")), validated[2])  # at each checkpoint
    assert torch.equal(flat(run(tmp_path / "b", 5, ema=0.9, recipe="authors")[0]), flat(averaged))


def share(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = tiny(backbone="adair")  # has weights that get no gradient
    _, log = run(f"{folder}/run", 4, model, batch_size=4, accumulate=2, ema=0.5)
    torch.save((flat(model), log), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_and_one_goes_on(tmp_path, capsys):
    lives = [quick_start().Process(target=share, args=(rank, str(tmp_path))) for rank in range(2)]
    for life in lives:
        life.start()
    options = dict(batch_size=4, ema=0.5)
    one, log = run(None, 4, tiny(backbone="adair"), **options)
    for life in lives:
        life.join()
    for rank in range(2):
        theirs, again = torch.load(tmp_path / f"{rank}.pt")
        differ = (flat(one) - theirs).abs() > 1e-4  # where a gradient is nearly zero, AdamW's step follows its rounding
        assert differ.float().mean() < 2e-5 and torch.allclose(flat(one), theirs, atol=1e-3)
        for a, b in zip(log, again, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["gradient"] == pytest.approx(b["gradient"], rel=1e-2)
    assert torch.equal(flat(SIPL.load(tmp_path / "run" / "model.safetensors")), theirs)
    longer, _ = run(tmp_path / "run", 5, tiny(backbone="adair"), accumulate=1, save_every=5, **options)
    told = capsys.readouterr().out
    for change in ("processes=1 (before: 2)", "accumulate=1 (before: 2)", "num_steps=5 (before: 4)", "save_every=5"):
        assert change in told
    assert longer.about["num_steps"] == 5


# ------------------------------------------------------------------------------------------------------------ data
class Noisy(Dataset):
    """Pairs that draw from PyTorch's global generator, as many data sets do."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        y = torch.full((3, 8, 8), i / 5)
        return (y + 0.1 * torch.randn(y.shape)), y


def test_a_data_set_goes_on_at_the_right_batch(tmp_path):
    seen = []

    def watch(model, x, y):
        seen.append(sorted((5 * y[:, 0, 0, 0]).round().int().tolist()))
        return train.authors(model, x, y)

    watch.__name__ = "authors"
    unbroken, _ = run(data=Noisy(), recipe=watch)
    assert len({*map(tuple, seen)}) > 2 and all(not {*a} & {*b} for a, b in zip(seen[::2], seen[1::2]))  # two an epoch
    with pytest.raises(SystemExit):
        run(tmp_path, data=Noisy(), recipe=at(6, SystemExit))
    resumed, _ = run(tmp_path, data=Noisy(), recipe="authors")
    assert torch.equal(flat(unbroken), flat(resumed))
    assert resumed.about["images"] == 5 and "suite" not in resumed.about


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_with_workers_it_trains_as_without():
    from sipl_min.data import Degraded

    for data in (Degraded(FLAT, "cdd11", 16), FLAT):
        alone, workers = (run(None, 4, data=data, num_workers=n)[0] for n in (0, 2))
        assert torch.equal(flat(alone), flat(workers))


def test_any_iterable_of_batches():
    y = torch.rand(6, 3, 16, 16)
    loader = DataLoader(TensorDataset(y, y), batch_size=4)  # the last batch of an epoch is smaller
    assert len(run(data=loader)[1]) == 8
    with pytest.raises(InputError, match="mild: of degradations, which pairs bring along: leave that out"):
        run(data=loader, mild=0.5)
    with pytest.raises(InputError, match="there are no more batches: pass what can be gone through again"):
        run(data=((y, y) for _ in range(3)))
    with pytest.raises(InputError, match=r"clean images must have values in \[0, 1\], not 0.* to 25"):
        run(data=DataLoader(TensorDataset(y, 255 * y), batch_size=4))
    with pytest.raises(InputError, match=r"degraded images must have values around \[0, 1\], not up to 25"):
        run(data=DataLoader(TensorDataset(255 * y, y), batch_size=4))


def test_a_loader_of_a_data_set_that_counts_epochs_has_other_crops_in_each():
    seen = []

    def recipe(model, x, y):
        seen.append(x)
        return model(x)

    loader = DataLoader(Degraded(Images(FLAT), "three_task", 16), batch_size=3)
    run(data=loader, model=tiny(fusion=False), num_steps=2, recipe=recipe)
    assert not torch.equal(*seen)


@pytest.mark.parametrize(
    "item, message",
    [
        (dict(lq=rand(3, 16, 16), gt=rand(3, 16, 16)), "a batch must be two tensors .*, not dict and NoneType"),
        ((rand(16, 16, 3), rand(16, 16, 3)), r"not \(1, 16, 16, 3\) and \(1, 16, 16, 3\)"),
        (
            (rand(3, 16, 16), 1.001 * rand(3, 16, 16).clamp(0.999)),
            r"values in \[0, 1\], not 0.99.* to 1.000.*: scale or clamp",
        ),
        ((rand(3, 16, 16) * torch.nan, rand(3, 16, 16)), "degraded images must have values around .*, not up to nan"),
    ],
)
def test_what_is_no_batch_of_images_is_named(item, message):
    with pytest.raises(InputError, match=message):
        run(data=DataLoader([item]))


def test_data_of_any_float_type_but_not_without_a_length():
    y = rand(4, 3, 16, 16).double()
    assert len(run(data=TensorDataset(y.half(), y), num_steps=2)[1]) == 2
    with pytest.raises(InputError, match="the data set TensorDataset is empty or has no length: pass a DataLoader"):
        run(data=TensorDataset(y[:0], y[:0]))


def test_a_recipe_may_hold_another_loss_and_returns_estimates():
    model, x, y = tiny(fusion=False).train(), rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1)

    def mine(model, x, y):
        e = model(x)
        return [y + (e.mean() - y.mean()).square(), e]

    loss, _ = train.Step(model, mine, autocast=False)(x, y)
    e = model(x)
    assert torch.allclose(loss, ((e.mean() - y.mean()).square() + F.l1_loss(e, y)) / 2)
    for result in ({}, None, [], e.mean(), (e, e.mean()), model.estimates(x)):
        with pytest.raises(InputError, match="a recipe must return an estimate of y, a tensor of its shape, or a list"):
            train.Step(model, lambda *_: result, autocast=False)(x, y)


def test_fine_tuning_is_told(capsys):
    model, _ = run(num_steps=1)
    capsys.readouterr()
    run(num_steps=1, model=model, lr=1e-3, progress=True)
    told = "fine-tuning weights with 1 steps behind them: recipe=authors, lr=0.001, warmup=2, ema=0.99, decibels=0.0"
    assert told in capsys.readouterr().out


def test_pairs_that_a_suite_would_not_use_are_refused():
    images = Images(FLAT)
    images.pairs = {"fog": []}
    with pytest.raises(InputError, match="there are pairs of fog, not in suite 'three_task': pass one that has it"):
        run(data=images)


def test_bad_folders_of_photos_are_named_before_anything_is_written(tmp_path):
    for make, message in (
        (lambda folder: None, "no folder"),
        (lambda folder: folder.mkdir(), "no photos"),
        (lambda folder: (folder / "a.png").write_text("no image", encoding="utf-8"), "a.png"),
    ):
        make(tmp_path / "photos")
        with pytest.raises(InputError, match=message):
            train.fit(tiny(), tmp_path / "photos", folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(suite="fog"), "unknown suite 'fog'"),
        (dict(recipe="authros"), "unknown recipe 'authros': did you mean 'authors'"),
        (dict(recipe="backbone"), "recipe 'backbone' needs a model without Proxy Fusion: fusion=False"),
        (dict(recipe="again"), "recipe 'again' needs a model without Proxy Fusion"),
        (dict(recipe="unroll", model=tiny(fusion=False)), "recipe 'unroll' needs Proxy Fusion: .* or pass 'backbone'"),
        (dict(num_steps=0), "num_steps=0 must be a positive"),
        (dict(learning_rate=1e-3), "unknown option 'learning_rate'"),
        (dict(num_step=5), "unknown option 'num_step': did you mean 'num_steps'"),
        (dict(lr="1e-3"), "lr='1e-3' must be a number"),
        (dict(save_every=0), "save_every=0 must be a positive"),
        (dict(lr=float("nan")), "lr=nan must be a positive"),
        (dict(mild=1.1), "mild=1.1 must be from 0 to 1$"),
        (dict(seed=-1), "seed=-1 must be 0 or more"),
        (dict(num_steps=1e4), "num_steps=10000.0 must be a whole number"),
        (dict(shares=dict(fog=3)), "shares of 'fog': suite 'three_task' has"),
        (dict(shares=dict(SOTS=-1)), "from 0 on, not SOTS=-1$"),
        (dict(shares=dict(SOTS=0.5)), "from 0 on, not SOTS=0.5$"),
        (dict(shares=dict.fromkeys(SHARES["three_task"], 0)), "all columns of suite 'three_task' are 0"),
        (dict(ema=1.0), "ema=1.0 must be from 0 to 1, less than 1"),
        (dict(device="tpu"), "device 'tpu' cannot be used here"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_folder_that_cannot_be_written_is_found_out_at_once(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file", recipe=lambda *_: pytest.fail("training began"))


# ------------------------------------------------------------------------------------------- checkpoints of others
def test_a_checkpoint_of_another_training_is_refused_and_the_advice_works(tmp_path, unbroken):
    shutil.copytree(unbroken[0], tmp_path, dirs_exist_ok=True)
    brighter = [image + 1 for image in FLAT]
    for change, message in (
        (dict(seed=3), r"is of another training \(seed=0, now 3\): repeat its arguments, or pass another folder"),
        (dict(suite="five_task"), r"\(suite='three_task', now 'five_task'\)"),
        (dict(shares=dict(SOTS=3)), r"\(shares={'SOTS': 1}, now {'SOTS': 3}\)"),
        (dict(model=tiny(dictionary_size=(5, 4, 2))), r"\(dictionary_size=\[6, 4, 2\], now \[5, 4, 2\]\)"),
        (dict(data=brighter), r"\(images='\(3, 40, 40\), crc \d+', now '\(3, 40, 40\), crc \d+'\)"),
        (dict(num_steps=7), r"has 8 steps behind it: pass num_steps=8 \(--steps 8\) or more"),
    ):
        with pytest.raises(InputError, match=message) as e:
            run(tmp_path, **change)
        assert len(str(e.value).replace(str(tmp_path), "")) < 200
    assert run(tmp_path)[1] == unbroken[2]
    run(tmp_path / "another", 1, seed=3)


def test_learns_from_parts_of_crops_that_were_damaged_whole(tmp_path, monkeypatch):
    x, y = torch.rand(2, 3, 24, 32), torch.rand(2, 3, 24, 32)
    assert all(torch.equal(a, b) for a, b in zip(train.cut(x, y, 0), (x, y)))
    places = set()
    for _ in range(200):
        a, b = train.cut(x, y, 16)
        assert a.shape == b.shape == (2, 3, 16, 16)
        (place,) = [(i, j) for i in range(9) for j in range(17) if torch.equal(x[..., i : i + 16, j : j + 16], a)]
        assert torch.equal(y[..., place[0] : place[0] + 16, place[1] : place[1] + 16], b)
        places.add(place)
    assert {i for i, _ in places} == {*range(9)} and {j for _, j in places} == {*range(17)}
    with pytest.raises(InputError, match="window=32 is too large for the crops, 24 x 32 pixels"):
        train.cut(x, y, 32)
    with pytest.raises(InputError, match=r"degraded images \(2, 3, 24, 32\) and clean ones \(2, 3, 24, 24\) must"):
        train.cut(x, y[..., :24], 0)
    pairs = TensorDataset(x, y)
    pairs.crop_size = 16  # as `Pairs` have it
    for data in (FLAT, pairs):
        with pytest.raises(InputError, match="window=17 is larger than the crops: pass a larger crop_size than 16"):
            run(tmp_path / "nothing", data=data, window=17)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(SystemExit):
        run(tmp_path, recipe=at(4, SystemExit), window=8)
    with pytest.raises(InputError, match="another training .window=8, now 0"):
        run(tmp_path, recipe="authors", window=0)
    log = run(tmp_path, recipe="authors")[1]  # goes on as it began
    assert log == run(recipe="authors", window=8)[1] != run(recipe="authors")[1]
    for side in (0, 16):  # 16 is the whole crop
        with pytest.raises(InputError, match="recipe 'overview' needs --window, and a larger --crop-size"):
            run(recipe="overview", window=side)
    with pytest.raises(InputError, match="window=24 is too large for the crops, 24 x 32 pixels"):
        train.cut(x, y, 24, overview=True)
    model = run(tmp_path / "o", recipe="overview", window=8)[0]
    assert SIPL.load(tmp_path / "o" / "model.safetensors").about["window"] == model.about["window"] == 8
    assert train.finetune_options(model).items() >= dict(recipe="overview", window=8, crop_size=24).items()
    seen = []  # by a recipe of another kind, and by what validates it
    options = dict(num_steps=1, batch_size=1, crop_size=16, progress=False)
    train.fit(model, FLAT, recipe="privilege", validate=lambda m: seen.append(m.about) or {}, **options)
    assert seen[0]["recipe"] == model.about["recipe"] == "privilege" and "window" not in seen[0] | model.about


def test_a_training_goes_on_with_its_own_shares(tmp_path, monkeypatch):
    logs = []
    for name in ("same code", "newer code"):
        run(tmp_path / name, 2)
        if name == "newer code":
            monkeypatch.setitem(SHARES["three_task"], "SOTS", 1000)
        logs.append(run(tmp_path / name, 6)[1])
    assert logs[0] == logs[1] != run(num_steps=6)[1]
    with pytest.raises(InputError, match="shares: of degradations, which pairs bring along"):
        run(data=TensorDataset(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)), shares=dict(SOTS=2))
    mine = dict(SOTS=np.int64(2))
    assert run(tmp_path / "numpy", 2, shares=mine)[1] == run(num_steps=2, shares=dict(SOTS=2))[1]
    assert type(mine["SOTS"]) is np.int64, "what was passed is as it was"


def test_images_left_out_are_told_and_others_refused(tmp_path, capsys):
    def images(number, clean=FLAT):
        found = Images(clean)
        name = found.names
        found.names = lambda: [*name(), *([f"SOTS: {number} pairs, crc {number}"] if number else [])]
        return found

    run(tmp_path, 1, data=images(9))
    run(tmp_path, 1, data=images(7))
    assert "2 images or pairs left out" in capsys.readouterr().out
    run(tmp_path, 1, data=images(7, FLAT[1:]))
    assert "1 images or pairs left out" in capsys.readouterr().out
    for number in (8, 0):  # none: that column would be made of clean images, in silence
        with pytest.raises(InputError, match="is of another training .images"):
            run(tmp_path, 1, data=images(number, FLAT[1:]))


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_damaged_checkpoint_gets_one_sentence_and_runs_no_code(tmp_path, monkeypatch, counted):
    monkeypatch.chdir(tmp_path)
    model, _ = run("run", 1)
    path = Path("run/checkpoint.pt")
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    torch.save(Evil(), "evil.pt")
    cases = [Path("evil.pt").read_bytes(), pickle.dumps(Evil()), b"", b"cos\nsystem\n(S'false'\ntR."]
    cases += [content[:n] for n in (1, 100, len(content) - 1, *rng.integers(0, len(content), 12))]
    for bit in rng.integers(0, 8 * len(content), 20):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        cases.append(bytes(flipped))
    for case in cases:
        path.write_bytes(case)
        try:
            again, _ = run("run", 1)  # finished: it only loads
        except InputError as e:
            assert "delete it and log.csv, or pass another folder" in str(e) and "\n" not in str(e)
            assert path.read_bytes() == case
            refused += 1
        else:  # a bit that means nothing
            assert torch.equal(flat(model), flat(again))
    assert refused > 0.8 * len(cases) and not Path("evil").exists()
    path.unlink()
    with pytest.raises(InputError, match="log.csv' is of a training whose checkpoint.pt is gone: move it, or pass"):
        run("run", 1)
    Path("run/log.csv").unlink()  # as advised
    assert torch.equal(flat(run("run", 1)[0]), flat(model))
    counted("faults in training checkpoints: refused, or the right weights", len(cases))


def as_version_0_1(folder):
    """Write the checkpoint in `folder` anew as version 0.1 had it."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    names = dict(suite="setting", num_steps="steps", batch_size="count", crop_size="size", lr="peak")
    names |= dict(weight_decay="decay", grad_clip="clip")
    known = {*names, "settings", "recipe", "images", "processes", "warmup", "seed", "accumulate", "ema"}
    run = {names.get(name, name): value for name, value in state["run"].items() if name in known}
    run["settings"]["aligned"] = True
    moments = dict(zip(state["model"], state["optimizer"]["state"].values(), strict=True))

    def old(name, t):
        return t[None] if name.endswith("maps") else t

    aligned = {f"aligned.{i}.weight": torch.rand(16 << i, 16 << i, 1, 1) for i in range(3)}
    steps = dict(step=torch.tensor(5.0))
    moments = {n: {kind: old(n, t) for kind, t in moment.items()} for n, moment in moments.items()}
    first = {n: steps | dict(exp_avg=t, exp_avg_sq=t) for n, t in aligned.items()}
    model = aligned | {n: old(n, t) for n, t in state["model"].items()}  # its parameters came first
    average = {n: old(n, t) for n, t in state["average"].items()} | {f"module.{n}": t for n, t in aligned.items()}
    group = state["optimizer"]["param_groups"][0] | dict(params=[*range(len(model))])
    optimizer = dict(state={i: (first | moments)[n] for i, n in enumerate(model)}, param_groups=[group])
    state = dict(run=run, step=state["step"], model=model, optimizer=optimizer, average=average)
    torch.save(state, folder / "checkpoint.pt")


def test_a_checkpoint_of_version_0_1_goes_on_bit_for_bit(tmp_path):
    unbroken, log = run(ema=0.9)
    with pytest.raises(SystemExit):
        run(tmp_path, ema=0.9, recipe=at(7, SystemExit))
    as_version_0_1(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.warns(UserWarning, match="aligned"), pytest.raises(InputError, match=r"\(dim=8, now 4\): repeat"):
        run(tmp_path, ema=0.9, recipe="authors", model=tiny(dim=4))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    with pytest.warns(UserWarning, match="aligned"):
        resumed, again = run(tmp_path, ema=0.9, recipe="authors")
    assert torch.equal(flat(unbroken), flat(resumed)) and again == log
    run(tmp_path, ema=0.9)  # it is as one of today now


# ----------------------------------------------------------------------------------------------------- fine-tuning
def test_trained_weights_keep_their_recipe_and_suite_and_are_treated_gently(tmp_path):
    first, _ = run(tmp_path / "a", 4, tiny(identity_start=True), recipe="unroll", command="train a")
    assert train.finetune_options(tiny()) == {}
    loaded = SIPL.load(tmp_path / "a" / "model.safetensors")
    assert loaded.about == dict(recipe="unroll", suite="three_task", num_steps=4, images=3, command="train a")
    train.fit(loaded, FLAT, folder=tmp_path / "b", num_steps=3, batch_size=1, progress=False)
    did = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["run"]
    assert did["recipe"] == "unroll" and did["suite"] == "three_task" and did["lr"] <= 2e-4 and did["ema"] > 0.9
    assert loaded.about["num_steps"] == 7
    loaded.about["steps"] = 0  # chosen for the recipe
    for recipe, about in (("unroll", 0), ("authors", None)):
        train.fit(loaded, FLAT, recipe=recipe, num_steps=1, batch_size=1, progress=False)
        assert loaded.about["recipe"] == recipe and loaded.about.get("steps") == about
    backbone, _ = run(None, 1, tiny(fusion=False))
    assert train.finetune_options(backbone)["recipe"] == "backbone"
    assert train.finetune_options(tiny(), start="published weights")["lr"] <= 2e-4
    nano = SIPL.from_pretrained("nano")  # a recipe of one's own may hold a loss, which PSNR would be added to
    run(num_steps=1, model=nano, decibels=0.0)
    assert "decibels" not in nano.about, "what was trained with is not told any more"
    nano = SIPL.from_pretrained("nano")
    assert train.finetune_options(nano)["decibels"] > 0 and "decibels" not in train.finetune_options(nano, recipe=flat)


def test_torchrun_is_joined_and_left(monkeypatch):
    with train.processes("cpu") as (device, first):
        assert (device, first, train.ranks()) == ("cpu", True, (0, 1))
    place = dict(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with train.processes("cpu") as (device, first):
        assert (device, first) == ("cpu", True) and torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
