"""Reads the pickles that data sets were published as, without running anything they ask for.

A pickle is a program: it names functions and calls them. Here each call is only written down, and
what was written down is then read as data.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from dp_synth.data.sources import printable
from dp_synth.errors import UserError

# All that a pickled array of numbers names, in the spellings of NumPy 1 and NumPy 2.
_NAMES = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }
)
_NUMBERS = re.compile(r"[iu][1248]|f[248]")


def unpickle(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Read a pickled dictionary of numbers, texts, lists and NumPy arrays.

    Nothing that the pickle names is called or imported, so a malicious one does nothing: see
    "Restricting Globals" in https://docs.python.org/3/library/pickle.html. Pickles of Python 2 and
    3, of protocols 0 to 4, are read.

    Args:
        file: where the pickle begins.
        path: its name, for messages.

    Returns:
        The dictionary. Keys are text; a value that is an array of integers or floats is a NumPy
        array that must not be written to; texts of Python 2 are bytes.

    Raises:
        UserError: the pickle names something else, is broken, or is no such dictionary.
    """
    try:
        content = _Recorder(file, path).load()
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no dictionary; get the file again.")
        return {_text(key): _value(value) for key, value in content.items()}
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  broken pickles raise anything, says Python
        reason = printable(str(error) or type(error).__name__)
        raise UserError(f"{path} is a broken pickle ({reason}); get the file again.") from None


# The version in Python, as quick where one value holds all bytes: that in C makes room for as many
# remembered values as a pickle of ten bytes claims to have, 32 GB of it.
class _Recorder(pickle._Unpickler):
    # Whatever came after protocol 4 is left out: it makes room before it looks for the bytes, too.
    dispatch: ClassVar = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
    }

    def __init__(self, file: BinaryIO, path: Path) -> None:
        # As bytes, the pixels that Python 2 stored as text are not decoded and encoded again.
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> "_Name":
        if (module, name) not in _NAMES:
            raise UserError(
                f"{self._path} asks for {printable(f'{module}.{name}')}, which no published batch "
                "does; "
                "do not trust this file and get it again from its publisher."
            )
        return _Name(name)


@dataclass
class _Call:
    """A call that a pickle asked for, and the state that it wanted the result to have."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass
class _Name:
    """Stands for a function or a class; made anew for each mention, as a pickle may change it."""

    name: str

    def __call__(self, *arguments: Any) -> _Call:
        return _Call(self.name, arguments)


def _value(value: Any) -> Any:
    if not isinstance(value, _Call):
        return value
    return _content(value) if value.name == "encode" else _array(value)


def _array(call: _Call) -> npt.NDArray[np.generic]:
    """The array that ``_reconstruct`` would have made and filled with its state."""
    _, shape, dtype, is_fortran, content = call.state
    order: Any = "F" if is_fortran else "C"
    return np.frombuffer(_content(content), _dtype(dtype)).reshape(shape, order=order)


def _dtype(call: _Call) -> np.dtype[Any]:
    name, byte_order = _text(call.arguments[0]), _text(call.state[1])
    if not _NUMBERS.fullmatch(name):
        raise ValueError(f"its entries are of type {name}, not numbers")
    return np.dtype(byte_order + name)


def _content(content: Any) -> bytes:
    # Protocols before 3 have no bytes: Python 3 writes them there as a call of "encode".
    return content.arguments[0].encode("latin1") if isinstance(content, _Call) else content


def _text(key: str | bytes) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else key
