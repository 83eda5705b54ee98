"""The wheel as users get it: in an environment of its own, away from the checkout, in parts."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A venv that holds the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for package in ("recsys", "training", "serving_export"):
        shutil.copytree(ROOT / package, source / package)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    site = next((venv / "lib").glob("python*/site-packages"))
    # A path that a .pth file adds is not searched for further .pth files: the editable install of
    # the checkout stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wheel = next(folder.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    return python


def answer(python, code, cwd):
    return subprocess.run(
        [python, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_command_works_from_another_folder(environment, tmp_path):
    recsys = environment.with_name("recsys")
    listed = subprocess.run(
        [recsys, "configs"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(environment.parents[1]) in listed.stdout
    change = ["--set", "data.events.columns.item=modle"]
    command = [recsys, "run", "--config", "eshop_clothing", *change]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    # The sample was found and its header read: only the column is wrong.
    assert "expected a column 'modle'" in told.stderr
    assert str(environment.parents[1]) in told.stderr


def test_all_three_packages_come_from_the_wheel(environment, tmp_path):
    code = "import recsys, training, serving_export as s; print(*(m.__file__ for m in (recsys, training, s)))"
    files = answer(environment, code, tmp_path).stdout.split()
    assert len(files) == 3
    assert all(file.startswith(str(environment.parents[1])) for file in files)


@pytest.mark.parametrize(
    ("missing", "modules"),
    [
        (
            "pyspark",
            "serving_export.savedmodel serving_export.registry serving_export.pyfunc recsys.cli",
        ),
        ("scann", "training.prepare training.fit training.evaluate training.tracking recsys.cli"),
    ],
)
def test_parts_do_without_what_the_other_part_needs(environment, tmp_path, missing, modules):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"import importlib\n"
        f"for name in {modules.split()!r}: importlib.import_module(name)\n"
        f"print('imported')"
    )
    told = answer(environment, code, tmp_path)
    assert told.stdout.strip() == "imported", told.stderr
