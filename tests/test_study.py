"""The study: arms of equal cost, paired rows, a table whose numbers are those of the rows, and resuming."""

import numpy as np
import pytest
import torch

from sipl_min import SIPL, benchmark, study, train, tried
from sipl_min.__main__ import main
from sipl_min.files import InputError


def test_widened_backbones_cost_what_ours_costs():
    ours = study.cost(study.build("unroll"))
    assert abs(study.cost(study.build("same parameters"))["parameters"] / ours["parameters"] - 1) < 0.1
    assert abs(study.cost(study.build("same compute"))["operations"] / ours["operations"] - 1) < 0.15


def test_unrolled_recipe_is_the_test_time_loop_with_gradients():
    torch.manual_seed(0)
    model = SIPL("nano", **train.DESIGN["unroll"])
    for c in model.aligned:
        torch.nn.init.normal_(c.weight, std=0.1)  # at zero, y1 would hardly depend on y0
    x = torch.rand(2, 3, 16, 16)
    found = train.unroll(model, x, x)
    for a, b in zip(found, model.refine(x, 1, return_all=True), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(model(x, model.privileged(found[0])), found[1], atol=1e-6)
    found[-1].square().mean().backward()
    assert model.encoder.embed.weight.grad.abs().max() > 0
    first = torch.autograd.grad(train.unroll(model, x, x)[-1].sum(), model.aligned[0].weight)[0]
    assert first.abs().max() > 0


def test_arms_that_were_tried_do_what_they_are_called():
    torch.manual_seed(0)
    x, y = torch.rand(2, 2, 3, 16, 16)
    found = {arm: study.build(arm).eval() for arm in study.ARMS}
    for model in found.values():
        for name, p in model.named_parameters():
            if name.startswith(("aligned", "embed")):
                torch.nn.init.normal_(p, std=0.1)  # at zero, y1 would hardly depend on y0
    correcting, recurrent, ours = (found[arm] for arm in ("correcting, loss late", "recurrent, loss late", "unroll"))
    with torch.no_grad():
        a, b, c = correcting.refine(x, 2, return_all=True)
        assert torch.allclose(c, correcting(x, correcting.privileged(b)) - x + b, atol=1e-5)
        a, b, c = recurrent.refine(x, 2, return_all=True)
        assert (b - a).abs().max() > 1e-3 and (c - b).abs().max() > 1e-5
        recurrent.embed.weight.zero_()  # blind to its estimate, it can only repeat itself
        assert torch.equal(recurrent.refine(x, 2), recurrent.refine(x, 0))
        first, second = tried.half(ours, x, y)
        assert torch.allclose(second[0], ours(x, ours.privileged(y))[0], atol=1e-5)  # the clean image
        assert torch.allclose(second[1], ours(x, ours.privileged(first))[1], atol=1e-5)  # the estimate
        batch = torch.rand(2, 3, 3, 16, 16)
        first, second = tried.thirds(ours, *batch)
        for i, source in enumerate((first, batch[1], ours(batch[1]))):
            assert torch.allclose(second[i], ours(batch[0], ours.privileged(source))[i], atol=1e-5)
        sharp, positioned = found["unroll, sharp"], found["unroll, sharp and placed"]
        effective = []  # the number of entries that a pixel reads, of 64
        for model in (ours, sharp):
            write, h = model.fusion[1].write, model.tap(x)[1]
            w = (write.queries(write.norm_query(h)) @ write.keys(model.fusion[1].dictionary)[0].mT).softmax(-1)
            effective.append(float((-(w * w.log()).sum(-1)).exp().mean()))
        assert effective[0] > 60 and effective[1] < 40, effective
        where = tried.placed(torch.zeros(1, 32, 6, 7))[0].flatten(1).T  # no two pixels alike, however near
        assert (torch.cdist(where, where) + torch.eye(42)).min() > 0.5
        untouched = positioned.decoder(x, positioned.encode(x), lambda i, h: h)  # so is a write that starts as identity
        assert torch.allclose(positioned(x), untouched, atol=1e-4)
    first, second = tried.late(ours, x, y)
    first.sum().backward()
    gradient = ours.decoder.output.weight.grad.clone()
    ours.zero_grad()
    ours(x).sum().backward()
    assert torch.allclose(gradient, 0.1 * ours.decoder.output.weight.grad, rtol=1e-4, atol=1e-4)


def test_study_writes_a_table_that_is_its_rows_and_keeps_what_is_done(tmp_path, capsys):
    command = ["study", str(tmp_path), "--settings", "five_task", "--arms", "backbone", "unroll", "--seeds", "2",
               "--steps", "2", "--T", "2", "--size", "32"]  # fmt: skip
    assert main(command) == 0
    rows = benchmark.read_csv(tmp_path / "study.csv")
    assert len(rows) == 2 * 3 * 5 * (2 + 5)  # seeds, photos, columns; input and y0; input, y0, y1, y2 and oracle
    mean = {s: np.mean([r["psnr"] for r in rows if (r["arm"], r["estimate"], r["seed"]) == ("unroll", "y1", s)])
            for s in (0, 1)}  # fmt: skip
    shown = f"{np.mean(list(mean.values())):.2f} ± {np.std(list(mean.values()), ddof=1):.2f}"
    table = (tmp_path / "study.md").read_text()
    assert shown in next(line for line in table.splitlines() if line.startswith("| unroll"))
    assert (tmp_path / "study.png").stat().st_size > 10_000
    before = (tmp_path / "five_task-unroll-1.csv").stat().st_mtime_ns
    assert main(command) == 0  # nothing is trained again
    assert (tmp_path / "five_task-unroll-1.csv").stat().st_mtime_ns == before
    assert main([*command[:-6], "--steps", "3", "--T", "2", "--size", "32"]) == 2
    assert "2 steps of nano" in capsys.readouterr().err
    for other in (["--T", "3"], ["--size", "48"]):  # rows that do not belong into one table
        assert main([*command, *other]) == 2
        assert "is of another study" in capsys.readouterr().err


def test_study_names_what_it_does_not_know(tmp_path):
    with pytest.raises(InputError, match="unknown arm 'ours'"):
        study.run(tmp_path, arms=["ours"])
    with pytest.raises(InputError, match="unknown setting 'rain'"):
        study.run(tmp_path, settings=["rain"])
    with pytest.raises(InputError, match="seeds=0"):
        study.run(tmp_path, seeds=0)
    with pytest.raises(InputError, match="16 pixels or more"):  # before anything is trained
        study.run(tmp_path, size=8)
    assert not list(tmp_path.iterdir())
