"""The layout is part of the contract: packages at the top, a test for every module."""

import importlib.metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("recsys", "training", "serving_export")
SAYS_NOTHING = {"utils", "common", "helpers", "misc", "core", "base", "manager", "handler"}


def modules():
    found = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    assert len(found) > 30
    return found


def test_every_module_has_a_test_of_its_own():
    missing = []
    for module in modules():
        path = module.relative_to(ROOT)
        test = ROOT / "tests" / path.parent / f"test_{path.stem}.py"
        folder_test = list((ROOT / "tests" / path.parent).glob("test_*.py"))
        if path.stem == "__init__":
            continue
        if not test.is_file() and not (path.parts[1] == "tfrecord" and folder_test):
            missing.append(str(path))
    assert not missing


def test_no_name_says_nothing_and_no_module_is_too_long():
    for module in modules():
        assert module.stem not in SAYS_NOTHING, module
        assert len(module.read_text(encoding="utf-8").splitlines()) <= 400, module


def test_the_top_level_is_fixed():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    built = {"build", "dist", "runs", "clickstream_recommender.egg-info"}
    built |= {"spark-warehouse", "mlruns"}
    assert folders - built == {*PACKAGES, "notebooks", "tests", "benchmarks"}


def test_generic_names_belong_to_this_distribution_alone():
    owners = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(owners[package]) == {"clickstream-recommender"}
