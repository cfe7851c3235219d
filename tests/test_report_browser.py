"""The report page in a real browser: at three widths, light and dark, it is whole and calls nobody."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from omegaconf import OmegaConf

from dp_synth.data.images import Images
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.report import report_runs
from dp_synth.reporting.officer import write_privacy_page
from dp_synth.runs import Run, write_samples

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_WIDTHS = (380, 800, 1400)
_SCHEMES = {"dark": "0", "light": "1"}  # as Chromium counts them

pytestmark = pytest.mark.skipif(
    _BROWSER is None, reason="neither chromium, chromium-browser nor google-chrome is installed"
)

# Each page lies in a frame of a given width, which its media queries see. The frames may run no
# script; this one, of the page around them, measures what it sees in them.
_MEASURE = """
const luminance = (rgb) => rgb.map((c) => c / 255)
  .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const colour = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const contrast = (a, b) => {
  const [low, high] = [luminance(a.slice(0, 3)), luminance(b.slice(0, 3))].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
function behind(view, element) {
  for (let e = element; e; e = e.parentElement) {
    const c = colour(view.getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
}
function texts(root) {
  return [...root.querySelectorAll('*')].filter((e) => !['STYLE', 'TITLE', 'title'].includes(e.tagName)
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length);
}
function faint(view, root) {
  return texts(root).filter((e) => {
    const style = view.getComputedStyle(e);
    const ink = colour(e.tagName === 'text' ? style.fill : style.color);
    return contrast(ink, behind(view, e)) < 4.5;
  }).map((e) => e.textContent.trim().slice(0, 40));
}
function collisions(root) {
  const found = [];
  for (const chart of root.querySelectorAll('svg.chart')) {
    const box = chart.getBoundingClientRect();
    if (!box.width) continue;
    const words = [...chart.querySelectorAll('text')].map((e) => [e.textContent, e.getBoundingClientRect()]);
    words.forEach(([word, a], i) => {
      if (a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1)
        found.push(word + ' leaves its chart');
      for (const [other, b] of words.slice(i + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
          found.push(word + ' covers ' + other);
    });
  }
  return found;
}
function cut(root, width) {
  return texts(root).filter((e) => !e.closest('.scroll, pre, svg') && e.getBoundingClientRect().right > width + 1)
    .map((e) => e.textContent.trim().slice(0, 40));
}
window.onload = () => {
  const measured = [...document.querySelectorAll('iframe')].map((frame) => {
    const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
    const closed = root.scrollWidth - root.clientWidth;
    page.querySelectorAll('details').forEach((e) => { e.open = true; });
    return {
      width: view.innerWidth,
      overflow: Math.max(closed, root.scrollWidth - root.clientWidth),
      height: root.scrollHeight,
      cut: cut(page.body, root.clientWidth),
      paper: luminance(colour(view.getComputedStyle(page.body).backgroundColor).slice(0, 3)),
      faint: faint(view, page.body),
      collisions: collisions(page.body),
      images: page.images.length,
      broken: [...page.images].filter((i) => !i.complete || !i.naturalWidth).length,
      requests: view.performance.getEntriesByType('resource').map((e) => e.name)
        .filter((name) => !name.startsWith('data:')),
    };
  });
  document.body.replaceChildren(Object.assign(document.createElement('pre'), {
    id: 'measured', textContent: JSON.stringify(measured)}));
};
"""


def _measure(folder, pages, scheme):
    """What the browser sees of each page at each width, page by page."""
    frames = "".join(
        f'<iframe srcdoc="{html.escape(page)}" style="width: {width}px; height: 900px; border: 0">'
        "</iframe>"
        for page in pages
        for width in _WIDTHS
    )
    around = folder / "around.html"
    around.write_text(
        f'<!doctype html><html><head><meta charset="utf-8"><meta name="color-scheme" '
        f'content="light dark"><script>{_MEASURE}</script></head><body>{frames}</body></html>'
    )
    finished = subprocess.run(
        [
            _BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={folder / scheme}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1600,1000",
            f"--blink-settings=preferredColorScheme={_SCHEMES[scheme]}", "--dump-dom",
            around.as_uri(),
        ],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="measured">(.*?)</pre>', finished.stdout, re.DOTALL)
    assert found, finished.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


def _run(path, eps, classes, metrics):
    run = Run.create(path, OmegaConf.create({"dataset": {"name": "moles of the left shoulder"}}))
    if eps is None:
        plan = PublicPlan(batch_size=100, steps=500, num_examples=60_000)
    else:
        plan = PrivacyPlan(
            eps=eps, delta=1e-5, max_grad_norm=1, batch_size=100, steps=500,
            num_examples=60_000, unit="patient", accountant="rdp",
        )  # fmt: skip
    run.write_statement(plan.calibrate().statement(500, "finished"))
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(classes)), 3).astype(np.int64)
    pixels = rng.integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    for directory in (run.public_examples_dir, run.public_only_dir, run.samples_dir):
        write_samples(Images(pixels, labels, classes), directory, "card")
    run.write_metrics(metrics, {key: {"private": True, "n": 12_345} for key in metrics})
    run.record_look("Evaluation compared synthetic data with private images.", metrics=["a", "b"])
    return run


def _metrics(classes):
    """All that a page can show, with wide numbers and long names."""
    metrics = {
        f"utility/accuracy{suffix}": value
        for suffix, value in (
            ("", 0.861), (".public_only", 0.855), (".real", 0.972), (".ensemble", 0.873),
            (".dp_classifier", 0.871), (".non_private_generator", 0.921), (".size.100", 0.61),
            (".size.1000", 0.79), (".size.1200", 0.8), (".size.50000", 0.86),
            (".classifier.a_wide_residual_network", 0.86), (".a_hospital_far_away", 0.79),
            (".synthetic_validation", 0.955), (".fresh", 0.882),
        )
    }  # fmt: skip
    for features in ("inception", "classifier", "a_network_that_nobody_knows"):
        for measure in ("frechet", "kid", "precision", "recall", "density", "coverage", "new"):
            for suffix in ("", ".public_only", ".real_floor"):
                metrics[f"fidelity/{measure}.{features}{suffix}"] = 12345.678
    metrics |= {"tuning/spearman": 0.87, "tuning/regret": 0.01, "tuning/regret_of_random": 0.14}
    metrics |= {key + end: metrics[key] for key in list(metrics) for end in (".ci_low", ".ci_high")}
    for k in range(9):
        metrics[f"tuning/setting.{k}.synthetic_validation"] = 0.9 + 0.01 * k
        metrics[f"tuning/setting.{k}.real"] = 0.97 + 0.001 * k
    for space in ("pixels", "pixels.public_only", "classifier"):
        for name in ("closer_to_train", "p_value", "distance_ratio", "copies", "copies_expected",
                     "copies_p_value"):  # fmt: skip
            metrics[f"memorization/{name}.{space}"] = 0.0001234
    for name in classes:
        metrics[f"utility/recall.{name}"] = 0.9
        metrics[f"fidelity/frechet.classifier.class.{name}"] = 3.2
    return metrics | {"memorization/flagged": 1.0, "x" * 70: 1.0}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of a bare run, of one with everything and of several; statements of the first two."""
    folder = tmp_path_factory.mktemp("runs")
    classes = ("benign", "a class of a rather long name", "Superkalifragilistisch_expiallegetisch")
    full = _metrics(classes)
    close = [_run(folder / f"run-{eps}", eps, classes, full) for eps in (None, 0.3, 7.7, 8.4, 10.0)]
    bare = Run.create(folder / "bare", OmegaConf.create({}))
    texts = []
    for runs in ([bare], [close[-1]], [bare, *close]):
        report_runs(runs, folder / "page.html")
        texts.append((folder / "page.html").read_text())
    return texts + [write_privacy_page(run).read_text() for run in (bare, close[-1])]


@pytest.mark.parametrize("scheme", _SCHEMES)
def test_the_page_is_whole_at_every_width(tmp_path, pages, scheme):
    measured = _measure(tmp_path, pages, scheme)
    assert [m["width"] for m in measured] == list(_WIDTHS) * len(pages)
    for number, seen in enumerate(measured):
        where = f"page {number // len(_WIDTHS)} at {seen['width']} px, {scheme}"
        assert seen["overflow"] <= 0 and seen["cut"] == [], where
        assert seen["height"] > 1000, where
        assert seen["paper"] < 0.05 if scheme == "dark" else seen["paper"] > 0.9, where
        assert seen["faint"] == [], where
        assert seen["collisions"] == [], where
        assert seen["broken"] == 0 and seen["requests"] == [], where
    assert [m["images"] > 0 for m in measured] == [
        page in (1, 2) for page in range(5) for _ in _WIDTHS
    ]


def test_the_measures_see_what_is_wrong(tmp_path):
    bad = """<!doctype html><style>body { background: #777; color: #888 }</style>
    <p style="width: 3000px">wide</p><img src="http://example.invalid/a.png" alt="none">
    <svg class="chart" viewBox="0 0 99 50" width="99"><text x="9" y="9">one</text>
    <text x="9" y="9">two</text></svg>"""
    for seen in _measure(tmp_path, [bad], "light"):
        assert seen["overflow"] > 0 and seen["cut"] == ["wide"] and seen["faint"]
        assert seen["collisions"] and seen["broken"] == 1
        assert seen["requests"] == ["http://example.invalid/a.png"]
