"""The list of a data set's files: coreutils' own program agrees, and nothing wrong goes unnoticed."""

import hashlib
import subprocess

import pytest
from conftest import refusal

from dp_synth.formats import checksums

LIST = "SHA256SUMS"
NAMES = (
    "README.md",
    "a/000000.png",
    "a/empty",
    "b c/* [1].png",
    "deep/er/than/that.bin",
    "  spaces  /  x  ",
    "\u00e9t\u00e9/\u732b\u2028.png",  # with a character at which str.splitlines would split
    "sub/SHA256SUMS",
    ".hidden",
)


@pytest.fixture
def folder(tmp_path):
    """Files of awkward names, each with bytes of its own, and one without any."""
    for number, name in enumerate(NAMES):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if name.endswith("empty") else bytes([number]) * (number * 1009))
    return tmp_path / "set"


def listed(folder):
    """Name to sum, read with nothing but the format's definition."""
    lines = (folder / LIST).read_bytes().split(b"\n")
    assert lines.pop() == b""
    return {line[66:].decode(): line[:64].decode() for line in lines}


def test_every_file_is_listed_but_the_list(folder):
    checksums.write(folder)
    expected = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    assert listed(folder) == expected
    assert list(listed(folder)) == sorted(NAMES)
    checksums.verify(folder)


def test_coreutils_accepts_it(folder):
    checksums.write(folder)
    command = ["sha256sum", "--check", "--strict", "--quiet", LIST]
    subprocess.run(command, cwd=folder, check=True)
    (folder / "README.md").write_text("other")
    assert subprocess.run(command, check=False, cwd=folder, capture_output=True).returncode == 1


def test_it_is_the_same_whenever_it_is_written(folder):
    checksums.write(folder)
    first = (folder / LIST).read_bytes()
    checksums.write(folder)
    assert (folder / LIST).read_bytes() == first


def test_one_file_that_was_meant_to_change_is_put_on_the_list(folder):
    checksums.write(folder)
    (folder / "README.md").write_text("another card")
    checksums.update(folder, "README.md")
    checksums.verify(folder)
    updated = (folder / LIST).read_bytes()
    checksums.write(folder)
    assert (folder / LIST).read_bytes() == updated


def test_known_sums_are_not_computed_again(folder):
    known = {"a/000000.png": "0" * 64, "gone.npz": "1" * 64}
    checksums.write(folder, known)
    found = listed(folder)
    assert found.pop("a/000000.png") == "0" * 64
    assert "gone.npz" not in found  # a file of which the data set was made
    for name, checksum in found.items():
        assert checksum == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_an_empty_folder_has_an_empty_list(tmp_path):
    checksums.write(tmp_path)
    assert (tmp_path / LIST).read_bytes() == b""
    checksums.verify(tmp_path)


def missing(folder):
    (folder / "a/empty").unlink()
    return "a/empty"


def changed(folder):
    path = folder / "b c/* [1].png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "b c/* [1].png"


def emptied(folder):
    (folder / "README.md").write_bytes(b"")
    (folder / "deep/er/than/that.bin").write_bytes(b"")
    return "deep/er/than/that.bin"


def extra(folder):
    (folder / "deep" / "extra.png").write_bytes(b"")
    return "deep/extra.png"


def hidden(folder):
    (folder / "a" / ".extra").write_bytes(b"")
    return "a/.extra"


def replaced_by_a_folder(folder):
    (folder / "a/empty").unlink()
    (folder / "a/empty").mkdir()
    return "a/empty"


def link(folder):
    (folder / "a" / "link").symlink_to(folder / "README.md")
    return "a/link"


def broken_link(folder):
    (folder / "a" / "link").symlink_to(folder / "nowhere")
    return "a/link"


def linked_folder(folder):
    (folder / "a" / "link").symlink_to(folder / "deep")
    return "a/link"


def link_in_place_of_a_file(folder):
    """The content is the same, but behind a link it may become another."""
    (folder / "README.md").rename(folder.parent / "elsewhere")
    (folder / "README.md").symlink_to(folder.parent / "elsewhere")
    return "README.md"


@pytest.mark.parametrize(
    "damage",
    [
        missing,
        changed,
        emptied,
        extra,
        hidden,
        replaced_by_a_folder,
        link,
        broken_link,
        linked_folder,
        link_in_place_of_a_file,
    ],
)
def test_what_is_wrong_is_named(folder, damage):
    checksums.write(folder)
    name = damage(folder)
    assert str(folder / name) in refusal(checksums.verify, folder)


def test_a_folder_without_a_list_is_refused(folder):
    assert str(folder / LIST) in refusal(checksums.verify, folder)


@pytest.mark.parametrize(
    "content",
    [
        b"no checksum\n",
        b"0" * 63 + b"  README.md\n",
        b"0" * 64 + b" README.md\n",
        b"0" * 64 + b"  README.md",  # cut
        bytes(range(128, 256)) + b"\n",
    ],
)
def test_a_damaged_list_is_refused(folder, content):
    (folder / LIST).write_bytes(content)
    assert LIST in refusal(checksums.verify, folder)


def test_the_list_cannot_lead_out_of_the_folder(folder):
    outside = folder.parent / "outside"
    outside.write_bytes(b"secret")
    checksums.write(folder)
    line = f"{hashlib.sha256(b'secret').hexdigest()}  ../outside\n"
    (folder / LIST).write_text(line + (folder / LIST).read_text())
    assert "outside" in refusal(checksums.verify, folder)
