"""CIFAR-10: batches that torchvision reads too, and pickles that must not be run."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from conftest import refusal
from published_fixtures import CIFAR10_CLASSES, cifar10_batch, random_rows, write_cifar10

from dp_synth.data import cifar10
from dp_synth.data.cifar_format import count_images, read_batch
from dp_synth.data.unpickling import unpickle
from dp_synth.errors import UserError

FOLDER = "cifar-10-batches-py"


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def small(tmp_path):
    """A folder as torchvision is given it, with 5 x 7 + 11 images."""
    write_cifar10(tmp_path / FOLDER, per_batch=7, test=11)
    return tmp_path


# --- the data set


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inner", [False, True])
def test_the_images_are_those_that_torchvision_reads(small, monkeypatch, split, inner):
    reader = torchvision.datasets.CIFAR10
    sums = {name: md5(small / FOLDER / name) for name in cifar10._MD5}
    monkeypatch.setattr(reader, "train_list", list(sums.items())[:5])
    monkeypatch.setattr(reader, "test_list", list(sums.items())[5:])
    meta = reader.meta | {"md5": md5(small / FOLDER / "batches.meta")}
    monkeypatch.setattr(reader, "meta", meta)
    theirs = reader(small, train=split == "train")
    ours = cifar10.load(root=small / FOLDER if inner else small, split=split, verify=False)
    assert len(ours) == (35 if split == "train" else 11)
    assert (ours.pixels == theirs.data).all()
    assert ours.pixels.flags.c_contiguous and ours.pixels.flags.writeable
    assert ours.labels.tolist() == theirs.targets
    assert list(ours.classes) == theirs.classes == CIFAR10_CLASSES


def test_the_checksums_are_torchvisions():
    theirs = torchvision.datasets.CIFAR10
    assert dict(theirs.train_list + theirs.test_list) == cifar10._MD5
    assert theirs.base_folder == FOLDER


def test_the_layout_is_planes_of_rows():
    row = np.arange(3072, dtype=np.uint16).reshape(3, 32, 32) % 251
    rows = row.astype(np.uint8).reshape(1, 3072)
    pixels, _ = read_batch({"data": rows, "labels": [0]}, Path("batch"), classes=10)
    for channel, y, x in [(0, 0, 0), (0, 0, 31), (1, 0, 0), (2, 31, 31), (1, 17, 5)]:
        assert pixels[0, y, x, channel] == (1024 * channel + 32 * y + x) % 251


def test_other_files_than_the_published_need_verify_false(small):
    message = refusal(cifar10.load, root=small)
    assert "data_batch_1" in message and "dataset.verify=false" in message


def test_what_is_not_verified_is_not_unpickled(small, monkeypatch):
    monkeypatch.setattr(cifar10, "unpickle", None)
    assert "not the published file" in refusal(cifar10.load, root=small)


def test_verified_files_are_read(small, monkeypatch):
    sums = {name: md5(small / FOLDER / name) for name in cifar10._MD5}
    monkeypatch.setattr(cifar10, "_MD5", sums)
    assert len(cifar10.load(root=small)) == 35
    path = small / FOLDER / "data_batch_4"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1  # one bit of one pixel
    path.write_bytes(content)
    assert str(path) in refusal(cifar10.load, root=small)
    assert len(cifar10.load(root=small, split="test")) == 11
    assert len(cifar10.load(root=small, verify=False)) == 35


def test_files_that_are_nowhere(tmp_path):
    message = refusal(cifar10.load, root=tmp_path)
    for part in (f"dataset.root={tmp_path}", f"{FOLDER}/", "dataset.download=true"):
        assert part in message
    message = refusal(cifar10.load, cache=tmp_path)
    assert f"{tmp_path}/data/{FOLDER}" in message and "dataset.root" in message


def test_a_missing_batch_is_named(small):
    (small / FOLDER / "data_batch_3").unlink()
    assert "data_batch_3" in refusal(cifar10.load, root=small, verify=False)
    assert "data_batch_3" in refusal(cifar10.survey, root=small)


def test_unknown_split(small):
    assert "split='valid'" in refusal(cifar10.load, root=small, split="valid")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"labels": [1]}, "no entries"),
        ({"data": random_rows(1)}, "no entries"),
        ({"data": random_rows(2), "labels": [1]}, "2 images and 1 labels"),
        ({"data": random_rows(2)[:, 1:], "labels": [1, 2]}, "3072 bytes a row"),
        ({"data": random_rows(2).astype(float), "labels": [1, 2]}, "3072 bytes a row"),
        ({"data": "no array", "labels": [1, 2]}, "3072 bytes a row"),
        ({"data": random_rows(2), "labels": [1, 10]}, r"outside 0..9"),
        ({"data": random_rows(2), "labels": [-1, 1]}, r"outside 0..9"),
        ({"data": random_rows(2), "labels": [1, 2.0]}, "no integers"),
        ({"data": random_rows(2), "labels": [1, [2]]}, "no integers"),
        ({"data": random_rows(2), "labels": [1, 10**30]}, "no integers"),
        ({"data": random_rows(2), "labels": None}, "no integers"),
    ],
)
def test_batches_of_another_form(small, batch, expected):
    path = small / FOLDER / "test_batch"
    path.write_bytes(pickle.dumps(batch, protocol=2))
    message = refusal(cifar10.load, root=small, split="test", verify=False)
    assert expected in message and str(path) in message


def test_empty_batches(tmp_path):
    write_cifar10(tmp_path, per_batch=0, test=0)
    assert cifar10.load(root=tmp_path, verify=False).pixels.shape == (0, 32, 32, 3)
    assert cifar10.survey(root=tmp_path).num_examples == 0


# --- what names tell


@pytest.mark.parametrize("per_batch", [1, 7, 300])
def test_survey_counts_images(tmp_path, per_batch):
    write_cifar10(tmp_path / FOLDER, per_batch=per_batch)
    survey = cifar10.survey(root=tmp_path)
    assert (survey.num_examples, survey.num_files) == (5 * per_batch, 6)
    assert list(survey.classes) == CIFAR10_CLASSES


def test_survey_reads_no_pixel(small):
    for number in range(1, 6):
        path = small / FOLDER / f"data_batch_{number}"
        content = path.read_bytes()
        first_pixels = random_rows(7, seed=number)[0, :9].tobytes()
        path.write_bytes(content[: content.index(first_pixels)])
    assert cifar10.survey(root=small).num_examples == 35


@pytest.mark.parametrize("protocol", range(5))
def test_images_are_counted_in_pickles_of_any_protocol(protocol):
    batch = pickle.dumps({"labels": [3072, 5], "data": random_rows(2)}, protocol=protocol)
    assert count_images(io.BytesIO(batch), Path("batch")) == 2


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"data": 3072}), b"I3072\n)."])
def test_no_images_are_counted_in_something_else(content):
    assert "some-batch" in refusal(count_images, io.BytesIO(content), Path("some-batch"))


def test_survey_without_files(tmp_path):
    assert cifar10.survey(root=tmp_path) is None
    assert cifar10.survey(cache=tmp_path) is None


# --- pickles


ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    np.arange(5, dtype=">i4"),
    np.linspace(0, 1, 7),
    np.float32([[[1.5]]]),
    np.array(3),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
@pytest.mark.parametrize("protocol", range(5))
def test_arrays_are_what_pickle_itself_would_make(array, protocol):
    content = pickle.dumps({"a": array, "b": [1, 2], "c": "ü", "d": b"x"}, protocol=protocol)
    for spelling in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        theirs = pickle.loads(content)
        ours = unpickle(io.BytesIO(_spelled(content, spelling)), Path("batch"))
        assert [ours[key] for key in "bcd"] == [theirs[key] for key in "bcd"]
        assert ours["a"].dtype == array.dtype and ours["a"].shape == array.shape
        assert (ours["a"] == theirs["a"]).all()


@pytest.mark.parametrize("protocol", [3, 4])
def test_empty_arrays(protocol):
    content = pickle.dumps({"a": np.zeros((0, 3), np.int64)}, protocol=protocol)
    assert unpickle(io.BytesIO(content), Path("batch"))["a"].shape == (0, 3)


def _spelled(content, module):
    """The pickle with another name for the module; protocol 4 writes lengths before texts."""
    for known in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        if known not in content:
            continue
        # A frame would have to tell its length anew.
        if content[2:3] == b"\x95":
            content = content[:2] + content[11:]
        before = b"\x8c" + bytes([len(known)]) + known
        return content.replace(before, b"\x8c" + bytes([len(module)]) + module).replace(
            b"c" + known, b"c" + module
        )
    raise AssertionError("no array in the pickle")


def test_python_2s_pickle_is_what_pickle_itself_would_make():
    rows, labels = random_rows(7), [9, 8, 7, 6, 5, 4, 300]
    content = cifar10_batch(rows, labels)
    theirs = pickle.loads(content, encoding="latin1")
    ours = unpickle(io.BytesIO(content), Path("batch"))
    assert (ours["data"] == rows).all() and (theirs["data"] == rows).all()
    assert ours["labels"] == theirs["labels"] == labels
    assert ours["batch_label"].decode() == theirs["batch_label"]


class Call:
    """Pickled, it asks for a function to be called."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("verify", [False, True])
def test_a_malicious_pickle_is_not_run(small, monkeypatch, protocol, verify):
    path, trace = small / FOLDER / "test_batch", small / "trace"
    for call in (
        Call(os.system, f"touch {trace}"),
        Call(eval, f"open({str(trace)!r}, 'w')"),
        Call(getattr, [], "append"),
        Call(np.fromfile, str(path)),
        Call(np.zeros, (10**12,)),
    ):
        path.write_bytes(pickle.dumps({"data": call, "labels": []}, protocol=protocol))
        monkeypatch.setitem(cifar10._MD5, "test_batch", md5(path))
        message = refusal(cifar10.load, root=small, split="test", verify=verify)
        assert str(path) in message
        assert "asks for" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        # Names with a dot lead from a module that is allowed to one that is not.
        b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        b"cnumpy\nload\n.",
        b"c_codecs\nlookup\n.",
        b"cbuiltins\neval\n.",
        b"c__builtin__\neval\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
    ],
)
def test_names_next_to_the_allowed_ones(content):
    assert "asks for" in refusal(unpickle, io.BytesIO(content), Path("batch"))


def test_allowed_names_are_not_called_either():
    """A huge array, a codec with a side effect, a dtype of objects: written down, never made."""
    content = pickle.dumps({"a": Call(np.ndarray, (10**15,))}, protocol=2)
    assert "broken" in refusal(unpickle, io.BytesIO(content), Path("batch"))
    objects = pickle.dumps({"a": np.array([None, []], dtype=object)}, protocol=2)
    assert "broken" in refusal(unpickle, io.BytesIO(objects), Path("batch"))


def test_a_pickle_cannot_change_what_reads_the_next_one():
    """Attributes that it sets on what a name stands for are gone with it."""
    spoilt = (
        b"}(U\x01acnumpy\ndtype\n(N}Vname\nVspoilt\nstbU\x01bcnumpy\nndarray\n(N}V__call__\nNstbu."
    )
    spoilt = unpickle(io.BytesIO(spoilt), Path("batch"))
    assert spoilt["a"].name == "spoilt" and spoilt["b"].__call__ is None
    rows = random_rows(2)
    good = unpickle(io.BytesIO(cifar10_batch(rows, [1, 2])), Path("batch"))
    assert (good["data"] == rows).all()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x07.",  # to be remembered as number 134,217,727
        b"\x80\x05\x96\x00\x00\x00\x40\x00\x00\x00\x00.",  # 1 GiB of bytes follows
    ],
)
def test_a_pickle_gets_no_more_memory_than_it_has_bytes(content):
    """The peak is that of a process that does nothing else, where no earlier one hides it."""
    script = (
        "import io, resource; from pathlib import Path\n"
        "from dp_synth.data.unpickling import UserError, unpickle\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: unpickle(io.BytesIO({content!r}), Path('batch'))\n"
        "except UserError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 200_000  # KiB


def test_what_a_pickle_asks_for_is_printable():
    content = b"\x80\x04\x8c\x06os\n\x1b[2\x8c\x06system\x93."
    message = refusal(unpickle, io.BytesIO(content), Path("batch"))
    assert message.isprintable() and "asks for" in message


def test_labels_are_not_unfolded():
    """Lists in lists, or one long text among many: NumPy would make 50^7 numbers, 40 GB of text."""
    nested = [0] * 50
    for _ in range(6):
        nested = [nested] * 50
    for labels in (nested, ["a" * 100_000] + [""] * 100_000, [1 << 100], [True], [1.5], None):
        batch = {"data": random_rows(1), "labels": labels}
        assert "no integers" in refusal(read_batch, batch, Path("batch"), classes=10)


def test_broken_pickles_are_one_sentence():
    """Cut anywhere, or one byte changed: an error or a batch, and no other exception."""
    content = cifar10_batch(random_rows(2), [1, 2])
    small_part = [place for place in range(len(content)) if not 200 < place < len(content) - 200]
    rng = np.random.default_rng(0)
    outcomes = set()
    for place in small_part:
        changed = bytearray(content)
        changed[place] = rng.integers(256)
        for broken in (content[:place], bytes(changed)):
            for read in (_read, count_images):
                try:
                    read(io.BytesIO(broken), Path("some-batch"))
                    outcomes.add("read")
                except UserError as error:
                    assert "some-batch" in str(error)
                    outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def _read(file, path):
    read_batch(unpickle(file, path), path, classes=10)
