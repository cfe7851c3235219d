"""Writes small data sets in the formats in which their publishers ship them."""

import gzip
import pickle
import struct

import numpy as np

CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def idx(array):
    """An array of bytes in the IDX format."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist_like(folder, *, train=7, test=5, compressed=False, seed=0):
    """Four IDX files of random 28x28 images; the labels of a split are 0, 1, ... 9, 0, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for prefix, number in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(number) % 10)):
            content = idx(array)
            if compressed:
                (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{prefix}-{name}-ubyte").write_bytes(content)


def random_rows(number, seed=0):
    """Images as CIFAR-10 stores them: uint8 [n, 3072], planes of red, green and blue."""
    return np.random.default_rng(seed).integers(0, 256, (number, 3072), dtype=np.uint8)


def cifar10_batch(rows, labels, title="training batch 1 of 5"):
    """A batch as Python 2 pickled it, in which texts and pixels alike are byte strings."""
    return b"".join(
        [
            b"\x80\x02}(",
            _text2(b"batch_label") + _text2(title.encode()),
            _text2(b"labels") + _list2(map(_integer2, labels)),
            _text2(b"data") + _array2(rows),
            _text2(b"filenames")
            + _list2(_text2(b"picture_s_%06d.png" % number) for number in range(len(rows))),
            b"u.",
        ]
    )


def write_cifar10(folder, *, per_batch=7, test=5, seed=0):
    """The five training batches, the test batch and the names of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 6):
        rows = random_rows(per_batch, seed=seed + number)
        labels = np.arange(number, number + per_batch) % 10
        title = f"training batch {number} of 5"
        (folder / f"data_batch_{number}").write_bytes(cifar10_batch(rows, labels, title))
    rows = random_rows(test, seed=seed)
    batch = cifar10_batch(rows, np.arange(test) % 10, "testing batch 1 of 1")
    (folder / "test_batch").write_bytes(batch)
    names = _list2(_text2(name.encode()) for name in CIFAR10_CLASSES)
    (folder / "batches.meta").write_bytes(b"\x80\x02}(" + _text2(b"label_names") + names + b"u.")


def imagenet32_batch(rows, labels):
    """A batch of down-sampled ImageNet; labels are 1..1000."""
    return {"data": rows, "labels": [int(label) for label in labels], "mean": rows.mean(axis=0)}


def write_imagenet32(folder, *, per_batch=3, test=4, npz=False, protocol=3, seed=0):
    """Ten training batches and the validation batch; the last training batch has two more."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {f"train_data_batch_{number}": per_batch for number in range(1, 11)}
    sizes["train_data_batch_10"] += 2
    sizes["val_data"] = test
    for place, (name, size) in enumerate(sizes.items()):
        labels = 1 + (np.arange(size) + 97 * place) % 1000
        batch = imagenet32_batch(random_rows(size, seed=seed + place), labels)
        if npz:
            batch["labels"] = np.array(batch["labels"])
            np.savez(folder / f"{name}.npz", **batch)
        else:
            (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))


# What follows writes the instructions of a pickle by hand: Python 3 cannot write Python 2's.


def _text2(text):
    if len(text) < 256:
        return b"U" + struct.pack("<B", len(text)) + text
    return b"T" + struct.pack("<i", len(text)) + text


def _integer2(number):
    number = int(number)
    if number < 256:
        return b"K" + struct.pack("<B", number)
    return b"M" + struct.pack("<H", number)


def _list2(items):
    return b"](" + b"".join(items) + b"e"


def _array2(array):
    numbers = b"J" + struct.pack("<i", -1)
    dtype = b"cnumpy\ndtype\n" + _text2(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + _text2(b"|") + b"NNN" + numbers + numbers + b"K\x00tb"
    shape = b"".join(map(_integer2, array.shape)) + b"\x86"
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + _text2(b"b")
        + b"\x87R(K\x01"
        + shape
        + dtype
        + b"\x89"
        + _text2(array.tobytes())
        + b"tb"
    )
