"""Down-sampled ImageNet: the publisher's batches, in part or whole, as they are or made to fit."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import refusal
from published_fixtures import imagenet32_batch, random_rows, write_imagenet32

from dp_synth.data import digits, imagenet32, mnist


def official(folder, split):
    """The rows and labels of a split as the publisher's own script reads them."""
    names = ["val_data"]
    if split == "train":
        names = [f"train_data_batch_{number}" for number in range(1, 11)]
    batches = [pickle.loads((folder / name).read_bytes()) for name in names]
    rows = np.concatenate([batch["data"] for batch in batches])
    # Three planes of 1024 values, put side by side and cut into rows.
    images = np.dstack((rows[:, :1024], rows[:, 1024:2048], rows[:, 2048:]))
    labels = np.array([label for batch in batches for label in batch["labels"]])
    return images.reshape(-1, 32, 32, 3), labels


@pytest.fixture
def pickled(tmp_path):
    """32 training images and 4 validation images."""
    write_imagenet32(tmp_path)
    return tmp_path


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_and_labels_are_the_publishers(tmp_path, split, protocol):
    write_imagenet32(tmp_path, protocol=protocol)
    pixels, labels = official(tmp_path, split)
    images = imagenet32.load(tmp_path, split)
    assert len(images) == (32 if split == "train" else 4)
    assert (images.pixels == pixels).all()
    assert (images.labels == labels - 1).all()


def test_npz_holds_the_same(tmp_path):
    write_imagenet32(tmp_path / "a")
    write_imagenet32(tmp_path / "b", npz=True)
    for split in ("train", "test"):
        pickled, npz = (imagenet32.load(tmp_path / name, split) for name in "ab")
        assert (pickled.pixels == npz.pixels).all()
        assert (pickled.labels == npz.labels).all()


@pytest.mark.parametrize("npz", [False, True])
def test_the_publishers_folders_are_found(tmp_path, npz):
    suffix = "_npz" if npz else ""
    write_imagenet32(tmp_path, npz=npz)
    for folder in (f"Imagenet32_train{suffix}", f"Imagenet32_val{suffix}"):
        (tmp_path / folder).mkdir()
    for path in [path for path in tmp_path.iterdir() if path.is_file()]:
        kind = "val" if path.name.startswith("val") else "train"
        path.rename(tmp_path / f"Imagenet32_{kind}{suffix}" / path.name)
    assert len(imagenet32.load(tmp_path)) == 32
    assert len(imagenet32.load(tmp_path, "test")) == 4
    assert len(imagenet32.load(tmp_path / f"Imagenet32_train{suffix}")) == 32


@pytest.mark.parametrize("npz", [False, True])
@pytest.mark.parametrize("number", [1, 3, 4, 31, 32])
def test_the_first_images_alone(tmp_path, number, npz):
    write_imagenet32(tmp_path, npz=npz)
    every, some = imagenet32.load(tmp_path), imagenet32.load(tmp_path, num_images=number)
    assert len(some) == number
    assert (some.pixels == every.pixels[:number]).all()
    assert (some.labels == every.labels[:number]).all()


def test_only_what_is_wanted_is_opened(pickled):
    expected = imagenet32.load(pickled).pixels[:7]
    (pickled / "train_data_batch_4").write_bytes(b"broken")
    assert (imagenet32.load(pickled, num_images=7).pixels == expected).all()
    assert "train_data_batch_4" in refusal(imagenet32.load, pickled, num_images=10)


def test_more_images_than_there_are(pickled):
    message = refusal(imagenet32.load, pickled, num_images=33)
    assert "public.load.num_images=33" in message and "32 images" in message


@pytest.mark.parametrize("number", [0, -1, 1.5, "many"])
def test_numbers_that_are_none(pickled, number):
    assert "public.load.num_images" in refusal(imagenet32.load, pickled, num_images=number)


# --- shapes


@pytest.mark.parametrize("side", [1, 8, 28, 31, 64, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(pickled, channels, side):
    images = imagenet32.load(pickled, image_shape=(channels, side, side))
    assert images.shape == (channels, side, side)
    assert len(images) == 32


def test_grey_is_the_luma_of_itu_r_601(pickled):
    colour = imagenet32.load(pickled).pixels.astype(float)
    grey = imagenet32.load(pickled, image_shape=(1, 32, 32)).pixels[..., 0]
    luma = (299 * colour[..., 0] + 587 * colour[..., 1] + 114 * colour[..., 2]) / 1000
    assert np.abs(grey - luma).max() <= 1


@pytest.mark.parametrize("side", [8, 28, 47])
def test_resizing_is_antialiased_bicubic_resampling(pickled, side):
    """PyTorch has its own: the same but for Pillow's rounding between its two passes."""
    colour = torch.from_numpy(imagenet32.load(pickled).pixels).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(
        colour.float(), (side, side), mode="bicubic", antialias=True, align_corners=False
    )
    theirs = theirs.clamp(0, 255).permute(0, 2, 3, 1).numpy()
    ours = imagenet32.load(pickled, image_shape=(3, side, side)).pixels.astype(float)
    difference = np.abs(ours - theirs)
    assert difference.mean() < 1
    assert np.quantile(difference, 0.99) < 3


@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 32, 31), (1, 0, 0)])
def test_shapes_that_there_are_not(pickled, shape):
    assert "dataset.image_shape" in refusal(imagenet32.load, pickled, image_shape=shape)


# --- classes


def test_no_class_is_taken_for_one_of_another_data_set(pickled):
    classes = set(imagenet32.load(pickled).classes)
    assert len(classes) == 1000
    assert not classes & {*digits.CLASSES, *mnist.CLASSES}


def test_the_ends_of_the_range_of_labels(pickled):
    batch = imagenet32_batch(random_rows(2), [1, 1000])
    (pickled / "val_data").write_bytes(pickle.dumps(batch, protocol=3))
    images = imagenet32.load(pickled, "test")
    assert [images.classes[label] for label in images.labels] == ["imagenet 1", "imagenet 1000"]


# --- what is refused


@pytest.mark.parametrize("label", [0, 1001, -5])
def test_labels_out_of_range(pickled, label):
    batch = imagenet32_batch(random_rows(2), [1, label])
    (pickled / "val_data").write_bytes(pickle.dumps(batch, protocol=3))
    message = refusal(imagenet32.load, pickled, "test")
    assert "outside 1..1000" in message and "val_data" in message


def test_files_that_are_nowhere(tmp_path):
    assert "public.root" in refusal(imagenet32.load, None)
    message = refusal(imagenet32.load, tmp_path)
    assert f"public.root={tmp_path}" in message and "train_data_batch_1.npz" in message


def test_a_missing_batch_is_named(pickled):
    (pickled / "train_data_batch_7").unlink()
    assert "train_data_batch_7" in refusal(imagenet32.load, pickled)


def test_unknown_split(pickled):
    assert "split='valid'" in refusal(imagenet32.load, pickled, "valid")


class Trap:
    """Pickled, it asks for a command to be run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("npz", [False, True])
def test_malicious_batches_are_not_run(tmp_path, npz):
    write_imagenet32(tmp_path, npz=npz)
    batch = imagenet32_batch(random_rows(2), [1, 2])
    trap = Trap(tmp_path / "trace")
    if npz:
        labels = np.array([trap, trap], dtype=object)
        np.savez(tmp_path / "val_data.npz", **(batch | {"labels": labels}))
    else:
        (tmp_path / "val_data").write_bytes(pickle.dumps(batch | {"labels": trap}))
    assert "val_data" in refusal(imagenet32.load, tmp_path, "test")
    assert not (tmp_path / "trace").exists()


def test_broken_archives(tmp_path):
    write_imagenet32(tmp_path, npz=True)
    path = tmp_path / "val_data.npz"
    content = path.read_bytes()
    for broken in (b"", b"no archive", content[:-30], content[:500] + b"x" + content[501:]):
        path.write_bytes(broken)
        assert "val_data.npz" in refusal(imagenet32.load, tmp_path, "test")
    np.savez(path, labels=[1])
    assert "val_data.npz" in refusal(imagenet32.load, tmp_path, "test")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", "no array")
    assert "val_data.npz" in refusal(imagenet32.load, tmp_path, "test")


def test_more_than_fits_in_memory(pickled, monkeypatch):
    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(imagenet32.np, "empty", no_memory)
    assert "public.load.num_images" in refusal(imagenet32.load, pickled)
