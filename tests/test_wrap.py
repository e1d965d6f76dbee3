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
from sipl_min.fast import accelerate

NAMES = dict(encoder=["enc2", "enc3"], decoder=["dec2", "enc3"])


class UNet(nn.Module):
    """What a stranger may write: batch norm, in-place activations, a module used twice, one that returns a pair."""

    def __init__(self, width=8):
        super().__init__()
        self.enc1, self.enc2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.enc3 = nn.Sequential(nn.Conv2d(2 * width, 3 * width, 3, 2, 1), nn.BatchNorm2d(3 * width))
        self.dec2 = nn.Conv2d(3 * width, 2 * width, 3, padding=1)
        self.dec1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.end, self.relu = nn.Conv2d(width, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.pair, self.unused, self.flat, self.last = Pair(), nn.Conv2d(3, 3, 1), nn.Flatten(), ChannelsLast()

    def forward(self, x):
        a = self.relu(self.enc1(x))
        b = self.relu(self.enc2(a))
        c = self.relu(self.enc3(b))
        self.last(self.flat(self.pair(c)[0]).view(c.shape))
        b = self.relu(self.dec2(F.interpolate(c, scale_factor=2.0))) + b
        return self.end(self.dec1(F.interpolate(b, scale_factor=2.0)) + a) + x


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def wrapped(**settings):
    torch.manual_seed(0)
    net = UNet()
    model = SIPL.wrap(net, example=rand(1, 3, 16, 24), **{**NAMES, **settings})
    return net, model.eval()


def guided(model, x, y):
    """The authors' guided pass: no gradient through the privileged branch."""
    with torch.no_grad():
        privileged = model.privileged(model(y))
    return model(x, privileged)


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
    for fast in (False, True):
        for feedback in ("privilege", "chain"):
            for a, b in zip(*(m.refine(x, 2, feedback, return_all=True) for m in (model, accelerate(other, fast)))):
                assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(a.abs().max())), feedback


@torch.no_grad()
def test_the_network_stays_as_it_was():
    torch.manual_seed(0)
    net = UNet()
    net.enc2.eval()
    x = rand(2, 3, 16, 24)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    model = SIPL.wrap(net, example=x, **NAMES)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()), "no running statistic has moved"
    assert modes == [m.training for m in net.modules()]
    expected = net.eval()(x)
    model.eval().refine(x, 2)
    with pytest.raises(RuntimeError):  # a pass that fails inside the network takes its hooks away too
        model(rand(1, 4, 16, 24))
    assert torch.equal(net(x), expected)
    assert not any(m._forward_hooks for m in net.modules())
    assert not torch.allclose(model(x), expected)
    same = SIPL.wrap(net, example=x, identity_start=True, **NAMES).eval()
    assert torch.allclose(same(x), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_features_are_what_the_module_put_out():
    net, model = wrapped()
    x = rand(1, 3, 16, 24)
    first, second = model.privileged(x)
    assert torch.equal(first, net.enc2(F.relu(net.enc1(x)))), "before the in-place activation behind it"
    assert second.shape == (1, 24, 4, 6) and model.fusion[1].dictionary.shape == (1, 24, 8, 8)
    assert model.fusion[0].dictionary.shape == (1, 16, 16, 16)


@pytest.mark.parametrize("h, w", [(1, 1), (7, 5), (16, 24), (19, 30)])
def test_any_size_comes_back(h, w):
    _, model = wrapped(multiple=4)
    x = rand(2, 3, h, w)
    assert model(x).shape == model.refine(x, 1, "chain").shape == x.shape
    _, model = wrapped(multiple=12)
    assert model.pad(x).shape[-1] % 12 == model.pad(x, 16).shape[-1] % 48 == 0


def test_names_may_come_in_any_order_and_widths_may_differ():
    """enc3 has 24 channels, dec1 8 at another resolution: pairs stay as given; dec2 and enc2 find each other."""
    x = rand(1, 3, 16, 24)
    model = SIPL.wrap(UNet(), ["enc3", "enc2"], ["dec2", "enc3"], x)
    assert model.settings.decoder == ("enc3", "dec2")
    model = SIPL.wrap(UNet(), ["enc3"], ["dec1"], x)
    assert model.settings.encoder_channels == (24,) and model.settings.decoder_channels == (8,)
    assert model.refine(x, 1).shape == x.shape


def test_gradients_reach_everything_and_spare_the_privilege():
    _, model = wrapped()
    x, y = rand(2, 3, 16, 24), rand(2, 3, 16, 24, seed=1)
    F.l1_loss(guided(model.train(), x, y), y).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == ["net.unused.weight", "net.unused.bias"]


@torch.no_grad()
def test_save_and_load_around_a_net(tmp_path):
    _, model = wrapped()
    model.about = {"recipe": "authors"}
    model.save(tmp_path / "m.safetensors")
    net, x = UNet(), rand(1, 3, 16, 24)
    loaded = SIPL.load(tmp_path / "m.safetensors", net=net)
    assert torch.equal(loaded.refine(x, 1), model.refine(x, 1)) and loaded.net is net and loaded.about == model.about
    with pytest.raises(InputError, match="holds a network wrapped by SIPL.wrap: pass it"):
        SIPL.load(tmp_path / "m.safetensors")
    strangers = {n: t.clone() for n, t in UNet(width=4).state_dict().items()}
    other = UNet(width=4)
    other.load_state_dict(strangers)
    with pytest.raises(
        InputError, match="'net=' must be the network that it was saved around: of its tensors .* shape"
    ):
        SIPL.load(tmp_path / "m.safetensors", net=other)
    assert all(torch.equal(t, strangers[n]) for n, t in other.state_dict().items()), "refused before it was touched"
    with pytest.raises(InputError, match="wrapped around a network already"):
        SIPL.from_backbone(model)


@torch.no_grad()
def test_checkpoints_and_state_dicts_of_a_wrapped_network(tmp_path):
    _, model = wrapped()
    average = torch.optim.swa_utils.AveragedModel(model)
    run = dict(settings={n: list(v) if isinstance(v, tuple) else v for n, v in vars(model.settings).items()})
    state = dict(run=run, model=UNet().state_dict(), average=average.state_dict())
    torch.save(state, tmp_path / "checkpoint.pt")
    x = rand(1, 3, 16, 24)
    assert torch.equal(SIPL.load(tmp_path / "checkpoint.pt", net=UNet()).refine(x), model.refine(x))
    state = {f"net.{n}": t for n, t in tiny(fusion=False).state_dict().items()} | {"fusion.0.dictionary": torch.ones(1)}
    with pytest.raises(InputError, match="wrapped by SIPL.wrap without its settings: write it with model.save"):
        SIPL.load(state)  # else the backbone alone would come back


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_network_of_another_dtype_comes_back_from_its_file(dtype, tmp_path):
    x = rand(1, 3, 16, 24).to(dtype)
    model = SIPL.wrap(UNet().to(dtype), example=x, **NAMES).eval()
    model.save(tmp_path / "m.safetensors")
    again = SIPL.load(tmp_path / "m.safetensors", net=UNet().to(dtype))
    assert torch.equal(again.refine(x), model.refine(x)) and model.refine(x).dtype == dtype


class Checkpointed(UNet):
    """Its deepest level runs again in backward instead of being kept."""

    def __init__(self):
        super().__init__()
        self.deep, self.enc3 = self.enc3, Again(self.enc3)


class Again(nn.Module):
    reentrant = True

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing_over_a_fused_module_is_refused_and_beside_it_works(monkeypatch):
    x = rand(1, 3, 16, 24)
    model = SIPL.wrap(Checkpointed(), ["enc2", "deep"], ["dec2", "deep"], x)
    with pytest.raises(InputError, match="'deep' runs under activation checkpointing"):
        model.train()(x)
    (SIPL.wrap(Checkpointed(), example=x, **NAMES).train()(x)).sum().backward()
    monkeypatch.setattr(Again, "reentrant", False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):  # PyTorch's own sentence
        model(x).sum().backward()


def test_threads_do_not_disturb_each_other():
    net, model = wrapped()
    x, failed = rand(1, 3, 16, 24), []
    expected, plain = model.refine(x, 1), net(x).detach()

    def work(function, right):
        for _ in range(20):
            try:
                with torch.no_grad():
                    assert torch.equal(function(x), right)
            except BaseException as e:
                failed.append(e)

    jobs = [(model.refine, expected), (model.refine, expected), (net, plain)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed, failed[0]


class Moody(UNet):
    """Skips a level while training, and halves its image where that is large."""

    def forward(self, x):
        x = F.avg_pool2d(x, 2) if x.shape[-1] > 32 else x
        return self.end(self.enc1(x)) if self.training else super().forward(x)


def test_a_network_that_changes_its_ways_after_the_dry_run_is_caught():
    x = rand(1, 3, 16, 24)
    model = SIPL.wrap(Moody(), example=x, **NAMES)
    with pytest.raises(InputError, match="'dec2' ran 0 times in one pass"):
        model.train()(x)
    with pytest.raises(InputError, match=r"maps \(1, 3, 40, 40\) to \(1, 3, 20, 20\): does it need another multiple="):
        model.eval()(rand(1, 3, 40, 40))


def parallel(rank, folder, expected):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    _, model = wrapped()
    x, y = rand(2, 3, 16, 24, seed=1).chunk(2)
    privileged = model.privileged(y)  # the images of the two processes differ, their gradients are averaged
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    sign = 1.0 if rank == 0 else 2.0
    (ddp(x, [p.detach() for p in privileged]) * sign).mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.allclose(g, expected[n], atol=1e-6) for n, g in grads.items()) and len(grads) > 40
    torch.distributed.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path):
    total = {}
    for sign in (1.0, 2.0):
        _, model = wrapped()
        x, y = rand(2, 3, 16, 24, seed=1).chunk(2)
        (model(x, [p.detach() for p in model.privileged(y)]) * sign).mean().backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] = total.get(n, 0) + p.grad / 2
    torch.multiprocessing.spawn(parallel, (str(tmp_path), total), nprocs=2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(encoder=["enc2", "enk3"]), AttributeError, "enk3"),
        (dict(encoder=["pair", "enc2"]), InputError, "module 'pair' puts out tuple for an image of 16 x 24"),
        (dict(encoder=["flat", "enc2"]), InputError, r"module 'flat' puts out \(1, 576\) for an image"),
        (dict(encoder=["last", "enc2"]), InputError, r"'last' puts out .* which is no feature \(B, C, h, w\) of it"),
        (dict(encoder=["relu", "enc2"]), InputError, "module 'relu' ran 4 times in one pass"),
        (dict(encoder=["unused", "enc2"]), InputError, "module 'unused' ran 0 times"),
        (dict(encoder=["dec1", "dec2"], decoder=["enc1", "enc2"]), InputError, "'enc1' runs before .* 'dec1'"),
        (dict(encoder=["enc1"]), ValueError, "zip"),
        (dict(dictionary_size=(3,)), ValueError, "zip"),
        (dict(read_heads=(3, 3)), InputError, "16 channels need heads that divide them"),
        (dict(dictonary_size=(3, 3)), TypeError, "dictonary_size"),
    ],
)
def test_what_cannot_work_is_named(change, error, message):
    with pytest.raises(error, match=message):
        SIPL.wrap(UNet(), **{**NAMES, "example": rand(1, 3, 16, 24), **change})


def test_a_network_that_changes_the_size_is_refused():
    with pytest.raises(InputError, match=r"the network maps \(1, 3, 8, 8\) to \(1, 8, 8, 8\)"):
        SIPL.wrap(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), ["0"], ["1"], rand(1, 3, 8, 8))
