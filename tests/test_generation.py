"""Data sets of any size: the same files whoever draws them, however often they are stopped."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose, files_below, refusal, tiny_diffusion, tiny_net
from hydra.utils import instantiate

from dp_synth.errors import UserError
from dp_synth.formats import FORMATS, checksums
from dp_synth.formats.reading import read_samples
from dp_synth.sampling import drawing, generation
from dp_synth.sampling.drawing import Source
from dp_synth.sampling.generation import generate
from dp_synth.sampling.sampler import Sampler
from dp_synth.sampling.shards import ShardQueue
from dp_synth.sampling.staging import Staging
from dp_synth.sampling.writing import Writer

CLASSES = ("a", "b", "c")
ALL = 53  # images, a prime


@pytest.fixture(scope="module")
def source():
    net = tiny_net().eval()
    return Source(net, "f" * 64, tiny_diffusion(), CLASSES, shares=None, seed=3)


def sampler_of(*typed):
    """A sampler of few steps: 53 images in batches of 5, shards of 10, the last two not full."""
    small = ("steps=2", f"num_images={ALL}", "batch_size=5", "shard_size=10")
    return instantiate(compose(*(f"sampler.{key}" for key in (*small, *typed))).sampler)


def make(out, source, sampler, **options):
    return generate(out, source, sampler, lambda execution: f"{execution}\n", None, **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, source):
    """Every file of the data set that is made in one go, by one process, for each format."""
    made = {}

    def of(form="png"):
        if form not in made:
            out = tmp_path_factory.mktemp("expected") / "out"
            assert make(out, source, sampler_of(f"format={form}"))
            made[form] = files_below(out)
        return made[form]

    return of


def assert_made(out, expected):
    """The data set is there, is the expected one, and nothing of its making is left."""
    assert files_below(out) == expected
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_what_the_sampler_draws(tmp_path, source, form):
    """An oracle: the images that one call draws into memory, in batches of the same shape."""
    sampler = sampler_of(f"format={form}")
    assert make(tmp_path / "out", source, sampler)
    images = sampler(source.net, source.process, CLASSES, source.seed, None)
    found = read_samples(tmp_path / "out")
    order, found_order = by_content(images), by_content(found)
    assert np.array_equal(images.pixels[order], found.pixels[found_order])
    assert np.array_equal(images.labels[order], found.labels[found_order])
    assert tuple(found.classes) == CLASSES
    checksums.verify(tmp_path / "out")


def by_content(images):
    """An order that does not depend on the one in which a format keeps images."""
    return np.lexsort(images.pixels.reshape(len(images), -1).T)


@pytest.mark.parametrize("count", [1, 4, 5, 10, 11])
def test_awkward_numbers_of_images(tmp_path, source, count):
    assert make(tmp_path / "out", source, sampler_of(f"num_images={count}"))
    assert len(read_samples(tmp_path / "out")) == count


def test_labels_follow_the_shares(tmp_path, source):
    source = replace(source, shares=[0.5, 0.5, 0.0])
    assert make(tmp_path / "out", source, sampler_of("labels=dp_histogram"))
    counts = np.bincount(read_samples(tmp_path / "out").labels, minlength=3)
    assert sorted(counts.tolist()) == [0, 26, 27]


def stop_after(monkeypatch, calls, error=KeyboardInterrupt):
    """Let ``calls`` batches be drawn, then raise; return how many were drawn, as it grows."""
    drawn = []
    draw = Sampler.draw

    def stopped(self, net, process, labels, first, seed):
        if len(drawn) == calls:
            raise error
        drawn.append(first)
        return draw(self, net, process, labels, first, seed)

    monkeypatch.setattr(Sampler, "draw", stopped)
    return drawn


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("batches", [0, 1, 2, 7, 10])
def test_what_was_stopped_is_continued(tmp_path, source, expected, monkeypatch, form, batches):
    out, sampler, whole = tmp_path / "out", sampler_of(f"format={form}"), expected(form)
    with monkeypatch.context() as patch:
        first = stop_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            make(out, source, sampler)
    assert not out.exists()
    again = stop_after(monkeypatch, 100)
    assert make(out, source, sampler)
    assert_made(out, whole)
    # Two batches make a shard: whole shards are not drawn again, the half of one is.
    whole_shards = first[: batches // 2 * 2]
    assert sorted(again) == sorted(set(range(0, ALL, 5)) - set(whole_shards))


def killed(out, source, sampler, place, after):
    """In a process of its own, ``after`` calls into ``place``, die as by the kernel's hand."""
    torch.set_num_threads(1)
    module, name = place
    calls, function = [], getattr(module, name)

    def deadly(*args, **kwargs):
        calls.append(None)
        if len(calls) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(module, name, deadly)
    make(out, source, sampler)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("place", "after"),
    [
        ((Path, "replace"), 0),  # the manifest is written, and not in its place
        ((Path, "replace"), 1),  # a shard is, and not marked
        ((Path, "replace"), 3),
        ((Path, "replace"), 6),  # all are written, and one is not marked
        ((checksums, "digest"), 0),
        ((checksums, "write"), 0),
        ((Path, "rename"), 0),
        ((Sampler, "draw"), 5),
    ],
    ids=lambda value: value if isinstance(value, int) else value[1],
)
def test_a_kill_loses_no_shard_and_damages_none(tmp_path, source, expected, form, place, after):
    out, sampler = tmp_path / "out", sampler_of(f"format={form}")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=killed, args=(out, source, sampler, place, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert make(out, source, sampler)
    assert_made(out, expected(form))


def take_part(out, source, sampler, finished):
    torch.set_num_threads(1)
    drawn = []
    draw = drawing.Drawing.__call__

    def noted(self, shard, heard):
        drawn.append(shard.number)
        return draw(self, shard, heard)

    drawing.Drawing.__call__ = noted
    finished.put((make(out, source, sampler), drawn))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("processes", [2, 3, 8])  # there are six shards
def test_processes_share_the_work(tmp_path, source, expected, form, processes):
    """Bit for bit what one process makes, each shard drawn once, and one of them says it is done."""
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    finished = context.Queue()
    arguments = (out, source, sampler_of(f"format={form}"), finished)
    started = [context.Process(target=take_part, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    results = [finished.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    assert_made(out, expected(form))
    assert sorted(number for _, drawn in results for number in drawn) == list(range(6))
    assert [put for put, _ in results].count(True) == 1


def test_what_others_finish_between_two_looks_is_left_alone(
    tmp_path, source, expected, monkeypatch
):
    """Clearing the staging folder takes the marks away, so that all shards seem to be free."""
    out = tmp_path / "out"
    claim = ShardQueue.claim

    def late(self):
        monkeypatch.setattr(ShardQueue, "claim", claim)
        assert make(out, source, sampler_of())
        return claim(self)

    monkeypatch.setattr(ShardQueue, "claim", late)
    assert not make(out, source, sampler_of())
    assert_made(out, expected())


def test_one_who_begins_while_others_clear_the_folder_leaves_what_is_there(
    tmp_path, source, expected, monkeypatch
):
    """A folder that is there when it is made, and gone when one asks whether it is a folder."""
    out = tmp_path / "out"
    mkdir = os.mkdir

    def late(path, mode=0o777):
        if Path(path).name != ".out.partial":
            return mkdir(path, mode)
        monkeypatch.setattr(os, "mkdir", mkdir)
        assert make(out, source, sampler_of())
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    monkeypatch.setattr(os, "mkdir", late)
    assert not make(out, source, sampler_of())
    assert_made(out, expected())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_who_comes_late_leaves_what_is_there(tmp_path, source, expected):
    out = tmp_path / "out"
    assert make(out, source, sampler_of())
    assert not make(out, source, sampler_of())
    assert_made(out, expected())


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("steps=3", "sampler.steps=2, not 3"),
        ("num_images=54", "sampler.num_images=53, not 54"),
        ("format=npz", "sampler.format=png, not npz"),
        ("batch_size=7", "sampler.batch_size=5, not 7"),
        ("shard_size=20", "sampler.shard_size=10, not 20"),
        ("guidance=1", "sampler.guidance=0.0, not 1"),
        ("precision=bf16", "sampler.precision=32-true, not bf16"),
    ],
)
def test_other_settings_do_not_continue_it(tmp_path, source, expected, monkeypatch, typed, words):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            make(out, source, sampler_of())
    before = files_below(tmp_path)
    assert words in refusal(make, out, source, sampler_of(typed))
    assert files_below(tmp_path) == before
    assert make(out, source, sampler_of())
    assert_made(out, expected())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 4}, "seed=3, not 4"),
        ({"model": "0" * 64}, "model="),
        ({"classes": ("a", "b", "d")}, "classes="),
        ({"shares": [0.2, 0.3, 0.5]}, "label_shares=null"),
    ],
)
def test_another_source_does_not_continue_it(tmp_path, source, monkeypatch, changes, words):
    stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", source, sampler_of())
    assert words in refusal(make, tmp_path / "out", replace(source, **changes), sampler_of())


def test_how_the_network_runs_is_settled_once(tmp_path, source, monkeypatch):
    """Who continues does not measure again: the fastest way may be another one by then."""
    out = tmp_path / "out"
    asked = []

    def measured(net, sampler):
        asked.append(None)
        return generation.Execution(channels_last=True)

    monkeypatch.setattr(generation, "measured", measured)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            make(out, source, sampler_of())
    assert make(out, source, sampler_of())
    assert asked == [None]
    assert (out / "README.md").read_text() == "precision 32-true, channels_last\n"


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, source, expected, monkeypatch):
    out, whole = tmp_path / "out", expected()
    with monkeypatch.context() as patch:
        form, calls = FORMATS["png"], []
        write = form.write_shard

        def full(directory, *arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device", str(directory / "x.png"))
            return write(directory, *arguments)

        patch.setattr(form, "write_shard", full)
        sentence = refusal(make, out, source, sampler_of())
    assert "x.png" in sentence and "No space left on device" in sentence
    assert not out.exists()
    again = stop_after(monkeypatch, 100)
    assert make(out, source, sampler_of())
    assert_made(out, whole)
    assert not {0, 5, 10, 15} & set(again)  # the first two shards


def test_a_folder_that_is_removed_meanwhile_is_said(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    write = Writer.write

    def removed(self, claim, images):
        write(self, claim, images)
        self.wait()
        shutil.rmtree(Staging(out).path)

    monkeypatch.setattr(Writer, "write", removed)
    with pytest.raises(UserError, match="was removed while a data set was made in it"):
        make(out, source, sampler_of())


def test_the_manifest_says_what_it_was_begun_with(tmp_path, source, monkeypatch):
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", source, sampler_of())
    stored = json.loads((Staging(tmp_path / "out").path / "manifest.json").read_text())
    assert stored["settings"]["model"] == "f" * 64 and stored["settings"]["seed"] == 3
    assert stored["execution"] == {
        "precision": "32-true",
        "channels_last": False,
        "compile": False,
    }
