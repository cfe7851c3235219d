"""``python -m dp_synth.report runs=[DIR,...]``: one HTML page for one or many runs."""

from pathlib import Path

from omegaconf import DictConfig, ListConfig

from dp_synth import __version__
from dp_synth.cli import command
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.reporting.comparison import compare
from dp_synth.reporting.content import read_content
from dp_synth.reporting.pages import environment
from dp_synth.runs import Run


def report_runs(
    runs: list[Run], out: Path, *, released: bool = False, private_metrics: bool = True
) -> None:
    """Write one self-contained page about ``runs``.

    The page loads nothing from anywhere and runs no script. It is made from the statements, the
    metrics, and the images of ``public/`` and ``samples/``: the private data are not opened and
    need not be there. What a run does not have is replaced by a sentence.

    Args:
        runs: at least one.
        out: the page; replaced if it is there.
        released: whether the page leaves the building: it then shows no image but of ``samples/``.
        private_metrics: whether metrics that looked at private images are shown.

    Raises:
        UserError: no run is given, the folder of ``out`` does not exist, or a file of a run is
            damaged.
    """
    if not runs:
        raise UserError("runs=[] names no run; give runs=[DIR,...].")
    if not out.parent.is_dir():
        raise UserError(f"out={out} lies in no existing folder; make {out.parent} first.")
    contents = [
        read_content(run, released=released, private_metrics=private_metrics) for run in runs
    ]
    page = environment().get_template("page.html.j2")
    html = page.render(runs=contents, groups=compare(contents), version=__version__)
    write_atomically(out, html)


@command("report")
def main(cfg: DictConfig) -> None:
    """Write the page of one run into it, of several runs into the working directory."""
    names = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    runs = [Run.open(str(name)) for name in names]
    default = runs[0].report_path if len(runs) == 1 else Path("report.html")
    out = Path(cfg.out) if cfg.out else default
    report_runs(runs, out)
    print(f"Report of {len(runs)} run{'s' if len(runs) > 1 else ''} in {out}")


if __name__ == "__main__":
    main()
