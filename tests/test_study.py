"""The study: what stands in for the privileged image, equal compute, seeds that resume."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import rand

from sipl_min import SIPL, InputError, study
from sipl_min.degrade import COLUMNS, generator
from sipl_min.speed import as_released


@torch.no_grad()
def test_proxies_are_made_of_what_their_names_say(model):
    x, y, other = rand(1, 3, 32, 32), rand(1, 3, 32, 32, seed=1), rand(1, 3, 32, 32, seed=2)
    constant = study.constant_proxies(model, [x, other])
    found = study.proxies_from(model, x, y, other, constant, generator(9))
    results = study.restore_with(model, x, found)
    assert torch.equal(results["D"], model(x))
    assert torch.allclose(results["estimate"], model.refine(x, 1), atol=1e-6)
    assert torch.allclose(results["clean"], model(x, model.privileged(y)), atol=1e-6)
    means = [p.mean((-2, -1)) for p in found["D - mean"]]
    assert max(float(m.abs().max()) for m in means) < 1e-6 and all(p.abs().sum() == 0 for p in found["zero"])
    mean = [(a + b) / 2 for a, b in zip(*(model.proxies(model.privileged(model(i))) for i in (x, other)))]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(constant, mean))
    results = [*results.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_the_share_between_images_is_zero_for_a_constant_and_larger_for_more(model, monkeypatch):
    same, other = rand(1, 3, 32, 32), rand(1, 3, 32, 32, seed=1)
    assert max(study.share_between_images(model, [same, same])) < 1e-6
    between = study.share_between_images(model, [same, other])
    assert len(between) == 3 and min(between) > 1e-6 and max(between) <= 1
    monkeypatch.setattr(model, "privileged", lambda image: image)
    monkeypatch.setattr(model, "forward", lambda x: x)
    monkeypatch.setattr(model, "proxies", lambda P: [torch.full((1, 4, 3, 3), float(P.sum()))])
    assert study.share_between_images(model, [same, other]) == pytest.approx([1.0]), "nothing varies but the image"


def test_equal_compute_is_equal():
    first, target, more = study.operations(SIPL("nano", dim=8), 2)
    wide = SIPL("nano", dim=study.wider(8), fusion=False)
    assert study.operations(wide)[0] / target == pytest.approx(1, abs=0.06)
    narrow, twice = (study.build(f"singles: {arm}", 8)[0] for arm in ("again", "equal compute"))
    assert study.operations(twice)[0] / study.operations(narrow, 1, "again")[1] == pytest.approx(1, abs=0.06)
    assert more > target > first > study.operations(SIPL("nano", dim=8, fusion=False))[0]
    assert study.operations(SIPL("nano", dim=8), 1) == [first, target], "each counts from the start"
    assert study.operations(as_released(SIPL("nano", dim=8)))[0] == first, "fused attention counts as if written out"


def test_an_arm_names_its_suite_and_recipe():
    assert [study.build(arm, 8)[1:] for arm in ("singles: again", "doubles: backbone", "authors")] == [
        ("again", "singles"),
        ("backbone", "doubles"),
        ("authors", "cdd11"),
    ]
    assert {name for name in COLUMNS["cdd11"] if name not in COLUMNS["doubles"]} == {"low_haze_rain", "low_haze_snow"}
    assert [*COLUMNS["singles"]] == ["low", "rain", "snow", "haze"]


@pytest.mark.parametrize(
    "question, arm",
    [("who", "unroll"), ("capacity", "unroll"), ("combinations", "singles: again"), ("windows", "overview")],
)
def test_a_study_runs_resumes_and_reports(question, arm, tmp_path, monkeypatch):
    monkeypatch.setitem(study.QUESTIONS, question, (study.QUESTIONS[question][0], [arm]))
    monkeypatch.setattr(study, "COLUMNS", {"cdd11": {"haze": ["haze"], "low_rain": ["low", "rain"]}})
    photo = {"one": np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)}
    monkeypatch.setattr(study, "held_out", lambda: photo | {"beyond photos=1": photo["one"]})
    arguments = dict(folder=tmp_path, seeds=2, num_steps=1, size=48, photos=1)
    rows = study.run(question, **arguments)
    before = (tmp_path / f"{question}.csv").read_bytes()
    assert study.run(question, **arguments) == rows and (tmp_path / f"{question}.csv").read_bytes() == before
    assert {row["seed"] for row in rows} == {0, 1} and all(np.isfinite(row["psnr"]) for row in rows)
    text = study.report(rows, question == "combinations")
    assert ("| 2 at once |" in text) == (question == "combinations")
    assert f"| {arm} |" in text and " ± " in text and ("unlike training" in text) == (question == "who")
    for nothing in (dict(seeds=0), dict(photos=-1)):
        with pytest.raises(InputError, match="must be 1 or more"):
            study.run("who", tmp_path / "nothing", **nothing)
    with pytest.raises(InputError, match="num_steps=1"):
        study.run(question, **arguments | dict(num_steps=2))
    monkeypatch.setattr(study, "held_out", lambda: {"one": 255 - photo["one"]})
    with pytest.raises(InputError, match="test="):  # another photo of this name
        study.run(question, **arguments)


def test_photos_of_one_stem_are_two(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "COLUMNS", {"cdd11": {"haze": ["haze"]}})
    for name, value in (("a.png", 60), ("a.jpg", 90), ("b/a.png", 120)):
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(tmp_path / "test" / name, np.full((32, 32, 3), value, np.uint8))
    rows = study.run("capacity", tmp_path, test=tmp_path / "test", weights=["nano-backbone"], size=32)
    assert {row["photo"] for row in rows} == {"a.jpg", "a.png", "b/a.png"}
    for name in ("nano-backbone", "nano-authors"):  # another network in the same folder
        SIPL.load(name).save(tmp_path / "weights")
        if name == "nano-backbone":
            study.run("capacity", tmp_path / "other", test=tmp_path / "test", weights=[tmp_path / "weights"], size=32)
    with pytest.raises(InputError, match="was begun with"):
        study.run("capacity", tmp_path / "other", test=tmp_path / "test", weights=[tmp_path / "weights"], size=32)


def test_weights_can_be_measured_and_costs_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "COLUMNS", {"cdd11": {"haze": ["haze"]}})
    monkeypatch.setattr(study, "held_out", lambda: {"one": np.full((48, 48, 3), 99, np.uint8)})
    assert study.main(["capacity", str(tmp_path), "--weights", "nano", "nano-backbone"]) == 0
    text = capsys.readouterr().out
    assert "| nano | " in text and "| nano-backbone | " in text and not any(p.is_dir() for p in tmp_path.iterdir())
    monkeypatch.setattr(study.cost, "__defaults__", (("nano",), 64, 32))
    assert study.main(["cost", str(tmp_path)]) == 0
    counted, timed = (tmp_path / "cost.md").read_text(encoding="utf-8").split("\n\n")
    for table in (counted, timed):
        ends = {line.split(" | ")[1]: line.split()[-3] for line in table.splitlines() if line.startswith("| nano ")}
        assert float(ends["chain"]) > float(ends["nothing reused"]) > 4
    assert "operations" in counted and "seconds (32 × 32 pixels, threads: " in timed
    assert study.main(["cost", str(tmp_path), "--weights", "nano"]) == 2 and "leave out" in capsys.readouterr().err
