import os
import subprocess
import sys
from pathlib import Path

import yaml
from typer.testing import CliRunner

import recsys
from recsys.cli import app, main
from recsys.config import load_config
from recsys.run_folder import RunFolder

RECSYS = Path(sys.executable).with_name("recsys")


def command(*arguments, **environment):
    return subprocess.run(
        [RECSYS, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def refused(*arguments, **environment):
    answer = command(*arguments, **environment)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    return answer.stderr


def test_help_lists_the_steps_and_loads_nothing_heavy():
    code = "import sys; import recsys.cli; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"tensorflow", "pyspark", "mlflow", "pandas", "numpy"}
    text = CliRunner().invoke(app, ["--help"]).stdout
    for step in (
        "run",
        "prepare",
        "fit",
        "evaluate",
        "export",
        "register",
        "promote",
        "score",
        "monitor",
        "tune",
        "publish",
        "withdraw",
        "availability",
        "champion",
        "lineage",
        "rollback",
    ):
        assert step in text


def test_main_returns_on_success(monkeypatch, capsys):
    """A wheel task of a scheduled job takes SystemExit for a failure."""
    monkeypatch.setattr(sys, "argv", ["recsys", "version"])
    main()
    assert recsys.__version__ in capsys.readouterr().out


def test_the_template_is_a_config_of_its_own(tmp_path):
    text = command("configs", "template").stdout
    assert yaml.safe_load(text)["name"] == "my_shop"
    listed = command("configs").stdout
    assert "eshop_clothing" in listed


def test_unknown_key(clicks_config, tmp_path):
    told = refused(
        "run", "--config", clicks_config, "--run-dir", tmp_path / "r", "--set", "seeed=1"
    )
    assert "seeed: unknown key; did you mean 'seed'?" in told
    assert not (tmp_path / "r").exists()


def test_missing_column(clicks_config, tmp_path):
    change = "data.events.columns.item=itme"
    told = refused("run", "--config", clicks_config, "--run-dir", tmp_path / "r", "--set", change)
    assert "data.events.columns.item" in told
    assert "did you mean 'item'?" in told
    assert not (tmp_path / "r").exists()


def test_nothing_to_begin_with(clicks_config, tmp_path):
    arguments = ["run", "--config", clicks_config, "--run-dir", tmp_path / "r"]
    told = refused(*arguments, "--warm-start", tmp_path / "gone")
    assert f"train.warm_start={tmp_path / 'gone'} holds no model: expected champion, or" in told
    assert not (tmp_path / "r").exists()


def test_unknown_config_and_unknown_command():
    assert "give a YAML file, or one of eshop_clothing, template" in refused("run", "--config", "x")
    assert "No such command 'trian'" in refused("trian")


def test_no_java(clicks_config, tmp_path):
    arguments = ["run", "--config", clicks_config, "--run-dir", tmp_path / "r"]
    told = refused(*arguments, JAVA_HOME=str(tmp_path))
    assert "Spark 4 needs Java 17 or 21, found none" in told
    assert "apt-get install openjdk-17-jre-headless" in told


def test_mlflow_unreachable(clicks_config, tmp_path):
    change = "cluster.tracking_uri=http://127.0.0.1:9"
    told = refused("run", "--config", clicks_config, "--run-dir", tmp_path / "r", "--set", change)
    assert "cluster.tracking_uri=http://127.0.0.1:9: no MLflow server answers" in told
    assert not (tmp_path / "r").exists()


def test_a_space_that_cannot_be_tuned(clicks_config, tmp_path):
    arguments = ["tune", "--config", clicks_config, "--run-dir", tmp_path / "r", "--set"]
    told = refused(*arguments, "tune.space={model.embeding_dim: {low: 8, high: 64}}")
    assert "tune.space.model.embeding_dim" in told
    assert "did you mean 'embedding_dim'?" in told
    told = refused(*arguments, "tune.space={model.dropout: {lo: 0.1, high: 0.5}}")
    assert "tune.space.model.dropout.lo: unknown key; did you mean 'low'?" in told
    assert not (tmp_path / "r").exists()


def test_tune_needs_a_run_a_space_and_optuna(clicks_config, tmp_path):
    assert "give the --run-dir of a started run, or a --config" in refused("tune")
    folder = RunFolder(tmp_path / "r")
    folder.freeze(load_config(clicks_config))
    assert "tune.space is empty" in refused("tune", "--run-dir", folder.path)
    missing = "raise ModuleNotFoundError(name='optuna')"
    (tmp_path / "optuna.py").write_text(missing)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    told = refused("tune", "--run-dir", folder.path, PYTHONPATH=os.pathsep.join(paths))
    assert "pip install 'clickstream-recommender[tuning]'" in told


def test_a_job_may_rank_whatever_its_config(clicks_config, command, tmp_path):
    RunFolder(tmp_path / "r").freeze(load_config(clicks_config))
    done = command("rank", "--run-dir", tmp_path / "r")
    assert done.returncode == 0
    assert "no `ranking` section" in done.stdout
    assert not (tmp_path / "r" / "ranking").exists()


def test_a_step_without_its_predecessor(finished_run, tmp_path):
    (tmp_path / "config.json").write_text((finished_run / "config.json").read_text())
    told = refused("evaluate", "--run-dir", tmp_path)
    assert "run `recsys prepare` first" in told
