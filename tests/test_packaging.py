"""The files around the code: pins agree, the package names its license, nothing in it depends on a place."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


def pins():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_environment_pins_what_requirements_pin_and_a_python_that_works():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "- -r requirements.txt" in text
    assert re.findall(r"==", text) == [], "one place holds the pins"
    assert re.search(r"python=(3\.\d+)$", text, re.M)[1] in ("3.11", "3.12")


def test_requirements_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = project["dependencies"] + project["optional-dependencies"]["test"]
    names = {re.match(r"[\w-]+", line)[0] for line in named}
    assert {*pins()} == names
    for line in named:
        least = re.search(r">=([\d.]+)", line)
        if least:
            pinned = [int(n) for n in pins()[re.match(r"[\w-]+", line)[0]].split(".")]
            assert pinned >= [int(n) for n in least[1].split(".")], line


def test_version_license_and_citation_agree():
    import sipl_min

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert project["version"] == sipl_min.__version__ and f"version: {sipl_min.__version__}" in citation
    assert "MIT" in (ROOT / "LICENSE").read_text(encoding="utf-8") and "sipl_min contributors" in citation
    assert sipl_min.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_circle_and_one_direction_of_imports():
    """At the top of files, imports lead one way, and sipl.py imports none of ours."""
    arrows = {}
    for path in (ROOT / "sipl_min").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"^from \.(\w+) import", text, re.M)
        for names in re.findall(r"^from \. import (.+)", text, re.M):
            found += [name.split(" as ")[0].strip() for name in names.split(",")]
        arrows[path.stem] = {name for name in found if (ROOT / "sipl_min" / f"{name}.py").exists()}
    assert arrows["sipl"] == set()
    left = dict(arrows)
    while left:
        free = [name for name, needs in left.items() if not needs & {*left}]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_the_package_is_small():
    lines = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "sipl_min").glob("*.py")}
    assert lines["sipl.py"] <= 360 and len(lines) <= 17, lines
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def build(kind, source, target):
    """Build a wheel or an sdist with the backend itself, which fetches nothing."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_what_is_installed_is_what_git_tracks_and_runs_elsewhere(tmp_path):
    """Wheel and sdist of a clone with stray files in it; the wheel's demo, and tests from the sdist."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout with its history")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    for stray in ("data/mine.safetensors", "data/results/mine.md", "sipl_min/mine.txt"):
        (clone / stray).write_text("stray", encoding="utf-8")
    tracked = subprocess.run(["git", "ls-files"], cwd=clone, check=True, capture_output=True, text=True).stdout.split()
    expected = {p for p in tracked if p.startswith("sipl_min/")}
    expected |= {p.replace("data/", "sipl_min/assets/") for p in tracked if p.startswith("data/")}

    wheel = build("wheel", clone, tmp_path)
    assert wheel.stat().st_size <= 10e6
    with zipfile.ZipFile(wheel) as z:
        assert {name for name in z.namelist() if ".dist-info/" not in name} == expected
        metadata = z.read(next(name for name in z.namelist() if name.endswith("METADATA"))).decode()
        z.extractall(tmp_path / "site")
    for field in ("License-Expression: MIT", "Author: sipl_min contributors", "Classifier: ", "Project-URL: Paper, "):
        assert field in metadata, field

    def run(*command, cwd, path):
        env = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")} | dict(PYTHONPATH=str(path))
        done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    (elsewhere := tmp_path / "elsewhere").mkdir()
    run("sipl_min", "demo", cwd=elsewhere, path=tmp_path / "site")
    assert (elsewhere / "demo.png").is_file()

    with tarfile.open(build("sdist", clone, tmp_path)) as t:
        t.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("sipl_min-*/")
    assert not [p for p in source.rglob("*mine*")]
    run("pytest", "-q", "tests/test_sipl.py", "tests/test_packaging.py", cwd=source, path=source)
