"""Gathers a release in a folder beside its place, and puts it there when it is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dp_synth.releasing.inventory import Inventory
from dp_synth.runs import Run


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out``; where anything goes wrong, nothing is left."""
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def copy_parts(run: Run, inventory: Inventory, folder: Path) -> None:
    """Copy model and samples.

    Files and folders are dated at the moment of copying: when training ended is not told.
    """
    for name in inventory.model:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path / name, folder / name)
    for name in inventory.samples:
        _copy_folder(run.path / name, folder / name)


def _copy_folder(source: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy_folder(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
