"""Fashion-MNIST and MNIST: IDX files, where they are found, and what is refused."""

import gzip
import hashlib
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from conftest import refusal
from published_fixtures import idx, write_mnist_like

from dp_synth.data import fashion_mnist, mnist
from dp_synth.data.idx import count_items
from dp_synth.data.idx import read as read_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SETS = [
    (mnist, torchvision.datasets.MNIST, "MNIST/raw"),
    (fashion_mnist, torchvision.datasets.FashionMNIST, "FashionMNIST/raw"),
]
each_set = pytest.mark.parametrize(("source", "reader", "folder"), SETS)


@pytest.fixture
def installed():
    """The folder of Debian's package."""
    if not (DEBIAN / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    return DEBIAN


# --- IDX


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [(0,), (1,), (13,), (0, 28, 28), (1, 3, 5), (7, 28, 28)])
def test_idx_round_trip(tmp_path, shape, compressed):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = idx(array)
    # By content, whatever the name says.
    for name in ("file", "file.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content) if compressed else content)
        found = read_idx(tmp_path / name, shape[1:], hashlib.md5(content).hexdigest())
        assert found.shape == shape and found.dtype == np.uint8 and found.flags.writeable
        assert (found == array).all()
        assert count_items(tmp_path / name, shape[1:]) == shape[0]


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_cut_short_anywhere(tmp_path, compressed):
    content = idx(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    stored = gzip.compress(content) if compressed else content
    path = tmp_path / "cut-short"
    for length in range(len(stored)):
        path.write_bytes(stored[:length])
        assert "cut-short" in refusal(read_idx, path, (2, 3))


def test_idx_refuses_what_its_header_does_not_say(tmp_path):
    path = tmp_path / "some-file"
    good = idx(np.zeros((2, 2, 3), np.uint8))
    for content, expected in [
        (good + b"\0", "holds more"),
        (b"\1" + good[1:], "no IDX file"),
        (good[:2] + b"\x0d" + good[3:], "no IDX file"),  # 13: floats
        (idx(np.zeros(5, np.uint8)), "no IDX file of bytes in 3 dimensions"),
        (idx(np.zeros((2, 3, 2), np.uint8)), r"items of (3, 2), not (2, 3)"),
        (good[:4] + b"\xff\xff\xff\xff" + good[8:], "declares 25,769,803,770 bytes"),
        (good[:4] + b"\0\0\0\3" + good[8:], "declares 18 bytes of data and holds 12"),
        (b"<html>Not found</html>", "no IDX file"),
    ]:
        path.write_bytes(content)
        message = refusal(read_idx, path, (2, 3))
        assert expected in message and "some-file" in message
    assert "some-folder" in refusal(read_idx, tmp_path / "some-folder", ())


# --- the four files


@each_set
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inner", [False, True])
def test_the_images_are_those_that_torchvision_reads(
    tmp_path, source, reader, folder, split, inner
):
    write_mnist_like(tmp_path / folder, train=13, test=11)
    theirs = reader(tmp_path, train=split == "train")
    root = tmp_path / folder if inner else tmp_path
    ours = source.load(root=root, split=split, verify=False)
    assert ours.shape == (1, 28, 28)
    assert (ours.pixels[..., 0] == theirs.data.numpy()).all()
    assert (ours.labels == theirs.targets.numpy()).all()
    assert len(ours.classes) == len(theirs.classes)


@each_set
def test_compressed_files_are_the_same_data_set(tmp_path, source, reader, folder):
    for name, compressed in (("plain", False), ("compressed", True)):
        write_mnist_like(tmp_path / name / folder, compressed=compressed)
    plain, compressed = (
        source.load(root=tmp_path / name, verify=False) for name in ("plain", "compressed")
    )
    assert (plain.pixels == compressed.pixels).all()
    assert (plain.labels == compressed.labels).all()


@each_set
def test_other_files_than_the_published_need_verify_false(tmp_path, source, reader, folder):
    write_mnist_like(tmp_path / folder)
    message = refusal(source.load, root=tmp_path)
    assert "train-images-idx3-ubyte" in message and "dataset.verify=false" in message


def test_class_names_can_be_folders_and_are_the_published_ones():
    published = torchvision.datasets.FashionMNIST.classes
    assert [name.replace("/", " or ") for name in published] == list(fashion_mnist.CLASSES)
    assert [name[0] for name in torchvision.datasets.MNIST.classes] == list(mnist.CLASSES)


def test_images_and_labels_must_fit_each_other(tmp_path):
    write_mnist_like(tmp_path, train=7)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(8)))
    message = refusal(mnist.load, root=tmp_path, verify=False)
    assert "7 images" in message and "8 labels" in message and str(labels) in message
    labels.write_bytes(idx(np.full(7, 10)))
    message = refusal(mnist.load, root=tmp_path, verify=False)
    assert str(labels) in message and "10, above 9" in message


def test_a_missing_file_is_named(tmp_path):
    write_mnist_like(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    message = refusal(mnist.load, root=tmp_path, split="test", verify=False)
    assert "t10k-labels-idx1-ubyte.gz" in message and str(tmp_path) in message
    assert len(mnist.load(root=tmp_path, verify=False)) == 7


@each_set
def test_unknown_split(tmp_path, source, reader, folder):
    write_mnist_like(tmp_path)
    assert "split='valid'" in refusal(source.load, root=tmp_path, split="valid")


# --- where the files are


def test_files_that_are_nowhere(tmp_path):
    message = refusal(mnist.load, root=tmp_path / "nowhere")
    for part in (f"dataset.root={tmp_path}/nowhere", "MNIST/raw/", "dataset.download=true"):
        assert part in message
    message = refusal(mnist.load, cache=tmp_path)
    for part in (f"{tmp_path}/data/MNIST/raw", "dataset.root", "dataset.download=true"):
        assert part in message


def test_fashion_mnist_names_debians_package(tmp_path, monkeypatch):
    elsewhere = replace(fashion_mnist._FASHION_MNIST, installed=tmp_path / "usr")
    monkeypatch.setattr(fashion_mnist, "_FASHION_MNIST", elsewhere)
    message = refusal(fashion_mnist.load, cache=tmp_path)
    assert f"{tmp_path}/usr or {tmp_path}/data" in message
    assert "dataset-fashion-mnist" in message and "dataset.download=true" in message
    write_mnist_like(tmp_path / "usr", train=3, compressed=True)
    assert len(fashion_mnist.load(cache=tmp_path, verify=False)) == 3


def test_the_download_place_is_found_without_a_root(tmp_path):
    write_mnist_like(tmp_path / "data" / "MNIST" / "raw", train=3)
    assert len(mnist.load(cache=tmp_path, verify=False)) == 3


@pytest.mark.parametrize("given", [False, True])
def test_download_through_torchvision(tmp_path, monkeypatch, given):
    def download(self):
        write_mnist_like(Path(self.raw_folder), train=3)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    options = {"root": tmp_path / "root"} if given else {"cache": tmp_path / "cache"}
    home = tmp_path / "root" if given else tmp_path / "cache" / "data"
    assert len(mnist.load(**options, verify=False, download=True)) == 3
    assert [path.name for path in home.iterdir()] == ["MNIST"]  # and nothing of the download
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", _not_again)
    assert len(mnist.load(**options, verify=False, download=True)) == 3


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = refusal(mnist.load, root=tmp_path, download=True)
    assert "could not be downloaded" in message and "no network" in message
    assert list(tmp_path.iterdir()) == []


def test_a_download_into_a_file_fails(tmp_path):
    (tmp_path / "file").touch()
    assert "could not be downloaded" in refusal(mnist.load, root=tmp_path / "file", download=True)


def _not_again(self):
    raise AssertionError("downloaded again")


# --- what names tell


@pytest.mark.parametrize("compressed", [False, True])
def test_survey_reads_the_number_from_the_header(tmp_path, compressed):
    write_mnist_like(tmp_path / "MNIST" / "raw", train=11, compressed=compressed)
    survey = mnist.survey(root=tmp_path)
    assert (survey.num_examples, survey.num_files) == (11, 4)
    assert survey.classes == mnist.CLASSES


def test_survey_opens_no_image(tmp_path):
    write_mnist_like(tmp_path, train=11)
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:16])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"")
    assert mnist.survey(root=tmp_path).num_examples == 11


def test_survey_without_files(tmp_path):
    assert mnist.survey(root=tmp_path) is None
    assert mnist.survey(cache=tmp_path) is None


def test_survey_of_a_broken_file(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\x1f\x8bnonsense")
    assert "train-images-idx3-ubyte" in refusal(mnist.survey, root=tmp_path)


# --- Fashion-MNIST in full


def test_fashion_mnist_in_full(installed):
    train, test = fashion_mnist.load(), fashion_mnist.load(split="test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert (np.bincount(train.labels) == 6_000).all() and (np.bincount(test.labels) == 1_000).all()
    # The mean and the standard deviation that everybody normalises Fashion-MNIST with.
    assert train.pixels.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert train.pixels.std() / 255 == pytest.approx(0.3530, abs=1e-4)
    assert fashion_mnist.survey().num_examples == 60_000


def test_debians_files_uncompressed_are_what_torchvision_reads(installed, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in installed.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    theirs = torchvision.datasets.FashionMNIST(tmp_path, train=False)
    ours = fashion_mnist.load(root=tmp_path, split="test")
    assert (ours.pixels[..., 0] == theirs.data.numpy()).all()
    assert (ours.labels == theirs.targets.numpy()).all()


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("compressed", [False, True])
def test_one_flipped_bit_is_found(installed, tmp_path, name, compressed):
    for path in installed.glob("t10k-*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fashion_mnist.load(root=tmp_path, split="test")
    content = bytearray(gzip.decompress((tmp_path / f"{name}.gz").read_bytes()))
    content[4321] ^= 1
    (tmp_path / f"{name}.gz").write_bytes(
        gzip.compress(content, compresslevel=1) if compressed else content
    )
    message = refusal(fashion_mnist.load, root=tmp_path, split="test")
    assert name in message and "not the published file" in message
    assert len(fashion_mnist.load(root=tmp_path, split="test", verify=False)) == 10_000
