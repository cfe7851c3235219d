"""Folders and zip archives: what is found in them, what is refused, and that nothing leads out."""

import io
import os
import pickle
import random
import stat
import struct
import zipfile

import pytest

from dp_synth.data import sources
from dp_synth.data.sources import Folder, ZipArchive
from dp_synth.errors import UserError

NAMES = ["a-b/1.png", "a/2.png", "a/10.png", "a/b/c/3.png", "a.png", "ä ö/猫.png", "b/'q\".png"]


def write_folder(root, contents):
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Folder(root)


def write_zip(path, contents, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return ZipArchive(path)


def is_one_sentence(error, *words):
    message = str(error.value)
    assert message.isprintable() and message.endswith(".")
    assert all(str(word) in message for word in words), message
    return True


@pytest.fixture(params=["folder", "zip"])
def written(request, tmp_path):
    """A function (contents) -> Source, for both kinds."""
    if request.param == "folder":
        return lambda contents: write_folder(tmp_path / "root", contents)
    return lambda contents: write_zip(tmp_path / "a.zip", contents)


# --- both


def test_names_come_sorted_and_bytes_come_back(written):
    contents = {name: name.encode() * number for number, name in enumerate(NAMES)}
    source = written(contents)
    assert list(source.walk()) == sorted(NAMES)
    for name, data in contents.items():
        assert source.read(name) == data
        assert source.stat(name)[0] == len(data)
        assert source.describe(name).endswith(name)


def test_hidden_files_and_resource_forks_are_passed_over(written):
    hidden = [".x.png", "a/.x.png", ".git/a/x.png", "__MACOSX/a/1.png", "a/__MACOSX/1.png"]
    source = written(dict.fromkeys([*hidden, "a/1.png", "a/x__MACOSX"], b""))
    assert list(source.walk()) == ["a/1.png", "a/x__MACOSX"]


def test_a_source_survives_pickling_also_after_it_was_used(written):
    source = written({"a/1.png": b"one"})
    for again in (pickle.loads(pickle.dumps(source)), source):
        assert again.read("a/1.png") == b"one"
    assert pickle.loads(pickle.dumps(source)).read("a/1.png") == b"one"


@pytest.mark.parametrize(
    "name",
    ["../secret", "a/../../secret", "/etc/passwd", "a//1.png", "./a", "a/.", "", "a/\0", "\udc80"],
)
def test_names_that_are_not_plain_are_refused(written, tmp_path, name):
    (tmp_path / "secret").write_bytes(b"secret")
    source = written({"a/1.png": b"one"})
    for look in (source.read, source.stat):
        with pytest.raises(UserError) as error:
            look(name)
        assert is_one_sentence(error)


def test_a_missing_file_is_named(written):
    source = written({"a/1.png": b"one"})
    for name in ("a/2.png", "a", "a/1.png/x", "b/1.png"):
        with pytest.raises(UserError) as error:
            source.read(name)
        assert is_one_sentence(error, source.describe(name))


def test_large_files_are_refused_before_they_are_read(written, monkeypatch):
    source = written({"a/1.png": bytes(11), "a/2.png": bytes(10)})
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10)
    with pytest.raises(UserError) as error:
        source.read("a/1.png")
    assert is_one_sentence(error, "a/1.png", "11", "10")


def test_what_is_not_there_is_named(tmp_path):
    for source in (Folder(tmp_path / "x"), ZipArchive(tmp_path / "x")):
        with pytest.raises(UserError) as error:
            list(source.walk())
        assert is_one_sentence(error, tmp_path / "x")


# --- folders


def test_an_empty_folder_has_no_files(tmp_path):
    assert list(Folder(tmp_path).walk()) == []


def test_links_that_stay_inside_are_followed(tmp_path):
    folder = write_folder(tmp_path / "root", {"a/1.png": b"one", ".store/x.png": b"x"})
    (tmp_path / "root/b.png").symlink_to("a/1.png")
    (tmp_path / "root/c").symlink_to(".store")
    assert list(folder.walk()) == ["a/1.png", "b.png", "c/x.png"]
    assert folder.read("b.png") == b"one" and folder.read("c/x.png") == b"x"


@pytest.mark.parametrize("target", ["secret", "other", "root-beside"])
def test_links_that_lead_out_are_refused(tmp_path, target):
    folder = write_folder(tmp_path / "root", {"a/1.png": b"one"})
    write_folder(tmp_path / "other", {"secret": b"secret"})
    write_folder(tmp_path / "root-beside", {"secret": b"secret"})
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root/link").symlink_to(tmp_path / target)
    name = "link" if target == "secret" else "link/secret"
    for look in (lambda: list(folder.walk()), lambda: folder.read(name), lambda: folder.stat(name)):
        with pytest.raises(UserError) as error:
            look()
        assert is_one_sentence(error, "root/link", "leads out of")


@pytest.mark.parametrize("target", [".", "..", "../b", "loop"])
def test_loops_and_folders_reached_twice_are_refused(tmp_path, target):
    folder = write_folder(tmp_path / "root", {"a/1.png": b"one", "b/2.png": b"two"})
    (tmp_path / "root/a/loop").symlink_to(target)
    with pytest.raises(UserError) as error:
        list(folder.walk())
    assert is_one_sentence(error, tmp_path)


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to("nothing")
    with pytest.raises(UserError) as error:
        list(Folder(tmp_path).walk())
    assert is_one_sentence(error, tmp_path / "a.png")


def test_the_root_itself_may_be_a_link(tmp_path):
    write_folder(tmp_path / "root", {"a/1.png": b"one"})
    (tmp_path / "link").symlink_to("root")
    assert [Folder(tmp_path / "link").read(n) for n in Folder(tmp_path / "link").walk()] == [b"one"]


def test_pipes_are_passed_over_and_never_waited_for(tmp_path):
    folder = write_folder(tmp_path, {"a.png": b"one"})
    os.mkfifo(tmp_path / "pipe.png")
    assert list(folder.walk()) == ["a.png"]
    for look in (folder.read, folder.stat):
        with pytest.raises(UserError) as error:
            look("pipe.png")
        assert is_one_sentence(error, tmp_path / "pipe.png")


def test_names_that_are_not_utf8_are_refused_with_a_printable_sentence(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    with pytest.raises(UserError) as error:
        list(Folder(tmp_path).walk())
    assert is_one_sentence(error, "udce9", "UTF-8")
    str(error.value).encode()


def test_line_breaks_in_names_do_not_break_messages(tmp_path):
    with pytest.raises(UserError) as error:
        Folder(tmp_path).read("a\nb.png")
    assert is_one_sentence(error, r"a\nb.png")


def test_very_deep_folders_are_walked(tmp_path):
    depth = 1200  # deeper than Python's recursion limit
    deepest = "d/" * depth
    for level in range(1, depth + 1):
        os.mkdir(tmp_path / ("d/" * level))
    (tmp_path / deepest / "1.png").write_bytes(b"")
    try:
        assert list(Folder(tmp_path).walk()) == [deepest + "1.png"]
    finally:  # pytest removes old folders by recursion
        (tmp_path / deepest / "1.png").unlink()
        for level in range(depth, 0, -1):
            os.rmdir(tmp_path / ("d/" * level))


def test_a_folder_that_vanishes_midway_is_named(tmp_path):
    folder = write_folder(tmp_path, {"a/1.png": b"", "b/2.png": b""})
    walk = folder.walk()
    assert next(walk) == "a/1.png"
    (tmp_path / "b/2.png").unlink()
    (tmp_path / "b").rmdir()
    with pytest.raises(UserError) as error:
        list(walk)
    assert is_one_sentence(error, tmp_path / "b")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, {"a.png": b"one"})
    open_file = os.open

    def grow(*args):
        with open(tmp_path / "a.png", "ab") as file:
            file.write(b"more")
        return open_file(*args)

    monkeypatch.setattr(os, "open", grow)
    with pytest.raises(UserError) as error:
        folder.read("a.png")
    assert is_one_sentence(error, tmp_path / "a.png", "changed")


# --- archives


def altered(path, change):
    """Pack one member whose entry is altered by ``change(info)`` and return the archive."""
    info = zipfile.ZipInfo("a/1.png")
    change(info)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, b"a target")
    return ZipArchive(path)


def set_link(info):
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda info: setattr(info, "filename", "../1.png"), "'..'"),
        (lambda info: setattr(info, "filename", "/etc/1.png"), "relative"),
        (lambda info: setattr(info, "compress_type", zipfile.ZIP_BZIP2), "deflate"),
        (lambda info: setattr(info, "compress_type", zipfile.ZIP_LZMA), "deflate"),
        (set_link, "link"),
    ],
)
def test_bad_members_condemn_the_archive(tmp_path, change, word):
    archive = altered(tmp_path / "a.zip", change)
    with pytest.raises(UserError) as error:
        list(archive.walk())
    assert is_one_sentence(error, tmp_path / "a.zip", "1.png", word)


def test_encrypted_members_are_refused(tmp_path):
    write_zip(tmp_path / "a.zip", {"a/1.png": b"one"})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag in the central directory
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError) as error:
        list(ZipArchive(tmp_path / "a.zip").walk())
    assert is_one_sentence(error, "a/1.png", "encrypted")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_come_twice_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/1.png", b"one")
        archive.writestr("a/1.png", b"two")
    with pytest.raises(UserError) as error:
        list(ZipArchive(tmp_path / "a.zip").walk())
    assert is_one_sentence(error, "a/1.png", "twice")


def test_a_member_is_never_unpacked_beyond_its_declared_size(tmp_path):
    """A bomb that declares 100 bytes and holds 64 MiB costs a sentence, not memory."""
    import tracemalloc

    write_zip(tmp_path / "a.zip", {"a/1.png": bytes(2**26)})
    data = bytearray((tmp_path / "a.zip").read_bytes())
    directory = data.index(b"PK\1\2")
    data[directory + 24 : directory + 28] = struct.pack("<I", 100)
    (tmp_path / "a.zip").write_bytes(data)
    archive = ZipArchive(tmp_path / "a.zip")
    assert archive.stat("a/1.png")[0] == 100
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        archive.read("a/1.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert is_one_sentence(error, "a/1.png")
    assert peak < 2**22


def test_a_folder_or_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "folder.zip").mkdir()
    for name in ("pipe.zip", "folder.zip"):
        with pytest.raises(UserError) as error:
            list(ZipArchive(tmp_path / name).walk())
        assert is_one_sentence(error, tmp_path / name)


def test_mutated_archives_end_in_sentences(tmp_path):
    contents = {f"a/{n}.png": random.Random(n).randbytes(50) + bytes(200) for n in range(5)}
    write_zip(tmp_path / "a.zip", contents)
    whole = (tmp_path / "a.zip").read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(generator.choice([1, 3])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        (tmp_path / "b.zip").write_bytes(data)
        archive = ZipArchive(tmp_path / "b.zip")
        try:
            read = {name: archive.read(name) for name in archive.walk()}
        except UserError as error:
            refused += 1
            assert str(error).isprintable()
        else:
            # A change of a name or of a time is no damage; of what is read, it is.
            assert all(data in contents.values() for data in read.values())
    assert refused > 50


def test_zipfile_agrees(tmp_path):
    names = [*NAMES, "empty/"]
    archive = write_zip(tmp_path / "a.zip", {n: io.BytesIO(n.encode()).read() for n in names})
    with zipfile.ZipFile(tmp_path / "a.zip") as other:
        files = [info.filename for info in other.infolist() if not info.is_dir()]
        assert list(archive.walk()) == sorted(files)
        assert all(archive.read(name) == other.read(name) for name in files)
