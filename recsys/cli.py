"""The `recsys` command: each step on its own, or all of them as one run.

Heavy packages are imported inside the commands, so that `recsys --help` and a misspelt key answer
at once. This is the only module that sees both `training` and `serving_export`.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import recsys
from recsys.artifacts import Scoring
from recsys.config import ConfigError
from recsys.monitored import monitored
from recsys.opened import config_file, continue_run, ready_configs, start_run
from recsys.pipeline import Run
from recsys.run_folder import RunFolder
from recsys.steps import STEPS
from recsys.summary import drift_table, policy_table
from recsys.warm_start import SCRATCH

#: Exit code of `monitor` where a limit is exceeded; errors have 1.
ALARM = 3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Recommenders from a click table: prepare, fit, evaluate, export, register, promote.",
)

ConfigOption = Annotated[
    str, typer.Option("--config", help="YAML file, or the name of a ready config")
]
SetOption = Annotated[
    list[str], typer.Option("--set", help="override a key: --set train.epochs=3 (repeatable)")
]
LaterSetOption = Annotated[
    list[str],
    typer.Option("--set", help="override a key that this step reads first (repeatable)"),
]
RunDirOption = Annotated[Path, typer.Option("--run-dir", help="folder of a started run")]
NewRunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="folder of the run; runs/<name> when not given")
]
WarmStartOption = Annotated[
    str | None,
    typer.Option(
        "--warm-start",
        help="begin with the weights of the `champion`, or of the model in this folder of a run; "
        "`none` trains from scratch",
    ),
]
NO_OVERRIDES: list[str] = []


@app.command()
def run(
    config: ConfigOption,
    overrides: SetOption = NO_OVERRIDES,
    run_dir: NewRunDirOption = None,
    warm_start: WarmStartOption = None,
) -> None:
    """Do all steps, skip those that are finished, and show what came out."""
    named = "null" if warm_start == SCRATCH else warm_start
    begun_with = [] if warm_start is None else [f"train.warm_start={named}"]
    started = start_run(config, [*overrides, *begun_with], run_dir)
    for step in started.steps:
        started.do(step)
    started.finish()
    typer.echo(started.summary())


@app.command()
def prepare(
    config: ConfigOption,
    overrides: SetOption = NO_OVERRIDES,
    run_dir: NewRunDirOption = None,
) -> None:
    """Turn the click table into examples, corpus and vocabularies."""
    _finish_step(start_run(config, overrides, run_dir), "prepare")


@app.command()
def fit(run_dir: RunDirOption, warm_start: WarmStartOption = None) -> None:
    """Train the towers; a training that was killed goes on where it stopped."""
    started = continue_run(run_dir)
    if warm_start is not None:
        started.start_with(warm_start)
    _finish_step(started, "fit")


@app.command()
def rank(run_dir: RunDirOption) -> None:
    """Train the second stage on what the towers retrieve, if the config has `ranking`."""
    started = continue_run(run_dir)
    if "rank" in started.steps:
        _finish_step(started, "rank")
    else:
        typer.echo("rank: the config has no `ranking` section, so retrieval alone recommends")


@app.command()
def evaluate(run_dir: RunDirOption) -> None:
    """Measure the model on the test window beside the baselines."""
    _finish_step(continue_run(run_dir), "evaluate")


@app.command()
def export(
    run_dir: RunDirOption,
    overrides: LaterSetOption = NO_OVERRIDES,
    corpus_of: Annotated[
        Path | None,
        typer.Option(help="folder of a run that was prepared later: index its items instead"),
    ] = None,
) -> None:
    """Write the SavedModels with their index, and compare them in a fresh process."""
    started = continue_run(run_dir, overrides, "export")
    if corpus_of is None:
        _finish_step(started, "export")
    else:
        started.reindex(corpus_of)
        started.finish()


@app.command()
def register(run_dir: RunDirOption, overrides: LaterSetOption = NO_OVERRIDES) -> None:
    """Make the exported model a version in the MLflow registry."""
    _finish_step(continue_run(run_dir, overrides, "register"), "register")


@app.command()
def promote(run_dir: RunDirOption, overrides: LaterSetOption = NO_OVERRIDES) -> None:
    """Make the version the champion, if it beats the baselines and the present champion."""
    _finish_step(continue_run(run_dir, overrides, "promote"), "promote")


@app.command()
def champion(run_dir: RunDirOption) -> None:
    """Show the champion of this run's model, and the evidence it was promoted by."""
    typer.echo(continue_run(run_dir).registered.champion())


@app.command()
def lineage(
    run_dir: RunDirOption,
    version: Annotated[
        str | None, typer.Option(help="version of the model; the champion when not given")
    ] = None,
) -> None:
    """Show the run, the code, the tables and their time range that a version was made from."""
    typer.echo(continue_run(run_dir).registered.lineage(version))


@app.command()
def rollback(
    run_dir: RunDirOption,
    to: Annotated[
        str | None, typer.Option(help="version; the one before the champion when not given")
    ] = None,
) -> None:
    """Make an earlier version the champion again."""
    typer.echo(continue_run(run_dir).registered.rollback(to))


@app.command()
def score(
    run_dir: RunDirOption,
    overrides: LaterSetOption = NO_OVERRIDES,
    last: Annotated[
        Path | None,
        typer.Option(
            help="folder of the run that scored last: who has not changed keeps its answer"
        ),
    ] = None,
) -> None:
    """Recommend to all users with the champion, in Spark."""
    started = continue_run(run_dir, overrides, "score")
    # Read now: it may be the scoring of this run, which is about to be made anew.
    before = None if last is None else Scoring.load(RunFolder(last).step(STEPS["score"][0]))
    started.do("score", again=True, last=before)
    started.finish()


@app.command()
def monitor(
    run_dir: RunDirOption,
    reference: Annotated[
        Path | None,
        typer.Option(help="run folder to compare with; the one of the model that scored by itself"),
    ] = None,
) -> None:
    """Compare the scoring with the data of its model; exit code 3 if a limit is exceeded."""
    started = continue_run(run_dir)
    report = monitored(started, reference)
    started.finish()
    if report is None:
        return
    typer.echo(drift_table(report))
    if report.alarms:
        typer.echo(f"recsys: drift exceeds {len(report.alarms)} limits of `monitoring`", err=True)
        raise typer.Exit(ALARM)


@app.command()
def tune(
    config: Annotated[
        str | None, typer.Option("--config", help="as for `run`; not needed for a started run")
    ] = None,
    overrides: SetOption = NO_OVERRIDES,
    run_dir: NewRunDirOption = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="trials in all; tune.trials when not given")
    ] = None,
) -> None:
    """Search for better settings on the validation split; a killed search goes on."""
    if config is not None:
        started = start_run(config, overrides, run_dir)
    elif run_dir is not None and not overrides:
        started = continue_run(run_dir)
    else:
        raise ConfigError("tune: give the --run-dir of a started run, or a --config (with --set)")
    told = started.tune(trials)
    started.finish()
    typer.echo(told)


@app.command()
def summary(run_dir: RunDirOption) -> None:
    """Show what a run has brought so far."""
    typer.echo(continue_run(run_dir).summary())


@app.command()
def recommend(
    run_dir: RunDirOption,
    user: Annotated[str, typer.Option(help="user id, as in the click table")],
    k: Annotated[int, typer.Option(help="number of items")] = 10,
    alias: Annotated[str, typer.Option(help="registered alias to ask")] = "champion",
) -> None:
    """Ask a registered model what it recommends to one user."""
    typer.echo(continue_run(run_dir).registered.recommend(user, k, alias))


@app.command()
def publish(
    run_dir: RunDirOption,
    to: Annotated[Path, typer.Option(help="folder that servers poll; one for each model")],
    alias: Annotated[str, typer.Option(help="registered alias to publish")] = "champion",
    keep: Annotated[int, typer.Option(min=1, help="versions that stay in the folder")] = 3,
) -> None:
    """Hand the champion to servers: the next version of both variants, warm-up and examples."""
    typer.echo(continue_run(run_dir).registered.publish(to, alias, keep))


@app.command()
def withdraw(
    published: Annotated[Path, typer.Option("--from", help="folder that servers poll")],
) -> None:
    """Take the newest published version back: servers return to the one before."""
    from serving_export.handoff import withdraw as take_back

    taken, left = take_back(published)
    typer.echo(f"withdrew version {taken} from {published}; servers return to version {left}")


@app.command()
def availability(
    to: Annotated[Path, typer.Option(help="folder that servers poll, which `publish` has filled")],
    unavailable: Annotated[
        Path | None, typer.Option(help="CSV file of all items that are not available now")
    ] = None,
    column: Annotated[str, typer.Option(help="column of the file that holds the ids")] = "item",
    clear: Annotated[bool, typer.Option("--clear", help="all items are available again")] = False,
    keep: Annotated[int, typer.Option(min=1, help="versions that stay in the folder")] = 3,
) -> None:
    """Tell servers which items are not available, without training or indexing anew."""
    if (unavailable is None) != clear:
        raise ConfigError("availability: give a file by --unavailable, or --clear")
    from serving_export.availability import publish_availability
    from serving_export.unavailable import read_items

    items = [] if unavailable is None else read_items(unavailable, column)
    done = publish_availability(to, items, keep)
    typer.echo(
        f"version {done.version} of {to}: {done.num_unavailable} of {done.num_items} items are not "
        f"available; {len(done.unknown)} ids are of no item of the model"
        + (f", such as {done.unknown[0]!r}" if done.unknown else "")
    )


@app.command("off-policy")
def off_policy(
    log: Annotated[Path, typer.Option(help="CSV or Parquet: context, item, propensity, reward")],
    target: Annotated[Path, typer.Option(help="context, item, probability; or a scoring's result")],
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="of the intervals")] = 0.95,
) -> None:
    """Estimate what a new policy would have earned, from a log with propensities."""
    from recsys.off_policy import policy_value
    from training.policy_log import read_choices

    choices = read_choices(log, target)
    value = policy_value(choices, confidence=confidence)
    typer.echo(policy_table(value))
    weight = value.mean_weight
    typer.echo(
        f"{len(choices)} choices tell as much as {value.effective_size:.0f} alike; mean weight "
        f"{weight.value:.3f} ({weight.low:.3f} to {weight.high:.3f}), 1 where the log may show all "
        "that the new policy does"
    )


@app.command()
def configs(
    name: Annotated[str | None, typer.Argument(help="print this one")] = None,
) -> None:
    """List the ready configs, or print one: `recsys configs template > mine.yaml`."""
    if name is None:
        for file in ready_configs():
            first_line = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            typer.echo(f"{file.stem:20} {first_line}\n{'':20} {file}")
        return
    typer.echo(config_file(name).read_text(encoding="utf-8"), nl=False)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"clickstream-recommender {recsys.__version__}")


def main() -> None:
    """Run the command; a known error is one clear message and exit code 1, anything else a trace.

    Returns instead of exiting on success: a scheduled wheel task takes SystemExit for a failure.
    """
    _quiet_logging()
    try:
        # What a command returns is None; an exit code is what it gave to `typer.Exit`.
        code = app(standalone_mode=False)
    except Exception as error:
        if not _is_expected(error):
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        typer.echo(f"recsys: {message}", err=True)
        sys.exit(1)
    if code:
        sys.exit(code)


def _is_expected(error: Exception) -> bool:
    """Whether the message alone tells a user what to do: our errors and wrong usage."""
    modules = ("recsys.", "training.", "serving_export.", "typer.", "click.")
    return f"{type(error).__module__}.".startswith(modules)


def _finish_step(started: Run, step: str) -> None:
    started.do(step, again=True)
    started.finish()


def _quiet_logging() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    for package in ("recsys", "training", "serving_export"):
        logging.getLogger(package).setLevel(logging.INFO)
    for noisy in ("absl", "tensorflow", "alembic", "py4j"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # MLflow sets its own level and draws its own bars when it is imported.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", str(sys.stderr.isatty()))
