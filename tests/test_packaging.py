"""The files around the code: pins agree, the package names its license, nothing in it depends on a place."""

import re
import tomllib
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
