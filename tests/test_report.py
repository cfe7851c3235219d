"""The report page: what it shows is what the files say, and it touches nothing else."""

import base64
import builtins
import html
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from omegaconf import OmegaConf
from PIL import Image

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.wording import round_up
from dp_synth.report import report_runs
from dp_synth.reporting import meaning, scales
from dp_synth.reporting.content import read_content
from dp_synth.reporting.grids import read_grid
from dp_synth.runs import Run, write_samples
from dp_synth.summary import print_metrics


def _images(count=4, classes=("cat", "dog"), shape=(8, 8, 3), seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(classes)), count)
    pixels = rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    return Images(pixels, labels.astype(np.int64), classes)


def _statement(eps=3.0, status="finished", **more):
    if eps is None:
        return PublicPlan(batch_size=10, steps=7, num_examples=101).statement(7, status)
    plan = PrivacyPlan(
        eps=eps, delta=1e-3, max_grad_norm=1, batch_size=10, steps=7, num_examples=101, **more
    )
    # RDP is quick; the page shows whatever accountant the statement names.
    return plan.calibrate().statement(7, status)


@pytest.fixture(scope="module")
def statement():
    return _statement(accountant="rdp")


def _metrics(accuracy=0.8123):
    """A number under every name that an evaluation may use, and under one that it does not."""
    values = {
        "utility/recall.cat": 0.71,
        "utility/recall.dog": 0.93,
        "utility/calibration_error": 0.0321,
        "fidelity/inception_score.inception": 3.21,
        "tuning/chosen": 1.0,
        "tuning/regret": 0.0123,
        "tuning/regret_of_random": 0.1357,
        "memorization/flagged": 0.0,
        "somebody/invented_this": 12345.6,
        "public/loss": 0.0456,
    }
    public = {
        "public/loss", "tuning/chosen", "fidelity/inception_score.inception",
        *(f"tuning/setting.{k}.synthetic_validation" for k in range(3)),
        *(f"utility/accuracy.synthetic_validation{end}" for end in ("", ".ci_low", ".ci_high")),
    }  # fmt: skip
    intervals = {
        "utility/accuracy": accuracy,
        "utility/accuracy.public_only": 0.5,
        "utility/accuracy.real": 0.97,
        "utility/accuracy.ensemble": 0.8456,
        "utility/accuracy.fresh": 0.8345,
        "utility/accuracy.dp_classifier": 0.8234,
        "utility/accuracy.non_private_generator": 0.9123,
        "utility/accuracy.synthetic_validation": 0.9507,
        "utility/accuracy.size.3": 0.6123,
        "utility/accuracy.size.5": 0.6987,
        "utility/accuracy.classifier.wrn": 0.8012,
        "utility/accuracy.other_hospital": 0.7345,
        "tuning/spearman": 0.8765,
        "tuning/kendall": 0.7654,
        "fidelity/frechet.classifier": 4.321,
        "fidelity/frechet.classifier.public_only": 9.876,
        "fidelity/frechet.classifier.real_floor": 0.543,
        "fidelity/precision.classifier": 0.7531,
    }
    for key, value in intervals.items():
        values |= {key: value, f"{key}.ci_low": value - 0.05, f"{key}.ci_high": value + 0.02}
    for suffix, value in (("", 6.5), (".public_only", 8.25), (".real_floor", 1.125)):
        values[f"fidelity/frechet.classifier.class.cat{suffix}"] = value
    for k, (on_synthetic, on_real) in enumerate(((0.41, 0.52), (0.93, 0.88), (0.75, 0.61))):
        values[f"tuning/setting.{k}.synthetic_validation"] = on_synthetic
        values[f"tuning/setting.{k}.real"] = on_real
    for space in ("pixels", "pixels.public_only", "classifier"):
        values[f"memorization/closer_to_train.{space}"] = 0.5123
        values[f"memorization/p_value.{space}"] = 0.4321
        values[f"memorization/distance_ratio.{space}"] = 1.0123
    for name, value in (("copies", 3.0), ("copies_expected", 2.5), ("copies_p_value", 0.3456)):
        values[f"memorization/{name}.pixels"] = value
    meta = {k: {"private": k not in public, "n": 360, "what": f"About {k}."} for k in values}
    return values, meta


def _run(path, statement, metrics=True, dataset="pets", images=None, accuracy=0.8123):
    config = {
        "dataset": {"name": dataset, "root": "/nowhere/private"},
        "public": {"load": {"_target_": "dp_synth.data.font_digits.load"}},
    }
    run = Run.create(path, OmegaConf.create(config))
    if statement is not None:
        run.write_statement(statement)
    images = images or _images()
    for directory in (run.public_examples_dir, run.public_only_dir, run.samples_dir):
        write_samples(images, directory, "card")
    if metrics:
        run.write_metrics(*_metrics(accuracy))
    return run


def _report(runs, out):
    report_runs(runs, out)
    return Page(out.read_text())


def test_the_page_is_well_formed_and_loads_nothing(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    page = _report([run], run.report_path)
    text = run.report_path.read_text()
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|@import|url\(|\son\w+\s*=", text)
    assert "default-src 'none'" in text
    assert len(page.ids) == len(set(page.ids))


def test_every_metric_is_shown_with_its_exact_value(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    page = _report([run], run.report_path)
    assert set(run.metrics().values()) <= set(page.values)
    for key in ("eps", "delta", "noise_multiplier", "sample_rate", "num_examples"):
        assert statement[key] in page.values


def test_every_shown_number_is_one_of_the_files(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    page = _report([run], run.report_path)
    numbers = {float(v) for v in statement.values() if isinstance(v, int | float)}
    assert set(page.values) <= numbers | set(run.metrics().values()) | {8.0, 360.0}


def test_the_text_of_a_number_is_its_value_rounded(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    report_runs([run], run.report_path)
    pairs = re.findall(r'<data value="([^"]+)">([^<]+)</data>', run.report_path.read_text())
    assert len(pairs) > 30
    for value, shown in pairs:
        number = html.unescape(shown).replace(",", "").replace("\xa0", "")
        if number.endswith("%"):
            assert abs(float(number[:-1]) / 100 - float(value)) <= 0.00051
        else:
            assert float(number) == pytest.approx(float(value), rel=5e-3)


def test_what_looked_at_private_images_is_marked(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    report_runs([run], run.report_path)
    text = run.report_path.read_text()
    _, meta = _metrics()
    for key in (k for k in meta if not k.endswith(("ci_low", "ci_high"))):
        marked = re.search(rf"<code>{re.escape(key)}</code><a class=\"mark\"", text) is not None
        assert marked == meta[key]["private"], key
    assert "not covered by eps" in text


def test_every_private_accuracy_is_marked_wherever_it_stands(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    for runs in ([run], [run, run]):
        report_runs(runs, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        # The table of all metrics puts the mark beside the name, not beside the number.
        shown = re.findall(r'<data value="0\.8123">81\.2&nbsp;%</data>(.{0,16})', text)
        assert len(shown) >= 2 and all(after.startswith('<a class="mark"') for after in shown)


def test_a_metric_without_meta_counts_as_private(tmp_path, statement):
    run = _run(tmp_path / "run", statement, metrics=False)
    run.write_metrics({"utility/accuracy": 0.5}, {})
    report_runs([run], run.report_path)
    assert '<code>utility/accuracy</code><a class="mark"' in run.report_path.read_text()


def test_only_public_and_sampled_images_are_opened(tmp_path, statement, monkeypatch):
    run = _run(tmp_path / "run", statement)
    opened: list[Path] = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(file, *args, **kwargs):
            if isinstance(file, str | bytes | os.PathLike):
                opened.append(Path(os.fsdecode(file)))
            return original(file, *args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(builtins, "open")
    watch(io, "open")
    watch(Image, "open")
    report_runs([run], tmp_path / "page.html")
    pictures = [path for path in opened if path.suffix == ".png"]
    allowed = (run.public_examples_dir, run.public_only_dir, run.samples_dir)
    assert pictures
    assert all(any(path.is_relative_to(a) for a in allowed) for path in pictures)
    ours = {path.relative_to(run.path).parts[0] for path in opened if path.is_relative_to(run.path)}
    assert ours <= {
        "public", "samples", "config.yaml", "privacy.json", "metrics.json", "metrics_meta.json",
    }  # fmt: skip


def test_a_link_out_of_the_samples_is_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8), 200).save(secret)
    folder = tmp_path / "samples" / "cat"
    folder.mkdir(parents=True)
    (folder / "0.png").symlink_to(secret)
    assert read_grid(tmp_path / "samples", "title", "note", "nothing").src is None


def test_a_class_folder_that_is_a_link_is_not_followed(tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    Image.new("L", (8, 8), 200).save(private / "0.png")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "cat").symlink_to(private)
    assert read_grid(tmp_path / "samples", "title", "note", "nothing").src is None


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 7, 3), (1, 1, 1)])
@pytest.mark.parametrize("classes", [1, 2, 5, 23])
def test_a_grid_holds_the_images_unchanged(tmp_path, shape, classes):
    images = _images(3, tuple(f"c{k}" for k in range(classes)), shape)
    write_samples(images, tmp_path / "samples", "card")
    grid = read_grid(tmp_path / "samples", "title", "note", "nothing")
    sheet = np.asarray(_decode(grid.src))
    shown = min(classes, 20)
    assert grid.classes == tuple(f"c{k}" for k in range(shown))
    assert grid.hidden_classes == classes - shown
    assert grid.colour == (shape[2] == 3)
    height, width, _ = shape
    opaque = sheet[sheet[:, :, 3] == 255][:, :3]
    assert len(opaque) == 3 * shown * height * width
    expected = np.broadcast_to(images.pixels[images.labels < shown], (3 * shown, height, width, 3))
    assert sorted(map(tuple, opaque)) == sorted(map(tuple, expected.reshape(-1, 3)))
    rows = sheet.shape[0] // shown  # the rows of the first class hold its images and no others
    first = sheet[:rows][sheet[:rows, :, 3] == 255][:, :3]
    assert sorted(map(tuple, first)) == sorted(map(tuple, expected[:3].reshape(-1, 3)))


def _decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_classes_are_in_natural_order(tmp_path):
    write_samples(_images(1, ("10", "9", "b2", "b10")), tmp_path / "s", "card")
    assert read_grid(tmp_path / "s", "", "", "").classes == ("9", "10", "b2", "b10")


def test_hostile_names_are_escaped(tmp_path, statement):
    evil = "\"><script>alert(1)<!-- & ' --> {{ 7 * 7 }}".replace("/", "")
    images = _images(classes=(evil, "dog"))
    hostile = statement | {
        "unit": evil,
        "status": evil,
        "not_covered": [evil],
        "unaccounted_looks": [{"what": evil, "metrics": [evil]}, evil],
        "versions": {evil: evil},
        "trust_model": evil,
    }
    run = _run(tmp_path / "<b>run", hostile, dataset=evil, images=images)
    metrics, meta = _metrics()
    metrics[f"utility/recall.{evil}"] = 0.123
    meta[f"utility/recall.{evil}"] = {"private": True, "n": 3, "what": evil}
    run.write_metrics(metrics, meta)
    other = _run(tmp_path / "other", hostile, dataset=evil)
    for runs in ([run], [run, other]):
        page = _report(runs, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text()
        assert "script" not in page.tags and "b" not in page.tags
        assert "<script" not in text and "<b>run" not in text and "<!-- &" not in text
        assert evil in page.text and "{{ 7 * 7 }}" in page.text


def test_missing_parts_leave_a_sentence(tmp_path):
    run = Run.create(tmp_path / "run", OmegaConf.create({}))
    page = _report([run], run.report_path)
    for sentence in (
        "No privacy statement",
        "was not evaluated",
        "no public images",
        "no samples of a public model",
        "no synthetic images yet",
        "no model in this run",
    ):
        assert sentence in page.text
    assert "img" not in page.tags


@pytest.mark.parametrize("missing", [".real", ".public_only", ""])
def test_a_missing_baseline_is_left_out(tmp_path, statement, missing):
    run = _run(tmp_path / "run", statement, metrics=False)
    metrics, meta = _metrics()
    gone = f"utility/accuracy{missing}"
    kept = {k: v for k, v in metrics.items() if k not in (gone, gone + ".ci_low")}
    run.write_metrics(kept, meta)
    page = _report([run, run], tmp_path / "page.html")
    assert set(kept.values()) <= set(page.values)
    assert metrics[gone] not in page.values


def test_training_on_fresh_images_stands_among_the_baselines(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    assert "Drawn anew each epoch" in _report([run], run.report_path).text
    metrics, meta = _metrics()
    kept = {k: v for k, v in metrics.items() if not k.startswith("utility/accuracy.fresh")}
    run.write_metrics(kept, meta)
    assert "Drawn anew each epoch" not in _report([run], run.report_path).text


def test_a_number_that_is_not_finite_is_left_out(tmp_path, statement):
    run = _run(tmp_path / "run", statement, metrics=False)
    run.write_metrics({"utility/accuracy": math.nan, "fidelity/frechet.classifier": 2.5}, {})
    page = _report([run], run.report_path)
    assert 2.5 in page.values and not any(math.isnan(value) for value in page.values)


def test_a_statement_of_few_fields_is_enough(tmp_path):
    run = _run(tmp_path / "run", {"eps": 2.0, "delta": 1e-5, "status": "finished"})
    page = _report([run], run.report_path)
    assert "does not hold what the curve is computed from" in page.text
    assert 2.0 in page.values


def test_a_damaged_statement_is_named(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    run.privacy_path.write_text("{")
    with pytest.raises(UserError, match="privacy.json"):
        report_runs([run], run.report_path)


def test_a_damaged_image_leaves_a_sentence(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    (run.samples_dir / "cat" / "000000.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    assert "a file is damaged" in _report([run], run.report_path).text


def test_a_finished_private_run_has_no_banner(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    assert read_content(run).banners == []


def test_what_must_not_be_released_has_a_banner(tmp_path):
    cases = {
        "Unfinished": _statement(status="running", accountant="rdp"),
        "No privacy": _statement(eps=None),
        "repeatable": _statement(accountant="rdp", unsafe_repeatable_randomness=3),
    }
    for number, (word, statement) in enumerate(cases.items()):
        run = _run(tmp_path / str(number), statement)
        report_runs([run], run.report_path)
        banners = re.findall(
            r'<div class="banner".*?</div>', run.report_path.read_text(), re.DOTALL
        )
        assert len(banners) == 1 and word in banners[0]


def test_several_runs_are_compared(tmp_path):
    runs = [
        _run(tmp_path / f"run-{eps}", _statement(eps, accountant="rdp"), accuracy=accuracy)
        for eps, accuracy in ((1.0, 0.61), (2.0, 0.62), (7.0, 0.63))
    ]
    runs.append(_run(tmp_path / "open", _statement(None), accuracy=0.64))
    page = _report(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    table = text[text.index('<table class="compare">') : text.index("</table>")]
    for number, run in enumerate(runs):
        assert f'<a href="#run{number}">{run.path.name}</a>' in table
        assert run.metrics()["utility/accuracy"] in page.values
        assert f'value="{run.metrics()["utility/accuracy"]}"' in table
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    titles = re.findall(r"<title>(run-[^:]+|open): ", text)
    # In the charts of accuracy and of distance; a run without privacy has no eps.
    assert sorted(titles) == sorted(2 * ["run-1.0", "run-2.0", "run-7.0"])


@pytest.mark.parametrize("seed", range(5))
def test_any_part_of_the_metrics_makes_a_page(tmp_path, statement, seed):
    rng = np.random.default_rng(seed)
    run = _run(tmp_path / "run", statement, metrics=False)
    metrics, meta = _metrics()
    odd = (
        "fidelity/", "fidelity/x", "fidelity/x.", "fidelity/frechet.new_features.class.a.b",
        "tuning/setting.x.real", "tuning/setting.", "memorization/", "memorization/copies",
        "utility/accuracy.size.many", "utility/accuracy.size.0", "utility/accuracy.", "no_part", "",
    )  # fmt: skip
    kept = {key: value for key, value in metrics.items() if rng.random() < 0.4}
    kept |= {key: float(rng.normal()) for key in odd if rng.random() < 0.5}
    run.write_metrics(kept, {key: meta[key] for key in kept if key in meta and rng.random() < 0.5})
    for runs in ([run], [run, run]):
        assert set(kept.values()) <= set(_report(runs, tmp_path / "page.html").values)


def test_metrics_of_the_wrong_kind_are_left_out(tmp_path, statement):
    run = _run(tmp_path / "run", statement, metrics=False)
    run.metrics_path.write_text('{"utility/accuracy": 0.5, "a": "text", "b": null, "c": [1]}')
    run.metrics_meta_path.write_text('{"utility/accuracy": 7}')
    assert 0.5 in _report([run], run.report_path).values


@pytest.mark.parametrize("name", ["metrics.json", "metrics_meta.json"])
def test_damaged_metrics_are_named(tmp_path, statement, name):
    run = _run(tmp_path / "run", statement)
    (run.path / name).write_text("{")
    with pytest.raises(UserError, match=name):
        report_runs([run], run.report_path)


def _with(run, **changes):
    """The text of the page of a run whose metrics are changed; None leaves one out."""
    metrics, meta = _metrics()
    for name, value in changes.items():
        metrics[name] = value
    kept = {key: value for key, value in metrics.items() if value is not None}
    run.write_metrics(kept, meta)
    return _report([run], run.report_path).text


def test_suspected_copies_stand_above_all_else(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    honest = _with(run)
    assert "No sign of memorisation" in honest and "no proof" in honest
    assert read_content(run).banners == []
    flagged = _with(run, **{"memorization/flagged": 1.0})
    assert "Memorisation is suspected" in flagged and "No sign of memorisation" not in flagged
    assert flagged.index("Copies of training images suspected") < flagged.rindex("Synthetic pets")
    unknown = _with(run, **{"memorization/flagged": None})
    assert "no verdict" in unknown and "No sign of memorisation" not in unknown


def test_the_gain_of_private_data_is_told_from_chance(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    name = "utility/accuracy.public_only"
    assert "add 31.2 percentage points" in _with(run) and "more than chance" in _with(run)
    close = {name: 0.8, f"{name}.ci_low": 0.75, f"{name}.ci_high": 0.85}
    assert "part or all of it may be chance" in _with(run, **close)
    assert "bought nothing" in _with(run, **{name: 0.9})


def test_whom_the_guarantee_protects_is_said(tmp_path, statement):
    by_image = _report([_run(tmp_path / "a", statement)], tmp_path / "a.html").text
    assert "Each single image" in by_image and "several images is protected less" in by_image
    by_patient = statement | {"unit": "patient"}
    page = _report([_run(tmp_path / "b", by_patient)], tmp_path / "b.html").text
    assert "Each patient, with all of its images" in page
    assert "protected less" not in page.partition("The privacy statement")[0]


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.01])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0, 3.0, 10.0, 14.0])
def test_no_test_guesses_right_more_often_than_the_page_says(eps, delta):
    # Randomized response that tells the truth outright with probability delta attains the bound.
    truth = delta + (1 - delta) * math.exp(eps) / (1 + math.exp(eps))
    shown = float(meaning.guess(eps, delta).removesuffix("\N{NO-BREAK SPACE}%")) / 100
    assert truth - 1e-12 <= shown <= truth + 0.0011


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.7, 1.0, 4.6, 9.99, 12.0])
def test_the_factors_are_those_of_eps_rounded_up(eps):
    for text in (meaning.odds_factor(eps).removeprefix("a factor of "), meaning.odds_after(eps)):
        shown = float(text.removesuffix(" to 1,000").replace(",", ""))
        assert math.exp(eps) - 1e-9 <= shown <= math.exp(eps) * 1.01


def test_an_enormous_eps_has_words(tmp_path, statement):
    page = _report([_run(tmp_path / "run", statement | {"eps": 1e6})], tmp_path / "page.html")
    assert "an astronomical factor" in page.text


def _dots(chart):
    places = re.findall(r'<circle cx="([^"]+)" cy="([^"]+)" r="5" class="dot (\w+)"', chart)
    return [(float(x), float(y), kind) for x, y, kind in places]


def test_the_scatter_has_a_mark_for_each_setting(tmp_path, statement):
    transfer = read_content(_run(tmp_path / "run", statement)).transfer
    dots = sorted(_dots(transfer.chart))
    # By accuracy on synthetic images 0, 2, 1; on real images as well; the SVG counts from the top.
    assert [kind for _, _, kind in dots] == ["open", "open", "private"]
    heights = [y for _, y, _ in dots]
    assert heights == sorted(heights, reverse=True) and transfer.num_settings == 3


def test_the_curve_over_sizes_ends_at_all_images_that_were_trained_on(tmp_path, statement):
    run = _run(tmp_path / "run", statement, metrics=False)
    metrics, meta = _metrics()
    # Of the run's 8 images 1 was kept to validate on.
    meta["utility/accuracy.synthetic_validation"]["n"] = 1
    run.write_metrics(metrics, meta)
    chart = read_content(run).usefulness.size_chart
    assert re.findall(r"<title>(\d+) images", chart) == ["3", "5", "7"]
    heights = [y for _, y, _ in _dots(chart)]
    assert heights == sorted(heights, reverse=True)


def _with_dp_accounting(statements, delta):
    """What all queries of some statements cost by another library."""
    from dp_accounting import dp_event, pld

    accountant = pld.PLDAccountant()
    for query in (query for statement in statements for query in statement["queries"]):
        step = dp_event.PoissonSampledDpEvent(
            query["sample_rate"], dp_event.GaussianDpEvent(query["noise_multiplier"])
        )
        accountant.compose(step, query["steps"])
    return accountant.get_epsilon(delta)


def test_the_best_of_several_runs_costs_all_of_them(tmp_path):
    statements = [_statement(eps, accountant="rdp") for eps in (1.0, 3.0, 2.0)]
    statements[1] = json.loads(json.dumps(statements[1]).replace("0.001", "0.0001"))
    runs = [_run(tmp_path / f"run-{k}", statement) for k, statement in enumerate(statements)]
    page = _report(runs, tmp_path / "page.html")
    said = r"Best of 3 runs on pets: .* at most eps = ([\d.]+) at delta = 0.0001 for one image"
    total = float(re.search(said, page.text).group(1))
    assert total == pytest.approx(_with_dp_accounting(statements, 1e-4), rel=1e-2)
    assert total < sum(statement["eps"] for statement in statements)
    assert "all 3 together" in page.text
    assert "The best of 3 runs looks better than it is" in page.text


def test_statements_that_list_no_mechanism_are_added_up(tmp_path):
    statements = [_statement(eps, accountant="rdp") for eps in (1.0, 3.0)]
    del statements[0]["queries"][0]["noise_multiplier"]
    runs = [_run(tmp_path / f"run-{k}", statement) for k, statement in enumerate(statements)]
    text = _report(runs, tmp_path / "page.html").text
    total = float(re.search(r"at most eps = ([\d.]+) at delta = 0.002 for one", text).group(1))
    assert total == pytest.approx(sum(s["eps"] for s in statements), rel=1e-3)
    assert "added up" in text


def test_runs_are_composed_for_each_unit_and_data_set_apart(tmp_path):
    statements = [_statement(eps, accountant="rdp") for eps in (1.0, 3.0)]
    image = _run(tmp_path / "image", statements[0])
    patient = _run(tmp_path / "patient", statements[1] | {"unit": "patient"})
    text = _report([image, patient], tmp_path / "page.html").text
    # For an image both count; for a patient the first gives no bound.
    assert re.findall(r"for one (\w+), if they saw", text) == ["image"]
    assert "there was 1 run that did not count by patient" in text
    patients = _run(tmp_path / "patients", statements[0] | {"unit": "patient"})
    text = _report([patient, patients], tmp_path / "page.html").text
    assert re.findall(r"for one (\w+), if they saw", text) == ["patient"]
    elsewhere = _run(tmp_path / "elsewhere", statements[1], dataset="birds")
    assert "Best of" not in _report([image, elsewhere], tmp_path / "page.html").text


def test_what_no_sum_covers_is_counted(tmp_path, statement):
    looked = statement | {"unaccounted_looks": ["One.", {"what": "Two."}]}
    void = statement | {"guarantee": "void: repeatable", "unaccounted_looks": ["Three."]}
    runs = [
        _run(tmp_path / f"run-{k}", one) for k, one in enumerate((looked, void, _statement(None)))
    ]
    text = _report(runs, tmp_path / "page.html").text
    assert "On pets there were 3 looks" in text
    assert "On pets there were 2 runs without a guarantee" in text
    assert "Best of" not in text


def test_a_second_query_says_that_eps_adds_up(tmp_path, statement):
    baseline = statement["queries"][0] | {"query": "dp_sgd_classifier", "released": "A baseline."}
    run = _run(tmp_path / "run", statement | {"queries": [*statement["queries"], baseline]})
    page = _report([run], run.report_path)
    assert "spends what all of them cost together" in page.text
    assert "A baseline." in page.text


def test_the_closing_lines_of_a_command_name_every_part(capsys):
    metrics, _ = _metrics()
    print_metrics(metrics)
    shown = capsys.readouterr().out
    for words in ("81.2%   [76.2%, 83.2%]", "82.3%", "on other_hospital", "4.32 (public alone 9.88",
                  "loses 1.2%, one chosen at random 13.6%", "no sign that"):  # fmt: skip
        assert words in shown
    print_metrics(metrics | {"memorization/flagged": 1.0})
    assert "SUSPECTED" in capsys.readouterr().out
    print_metrics({"utility/accuracy": 0.5})
    assert capsys.readouterr().out.splitlines()[1:] == ["  synthetic data  50.0%"]
    print_metrics({})
    assert capsys.readouterr().out == ""


def test_no_runs_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="runs="):
        report_runs([], tmp_path / "page.html")


def test_the_folder_of_the_page_must_exist(tmp_path, statement):
    run = _run(tmp_path / "run", statement)
    with pytest.raises(UserError, match="out="):
        report_runs([run], tmp_path / "nowhere" / "page.html")


def test_eps_is_never_rounded_down():
    rng = np.random.default_rng(0)
    for eps in [*np.exp(rng.uniform(-8, 8, 500)), 1.0, 9.99999999, 10.0, 0.1, 0.3, 3.0, 12345.6]:
        shown = float(round_up(eps))
        assert eps * (1 - 1e-8) <= shown <= eps * 1.0011
    assert round_up(10.0) == "10" and round_up(0.3) == "0.3" and round_up(0.0) == "0"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 1), (0.13, 1), (0, 9.99), (0, 2e6), (3.0, 3.0), (0.999, 1.0)]
)
def test_a_scale_holds_its_range_with_few_even_ticks(low, high):
    scale = scales.linear_scale(low, high)
    steps = np.diff(scale.ticks)
    assert scale.ticks[0] <= low + 1e-9 and scale.ticks[-1] >= high - 1e-9
    assert 1 <= len(steps) <= 9 and np.allclose(steps, steps[0]) and steps[0] > 0
    assert [scale.share(tick) for tick in (scale.ticks[0], scale.ticks[-1])] == [0, 1]


def test_the_curve_ends_at_the_eps_of_the_statement(tmp_path, statement):
    curve = read_content(_run(tmp_path / "run", statement)).curve
    points = re.search(r'polyline points="([^"]+)"', curve).group(1).split()
    xs, ys = np.array([point.split(",") for point in points], dtype=float).T
    assert (np.diff(xs) > 0).all() and (np.diff(ys) < 0).all()  # SVG counts from the top
    assert len(points) == 7 + 1


def test_the_command_accepts_one_name_or_a_list(tmp_path, statement):
    for name in ("a", "b"):
        _run(tmp_path / name, statement)

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "dp_synth.report", *arguments],
            check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    assert command("runs=a").returncode == 0
    assert (tmp_path / "a" / "report.html").is_file()
    assert command("runs=[a,b]").returncode == 0
    assert ">b</a>" in (tmp_path / "report.html").read_text()
    failed = command("runs=[a,nowhere]")
    assert failed.returncode == 2 and "nowhere" in failed.stderr
    assert json.loads((tmp_path / "a" / "privacy.json").read_text()) == statement
