"""Anybody's own images: which are found, of what class, split and unit, whatever lies around them."""

import csv
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose, tiny_module
from hydra.utils import instantiate
from PIL import Image

from dp_synth import plan as plan_command
from dp_synth import train
from dp_synth.building import load_images
from dp_synth.data import image_folder, splitting
from dp_synth.data.catalogue import read_catalogue
from dp_synth.data.folder import read_image_folder
from dp_synth.data.images import Images
from dp_synth.data.module import ImageDataModule
from dp_synth.data.splitting import at_most, is_test
from dp_synth.declaration import declare
from dp_synth.errors import UserError
from dp_synth.networks import unet
from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.runs import Run

SIDE = 4


def paint(path: Path, seed: int = 0, blank: bool = False) -> None:
    """A PNG of random colours, or of none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels * (not blank)).save(path)


def write_csv(path: Path, header: str, *rows: str, end: str = "\n", encoding: str = "utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in (header, *rows)).encode(encoding))


def make_class_folders(root: Path, count: int = 23, classes: int = 3) -> list[str]:
    """Class folders of `count` images; their relative paths, sorted."""
    paths = [f"class {i % classes}/deep/{i:03d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        paint(root / path, seed=i)
    return sorted(paths)


def make_patients(root: Path, patients: int = 13, blanked: str = "") -> list[tuple[str, str, str]]:
    """A CSV of patients with 1 to 5 images each; its rows (path, label, patient)."""
    rows, seed = [], 0
    for patient in range(patients):
        for number in range(patient % 5 + 1):
            name = f"p{patient}"
            rows.append((f"scans/{name}-{number}.png", "sick" if seed % 3 else "well", name))
            paint(root / rows[-1][0], seed, blank=name == blanked)
            seed += 1
    write_csv(root / "labels.csv", "path,label,patient_id", *map(",".join, rows))
    return rows


def pack(root: Path, archive: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            file.write(path, inside + str(path.relative_to(root)))
    return archive


def load(root, tmp_path, split="train", **options) -> Images:
    settings = {"resolution": SIDE, "channels": 3, "cache": tmp_path / "cache"}
    return image_folder.load(root=root, split=split, **(settings | options))


def found(root, unit=None, most=None, test_fraction=0.2):
    """By split: a dict from each image's relative path to its class and its unit's number."""
    catalogue = read_catalogue(root, unit, most, test_fraction)
    splits = {}
    for split in ("train", "test"):
        if catalogue.rows[split]:
            listing = catalogue.listing(split)
            classes = [listing.classes[label] for label in listing.labels]
            units = [None] * len(listing) if listing.units is None else listing.units.tolist()
            paths = catalogue.layout.relative(listing.names)
            splits[split] = dict(zip(paths, zip(classes, units, strict=True), strict=True))
    return splits


def paths_of(root, **options):
    return {split: set(images) for split, images in found(root, **options).items()}


# ------------------------------------------------------------------------------- class folders


def test_class_folders_are_what_torchvision_finds(tmp_path):
    import torchvision

    root = tmp_path / "data"
    make_class_folders(root, classes=11)
    # Of what else lies about, both pass over the same.
    (root / "README.txt").write_text("not an image")
    (root / "class 1" / "notes.txt").write_text("not an image")
    paint(root / "class 2" / "UPPER.PNG", seed=99)
    theirs = torchvision.datasets.ImageFolder(str(root))
    expected = {
        os.path.relpath(path, root): (theirs.classes[label], np.asarray(theirs.loader(path)))
        for path, label in theirs.samples
    }
    catalogue = read_catalogue(root, None, None, test_fraction=0)
    listing = catalogue.listing("train")
    images = load(root, tmp_path, test_fraction=0)
    assert images.classes == tuple(f"class {i}" for i in range(11)) and images.units is None
    assert listing.names == sorted(expected)
    for name, pixels, label in zip(listing.names, images.pixels, images.labels, strict=True):
        assert images.classes[label] == expected[name][0]
        assert (pixels == expected[name][1]).all()


def test_grey_and_another_size_by_configuration(tmp_path):
    root = tmp_path / "data"
    make_class_folders(root, count=5)
    images = load(root, tmp_path, test_fraction=0, channels=1, resolution=7)
    assert images.shape == (1, 7, 7) and len(images) == 5


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    paths = make_class_folders(tmp_path)
    paint(tmp_path / ".thumbnails" / "a.png")
    paint(tmp_path / "class 1" / ".hidden.png")
    assert set(found(tmp_path, test_fraction=0)["train"]) == set(paths)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "0"], ("0", "9", "10")),
        (["b2c10", "b2c9", "b10", "a"], ("a", "b2c9", "b2c10", "b10")),
        (["1", "01", "001", "2"], ("001", "01", "1", "2")),
        (["Zebra", "ant", "ärmel"], ("Zebra", "ant", "ärmel")),
        (["x", "1x", "-1", "1"], ("1", "1x", "-1", "x")),
    ],
)
def test_classes_are_sorted_with_numbers_by_value(tmp_path, names, expected):
    for name in names:
        paint(tmp_path / name / "0.png")
    assert read_catalogue(tmp_path, None, None, 0).classes == tuple(expected)


# ----------------------------------------------------------------------------------- the split


def test_the_hash_splits_as_documented_and_by_about_the_fraction():
    names = [f"{i}.png" for i in range(5000)]
    for fraction in (0.0, 0.05, 0.2, 0.5, 1.0):
        share = np.mean([is_test(name, fraction) for name in names])
        assert abs(share - fraction) <= 6 * (fraction * (1 - fraction) / len(names)) ** 0.5
    # More test images are the old ones and others.
    assert all(is_test(name, 0.3) for name in names if is_test(name, 0.1))


def test_adding_or_removing_images_moves_no_other(tmp_path):
    paths = make_class_folders(tmp_path, count=29)
    before = paths_of(tmp_path)
    assert len(before["train"]) > len(before["test"]) > 1
    assert before["train"] | before["test"] == set(paths)
    for seed in range(3):
        paint(tmp_path / "class 0" / f"new {seed}.png", seed)
    after = paths_of(tmp_path)
    assert all(before[split] <= after[split] for split in before)
    for path in paths[::5]:
        (tmp_path / path).unlink()
    assert paths_of(tmp_path) == {s: after[s] - set(paths[::5]) for s in after}


def test_units_are_never_divided_and_other_units_move_none(tmp_path):
    rows = make_patients(tmp_path, patients=31)
    patient_of = {path: patient for path, _, patient in rows}

    def patients():
        splits = paths_of(tmp_path, unit="patient_id")
        return {split: {patient_of[path] for path in paths} for split, paths in splits.items()}

    before = patients()
    assert min(map(len, before.values())) > 1 and not before["train"] & before["test"]
    kept = [row for row in rows if row[2] not in ("p3", "p17", "p30")]
    write_csv(tmp_path / "labels.csv", "path,label,patient_id", *map(",".join, kept))
    assert patients() == {split: names - {"p3", "p17", "p30"} for split, names in before.items()}


def test_without_units_a_patients_images_may_be_divided(tmp_path):
    """So that the test above can fail."""
    rows = make_patients(tmp_path, patients=31)
    patient_of = {path: patient for path, _, patient in rows}
    splits = paths_of(tmp_path)
    assert {patient_of[p] for p in splits["train"]} & {patient_of[p] for p in splits["test"]}


@pytest.mark.parametrize("listed", [False, True])
def test_train_and_test_folders_are_the_split(tmp_path, listed):
    for split, labels in (("train", "abc"), ("test", "ab")):
        for i, label in enumerate(labels * 2):
            paint(tmp_path / split / label / f"{i}.png", seed=i)
        if listed:
            rows = [f"{label}/{i}.png,{label}" for i, label in enumerate(labels * 2)]
            write_csv(tmp_path / split / f"{split}.csv", "path,label", *rows)
    paint(tmp_path / "other" / "z" / "0.png")
    expected = {
        split: {f"{split}/{label}/{i}.png": (label, None) for i, label in enumerate(labels * 2)}
        for split, labels in (("train", "abc"), ("test", "ab"))
    }
    assert found(tmp_path) == found(tmp_path, test_fraction=1) == expected
    assert load(tmp_path, tmp_path, "test").classes == ("a", "b", "c")
    survey = image_folder.survey(root=tmp_path)
    assert (survey.num_examples, survey.classes, survey.num_files) == (6, ("a", "b", "c"), 10)


def test_a_csv_above_train_and_test_keeps_their_split(tmp_path):
    names = ["train/0.png", "train/1.png", "test/0.png"]
    for i, name in enumerate(names):
        paint(tmp_path / name, seed=i)
    write_csv(tmp_path / "all.csv", "path,label", *(f"{name},a" for name in names))
    assert paths_of(tmp_path) == {"train": set(names[:2]), "test": set(names[2:])}
    paint(tmp_path / "valid" / "0.png")
    write_csv(tmp_path / "all.csv", "path,label", *(f"{n},a" for n in [*names, "valid/0.png"]))
    with pytest.raises(UserError, match=r"all\.csv line 5 is in 'valid'"):
        found(tmp_path)


def test_a_column_is_the_split(tmp_path):
    for i in range(5):
        paint(tmp_path / f"{i}.png", seed=i)
    splits = ["train", "test", "train", "test", " train"]
    rows = [f"{i}.png,a,{split}" for i, split in enumerate(splits)]
    write_csv(tmp_path / "all.csv", "path,label,split", *rows)
    assert paths_of(tmp_path, test_fraction=1) == {
        "train": {"0.png", "2.png", "4.png"},
        "test": {"1.png", "3.png"},
    }
    survey = image_folder.survey(root=tmp_path)
    assert (survey.num_examples, survey.num_files, dict(survey.units)) == (3, 5, {})


def test_a_folder_named_train_with_images_of_its_own_is_a_class(tmp_path):
    for name in ("train/0.png", "train/1.png", "car/0.png", "car/more/train/1.png"):
        paint(tmp_path / name)
    assert found(tmp_path, test_fraction=0)["train"] == {
        "train/0.png": ("train", None),
        "train/1.png": ("train", None),
        "car/0.png": ("car", None),
        "car/more/train/1.png": ("car", None),
    }


# --------------------------------------------------------------------------------- CSV and zip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_tables_are_what_the_csv_module_writes(tmp_path, encoding, end, quoting):
    values = ["plain", 'with "quotes"', "commas, two, of them", "Übergröße", "7", "  spaced  "]
    rows = [(f"folder/{i}, {value.strip()}.png", value) for i, value in enumerate(values)]
    with (tmp_path / "Table.CSV").open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, lineterminator=end, quoting=quoting)
        writer.writerow(["label", "age", "path"])
        writer.writerows((label, number, path) for number, (path, label) in enumerate(rows))
        file.write(end)
    for path, _ in rows:
        paint(tmp_path / path)
    expected = {"train": {path: (label.strip(), None) for path, label in rows}}
    assert found(tmp_path, test_fraction=0) == expected
    assert found(tmp_path / "Table.CSV", test_fraction=0) == expected


def test_only_what_the_csv_lists_is_taken_in_whatever_spelling(tmp_path):
    for name in ("a.png", "sub/b.png", "sub/unlisted.png", "c without suffix"):
        paint(tmp_path / "x.png")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / name)
    rows = ["./a.png,3", "sub//./b.png,3", "c without suffix,4"]
    write_csv(tmp_path / "t.csv", "path,label", *rows)
    assert set(found(tmp_path, test_fraction=0)["train"]) == {
        "a.png",
        "sub/b.png",
        "c without suffix",
    }
    assert len(load(tmp_path, tmp_path, test_fraction=0)) == 3


def test_the_csv_itself_as_root_looks_at_nothing_else(tmp_path):
    paint(tmp_path / "data" / "a.png")
    write_csv(tmp_path / "data" / "one.csv", "path,label", "a.png,x")
    write_csv(tmp_path / "data" / "two.csv", "nothing", "of interest")
    (tmp_path / "data" / "out").symlink_to("/")
    assert found(tmp_path / "data" / "one.csv", test_fraction=0) == {
        "train": {"a.png": ("x", None)}
    }


@pytest.mark.parametrize("inside", ["", "my data/"])
@pytest.mark.parametrize("make", [make_class_folders, make_patients])
def test_a_zip_is_the_folder_that_was_packed(tmp_path, make, inside):
    root = tmp_path / "data"
    make(root)
    archive = pack(root, tmp_path / "data.zip", inside)
    unit = "patient_id" if make is make_patients else None
    assert found(archive, unit=unit, most=None if unit is None else 2) == found(
        root, unit=unit, most=None if unit is None else 2
    )
    for split in ("train", "test"):
        ours, theirs = (load(r, tmp_path, split, unit=unit) for r in (root, archive))
        assert (ours.pixels == theirs.pixels).all() and (ours.labels == theirs.labels).all()


def test_a_zip_of_one_class_is_one_class(tmp_path):
    for i in range(3):
        paint(tmp_path / "data" / "only" / f"{i}.png", seed=i)
    archive = pack(tmp_path / "data", tmp_path / "data.zip")
    assert read_catalogue(archive, None, None, 0).classes == ("only",)


def test_a_zip_of_train_and_test(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        paint(tmp_path / "data" / name)
    for inside in ("", "data/"):
        archive = pack(tmp_path / "data", tmp_path / "data.zip", inside)
        assert paths_of(archive)["test"] == {"test/a/0.png"}


# --------------------------------------------------------------------------------------- units


def test_units_are_numbered_by_their_sorted_names(tmp_path):
    rows = make_patients(tmp_path)
    splits = found(tmp_path, unit="patient_id")
    for images in splits.values():
        names = sorted({patient for path, _, patient in rows if path in images})
        assert images == {
            path: (label, names.index(patient)) for path, label, patient in rows if path in images
        }


def test_blanks_make_no_other_unit_or_class(tmp_path):
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    write_csv(tmp_path / "t.csv", "path, label,who ", "0.png,a, p1", "1.png, a,p1 ", "2.png,a ,p1")
    assert found(tmp_path, unit="who", test_fraction=0)["train"] == {
        f"{i}.png": ("a", 0) for i in range(3)
    }


@pytest.mark.parametrize("most", [1, 2, 4, 100])
def test_at_most_so_many_of_a_unit_whatever_the_others_are(tmp_path, most):
    rows = make_patients(tmp_path)
    everything = found(tmp_path, unit="patient_id")
    chosen = found(tmp_path, unit="patient_id", most=most)
    assert chosen["test"] == everything["test"]
    own = {}
    for path, (_, unit) in everything["train"].items():
        own.setdefault(unit, []).append(path)
    for unit, paths in own.items():
        kept = [path for path in paths if path in chosen["train"]]
        assert len(kept) == min(most, len(paths))
        # A choice by the unit's own paths alone is the choice where there is no other unit.
        assert sorted(kept) == sorted(
            paths[row] for row in at_most(most, range(len(paths)), [str(unit)] * len(paths), paths)
        )
    patients = {path: patient for path, _, patient in rows}
    assert {patients[p] for p in chosen["train"]} == {patients[p] for p in everything["train"]}


def test_images_that_are_left_out_are_never_opened(tmp_path):
    rows = make_patients(tmp_path)
    kept = found(tmp_path, unit="patient_id", most=1)["train"]
    for path in set(found(tmp_path, unit="patient_id")["train"]) - set(kept):
        (tmp_path / path).write_bytes(b"no image")
    images = load(tmp_path, tmp_path, unit="patient_id", max_images_per_unit=1)
    assert len(images) == images.num_units == len(kept) < len(rows)


def test_the_survey_tells_what_else_could_be_the_unit(tmp_path):
    rows = make_patients(tmp_path)
    further = [
        f"{','.join(row)},{i % 4},{'' if i == 3 else 'x' * (i % 2)},same,{i}"
        for i, row in enumerate(rows)
    ]
    header = "path,label,patient_id,ward,sometimes,constant,distinct"
    write_csv(tmp_path / "labels.csv", header, *further)
    survey = image_folder.survey(root=tmp_path, test_fraction=0)
    assert survey.num_examples == survey.num_files == len(rows)
    assert dict(survey.units) == {"patient_id": 13, "ward": 4}
    survey = image_folder.survey(root=tmp_path, unit="patient_id", test_fraction=0)
    assert survey.num_examples == 13 and survey.num_files == len(rows)
    assert dict(survey.units) == {"ward": 4}


def test_the_survey_opens_no_image_and_counts_what_load_finds(tmp_path):
    make_patients(tmp_path)
    for unit, most in ((None, None), ("patient_id", None), ("patient_id", 2)):
        options = {"unit": unit, "max_images_per_unit": most}
        images = load(tmp_path, tmp_path, **options)
        survey = image_folder.survey(root=tmp_path, **options)
        assert survey.num_examples == images.num_examples
        assert survey.classes == tuple(images.classes)
    for path in tmp_path.glob("scans/*"):
        path.write_bytes(b"")
    assert image_folder.survey(root=tmp_path, **options) == survey


def test_a_listing_can_be_handed_to_another_process(tmp_path):
    make_patients(tmp_path)
    listing = read_catalogue(tmp_path, "patient_id", None, 0.2).listing("train")
    other = pickle.loads(pickle.dumps(listing))
    assert other.source.read(other.names[0]) == listing.source.read(listing.names[0])


# --------------------------------------------------------------------------------- sensitivity


def clipped_sum_of(images, plan):
    """The clipped sum of a step that selects all units, in float64."""
    everyone = np.arange(images.num_examples)
    (batch,) = ImageDataModule(images, lambda steps_taken: [everyone]).train_dataloader()
    torch.manual_seed(0)
    net = unet((3, SIDE, SIDE), 2, block_out_channels=[4], **ONE_BLOCK).double()
    module = tiny_module(plan, net=net, label_dropout=0.2, flip=True)
    rows = module.draw_rows(batch, 3)
    rows = tuple(r.double() if r.is_floating_point() else r for r in rows)
    ClippingEngine(net, plan.max_grad_norm).accumulate(
        module.diffusion.row_loss(net), rows, plan.multiplicity
    )
    return torch.cat([p.grad.flatten() for p in net.parameters()])


ONE_BLOCK = {
    "down_block_types": ["AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}


@pytest.mark.parametrize("multiplicity", [1, 3])
def test_a_patient_moves_the_clipped_sum_by_at_most_max_grad_norm(tmp_path, multiplicity):
    """Of three folders: as they are, with a patient's images unreadable, and with them black."""
    plan = PrivacyPlan(
        eps=10,
        delta=1e-2,
        max_grad_norm=1e-3,  # below every patient's norm
        batch_size=4,
        steps=2,
        num_examples=7,
        multiplicity=multiplicity,
        noise_multiplier=1.0,
        unsafe_repeatable_randomness=7,
    )
    patient = "p6"  # the last one, so that all others keep their numbers
    for name, blanked in (("whole", ""), ("blanked", ""), ("black", patient)):
        rows = make_patients(tmp_path / name, patients=7, blanked=blanked)
    for path, _, own in rows:
        if own == patient:
            (tmp_path / "blanked" / path).write_bytes(b"")
    options = {"unit": "patient_id", "test_fraction": 0, "on_error": "skip"}
    whole, blanked, black = (
        load(tmp_path / name, tmp_path, **options) for name in ("whole", "blanked", "black")
    )
    assert whole.num_examples == blanked.num_examples == black.num_examples == 7
    assert blanked.missing == 1 and len(blanked) < len(black) == len(whole) == len(rows)
    sums = [clipped_sum_of(images, plan) for images in (whole, blanked, black)]
    for one in (0, 2):
        moved = float((sums[one] - sums[1]).norm())
        assert moved == pytest.approx(plan.max_grad_norm, rel=1e-5)
        assert moved <= plan.max_grad_norm * (1 + 1e-9)
    assert 0 < float((sums[0] - sums[2]).norm()) <= 2 * plan.max_grad_norm * (1 + 1e-9)


# --------------------------------------------------------------------------------- the program


def test_the_configuration_loads_what_the_folder_holds(tmp_path):
    make_patients(tmp_path / "data")
    cfg = compose(
        "dataset=image_folder",
        "dataset.name=ours",
        f"dataset.root={tmp_path / 'data'}",
        "dataset.unit=patient_id",
        "dataset.max_images_per_unit=3",
        "dataset.resolution=8",
        "dataset.channels=1",
        "public=image_folder",
        f"public.root={tmp_path / 'data'}",
    )
    survey = declare(cfg)
    images = load_images(cfg, "train")
    assert images.num_examples == survey.num_examples == cfg.dataset.num_examples
    assert images.shape == (1, 8, 8) and np.bincount(images.units).max() == 3
    assert cfg.dataset.num_classes == 2 and cfg.privacy.unit == "patient_id"
    public = instantiate(cfg.public.load, split="train")
    assert len(public) == survey.num_files and public.shape == images.shape


def test_a_run_from_a_folder_to_a_synthetic_folder(command, tmp_path):
    make_patients(tmp_path / "data", patients=31)
    outcome = command(
        train,
        "dataset=image_folder",
        "dataset.name=ours",
        f"dataset.root={tmp_path / 'data' / 'labels.csv'}",
        "dataset.unit=patient_id",
        "dataset.max_images_per_unit=3",
        "dataset.resolution=8",
        "public=none",
        "model=unet_digits",
        "experiment=smoke",
        "privacy.batch_size=9",
        f"run_dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "run")
    patients = image_folder.survey(root=tmp_path / "data", unit="patient_id").num_examples
    statement = run.statement()
    assert (statement["unit"], statement["num_examples"]) == ("patient_id", patients)
    assert 0 <= run.metrics()["utility/accuracy"] <= 1
    assert set(read_image_folder(run.samples_dir).classes) == {"sick", "well"}


def test_root_and_name_must_be_given(command, tmp_path):
    make_class_folders(tmp_path)
    for main in (plan_command, train):
        for given, missing in (("name=x", "root"), (f"root={tmp_path}", "name")):
            outcome = command(main, "dataset=image_folder", f"dataset.{given}")
            assert outcome.code == 2 and f"dataset.{missing}" in outcome.err, outcome.err
            assert "Traceback" not in outcome.err


# ------------------------------------------------------------------------------------ mistakes


def test_what_is_no_root(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "bad.zip").write_text("no zip")
    for name, told in {
        "missing": r"root=.*missing does not exist; name a folder of class folders",
        "file.txt": r"file\.txt is of another kind; name a folder of class folders",
        "bad.zip": r"bad\.zip is damaged",
        "empty": r"empty has no class folders with images",
    }.items():
        with pytest.raises(UserError, match=told):
            found(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(UserError, match=r"empty\.zip has no class folders"):
        found(tmp_path / "empty.zip")


def test_folders_that_are_not_as_they_should_be(tmp_path):
    paint(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "scan.dcm").write_text("no image")
    with pytest.raises(UserError, match=r"b holds files but no image; use one of \.bmp"):
        found(tmp_path)
    (tmp_path / "b" / "scan.dcm").unlink()
    with pytest.raises(UserError, match=r"dataset\.unit=patient names a column .*class folders"):
        found(tmp_path, unit="patient")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="remove the link"):
        found(tmp_path)
    (tmp_path / "b" / "loop").unlink()
    paint(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(UserError, match=r"train is there and test/ is not; add test/"):
        found(tmp_path)
    for name in ("1.csv", "2.csv"):
        write_csv(tmp_path / name, "path,label", "a/0.png,a")
    with pytest.raises(UserError, match="holds 2 CSV files"):
        found(tmp_path)


@pytest.mark.parametrize("name", ["back\\slash", "line\nbreak", "bell\a"])
def test_a_class_that_no_sample_folder_could_be_named_after(tmp_path, name):
    paint(tmp_path / name / "0.png")
    with pytest.raises(UserError, match="cannot be a folder's name; rename the class") as caught:
        found(tmp_path)
    assert str(caught.value).isprintable()


def test_a_name_that_is_not_utf_8(tmp_path):
    paint(tmp_path / "a" / "0.png")
    os.rename(os.fsencode(tmp_path / "a" / "0.png"), os.fsencode(tmp_path) + b"/a/\xff.png")
    with pytest.raises(UserError, match="not UTF-8"):
        found(tmp_path)


def test_every_class_needs_a_training_image_and_one_is_enough(tmp_path):
    for split, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            paint(tmp_path / split / name / "0.png")
    with pytest.raises(UserError, match="class 'c' of .* has no image in the training split"):
        found(tmp_path)
    paint(tmp_path / "train" / "c" / "0.png")
    assert [label for label, _ in found(tmp_path)["train"].values()] == ["a", "b", "c"]


def test_a_split_without_images(tmp_path):
    make_class_folders(tmp_path)
    with pytest.raises(UserError, match=r"split='test' has no image .* raise dataset\.test_frac"):
        load(tmp_path, tmp_path, "test", test_fraction=0)
    with pytest.raises(UserError, match="has no image in the training split"):
        load(tmp_path, tmp_path, test_fraction=1)
    with pytest.raises(UserError, match=r"split='valid'"):
        load(tmp_path, tmp_path, "valid")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"test_fraction": -0.1}, r"dataset\.test_fraction=-0\.1 must be a number from 0 to 1"),
        ({"test_fraction": "a"}, r"dataset\.test_fraction='a'"),
        ({"max_images_per_unit": 3}, r"dataset\.max_images_per_unit=3 needs dataset\.unit"),
        ({"max_images_per_unit": 0, "unit": "patient_id"}, r"dataset\.max_images_per_unit=0"),
        ({"unit": "patient"}, r"dataset\.unit=patient is no further column of .*labels\.csv"),
        ({"unit": "label"}, r"dataset\.unit=label is no further column"),
        ({"resolution": 0}, r"resolution=0"),
        ({"channels": 2}, r"1 or 3 channels"),
        ({"on_error": "ignore"}, r"dataset\.on_error='ignore'"),
    ],
)
def test_values_that_cannot_be(tmp_path, options, told):
    make_patients(tmp_path)
    with pytest.raises(UserError, match=told):
        load(tmp_path, tmp_path, **options)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", r"t\.csv has no column path: its first line must be path,label"),
        (b"a.png,x\nb.png,y\n", r"t\.csv has no column path"),
        (b"path,class\na.png,x\n", r"t\.csv has no column label"),
        (b"path;label\na.png;x\n", r"t\.csv has no column path.* separated by commas"),
        (b"path,label,path\na.png,x,b.png\n", r"t\.csv has two columns named 'path'"),
        (b"path,label\n", r"t\.csv lists no images"),
        (b"path,label\na.png,x\nb.png\n", r"t\.csv line 3 has 1 fields, but the header has 2"),
        (b"path,label\na.png,x,y\n", r"t\.csv line 2 has 3 fields"),
        (b"path,label\n\n\na.png,x\nno.png,x\n", r"t\.csv line 5: .*no\.png does not exist"),
        (b"path,label\na.png,x\nsub,x\n", r"t\.csv line 3: .*sub is not a file"),
        (b"path,label\na.png,x\n./a.png,x\n", r"t\.csv line 3 lists a\.png a second time"),
        (b"path,label\na.png,x\nsub/../a.png,x\n", r"t\.csv line 3 lists .* has '\.\.'"),
        (b"path,label\n/etc/passwd,x\n", r"t\.csv line 2 lists /etc/passwd, which is absolute"),
        (b"path,label\nout/passwd,x\n", r"t\.csv line 2: .* leads out of"),
        (b"path,label\n,x\n", r"t\.csv line 2 has no path"),
        (b"path,label\na.png,  \n", r"t\.csv line 2 has no label"),
        (b"path,label,who\na.png,x,p\nb.png,x, \n", r"t\.csv line 3 has no who; fill it in"),
        (b"path,label,split\na.png,x,valid\n", r"t\.csv line 2 is in 'valid'"),
        (b"path,label\na.png,x/y\n", r"class 'x/y' of .* cannot be a folder's name"),
        (b"path,label\na.png,..\n", r"class '\.\.' of .* cannot be a folder's name"),
        (b"path,label\na.png," + b"x" * 256 + b"\n", r"class 'x*\.\.\.' of .* cannot be a folder"),
        (b"path,label\na.png,x\n\xff.png,x\n", r"t\.csv line 3 is not UTF-8"),
        ("path,label\na.png,x\n".encode("utf-16"), r"t\.csv line 1 is not UTF-8"),
        (b"path,label\na.png,x\0\n", r"t\.csv line 2 has a zero byte"),
        (b'path,label\na.png,"x\nb.png,y\n', r"t\.csv line 3 is no row of a CSV"),
        (b"path,label\na.png," + b"x" * 200_000 + b"\n", r"t\.csv line 2 is no row .* limit"),
        (b'path,label,n\na.png,x,"two\nlines"\nno.png,x,\n', r"t\.csv line 4: .*no\.png does"),
    ],
)
def test_csv_mistakes_are_told_with_file_and_line(tmp_path, content, told):
    for name in ("a.png", "b.png", "sub/c.png"):
        paint(tmp_path / "data" / name)
    (tmp_path / "data" / "t.csv").write_bytes(content)
    root = tmp_path / "data"
    if b"out/" in content:
        (root / "out").symlink_to("/etc")
        root = root / "t.csv"
    unit = "who" if b"who" in content else None
    with pytest.raises(UserError, match=told) as caught:
        found(root, unit=unit)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("by", ["column", "folders"])
def test_a_unit_in_both_splits(tmp_path, by):
    for name in ("train/0.png", "train/1.png", "test/0.png"):
        paint(tmp_path / name)
    if by == "column":
        rows = ["train/0.png,x,p1,train", "train/1.png,x,p2,train", "test/0.png,x,p2,test"]
        write_csv(tmp_path / "t.csv", "path,label,who,split", *rows)
        told = r"t\.csv line 4 has 'p2' in test, but other images of this unit are in train"
    else:
        write_csv(tmp_path / "train" / "t.csv", "path,label,who", "0.png,x,p1", "1.png,x,p2")
        write_csv(tmp_path / "test" / "t.csv", "path,label,who", "0.png,x,p2")
        told = r"test/t\.csv line 2 has 'p2' in test, but other images of this unit are in train"
    with pytest.raises(UserError, match=told):
        found(tmp_path, unit="who")
    assert len(found(tmp_path)["train"]) == 2


def test_a_column_split_within_a_split(tmp_path):
    for split in ("train", "test"):
        paint(tmp_path / split / "0.png")
        write_csv(tmp_path / split / "t.csv", "path,label,split", "0.png,x,train")
    with pytest.raises(UserError, match=r"train/t\.csv has a column split, but its folder is"):
        found(tmp_path)


# --------------------------------------------------------------------------------------- scale


def test_a_name_is_hashed_no_more_than_twice(tmp_path, monkeypatch):
    """Calls are counted, not seconds: what grows with the square of the images would show."""
    archive, count = tmp_path / "data.zip", 5_003
    rows = [f"{i % 7}/{i}.png,{i % 7},p{i % 97}" for i in range(count)]
    with zipfile.ZipFile(archive, "w") as file:
        for row in rows:
            file.writestr(row.partition(",")[0], b"")
        file.writestr("t.csv", "\n".join(["path,label,who", *rows]))
    hashed = []
    original = splitting._hash
    monkeypatch.setattr(splitting, "_hash", lambda text: hashed.append(text) or original(text))
    listing = read_catalogue(archive, "who", 13, 0.2).listing("train")
    assert len(hashed) <= 2 * count
    assert set(np.bincount(listing.units)) == {13}
