"""What only a GPU can tell. `pytest -m cuda` runs these alone; without CUDA they are skipped."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, rand, tiny

from sipl_min import SIPL, fast
from sipl_min.fast import accelerate
from sipl_min.train import RECIPES, fit

there = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
pytestmark = [pytest.mark.cuda, there]
BACKBONES = ["promptir", "restormer", "adair", "nafnet"]


@pytest.fixture(autouse=True)
def exact():
    """float32 as float32: TF32 would hide a difference."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def relative(a, b):
    return float((a.float().cpu() - b.float().cpu()).abs().max() / b.float().abs().max().cpu())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("feedback", ["privilege", "chain"])
def test_cuda_equals_cpu(backbone, feedback):
    model, x = tiny(backbone=backbone), rand(2, 3, 72, 104)
    expected = model.refine(x, 2, feedback)
    assert relative(model.cuda().refine(x.cuda(), 2, feedback), expected) < 1e-4


@pytest.mark.parametrize("tile", [2**13, 2**18, 2**26])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_plain_equals_fast(backbone, tile, monkeypatch):
    monkeypatch.setitem(fast.TILE, "cuda", tile)
    plain = tiny(backbone=backbone).cuda()
    x = rand(2, 3, 136, 200).cuda()
    assert relative(accelerate(copy.deepcopy(plain)).refine(x, 2), plain.refine(x, 2)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_stays_finite(backbone, dtype):
    x = rand(1, 3, 1024, 1024).cuda()
    for model in (tiny(backbone=backbone).cuda().to(dtype), accelerate(tiny(backbone=backbone).cuda().to(dtype))):
        assert model.refine(x.to(dtype)).isfinite().all()


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler's advice to let go of precision
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch 2.11 warns of itself
def test_compile_of_forward_refinement_and_a_training_step():
    model, x, y = tiny().cuda(), rand(2, 3, 64, 96).cuda(), rand(2, 3, 64, 96, seed=1).cuda()
    expected = model.refine(x)
    assert relative(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-3
    assert relative(torch.compile(model.refine, fullgraph=True)(x), expected) < 1e-3
    gradients = []
    for step in (RECIPES["authors"], torch.compile(RECIPES["authors"])):
        model.zero_grad()
        F.l1_loss(step(model, x, y), y).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(gradients[1], gradients[0]) < 1e-2


def test_training_resumes(tmp_path):
    """Stopped after two of four steps, and not stopped: the same weights, to what CUDA's sums allow."""
    options = dict(batch_size=2, crop_size=32, save_every=2, device="cuda", progress=False)
    weights = []
    for stops in ([4], [2, 4]):
        for num_steps in stops:
            torch.manual_seed(0)
            model = SIPL("nano")
            fit(model, folder=tmp_path / str(len(stops)), num_steps=num_steps, **options)
        weights.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    assert weights[0].isfinite().all()
    assert (weights[0] - weights[1]).abs().max() < 0.1  # the schedules differ, as their lengths do


WORKER = """
import json, sys, torch
from sipl_min import SIPL
from sipl_min.train import fit, processes
torch.manual_seed(0)
model = SIPL("nano")
with processes("cuda:0") as (device, first):
    fit(model, num_steps=2, batch_size=4, crop_size=32, device="cuda:0", autocast=False, progress=False)
if first:
    json.dump([float(p.double().sum()) for p in model.parameters()], open(sys.argv[1], "w"))
"""


def test_two_processes_on_one_gpu_equal_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    sums = []
    for count in (1, 2):
        target = tmp_path / f"{count}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        env = os.environ | dict(PYTHONPATH=str(ROOT))
        subprocess.run([*command, tmp_path / "worker.py", target], check=True, capture_output=True, env=env)
        sums.append(torch.tensor(json.loads(target.read_text())))
    assert torch.allclose(sums[0], sums[1], rtol=1e-3, atol=1e-3)
