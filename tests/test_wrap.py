"""SIPL around a network of somebody else: the same mathematics, the network untouched, clear words where it fails."""

import copy
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import TINY, rand, tiny

from sipl_min import SIPL, InputError
from sipl_min.evaluate import measure
from sipl_min.fast import accelerate

NAMES = dict(encoder=["enc2", "enc3"], decoder=["dec2", "enc3"])


class UNet(nn.Module):
    """What a stranger may write: batch norm, in-place activations, a module used four times."""

    def __init__(self, width=8):
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.enc3 = nn.Sequential(nn.Conv2d(2 * width, 3 * width, 3, 2, 1), nn.BatchNorm2d(3 * width))
        self.dec2 = nn.Conv2d(3 * width, 2 * width, 3, padding=1)
        self.dec1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.end, self.relu = nn.Conv2d(width, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.unused, self.flat = nn.Conv2d(3, 3, 1), nn.Flatten()

    def forward(self, x):
        a = self.relu(self.enc1(x))
        b = self.relu(self.enc2(a))
        c = self.relu(self.enc3(b))
        self.flat(c)
        b = self.relu(self.dec2(F.interpolate(c, scale_factor=2.0))) + b
        return self.end(self.dec1(F.interpolate(b, scale_factor=2.0)) + a) + x


def wrapped(net=None, **settings):
    torch.manual_seed(0)
    return SIPL.wrap(net or UNet(), **{"example": rand(1, 3, 16, 24), **NAMES, **settings}).eval()


@pytest.mark.parametrize("backbone", ["promptir", "nafnet", "adair"])
@torch.no_grad()
def test_wrapping_our_own_backbone_gives_our_own_model(backbone):
    """The hooks and the built-in decoder are two ways to the same numbers."""
    model = tiny(backbone=backbone)
    net = SIPL("nano", **TINY, backbone=backbone, fusion=False).eval()
    net.encoder, net.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    levels = [f"encoder.levels.{i}" for i in (1, 2, 3)]
    fused = ["decoder.levels.1.0", "decoder.levels.2.0", "encoder.levels.3"]
    if backbone == "nafnet":
        fused = [f"decoder.levels.{i}" for i in (0, 1, 2)]  # named in the order in which they run
    heads = dict(read_heads=(1, 2, 1), write_heads=(1, 2, 4))
    other = SIPL.wrap(net, levels, fused, rand(1, 3, 16, 16), dictionary_size=(6, 4, 2), multiple=16, **heads).eval()
    other.fusion.load_state_dict(model.fusion.state_dict())
    x = rand(2, 3, 16, 32)
    for feedback, fast in (("privilege", False), ("privilege", True), ("chain", False)):
        for a, b in zip(*(m.refine(x, 2, feedback, return_all=True) for m in (model, accelerate(other, fast)))):
            assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(a.abs().max())), feedback


@torch.no_grad()
def test_the_network_stays_as_it_was():
    net, x = UNet(), rand(2, 3, 16, 24)
    before = copy.deepcopy(net.state_dict())
    model = SIPL.wrap(net, example=x, **NAMES)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "no running statistic has moved"
    assert net.training and net.enc3.training
    expected = net.eval()(x)
    model.eval().refine(x, 2)
    with pytest.raises(RuntimeError):  # a pass that fails inside the network takes its hooks away too
        model(rand(1, 4, 16, 24))
    assert torch.equal(net(x), expected) and not torch.allclose(model(x), expected)
    assert not any(m._forward_hooks for m in net.modules())
    same = SIPL.wrap(net, example=x, identity_start=True, **NAMES).eval()
    assert torch.allclose(same(x), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_features_pairs_and_sizes():
    model, x = wrapped(), rand(1, 3, 16, 24)
    first, second = model.privileged(x)
    assert torch.equal(first, model.net.enc2(F.relu(model.net.enc1(x)))), "before the in-place activation behind it"
    assert second.shape == (1, 24, 4, 6) and model.fusion[1].dictionary.shape == (1, 24, 8, 8)
    assert wrapped(encoder=["enc3", "enc2"]).settings.decoder == ("enc3", "dec2"), "paired by resolution"
    other = wrapped(encoder=["enc3"], decoder=["dec1"])  # of other resolution and width
    assert other.settings.encoder_channels == (24,) and other.refine(x, 1).shape == x.shape
    model = wrapped(multiple=12)
    for x in (rand(2, 3, 1, 1), rand(2, 3, 19, 30)):
        assert model(x).shape == model.refine(x, 1, "chain").shape == x.shape
    assert model.pad(x).shape[-1] % 12 == model.pad(x, 16).shape[-1] % 48 == 0


def test_measuring_and_restoring_leave_running_statistics_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
    model = wrapped(net, encoder=["0"], decoder=["1"]).train()
    net[2].eval()  # say, it is frozen
    before = net[1].running_mean.clone()
    restored = model.restore(rand(3, 16, 16))
    measure(model, [(rand(1, 3, 16, 16), rand(1, 3, 16, 16))], 1, progress=False)
    assert torch.equal(net[1].running_mean, before) and net[1].training and not net[2].training
    assert torch.equal(model.eval().restore(rand(3, 16, 16)), restored)


def test_gradients_reach_everything_that_runs():
    model, x, y = wrapped().train(), rand(2, 3, 16, 24), rand(2, 3, 16, 24, seed=1)
    privileged = [p.detach() for p in model.privileged(y)]
    F.l1_loss(model(x, privileged), y).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == ["net.unused.weight", "net.unused.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_save_and_load_around_a_net(dtype, tmp_path):
    path, net, x = tmp_path / "m.safetensors", UNet().to(dtype), rand(1, 3, 16, 24).to(dtype)
    model = wrapped(UNet().to(dtype), example=x)
    model.about = {"recipe": "authors"}
    model.save(path)
    loaded = SIPL.load(path, net=net)
    assert torch.equal(loaded.refine(x, 1), model.refine(x, 1)) and loaded.net is net and loaded.about == model.about
    other = UNet(width=4).to(dtype)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError, match="size mismatch .* pass the network that it was saved around"):
        SIPL.load(path, net=other)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items()), "refused before it was touched"
    with pytest.raises(InputError, match="holds a network wrapped by SIPL.wrap: pass the network"):
        SIPL.load(path)
    with pytest.raises(InputError, match="wrapped around a network already"):
        SIPL.from_backbone(model)


@torch.no_grad()
def test_checkpoints_and_state_dicts_of_a_wrapped_network(tmp_path):
    model, x = wrapped(), rand(1, 3, 16, 24)
    average = torch.optim.swa_utils.AveragedModel(model)
    run = dict(settings={n: list(v) if isinstance(v, tuple) else v for n, v in vars(model.settings).items()})
    torch.save(dict(run=run, model=UNet().state_dict(), average=average.state_dict()), tmp_path / "checkpoint.pt")
    assert torch.equal(SIPL.load(tmp_path / "checkpoint.pt", net=UNet()).refine(x), model.refine(x))
    state = {f"net.{n}": t for n, t in tiny(fusion=False).state_dict().items()} | {"fusion.0.dictionary": torch.ones(1)}
    with pytest.raises(InputError, match="wrapped by SIPL.wrap without its settings"):
        SIPL.load(state)  # else the backbone alone would come back


class Moody(UNet):
    """Skips a level while training, halves large images, and runs its deepest level again in backward, if asked."""

    again = False

    def forward(self, x):
        x = F.avg_pool2d(x, 2) if x.shape[-1] > 32 else x
        if self.again:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)
        return self.end(self.enc1(x)) if self.training else super().forward(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_network_that_changes_its_ways_after_the_dry_run_is_caught():
    model, x = wrapped(Moody()), rand(1, 3, 16, 24)
    with pytest.raises(InputError, match="'dec2' ran 0 times in one pass"):
        model.train()(x)
    with pytest.raises(InputError, match=r"maps \(1, 3, 40, 40\) to \(1, 3, 20, 20\): does it need another multiple="):
        model.eval()(rand(1, 3, 40, 40))
    model.net.again = True  # gradients would be those of a pass without Proxy Fusion
    with pytest.raises(InputError, match="'enc3' runs under activation checkpointing"):
        model(x)


def test_our_own_blocks_inside_a_network_stay_its_own():
    model = SIPL.wrap(tiny(fusion=False), ["encoder.levels.1"], ["decoder.levels.1.0.attention"], rand(1, 3, 16, 16))
    assert model.restore(rand(3, 16, 16), 1).shape == (3, 16, 16)


def test_threads_do_not_disturb_each_other():
    model, x, failed = wrapped(), rand(1, 3, 16, 24), []

    def work(function, right):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(function(x), right):
                    failed.append(function)

    jobs = [(f, f(x).detach()) for f in (model.refine, model.refine, model.net)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed


class Pair(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1))

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(encoder=["enc2", "enk3"]), ValueError, "unknown module .enk3.: did you mean .enc3."),
        (dict(encoder=["flat", "enc2"]), InputError, r"'flat' puts out \(1, 576\) .* no feature \(B, C, h, w\) of it"),
        (dict(encoder=["relu", "enc2"]), InputError, "module 'relu' ran 4 times in one pass"),
        (dict(encoder=["dec1", "dec2"], decoder=["enc1", "enc2"]), InputError, "'enc1' runs before .* 'dec1'"),
        (dict(encoder=["enc1"]), InputError, "must be lists of as many names"),
        (dict(encoder="enc1", decoder="dec1"), InputError, "must be lists of as many names"),
        (dict(encoder=["enc2", "enc2"]), InputError, "must name each module once"),
        (dict(encoder=[], decoder=[]), InputError, "must be lists of as many names, one or more"),
        (dict(read_heads=(3, 3)), InputError, "16 channels need heads that divide them"),
        (dict(dictonary_size=(3, 3)), ValueError, "unknown option 'dictonary_size': did you mean 'dictionary_size'"),
        (dict(fusion=False), InputError, r"train it by recipe=lambda model, x, y: model.net\(x\)"),
        (dict(example=(1, 3, 32, 32)), InputError, r"example must be .* a tensor \(B, 3, H, W\)"),
        (dict(example=rand(1, 4, 16, 16)), InputError, r"fails on the example, \(1, 4, 16, 16\): .*channels"),
        (dict(net=Pair(), encoder=["0"], decoder=["1"]), InputError, "the network returns a tuple"),
        (dict(net=nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), encoder=["0"], decoder=["1"]), InputError, "maps"),
    ],
)
def test_what_cannot_work_is_named(change, error, message):
    with pytest.raises(error, match=message):
        wrapped(**change)
