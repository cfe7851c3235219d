"""Finds the files of a published data set, downloads them if asked to, and checks their contents."""

import hashlib
import os.path
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from dp_synth.errors import UserError
from dp_synth.files import cache_folder


@dataclass(frozen=True)
class Publication:
    """Where a published data set may lie.

    Attributes:
        name: as in ``dataset=NAME``.
        torchvision: the class of ``torchvision.datasets`` that downloads it.
        folder: where that class puts the files, below the folder that it is given.
        files: names of files, any of which shows that a folder is the right one.
        package: the Debian package that has the files, if there is one.
        installed: where that package puts them.
    """

    name: str
    torchvision: str
    folder: str
    files: tuple[str, ...]
    package: str | None = None
    installed: Path | None = None

    def find(self, root: Path | str | None, cache: Path | str | None) -> Path | None:
        """The folder that has the files, or None; no file is opened.

        Args:
            root: the folder that torchvision would be given, or the one that has the files; None
                looks where a system package puts them, then where ``obtain`` downloads them to.
            cache: see ``files.cache_folder``.
        """
        for place in self._places(root, cache):
            # Unlike Path.is_file, this is False also where the user may not look.
            if any(os.path.isfile(place / file) for file in self.files):
                return place
        return None

    def obtain(self, root: Path | str | None, cache: Path | str | None, *, download: bool) -> Path:
        """The folder that has the files, downloaded if they are nowhere and ``download`` is true.

        A download goes into ``root`` or, where that is None, into the folder ``data`` of the cache.

        Raises:
            UserError: the files are nowhere, or the download failed; it then left no file behind.
        """
        found = self.find(root, cache)
        if found is not None:
            return found
        if download:
            return self._download(download_folder(root, cache))
        if root is not None:
            raise UserError(
                f"dataset.root={root} does not hold the files of {self.name}; give the folder that "
                f"holds {self.folder}/, or set dataset.download=true to download it there."
            )
        places = " or ".join(str(place) for place in self._places(root, cache))
        package = f", or install the Debian package {self.package}" if self.package else ""
        raise UserError(
            f"{self.name} is not in {places}; set dataset.root to the folder that holds "
            f"{self.folder}/, or set dataset.download=true to download it{package}."
        )

    def _places(self, root: Path | str | None, cache: Path | str | None) -> Iterator[Path]:
        if root is None and self.installed is not None:
            yield self.installed
        yield download_folder(root, cache) / self.folder
        if root is not None:
            yield Path(root).expanduser()

    def _download(self, home: Path) -> Path:
        import torchvision  # takes a second, which only a download is worth

        target = home / self.folder
        try:
            home.mkdir(parents=True, exist_ok=True)
            # Files move to their place when all are whole: torchvision takes a part for a file.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=home) as staging:
                getattr(torchvision.datasets, self.torchvision)(staging, download=True)
                target.mkdir(parents=True, exist_ok=True)
                for path in Path(staging, self.folder).iterdir():
                    path.replace(target / path.name)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.name} could not be downloaded to {home} ({reason}); download it elsewhere "
                f"and set dataset.root to the folder that holds {self.folder}/."
            ) from None
        return target


def check_md5(content: bytes, md5: str, path: Path) -> None:
    """Compare a file's content with what its publisher published.

    Raises:
        UserError: they differ.
    """
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(
            f"{path} is not the published file (its content's md5 is {found}, not {md5}); get the "
            "file again, or take it as it is with dataset.verify=false."
        )


def unreadable(path: Path, error: Exception) -> UserError:
    """What to raise for a published file that cannot be read."""
    reason = getattr(error, "strerror", None) or error  # an OSError's text has the path once more
    return UserError(f"{path} cannot be read ({reason}); get the file again.")


def download_folder(root: Path | str | None, cache: Path | str | None) -> Path:
    """The folder that a publisher's own tool would be given: the root, or ``data`` in the cache."""
    return cache_folder(cache) / "data" if root is None else Path(root).expanduser()
