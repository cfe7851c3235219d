"""The wheel is the whole program: configs, templates and types are in it, and it runs elsewhere."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked; built with the backend that is here, else with one pip fetches."""
    out = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    result = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(out), str(ROOT)],
        capture_output=True,
        check=False,
        text=True,
    )
    said = result.stdout + result.stderr
    if (
        result.returncode
        and not isolation
        and "No matching distribution found for hatchling" in said
    ):
        pytest.skip("hatchling is not installed and no package index can be reached")
    assert result.returncode == 0, said
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def below(directory):
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_all_of_the_package_and_the_configs(wheel):
    assert below(wheel / "dp_synth" / "conf") == below(ROOT / "conf")
    package = {name for name in below(wheel / "dp_synth") if not name.startswith("conf/")}
    assert package == below(ROOT / "dp_synth")
    assert {"py.typed", "reporting/page.html.j2", "reporting/page.css"} <= package


def test_the_wheel_holds_nothing_else(wheel):
    assert {path.name for path in wheel.iterdir()} == {
        "dp_synth",
        "dp_synth-0.1.0.dist-info",
        "hydra_plugins",
    }


def test_the_program_runs_from_the_wheel_in_another_directory(wheel, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    code = (
        "import sys, runpy, dp_synth; from dp_synth.cli import conf_dir\n"
        f"assert dp_synth.__file__.startswith({str(wheel)!r}), dp_synth.__file__\n"
        f"assert str(conf_dir()).startswith({str(wheel)!r}), conf_dir()\n"
        "sys.argv = ['train', '--cfg', 'job', 'experiment=smoke']\n"
        "runpy.run_module('dp_synth.train', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "_target_: dp_synth.privacy.plan.PrivacyPlan" in result.stdout
    assert "steps: 3" in result.stdout and list(tmp_path.iterdir()) == []
