"""The cache holds what decoding gives, once, for one user, whatever kills or damages it."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import stat
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from dp_synth.data import cache, decoding, journal
from dp_synth.data.journal import Journal
from dp_synth.data.listing import Listing
from dp_synth.data.sources import Folder, ZipArchive
from dp_synth.errors import UserError

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven images to a chunk, so that a few images are many chunks."""
    monkeypatch.setattr(cache, "_CHUNK_IMAGES", 7)


@pytest.fixture
def decoded(monkeypatch):
    """The names that are decoded from here on, in any order."""
    names = []
    original = decoding.decode

    def counted(data, what, *args):
        names.append(os.path.basename(what))
        return original(data, what, *args)

    monkeypatch.setattr(decoding, "decode", counted)
    return names


def write_images(root, count, size=6):
    """``count`` different pictures in two folders, listed."""
    rng = np.random.default_rng(count)
    for number in range(count):
        path = root / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return list_images(Folder(root))


def list_images(source, units_of=None):
    """Class by first letter; ``units_of`` images in a row are one unit, if it is given."""
    names = list(source.walk())
    labels = np.array([name.startswith("b") for name in names], np.int64)
    units = None if units_of is None else np.arange(len(names), dtype=np.int64) // units_of
    return Listing(source, names, labels, ("a", "b"), units)


def one_by_one(listing, resolution=6, channels=3):
    """The slow oracle."""
    pixels = np.empty((len(listing), resolution, resolution, channels), np.uint8)
    for row, name in zip(pixels, listing.names, strict=True):
        row[:] = decoding.decode(listing.source.read(name), name, resolution, channels)
    return pixels


def load(listing, directory, resolution=6, channels=3, **options):
    return cache.load(
        listing, resolution=resolution, channels=channels, directory=directory, **options
    )


def home_of(directory):
    (home,) = [path for path in directory.iterdir() if path.is_dir()]
    return home


# --- what it holds


@pytest.mark.parametrize("count", [0, 1, 7, 8, 29])
@pytest.mark.parametrize(("resolution", "channels"), [(6, 3), (4, 1)])
def test_holds_what_decoding_gives(tmp_path, count, resolution, channels):
    (tmp_path / "images").mkdir()
    listing = write_images(tmp_path / "images", count)
    for _ in range(2):
        images = load(listing, tmp_path / "cache", resolution, channels)
        assert (images.pixels == one_by_one(listing, resolution, channels)).all()
        assert (images.labels == listing.labels).all()
        assert images.classes == ("a", "b")
        assert images.units is None and images.missing == 0
        assert images.num_examples == count


def test_a_second_call_decodes_nothing_and_maps_the_same_file(tmp_path, decoded):
    listing = write_images(tmp_path / "images", 17)
    load(listing, tmp_path / "cache")
    assert len(decoded) == 17
    images = load(listing, tmp_path / "cache")
    assert len(decoded) == 17
    assert isinstance(images.pixels, np.memmap) and not images.pixels.flags.writeable


def test_labels_and_units_are_the_listings_own(tmp_path, decoded):
    listing = write_images(tmp_path / "images", 9)
    load(listing, tmp_path / "cache")
    changed = Listing(
        listing.source, listing.names, 1 - listing.labels, ("b", "a"), np.arange(9) // 2
    )
    images = load(changed, tmp_path / "cache")
    assert (images.labels == changed.labels).all() and (images.units == changed.units).all()
    assert len(decoded) == 9


def test_an_archive_is_cached_as_a_folder_is(tmp_path):
    listing = write_images(tmp_path / "images", 15)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in listing.names:
            archive.write(tmp_path / "images" / name, name)
    images = load(list_images(ZipArchive(tmp_path / "a.zip")), tmp_path / "cache")
    assert (images.pixels == one_by_one(listing)).all()


@pytest.mark.parametrize("change", ["touch", "content", "name", "resolution", "channels", "place"])
def test_whatever_changes_the_pixels_is_another_cache(tmp_path, decoded, change):
    listing = write_images(tmp_path / "images", 8)
    load(listing, tmp_path / "cache")
    decoded.clear()
    options = {}
    first = tmp_path / "images" / listing.names[0]
    if change == "touch":
        os.utime(first, ns=(1, 1))
    elif change == "content":
        first.write_bytes((tmp_path / "images" / listing.names[1]).read_bytes())
    elif change == "name":
        first.rename(first.with_name("zzz.png"))
    elif change == "place":
        (tmp_path / "images").rename(tmp_path / "moved")
    else:
        options = {"resolution": 5} if change == "resolution" else {"channels": 1}
    source = Folder(tmp_path / ("moved" if change == "place" else "images"))
    listing = list_images(source)
    images = load(listing, tmp_path / "cache", **options)
    assert len(decoded) == 8
    assert (images.pixels == one_by_one(listing, **options)).all()


# --- who may read it


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_private_whatever_the_umask(tmp_path, umask):
    listing = write_images(tmp_path / "images", 9)
    (tmp_path / "images" / listing.names[3]).write_bytes(b"broken")
    # An existing folder is closed, too.
    (tmp_path / "cache").mkdir(mode=0o755)
    before = os.umask(umask)
    try:
        load(listing, tmp_path / "cache", on_error="skip")
    finally:
        os.umask(before)
    kept = {path.name for path in home_of(tmp_path / "cache").iterdir()}
    assert kept == {"pixels", "journal", "verified", "skipped.txt"}
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        allowed = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) & ~allowed == 0, path
        if path.suffix != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == allowed, path


def test_its_place_is_named_once(tmp_path, caplog):
    listing = write_images(tmp_path / "images", 3)
    for _ in range(2):
        load(listing, tmp_path / "cache")
    (message,) = caplog.messages
    assert str(tmp_path / "cache") in message
    assert home_of(tmp_path / "cache").name not in message  # it follows the files' sizes


# --- crashes


def load_slowly(listing, directory):
    original = decoding.decode

    def slow(*args):
        time.sleep(0.002)
        return original(*args)

    decoding.decode = slow
    load(listing, directory)


def test_sigkill_loses_no_finished_chunk(tmp_path, decoded):
    """Killed four times at different moments; in all, each finished chunk is decoded once."""
    listing = write_images(tmp_path / "images", 200)
    directory = tmp_path / "cache"
    finished = 0
    for target in (1, 5, 11, 18):
        process = fork.Process(target=load_slowly, args=(listing, directory))
        process.start()
        lines = 0
        while lines < target and process.is_alive():
            time.sleep(0.001)
            journals = list(directory.glob(".*.partial/journal"))
            lines = journals[0].read_bytes().count(b"\n") if journals else 0
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (left,) = directory.glob(".*.partial")
        chunks = Journal(left / "journal").read()
        assert len(chunks) >= max(finished, target)
        finished = len(chunks)
        assert not [path for path in directory.iterdir() if path.name[0] != "."]
    images = load(listing, directory)
    assert (images.pixels == one_by_one(listing)).all()
    todo = [os.path.basename(name) for name in listing.names[7 * finished :]]
    assert 0 < len(todo) < 200
    assert sorted(decoded[: len(todo)]) == sorted(todo)


def test_whatever_a_crash_leaves_of_pixels_and_journal_is_mended(tmp_path):
    """Both files cut, or a byte of them changed, anywhere: nothing wrong is ever returned."""
    listing = write_images(tmp_path / "images", 40)
    directory = tmp_path / "cache"
    expected = one_by_one(listing)
    load(listing, directory)
    home = home_of(directory)
    staging = home.with_name(f".{home.name}.partial")
    generator = random.Random(0)
    for trial in range(60):
        home.rename(staging)
        for name in generator.sample(["pixels", "journal"], generator.choice([1, 2])):
            data = bytearray((staging / name).read_bytes())
            place = generator.randrange(len(data))
            if generator.random() < 0.5:
                del data[place:]
            else:
                data[place] ^= 1 + generator.randrange(255)
            (staging / name).write_bytes(data)
        if trial % 2:  # damaged after it was whole
            staging.rename(home)
        assert (load(listing, directory).pixels == expected).all()
        assert not staging.exists()


@pytest.mark.parametrize("lost", ["pixels", "journal", "verified"])
def test_a_lost_file_is_made_again(tmp_path, lost):
    listing = write_images(tmp_path / "images", 20)
    load(listing, tmp_path / "cache")
    (home_of(tmp_path / "cache") / lost).unlink()
    assert (load(listing, tmp_path / "cache").pixels == one_by_one(listing)).all()


def test_a_damaged_chunk_is_found_and_those_before_it_are_kept(tmp_path, decoded):
    listing = write_images(tmp_path / "images", 30)
    load(listing, tmp_path / "cache")
    decoded.clear()
    with (home_of(tmp_path / "cache") / "pixels").open("r+b") as file:
        file.seek(15 * 6 * 6 * 3)  # in the third chunk
        file.write(b"\1\2\3\4\5\6")
    images = load(listing, tmp_path / "cache")
    assert len(decoded) == 30 - 14
    assert (images.pixels == one_by_one(listing)).all()


def test_a_copied_cache_is_verified_and_used(tmp_path, decoded):
    listing = write_images(tmp_path / "images", 20)
    load(listing, tmp_path / "cache")
    home = home_of(tmp_path / "cache")
    os.utime(home / "pixels", ns=(5, 5))
    for _ in range(2):
        load(listing, tmp_path / "cache")
    assert len(decoded) == 20
    assert (home / "verified").read_text() == "5"


def test_two_at_once_decode_once(tmp_path):
    listing = write_images(tmp_path / "images", 120)
    directory = tmp_path / "cache"
    counter = fork.Value("i", 0)
    original = decoding.decode

    def work():
        def counted(*args):
            with counter.get_lock():
                counter.value += 1
            time.sleep(0.001)
            return original(*args)

        decoding.decode = counted
        pixels = load(listing, directory).pixels
        os._exit(0 if (pixels == one_by_one(listing)).all() else 1)

    processes = [fork.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert counter.value == 120 + 3 * 120  # once for the cache, and once for each oracle


# --- what cannot be read


@pytest.mark.parametrize("units_of", [None, 1, 3])
def test_skip_leaves_out_what_cannot_be_read(tmp_path, caplog, decoded, units_of):
    write_images(tmp_path / "images", 31)
    listing = list_images(Folder(tmp_path / "images"), units_of)
    broken = {0, 1, 2, 8, 13, 14, 15, 16, 17, 18, 19, 20, 30}
    for place in broken:
        (tmp_path / "images" / listing.names[place]).write_bytes(b"broken")
    (tmp_path / "images" / listing.names[5]).unlink()
    broken.add(5)
    good = [place for place in range(31) if place not in broken]
    for _ in range(2):
        images = load(listing, tmp_path / "cache", on_error="skip")
        readable = Listing(
            listing.source, [listing.names[place] for place in good], listing.labels[good], ("a",)
        )
        assert (images.pixels == one_by_one(readable)).all()
        assert (images.labels == listing.labels[good]).all()
        if units_of is None:
            assert images.units is None and images.missing == len(broken)
        else:
            assert (images.units == listing.units[good]).all()
            assert images.missing == len(set(listing.units) - set(listing.units[good]))
        assert images.num_examples == listing.num_examples
    skipped = home_of(tmp_path / "cache") / "skipped.txt"
    lines = skipped.read_text().splitlines()
    assert len(lines) == len(broken)
    for place, line in zip(sorted(broken), lines, strict=True):
        assert listing.names[place] in line
    assert sum("skipped.txt" in message for message in caplog.messages) == 1
    assert not any(char.isdigit() for char in caplog.messages[-1])  # not even how many


def test_raise_names_the_first_in_the_listing_and_skip_goes_on_from_there(tmp_path, decoded):
    listing = write_images(tmp_path / "images", 50)
    for place in (30, 31, 45):
        (tmp_path / "images" / listing.names[place]).write_bytes(b"broken")
    assert listing.names[30] in refusal(load, listing, tmp_path / "cache")
    decoded.clear()
    assert len(load(listing, tmp_path / "cache", on_error="skip")) == 47
    assert len(decoded) == 50 - 28


def test_a_cache_that_lacks_images_does_not_serve_raise(tmp_path, monkeypatch):
    listing = write_images(tmp_path / "images", 20)
    denied = listing.source.describe(listing.names[9])
    original = decoding.decode

    def failing(data, what, *args):
        if what == denied:
            raise UserError(f"{what} is denied.")
        return original(data, what, *args)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", failing)
        assert load(listing, tmp_path / "cache", on_error="skip").missing == 1
        assert denied in refusal(load, listing, tmp_path / "cache")
        assert load(listing, tmp_path / "cache", on_error="skip").missing == 1
    images = load(listing, tmp_path / "cache")
    assert images.missing == 0 and (images.pixels == one_by_one(listing)).all()
    assert not (home_of(tmp_path / "cache") / "skipped.txt").exists()


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_nothing_readable_is_an_error_and_leaves_nothing(tmp_path, on_error):
    listing = write_images(tmp_path / "images", 9)
    for name in listing.names:
        (tmp_path / "images" / name).write_bytes(b"broken")
    assert listing.names[0] in refusal(load, listing, tmp_path / "cache", on_error=on_error)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name[0] != "."]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("mishap", ["vanishes", "changes", "folder vanishes"])
def test_what_changes_midway_ends_in_a_sentence_and_keeps_what_is_done(
    tmp_path, monkeypatch, decoded, on_error, mishap
):
    listing = write_images(tmp_path / "images", 60)
    read = Folder.read
    happened = threading.Event()

    def disturbed(self, name):
        data = read(self, name)
        if name == listing.names[30] and not happened.is_set():
            happened.set()
            if mishap == "vanishes":
                (tmp_path / "images" / name).unlink()
            elif mishap == "changes":
                with (tmp_path / "images" / name).open("ab") as file:
                    file.write(b"more")
            else:
                (tmp_path / "images").rename(tmp_path / "away")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", disturbed)
        message = refusal(load, listing, tmp_path / "cache", on_error=on_error)
    assert str(tmp_path / "images") in message
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name[0] != "."]
    if mishap == "folder vanishes":
        (tmp_path / "away").rename(tmp_path / "images")
        (partial,) = (tmp_path / "cache").glob(".*.partial")
        finished = Journal(partial / "journal").read()
        decoded.clear()
        assert len(load(listing, tmp_path / "cache", on_error=on_error)) == 60
        assert len(decoded) == 60 - (finished[-1].stop if finished else 0)


def test_a_missing_file_is_found_before_anything_is_decoded(tmp_path, decoded):
    listing = write_images(tmp_path / "images", 20)
    (tmp_path / "images" / listing.names[19]).unlink()
    assert listing.names[19] in refusal(load, listing, tmp_path / "cache")
    assert not decoded


# --- mistakes


def test_wrong_arguments_name_the_key(tmp_path):
    listing = write_images(tmp_path / "images", 2)
    assert "dataset.on_error" in refusal(load, listing, tmp_path / "cache", on_error="ignore")
    assert "dataset.resolution" in refusal(load, listing, tmp_path / "cache", resolution=0)
    assert "channels" in refusal(load, listing, tmp_path / "cache", channels=2)


def test_a_place_that_cannot_hold_a_cache_names_the_variable(tmp_path):
    listing = write_images(tmp_path / "images", 2)
    (tmp_path / "file").write_bytes(b"")
    message = refusal(load, listing, tmp_path / "file" / "cache")
    assert "DP_SYNTH_CACHE" in message and str(tmp_path / "file") in message


def test_too_small_a_disk_is_found_before_anything_is_decoded(tmp_path, monkeypatch, decoded):
    listing = write_images(tmp_path / "images", 20)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert "DP_SYNTH_CACHE" in refusal(load, listing, tmp_path / "cache")
    assert not decoded


def test_a_disk_that_fills_up_keeps_what_is_done(tmp_path, monkeypatch, decoded):
    listing = write_images(tmp_path / "images", 60)
    append = Journal.append

    def full(self, chunk):
        if chunk.start == 28:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        message = refusal(load, listing, tmp_path / "cache")
    assert "DP_SYNTH_CACHE" in message and "No space" in message
    decoded.clear()
    assert (load(listing, tmp_path / "cache").pixels == one_by_one(listing)).all()
    assert len([name for name in decoded if name]) == 60 - 28 + 60  # the oracle's are in it


def test_pixels_are_on_disk_before_the_journal_says_so(tmp_path, monkeypatch):
    """Whenever a line is written, all pixels before it were synced and none after."""
    listing = write_images(tmp_path / "images", 30)
    synced = {}
    fsync = os.fsync

    def recorded(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[os.path.basename(path)] = os.fstat(descriptor).st_size
        fsync(descriptor)

    append = Journal.append

    def checked(self, chunk):
        assert synced["pixels"] == chunk.stop * 6 * 6 * 3
        append(self, chunk)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Journal, "append", checked)
    load(listing, tmp_path / "cache")
    assert synced["journal"] > 0


def test_chunks_are_bounded_by_images_by_pixels_and_by_bytes_of_files(tmp_path, monkeypatch):
    listing = write_images(tmp_path / "images", 40)
    decoder = cache._Decoder(listing, 6, 3, "raise")

    def cuts(start=0):
        ranges = list(decoder.ranges(start))
        assert [first for first, _ in ranges] == [start, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == 40
        return {stop - first for first, stop in ranges[:-1]}

    assert cuts() == cuts(start=3) == {7}
    monkeypatch.setattr(cache, "_CHUNK_BYTES", 3 * 6 * 6 * 3 + 1)
    assert cuts() == {3}
    monkeypatch.setattr(cache, "_CHUNK_BYTES", 1)
    assert cuts() == {1}
    monkeypatch.setattr(cache, "_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(cache, "_CHUNK_FILE_BYTES", 1)
    assert cuts() == {1}


def test_a_journal_ends_where_it_is_torn_or_skips(tmp_path):
    chunks = [
        journal.Chunk(0, 5, 1),
        journal.Chunk(5, 9, 2, {6: "a\nb ü"}),
        journal.Chunk(9, 10, 3),
    ]
    book = Journal(tmp_path / "journal")
    assert book.read() == []
    book.replace(chunks[:1])
    for chunk in chunks[1:]:
        book.append(chunk)
    assert book.read() == chunks
    data = book.path.read_bytes()
    for end in range(len(data)):
        book.path.write_bytes(data[:end])
        assert book.read() == chunks[: data[: end + 1].count(b"\n")]
    book.replace([chunks[0], chunks[2]])
    assert book.read() == chunks[:1]


# --- the benchmark


def test_the_benchmark_measures_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import decoding as benchmark

    benchmark._make_folder(tmp_path / "images" / "00000000", 12, 20)
    assert load(list_images(Folder(tmp_path / "images"), 1), tmp_path / "c", 20).num_units == 12
    monkeypatch.setattr(benchmark, "in_new_process", lambda function, *args: function(*args))
    rounds = [benchmark.measure(tmp_path / "images", [20, 8], 2) for _ in range(3)]
    results = benchmark.summarise(rounds, 12)
    assert results["Pillow alone"]["share_by_seconds"] == 1
    assert set(results) == {"Pillow alone", "cache at 20", "cache at 8"}
    assert all(row["images_per_second"] > 0 for row in results.values())
    assert not (tmp_path / "cache").exists()
    machine = benchmark.machine(benchmark.parse(["--images", "12", "--side", "20"]))
    benchmark.print_table({"machine": machine, "bytes_per_file": 1, "results": results})
    assert "100%" in capsys.readouterr().out
