"""The scheduled job against the code: every command, option and dependency exists."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import yaml

from recsys.cli import app
from recsys.config import load_config
from recsys.opened import config_file
from recsys.steps import STEPS

ROOT = Path(__file__).parents[1]


def jobs():
    bundle = yaml.safe_load((ROOT / "databricks.yml").read_text())
    files = [file for pattern in bundle["include"] for file in ROOT.glob(pattern)]
    assert files
    return bundle, [yaml.safe_load(file.read_text())["resources"]["jobs"] for file in files]


def steps():
    """Those of any config, `rank` among them, and the watch over what they made."""
    return [*STEPS, "monitor"]


def test_each_task_calls_a_step_that_exists_with_options_it_has():
    commands = typer.main.get_command(app).commands
    _, found = jobs()
    tasks = [task for job in found for entry in job.values() for task in entry["tasks"]]
    assert len(tasks) == len(steps())
    for task in tasks:
        wheel = task["python_wheel_task"]
        assert wheel["package_name"] == "clickstream_recommender"
        assert wheel["entry_point"] == "recsys"
        step, *arguments = wheel["parameters"]
        assert step == task["task_key"]
        options = {option for p in commands[step].params for option in p.opts}
        given = [argument for argument in arguments if argument.startswith("--")]
        assert given
        assert set(given) <= options


def test_tasks_run_in_the_order_of_the_steps():
    _, found = jobs()
    for job in found:
        for entry in job.values():
            names = [task["task_key"] for task in entry["tasks"]]
            assert names == steps()
            for before, task in zip(names, entry["tasks"][1:], strict=False):
                assert task["depends_on"] == [{"task_key": before}]
                assert task["job_cluster_key"] in {
                    cluster["job_cluster_key"] for cluster in entry["job_clusters"]
                }


def test_every_variable_is_declared():
    bundle, _ = jobs()
    text = "".join(file.read_text() for file in ROOT.glob("training/jobs/*.job.yml"))
    used = set(re.findall(r"\$\{var\.(\w+)\}", text))
    assert used
    assert used <= set(bundle["variables"])


def test_the_wheel_is_the_one_that_the_bundle_builds():
    for file in ROOT.glob("training/jobs/*.job.yml"):
        job = yaml.safe_load(file.read_text())["resources"]["jobs"]
        libraries = [
            lib for entry in job.values() for t in entry["tasks"] for lib in t["libraries"]
        ]
        wheels = {(file.parent / lib["whl"]).resolve().parent for lib in libraries if "whl" in lib}
        assert wheels == {ROOT / "dist"}


@pytest.mark.parametrize("warm_start", [None, "champion"])
def test_the_overrides_of_the_job_fit_the_config(warm_start):
    bundle, found = jobs()
    for job in found:
        for entry in job.values():
            named = {p["name"]: p["default"] for p in entry["parameters"]}
            given = bundle["variables"] | {"warm_start": {"default": warm_start or "null"}}
            arguments = entry["tasks"][0]["python_wheel_task"]["parameters"]
            changes = [b for a, b in pairwise(arguments) if a == "--set"]
            for pattern, known in (
                (r"\{\{job\.parameters\.(\w+)\}\}", named),
                (r"\$\{var\.(\w+)\}", {name: v["default"] for name, v in given.items()}),
            ):
                changes = [re.sub(pattern, lambda m, k=known: k[m[1]], c) for c in changes]
            config = load_config(config_file("eshop_clothing"), changes)
            assert config.cluster.master is None
            assert config.cluster.experiment.startswith("/")
            assert config.train.warm_start == warm_start
