"""Camelyon17-WILDS against a second reading of its table and against Pillow, on real tissue."""

import csv
import random
import shutil
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import compose
from PIL import Image
from tissue import COLUMNS, SLIDES, write_camelyon17

from dp_synth import evaluate, train
from dp_synth.data import camelyon17
from dp_synth.declaration import declare
from dp_synth.errors import UserError
from dp_synth.runs import Run

HEADER = "," + ",".join(COLUMNS)
# One patch of each split and a second one to train on.
ROWS = (
    "0,004,4,3328,21792,1,0,0,0",
    "1,004,4,3360,21792,0,0,0,1",
    "2,020,2,3328,21792,0,10,1,1",
    "3,040,2,3328,21792,1,20,2,0",
    "4,060,3,3328,21792,0,30,3,0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``camelyon17_v1.0`` with 300 patches; tests must not change it."""
    return write_camelyon17(tmp_path_factory.mktemp("wilds"), count=300)


@pytest.fixture
def load(tmp_path):
    """``camelyon17.load`` with a cache of the test's own."""
    return lambda root, **options: camelyon17.load(root=root, cache=tmp_path / "cache", **options)


@pytest.fixture
def table(tmp_path):
    """A function that writes ``metadata.csv`` from lines or bytes and returns the root."""

    def write(lines, end="\n"):
        content = lines if isinstance(lines, bytes) else (end.join(lines) + end).encode()
        (tmp_path / "metadata.csv").write_bytes(content)
        return tmp_path

    return write


def by_split(folder):
    """The rows of each split, told as WILDS tells them: first the column, then the hospitals."""
    rows = defaultdict(list)
    with (folder / "metadata.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            split = {"0": "train", "1": "id_val"}[row["split"]]
            split = {"1": "val", "2": "test"}.get(row["center"], split)
            rows[split].append(row)
    return rows


def path_of(folder, row):
    slide = f"patient_{row['patient']}_node_{row['node']}"
    name = f"patch_{slide}_x_{row['x_coord']}_y_{row['y_coord']}.png"
    return folder / "patches" / slide / name


def pillow(path, resolution):
    with Image.open(path) as picture:
        rgb = picture.convert("RGB")
        if rgb.width != resolution:
            rgb = rgb.resize((resolution, resolution), Image.Resampling.BICUBIC)
        return np.asarray(rgb)


# --- load ------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 96])
@pytest.mark.parametrize("split", camelyon17.SPLITS)
def test_each_split_has_wilds_own_patches_in_the_order_of_the_table(
    folder, load, split, resolution
):
    rows = by_split(folder)[split]
    images = load(folder.parent, split=split, resolution=resolution)
    assert images.classes == ("normal", "tumor") and images.units is None
    assert images.labels.tolist() == [int(row["tumor"]) for row in rows]
    expected = np.stack([pillow(path_of(folder, row), resolution) for row in rows])
    np.testing.assert_array_equal(images.pixels, expected)


def test_a_patch_lies_where_wilds_puts_it(folder):
    path = path_of(folder, {"patient": "004", "node": 4, "x_coord": 3328, "y_coord": 21792})
    assert path.relative_to(folder).as_posix() == (
        "patches/patient_004_node_4/patch_patient_004_node_4_x_3328_y_21792.png"
    )


def test_every_patch_is_in_one_split_and_both_classes_in_each(folder, load):
    splits = {split: load(folder.parent, split=split) for split in camelyon17.SPLITS}
    assert sum(map(len, splits.values())) == 300
    assert all(set(images.labels) == {0, 1} for images in splits.values())


def test_the_folder_itself_is_a_root_too(folder, load):
    outer, inner = load(folder.parent, split="val"), load(folder, split="val")
    np.testing.assert_array_equal(outer.pixels, inner.pixels)


def test_without_a_root_the_data_are_where_a_download_puts_them(folder, load, tmp_path):
    (tmp_path / "cache" / "data").mkdir(parents=True)
    (tmp_path / "cache" / "data" / folder.name).symlink_to(folder)
    assert len(load(None)) == len(by_split(folder)["train"])


@pytest.mark.parametrize("unit", camelyon17.UNITS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_units_are_the_rows_of_equal_value(folder, load, unit, split):
    rows = by_split(folder)[split]
    images = load(folder.parent, split=split, unit=unit)
    pairs = set(zip([row[unit] for row in rows], images.units.tolist(), strict=True))
    assert len(pairs) == len({row[unit] for row in rows}) == len(set(images.units))
    assert images.num_examples == len(pairs)


def test_training_units_are_cut_to_their_largest_size_and_test_units_are_not(folder, load):
    whole, cut = (load(folder, unit="slide", max_images_per_unit=n) for n in (None, 7))
    sizes, kept = (
        dict(zip(*np.unique(images.units, return_counts=True), strict=True))
        for images in (whole, cut)
    )
    assert min(sizes.values()) > 7
    assert kept == dict.fromkeys(sizes, 7)
    tumor = {pixels.tobytes(): y for pixels, y in zip(whole.pixels, whole.labels, strict=True)}
    for pixels, label in zip(cut.pixels, cut.labels, strict=True):
        assert tumor[pixels.tobytes()] == label
    test = load(folder, split="test", unit="slide", max_images_per_unit=7)
    assert len(test) == len(by_split(folder)["test"])


# --- survey ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [None, *camelyon17.UNITS])
def test_a_survey_counts_what_training_will_load(folder, load, unit):
    survey = camelyon17.survey(root=folder.parent, unit=unit)
    assert survey.num_examples == load(folder, unit=unit).num_examples
    assert survey.classes == camelyon17.CLASSES and survey.num_files == 300
    rows = by_split(folder)["train"]
    assert survey.units == {
        name: len({row[name] for row in rows}) for name in camelyon17.UNITS if name != unit
    }


def test_a_survey_opens_no_image(table):
    assert camelyon17.survey(root=table([HEADER, *ROWS])).num_examples == 2


@pytest.mark.parametrize(
    ("unit", "expected"), [(None, 302_436), ("patient", 26), ("slide", 30), ("center", 3)]
)
def test_with_no_folder_the_numbers_are_the_published_ones(tmp_path, unit, expected):
    survey = camelyon17.survey(unit=unit, cache=tmp_path)
    assert survey.num_examples == expected and survey.num_files is None


def test_published_units_are_those_of_the_annotated_slides():
    slides = [(center, patient, node) for center in (0, 3, 4) for patient, node in SLIDES[center]]
    assert {
        "patient": len({patient for _, patient, _ in slides}),
        "slide": len(set(slides)),
        "center": len({center for center, _, _ in slides}),
    } == camelyon17.PUBLISHED_NUM_UNITS


def test_a_plan_needs_no_folder_and_takes_the_patients_as_units():
    for overrides, expected in (([], 302_436), (["dataset.unit=patient"], 26)):
        cfg = compose("dataset=camelyon17", *overrides)
        declare(cfg)
        assert cfg.dataset.num_examples == cfg.privacy.num_examples == expected


# --- what is wrong with a table --------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_that_a_spreadsheet_saved_is_the_same_table(folder, load, tmp_path, end):
    root = tmp_path / "root"
    shutil.copytree(folder, root)
    header, *rows = (folder / "metadata.csv").read_text().splitlines()
    cells = (row.split(",", 1) for row in rows)
    stripped = [f'"{index}",{rest.lstrip("0")}' for index, rest in cells]
    text = end.join(["\ufeff" + header, *stripped, "", ""])
    (root / "metadata.csv").write_text(text, newline="")
    for split in camelyon17.SPLITS:
        np.testing.assert_array_equal(
            load(root, split=split).pixels, load(folder, split=split).pixels
        )


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("5,004,4,3392,21792,0,0,0", "must have an index and 8 whole numbers"),
        ("5,004,4,3392,21792,0,0,0,0,0", "must have an index and 8 whole numbers"),
        ("5,004,4,3392,21792,x,0,0,0", "whole numbers: patient, node"),
        ("5,004,4,3392,,0,0,0,0", "whole numbers"),
        ("5,004,4,33.92,21792,0,0,0,0", "whole numbers"),
        ("5,004,4,-3392,21792,0,0,0,0", "whole numbers"),
        ("5,../../4,4,3392,21792,0,0,0,0", "whole numbers"),
        ("5,٤,4,3392,21792,0,0,0,0", "whole numbers"),
        ("5,4,4,99999999999999999999,21792,0,0,0,0", "whole numbers"),
        ("5,004,4,3392,21792,2,0,0,0", "has a tumor that is neither 0 nor 1"),
        ("5,004,4,3392,21792,0,0,0,2", "has a split that is neither 0 nor 1"),
        ("5,004,4,3328,21792,1,0,0,1", "lists a patch that an earlier line lists too"),
        ("5,004,4,3392,21792,0,0,2,0", "another center than an earlier line of the same patient"),
        ("5,061,4,3392,21792,0,30,3,0", "another patient than an earlier line of the same slide"),
        ('5,"004,4,3392,21792,0,0,0,0', "is no row of a CSV"),
    ],
)
def test_a_wrong_row_is_one_sentence_with_its_line(table, row, fault):
    root = table([HEADER, *ROWS, row, "6,080,1,3328,21792,0,40,4,0"])
    with pytest.raises(UserError, match=fault) as caught:
        camelyon17.survey(root=root)
    line = 8 if "CSV" in fault else 7
    assert f"{root / 'metadata.csv'} line {line} " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "must begin with the line ,patient,node"),
        (b"path,label\na,b\n", "must begin with the line ,patient,node"),
        (HEADER.encode() + b"\n", "lists no patch of the split train"),
        ((HEADER + "\n" + ROWS[3] + "\n").encode(), "lists no patch of the split train"),
        ((HEADER + "\n" + ROWS[0]).encode() + b"\xff\n", "is not UTF-8"),
        ((HEADER + "\n" + ROWS[0]).encode("utf-16"), "is not UTF-8"),
        ((HEADER + '\n"' + "x" * 200_000 + '",004').encode(), "line 2 is no row of a CSV"),
    ],
)
def test_a_table_of_another_kind_is_one_sentence(table, content, fault):
    with pytest.raises(UserError, match=fault):
        camelyon17.survey(root=table(content))


def test_two_hundred_damaged_tables_are_read_or_refused(table):
    """And never a third thing: no other exception, no count that the rows do not give."""
    good = "\n".join([HEADER, *ROWS, ""]).encode()
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(bad))
            match rng.randrange(3):
                case 0:
                    bad[place] = rng.randrange(256)
                case 1:
                    del bad[place : place + rng.randint(1, 40)]
                case 2:
                    bad[place:place] = rng.choice([b",", b"\n", b'"', b"\0", b"9" * 30, b"\xe2"])
        try:
            survey = camelyon17.survey(root=table(bytes(bad)))
        except UserError as error:
            assert "metadata.csv" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert 1 <= survey.num_examples <= survey.num_files <= len(ROWS)
    assert 0 < refused < 200


# --- what is wrong with files and keys ---------------------------------------------------------


def test_a_patch_that_is_not_there_is_named_or_skipped_and_counted(folder, load, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    gone, broken = (path_of(copy, row) for row in by_split(folder)["train"][3:5])
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        load(copy)
    broken.write_bytes(broken.read_bytes()[:100])
    images, whole = load(copy, on_error="skip"), load(folder)
    assert images.missing == 2 and images.num_examples == len(whole)
    np.testing.assert_array_equal(images.pixels, np.delete(whole.pixels, [3, 4], axis=0))
    np.testing.assert_array_equal(images.labels, np.delete(whole.labels, [3, 4]))


def test_decoded_patches_are_in_the_folder_for_private_pixels(folder, load, tmp_path):
    load(folder, split="val")
    (images,) = (tmp_path / "cache").iterdir()
    assert images.name == "images" and images.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "split='validation' is unknown; use train or id_val"),
        ({"unit": "hospital"}, "dataset.unit='hospital' is unknown; use patient or slide"),
        ({"resolution": 0}, "dataset.resolution=0"),
        ({"on_error": "ignore"}, "dataset.on_error='ignore'"),
        ({"max_images_per_unit": 3}, "dataset.max_images_per_unit=3 needs dataset.unit"),
        ({"max_images_per_unit": 0, "unit": "slide"}, "dataset.max_images_per_unit=0"),
    ],
)
def test_a_wrong_value_names_its_key(folder, load, options, message):
    with pytest.raises(UserError, match=message):
        load(folder, **options)


@pytest.mark.parametrize("root", [None, "nowhere"])
def test_a_folder_that_is_not_there_is_one_sentence(load, tmp_path, root):
    root = root and tmp_path / root
    with pytest.raises(UserError, match="dataset.root must be the folder that holds camelyon17_v1"):
        load(root)
    if root is not None:
        with pytest.raises(UserError, match="dataset.root"):
            camelyon17.survey(root=root)


# --- a run -----------------------------------------------------------------------------------


def test_a_run_is_tested_on_all_three_other_splits(folder, command, tmp_path):
    """From the publisher's files to the report."""
    overrides = (
        "public=none",
        "model.network.block_out_channels=[8,8,8]",
        "model.network.attention_head_dim=8",
        "model.network.norm_num_groups=2",
        "privacy.steps=1",
        "privacy.multiplicity=1",
        "privacy.batch_size=8",
        "sampler.steps=2",
        "sampler.num_images=8",
        "evaluator.classifier.steps=2",
        f"run_dir={tmp_path / 'run'}",
    )
    outcome = command(train, "dataset=camelyon17", f"dataset.root={folder.parent}", *overrides)
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "run")
    rows = by_split(folder)
    metrics, meta = run.metrics(), run.metrics_meta()
    for split, name in (
        ("test", "utility/accuracy"),
        ("val", "utility/accuracy.val"),
        ("id_val", "utility/accuracy.id_val"),
    ):
        assert metrics[f"{name}.ci_low"] <= metrics[name] <= metrics[f"{name}.ci_high"]
        assert meta[name]["private"] and meta[name]["n"] == len(rows[split])
        assert f"{metrics[name]:.1%}" in outcome.out
    (look,) = run.statement()["unaccounted_looks"]
    assert look["splits"] == ["train", "test", "val", "id_val"]
    assert run.statement()["num_examples"] == len(rows["train"])
    page = run.report_path.read_text()
    assert ">val<" in page and ">id_val<" in page
    beside = {"README.md", "SHA256SUMS"}
    assert {p.name for p in run.samples_dir.iterdir()} == {"normal", "tumor"} | beside

    again = command(evaluate, f"run={run.path}", "evaluator.classifier.steps=2")
    assert again.code == 0 and run.metrics() == metrics


# --- download --------------------------------------------------------------------------------


def test_a_download_is_wilds_own(folder, load, tmp_path, monkeypatch):
    def get_dataset(dataset, version, root_dir, download):
        assert (dataset, version, download) == ("camelyon17", "1.0", True)
        shutil.copytree(folder, tmp_path / "new" / "camelyon17_v1.0")
        assert root_dir == str(tmp_path / "new")

    monkeypatch.setitem(sys.modules, "wilds", SimpleNamespace(get_dataset=get_dataset))
    root = tmp_path / "new"
    assert camelyon17.survey(root=root, download=True).num_examples == 302_436
    for _ in range(2):  # the second time it is there: get_dataset would fail
        assert len(load(root, download=True)) == len(by_split(folder)["train"])


@pytest.mark.parametrize(
    ("wilds", "message"),
    [
        (None, "dataset.download=true needs the package wilds"),
        (FileNotFoundError("no metadata.csv"), "wilds could not download Camelyon17"),
        ("nothing", "is not there; dataset.root"),
    ],
)
def test_a_download_that_fails_is_one_sentence(load, tmp_path, monkeypatch, wilds, message):
    def get_dataset(*args, **kwargs):
        if isinstance(wilds, Exception):
            raise wilds

    stand_in = None if wilds is None else SimpleNamespace(get_dataset=get_dataset)
    monkeypatch.setitem(sys.modules, "wilds", stand_in)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "root", download=True)
