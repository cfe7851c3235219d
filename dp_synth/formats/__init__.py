"""How synthetic data sets are stored: each format is a module with one calling convention."""

from dp_synth.formats import npz, parquet, png, webdataset
from dp_synth.formats.format import Format

FORMATS: dict[str, Format] = {
    "png": png,
    "webdataset": webdataset,
    "parquet": parquet,
    "npz": npz,
}
"""The formats by the names that users type."""

__all__ = ["FORMATS", "Format"]
