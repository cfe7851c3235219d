"""The formats of data sets: other libraries read what was written, what was begun is redone."""

import io
import json
import os
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import files_below, refusal

from dp_synth.data.folder import write_image_folder
from dp_synth.data.images import Images
from dp_synth.formats import FORMATS, checksums
from dp_synth.formats.reading import first_samples, read_samples, summary_of

os.environ["HF_HUB_OFFLINE"] = "1"  # read by `datasets` when it is imported

FOLDER_CLASSES = ("10", "2", "a cat", "\u00e9t\u00e9 \u732b")  # in the order in which folders sort
ODD_CLASSES = ("b", "a", "", ".", "../x", "a/b", 'say "no"', "line\nbreak", "\u732b", "README.md")
SHAPES = [(1, 1, 1), (1, 1, 3), (7, 5, 1), (5, 7, 3), (8, 8, 1)]  # height, width, channels
BY_PNG = [form for form in FORMATS if form != "npz"]


def images_of(count, shape=(7, 5, 1), classes=FOLDER_CLASSES, seed=0):
    """Random images; the last class has none."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return Images(pixels, np.arange(count) * 7 % max(1, len(classes) - 1), classes)


def write(form, directory, images, shard_size=10):
    """Write a data set in shards; return it and the list of sums that the format made."""
    directory.mkdir(exist_ok=True)
    starts = range(0, len(images), shard_size) or range(1)
    sums, counts = {}, []
    for shard, first in enumerate(starts):
        part = images.select(np.arange(first, min(first + shard_size, len(images))))
        sums |= FORMATS[form].write_shard(directory, part, first, shard, len(starts))
        counts.append(len(part))
    sums |= FORMATS[form].assemble(directory, counts, images.classes)
    return sums


def keyed(images):
    """Images as a set of (pixels, class name): formats keep them in orders of their own."""
    rows = zip(images.pixels, images.labels, strict=True)
    return sorted((pixels.tobytes(), images.classes[label]) for pixels, label in rows)


def keyed_pairs(pairs, images):
    """The same of pairs (picture or array, class name) that another library gave."""
    shape = images.pixels.shape[1:]
    return sorted((np.asarray(p).reshape(shape).tobytes(), str(name)) for p, name in pairs)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "shard_size"), [(1, 1), (13, 13), (23, 5), (5, 1), (20, 10)])
def test_what_was_written_is_read(tmp_path, form, shape, count, shard_size):
    images = images_of(count, shape)
    write(form, tmp_path / "set", images, shard_size)
    back = read_samples(tmp_path / "set")
    assert tuple(back.classes) == images.classes
    assert keyed(back) == keyed(images)
    assert summary_of(tmp_path / "set") == (count, images.classes)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "png"])
def test_the_order_is_kept(tmp_path, form):
    images = images_of(23)
    write(form, tmp_path / "set", images, 5)
    back = read_samples(tmp_path / "set")
    assert np.array_equal(back.pixels, images.pixels)
    assert np.array_equal(back.labels, images.labels)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("most", [1, 4, 5, 6, 22, 23, 24])
def test_the_first_images_by_number(tmp_path, form, most):
    images = images_of(23)
    write(form, tmp_path / "set", images, 5)
    first = first_samples(tmp_path / "set", most)
    assert keyed(first) == keyed(images.select(np.arange(min(most, 23))))
    assert tuple(first.classes) == images.classes


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_images_by_number_beyond_a_million(tmp_path, form):
    """Names of seven digits come after those of six, though not in the order of strings."""
    images = images_of(3)
    (tmp_path / "set").mkdir()
    for shard, first in enumerate((0, 999_999, 1_000_000)):
        part = images.select([shard])
        FORMATS[form].write_shard(tmp_path / "set", part, first, shard, 3)
    FORMATS[form].assemble(tmp_path / "set", [1, 1, 1], images.classes)
    assert keyed(first_samples(tmp_path / "set", 2)) == keyed(images.select([0, 1]))


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_images_are_read_alone(tmp_path, form, monkeypatch):
    """A report is made of a million images, too: no more is opened than is shown."""
    images = images_of(40)
    write(form, tmp_path / "set", images, 10)
    late = [p for p in (tmp_path / "set").rglob("*") if p.is_file() and "00003" in p.name]
    if form == "png":
        late = [p for p in late if p.stem == "000031"]
    if form == "npz":  # one file, whose pixels are last but few bytes
        calls = []
        read = zipfile.ZipExtFile.read
        monkeypatch.setattr(
            zipfile.ZipExtFile, "read", lambda s, n=-1: calls.append(n) or read(s, n)
        )
    for path in late:
        path.write_bytes(b"damaged")
    assert len(first_samples(tmp_path / "set", 7)) == 7
    if form == "npz":
        assert all(n is not None and n >= 0 for n in calls) and max(calls) < images.pixels.nbytes
    else:
        assert late


@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_without_images(tmp_path, form):
    images = images_of(4)
    directory = tmp_path / "set"
    directory.mkdir()
    for shard, part in enumerate((images, images.select([]))):
        FORMATS[form].write_shard(directory, part, 4 * shard, shard, 2)
    FORMATS[form].assemble(directory, [4, 0], images.classes)
    assert keyed(read_samples(directory)) == keyed(images)
    assert summary_of(directory) == (4, images.classes)


@pytest.mark.parametrize("form", ["webdataset", "parquet", "npz"])
def test_class_names_may_be_anything(tmp_path, form):
    images = images_of(23, classes=ODD_CLASSES)
    FORMATS[form].check(ODD_CLASSES, 1)
    write(form, tmp_path / "set", images)
    assert tuple(read_samples(tmp_path / "set").classes) == ODD_CLASSES
    assert all(path.is_relative_to(tmp_path / "set") for path in tmp_path.rglob("*.*"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "a\\b", "a\nb", "README.md", "x" * 256]
)
def test_class_folders_refuse_what_is_no_name_of_a_folder(name):
    assert repr(name) in refusal(FORMATS["png"].check, ("a", name), 1)


def test_class_folders_do_not_hide_the_checksums():
    assert "SHA256SUMS" in refusal(FORMATS["png"].check, ("a", "SHA256SUMS"), 1)


@pytest.mark.parametrize("form", BY_PNG)
def test_other_numbers_of_channels_are_refused(form):
    assert "2" in refusal(FORMATS[form].check, ("a",), 2)
    FORMATS["npz"].check(("a",), 2)


def test_npz_holds_any_number_of_channels(tmp_path):
    images = images_of(5, (2, 3, 4))
    write("npz", tmp_path / "set", images)
    assert keyed(read_samples(tmp_path / "set")) == keyed(images)


def test_parquet_without_its_package_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    assert "pip install 'dp-synth[formats]'" in refusal(FORMATS["parquet"].check, ("a",), 1)
    FORMATS["webdataset"].check(("a",), 1)


@pytest.mark.parametrize("form", FORMATS)
def test_sums_are_those_of_the_files(tmp_path, form):
    sums = write(form, tmp_path / "set", images_of(23))
    checksums.write(tmp_path / "set", sums)
    checksums.verify(tmp_path / "set")
    files = {p.relative_to(tmp_path / "set").as_posix() for p in (tmp_path / "set").rglob("*.*")}
    assert files <= sums.keys() | {"SHA256SUMS"}  # so that no file is read twice


@pytest.mark.parametrize("form", FORMATS)
def test_card_and_checksums_beside_the_images_are_passed_over(tmp_path, form):
    images = images_of(23)
    write(form, tmp_path / "set", images)
    (tmp_path / "set" / "README.md").write_text("card")
    checksums.write(tmp_path / "set")
    assert keyed(read_samples(tmp_path / "set")) == keyed(images)
    assert summary_of(tmp_path / "set") == (23, images.classes)


def test_samples_of_earlier_versions_are_read(tmp_path):
    """Plain class folders with a card, whose numbers need not begin with 0."""
    images = images_of(23)
    write_image_folder(images, tmp_path / "samples")
    (tmp_path / "samples" / "README.md").write_text("card")
    (tmp_path / "samples" / FOLDER_CLASSES[0] / "000000.png").unlink()
    rest = images.select(np.arange(1, 23))
    assert keyed(read_samples(tmp_path / "samples")) == keyed(rest)
    assert keyed(first_samples(tmp_path / "samples", 3)) == keyed(rest.select([0, 1, 2]))
    assert summary_of(tmp_path / "samples") == (22, images.classes)


def test_nothing_is_not_samples(tmp_path):
    assert summary_of(tmp_path / "nowhere") == (0, ())
    assert summary_of(tmp_path) == (0, ())
    for read in (read_samples, lambda directory: first_samples(directory, 3)):
        assert "nowhere" in refusal(read, tmp_path / "nowhere")
        assert str(tmp_path) in refusal(read, tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_images_are_the_same_bytes(tmp_path, form, monkeypatch):
    write(form, tmp_path / "one", images_of(23))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    monkeypatch.setattr("os.getuid", lambda: 4711, raising=False)
    write(form, tmp_path / "two", images_of(23))
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_that_was_begun_is_written_again(tmp_path, form):
    images = images_of(23)
    expected = write(form, tmp_path / "whole", images, 6)
    (tmp_path / "set").mkdir()
    FORMATS[form].write_shard(tmp_path / "set", images.select(np.arange(6, 12)), 6, 1, 4)
    for path in (tmp_path / "set").rglob("*"):
        if path.is_file():  # cut, as by a kill
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert write(form, tmp_path / "set", images, 6) == expected
    assert files_below(tmp_path / "set") == files_below(tmp_path / "whole")


@pytest.mark.parametrize("form", FORMATS)
def test_assembling_twice_changes_nothing(tmp_path, form):
    images = images_of(23)
    sums = write(form, tmp_path / "set", images)
    before = files_below(tmp_path / "set")
    again = FORMATS[form].assemble(tmp_path / "set", [10, 10, 3], images.classes)
    assert files_below(tmp_path / "set") == before
    assert again.items() <= sums.items()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("keep", [0, 50, -1])
def test_damaged_files_are_one_sentence(tmp_path, form, keep):
    write(form, tmp_path / "set", images_of(23))
    path = max(
        (p for p in (tmp_path / "set").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if keep < 0 else content[:keep])
    assert path.name in refusal(read_samples, tmp_path / "set")


# Other people's readers.


@pytest.mark.parametrize("shape", [(7, 5, 1), (5, 7, 3), (1, 1, 1)])
def test_torchvision_opens_class_folders(tmp_path, shape):
    from torchvision.datasets import ImageFolder

    images = images_of(23, shape)
    write("png", tmp_path / "set", images)
    (tmp_path / "set" / "README.md").write_text("card")
    checksums.write(tmp_path / "set")
    data = ImageFolder(tmp_path / "set", allow_empty=True)
    assert tuple(data.classes) == images.classes
    mode = "L" if shape[2] == 1 else "RGB"
    pairs = [(picture.convert(mode), data.classes[label]) for picture, label in data]
    assert keyed_pairs(pairs, images) == keyed(images)


@pytest.mark.parametrize("shape", [(7, 5, 1), (5, 7, 3), (1, 1, 1)])
def test_webdataset_opens_its_shards(tmp_path, shape):
    import webdataset

    images = images_of(23, shape)
    write("webdataset", tmp_path / "set", images, 5)
    paths = sorted(map(str, (tmp_path / "set").glob("*.tar")))
    mode = "l8" if shape[2] == 1 else "rgb8"
    data = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode(mode)
    rows = list(data)
    found = [(row["png"], images.classes[row["cls"]]) for row in rows]
    assert keyed_pairs(found, images) == keyed(images)
    keys = [row["__key__"] for row in rows]
    assert keys == sorted(set(keys)) == [f"{number:06d}" for number in range(23)]


def test_tar_files_say_nothing_of_their_maker(tmp_path):
    write("webdataset", tmp_path / "set", images_of(23), 5)
    for path in (tmp_path / "set").glob("*.tar"):
        with tarfile.open(path, "r:", errorlevel=2) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                assert (member.uname, member.gname) == ("", "")
                assert member.isreg() and member.mode == 0o644
        assert path.stat().st_size % tarfile.RECORDSIZE == 0


def test_tar_files_are_those_of_the_library(tmp_path):
    """Byte for byte what ``tarfile`` makes of the same members."""
    write("webdataset", tmp_path / "set", images_of(11), 11)
    (path,) = (tmp_path / "set").glob("*.tar")
    oracle = io.BytesIO()
    with (
        tarfile.open(path, "r:") as archive,
        tarfile.open(fileobj=oracle, mode="w", format=tarfile.USTAR_FORMAT) as other,
    ):
        for member in archive:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            other.addfile(info, archive.extractfile(member))
    assert path.read_bytes() == oracle.getvalue()


@pytest.mark.parametrize("shape", [(7, 5, 1), (5, 7, 3), (1, 1, 3)])
def test_numpy_opens_the_archive(tmp_path, shape):
    images = images_of(23, shape, ODD_CLASSES)
    write("npz", tmp_path / "set", images, 5)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["samples.npz"]
    with np.load(tmp_path / "set" / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1", "classes"]
        assert archive["arr_0"].dtype == np.uint8 and archive["arr_1"].dtype == np.int64
        assert np.array_equal(archive["arr_0"], images.pixels)
        assert np.array_equal(archive["arr_1"], images.labels)
        assert tuple(archive["classes"].tolist()) == ODD_CLASSES


@pytest.fixture
def load_dataset(tmp_path):
    """``datasets.load_dataset`` with a cache of its own and without a network."""
    import datasets

    def load(*arguments, **options):
        return datasets.load_dataset(
            *map(str, arguments), cache_dir=str(tmp_path / "cache"), **options
        )

    datasets.disable_progress_bars()
    return load


def pairs_of(data, images):
    names = data.features["label"].names
    mode = "L" if images.shape[0] == 1 else "RGB"
    return [(row["image"].convert(mode), names[row["label"]]) for row in data]


@pytest.mark.parametrize("shape", [(7, 5, 1), (5, 7, 3)])
def test_datasets_opens_parquet(tmp_path, load_dataset, shape):
    images = images_of(23, shape, ODD_CLASSES)
    write("parquet", tmp_path / "set", images, 5)
    names = sorted(path.name for path in (tmp_path / "set" / "data").iterdir())
    assert names == [f"train-{shard:05d}-of-00005.parquet" for shard in range(5)]
    files = str(tmp_path / "set" / "data" / "*.parquet")
    data = load_dataset("parquet", data_files=files, split="train")
    assert tuple(data.features["label"].names) == ODD_CLASSES
    assert keyed_pairs(pairs_of(data, images), images) == keyed(images)
    assert [np.asarray(row["image"]).tobytes() for row in data] == [
        pixels.tobytes() for pixels in images.pixels
    ]


def test_parquet_is_described_as_datasets_would(tmp_path):
    from datasets import ClassLabel, Features, Image
    from pyarrow import parquet

    write("parquet", tmp_path / "set", images_of(3, classes=ODD_CLASSES))
    (path,) = (tmp_path / "set" / "data").iterdir()
    schema = parquet.read_schema(path)
    oracle = Features({"image": Image(), "label": ClassLabel(names=list(ODD_CLASSES))}).arrow_schema
    assert schema.remove_metadata() == oracle.remove_metadata()
    described, expected = (json.loads(s.metadata[b"huggingface"]) for s in (schema, oracle))
    assert described == expected


@pytest.mark.parametrize("shape", [(7, 5, 1), (5, 7, 3)])
def test_datasets_opens_class_folders(tmp_path, load_dataset, shape):
    images = images_of(23, shape)
    write("png", tmp_path / "set", images)
    checksums.write(tmp_path / "set")
    data = load_dataset("imagefolder", data_dir=str(tmp_path / "set"), split="train")
    # It does not see the folder of the class that has no image.
    assert tuple(data.features["label"].names) == images.classes[:-1]
    assert keyed_pairs(pairs_of(data, images), images) == keyed(images)


@pytest.mark.parametrize("form", BY_PNG)
@pytest.mark.parametrize("classes", [FOLDER_CLASSES, ("one", "none")])
def test_datasets_opens_the_folder_by_its_card(tmp_path, load_dataset, form, classes):
    """The header alone tells which files there are: with one class of images, too."""
    import yaml

    images = images_of(13, classes=classes)
    write(form, tmp_path / "set", images, 5)
    header = yaml.safe_dump(FORMATS[form].card_header())
    (tmp_path / "set" / "README.md").write_text(f"---\n{header}---\n\nText.\n")
    checksums.write(tmp_path / "set")
    data = load_dataset(tmp_path / "set", split="train")
    if form == "webdataset":
        pairs = [(row["png"].convert("L"), images.classes[row["cls"]]) for row in data]
    else:
        pairs = pairs_of(data, images)
    assert keyed_pairs(pairs, images) == keyed(images)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("folder", [".", "samples-2"])
def test_the_lines_of_the_card_load_the_data_set(tmp_path, form, folder, monkeypatch):
    """As printed, from the folder that they name."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    images = images_of(23, classes=("a", "b", "c"))
    images = Images(images.pixels, np.arange(23) % 3, images.classes)
    write(form, tmp_path / folder if folder != "." else tmp_path, images)
    names = {}
    exec(FORMATS[form].loading(folder), names)  # noqa: S102
    found = names["images"] if form == "npz" else list(names["data"])
    assert len(found) == 23
