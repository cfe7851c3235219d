"""Features of real images on disk, so that each run of a sweep need not compute them again."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from dp_synth.data.journal import open_private
from dp_synth.errors import UserError
from dp_synth.metrics.features.extraction import Features

logger = logging.getLogger("dp_synth")

_HASH_ROWS = 4096


def cached(
    features: Features, pixels: npt.NDArray[np.uint8], directory: Path
) -> npt.NDArray[np.float32]:
    """Return ``features(pixels)``, computed now or by an earlier call.

    Features of private images are private and are kept until someone removes them, 4 bytes a
    number, in a file that is named by a hash of the pixels and the features' fingerprint. The
    folder has mode 0700 and files 0600, whatever the umask. A file gets its name when it is whole;
    of two calls at once, the second waits for the first. Features without a fingerprint are not
    kept.

    Args:
        features: the network.
        pixels: uint8 ``[N, H, W, C]``.
        directory: the folder of all such files; made if missing.

    Returns:
        float32 ``[N, D]``, a read-only ``np.memmap`` unless N is 0 or nothing is kept.

    Raises:
        UserError: a directory that cannot be written or is full.
    """
    if features.fingerprint is None or len(pixels) == 0:
        return features(pixels)
    path = directory / f"{_key(features.fingerprint, pixels)}.npy"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
        with FileLock(path.with_name(f".{path.stem}.lock"), mode=0o600):
            if not path.exists():
                logger.warning(
                    "Features of private images are kept in %s, which only you may read, until "
                    "you remove it.",
                    directory,
                )
                _write(features, pixels, path)
    # NotImplementedError is filelock's, of a file system without locks.
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"features cannot be kept in {directory} ({reason}); set DP_SYNTH_CACHE to a folder of "
            "your own on a disk with space."
        ) from error
    rows: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
    return rows


def _write(features: Features, pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """Write a batch at a time: all rows may not fit into memory."""
    partial = path.with_name(f".{path.stem}.partial")
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
        "fortran_order": False,
        "shape": (len(pixels), features.num_features),
    }
    with open_private(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in features.batches(pixels):
            file.write(rows.data)
    partial.rename(path)


def _key(fingerprint: str, pixels: npt.NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(f"{fingerprint} {pixels.shape}".encode())
    for start in range(0, len(pixels), _HASH_ROWS):
        digest.update(np.ascontiguousarray(pixels[start : start + _HASH_ROWS]).data)
    return digest.hexdigest()[:32]
