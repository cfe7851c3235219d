"""Shards: they cover every image once, and of all who ask, one gets each."""

import json
import multiprocessing
import os
import signal

import pytest

from dp_synth.sampling.shards import Shard, ShardQueue, default_shard_size

MOST_BYTES = 64 * 2**20


@pytest.fixture
def directory(tmp_path):
    return tmp_path


@pytest.mark.parametrize("shard_size", [1, 2, 7, 10, 11, 10**6])
@pytest.mark.parametrize("num_images", [1, 7, 10, 97])
def test_shards_cover_every_image_once(directory, num_images, shard_size):
    shards = ShardQueue(directory, num_images, shard_size).shards
    covered = [i for shard in shards for i in range(shard.first, shard.first + shard.count)]
    assert covered == list(range(num_images))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert all(1 <= shard.count <= shard_size for shard in shards)


@pytest.mark.parametrize("batch_size", [1, 7, 500, 4096])
@pytest.mark.parametrize("image_bytes", [1, 64, 784, 3 * 256 * 256, 10**9])
@pytest.mark.parametrize("num_images", [1, 5000, 10**6])
def test_a_shard_is_whole_batches_within_bounds(num_images, image_bytes, batch_size):
    """Whole batches: otherwise each shard would end with a batch of another shape."""
    size = default_shard_size(num_images, image_bytes, batch_size)
    assert size >= batch_size and size % batch_size == 0
    if size > batch_size:
        assert size <= 10_000 and size * image_bytes <= MOST_BYTES
        assert size <= -(-num_images // 16)


def test_each_shard_is_one_claimants(directory):
    one, other = (ShardQueue(directory, 10, 4) for _ in range(2))
    first, second = one.claim(), other.claim()
    assert (first.shard.number, second.shard.number) == (0, 1)
    third = one.claim()
    assert third.shard == Shard(number=2, first=8, count=2)
    assert one.claim() is None and other.claim() is None
    assert not one.all_done()


def test_what_is_let_go_can_be_claimed_and_what_is_done_cannot(directory):
    one, other = (ShardQueue(directory, 8, 4) for _ in range(2))
    first, second = one.claim(), one.claim()
    second.release()
    first.finish({"a.png": "0" * 64})
    again = other.claim()
    assert again.shard.number == 1
    again.finish({"b.png": "1" * 64})
    assert one.claim() is None and one.all_done() and other.done() == {0, 1}
    assert other.checksums(other.shards[0]) == {"a.png": "0" * 64}


def test_a_mark_that_came_since_the_last_look_is_seen(directory):
    """Between a look at the marks and the lock, another process may finish the shard."""
    late = ShardQueue(directory, 4, 4)
    assert late.done() == set()
    ShardQueue(directory, 4, 4).claim().finish({})
    assert late.claim() is None
    assert late.all_done()


def _claim_and_wait(directory, claimed):
    claim = ShardQueue(directory, 4, 4).claim()
    claimed.put(claim.shard.number)
    signal.pause()


def test_a_killed_process_lets_its_shard_go(directory):
    context = multiprocessing.get_context("fork")
    claimed = context.Queue()
    process = context.Process(target=_claim_and_wait, args=(directory, claimed), daemon=True)
    process.start()
    assert claimed.get(timeout=60) == 0
    queue = ShardQueue(directory, 4, 4)
    assert queue.claim() is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert queue.claim().shard.number == 0


def test_a_mark_is_whole_or_not_there(directory):
    """A mark is written beside its place and renamed, so that a kill leaves no half of one."""
    claim = ShardQueue(directory, 4, 4).claim()
    claim.finish({f"{i}.png": "0" * 64 for i in range(100)})
    (mark,) = directory.glob("*.done")
    assert len(json.loads(mark.read_text())) == 100
    assert not [path for path in directory.iterdir() if path.suffix not in {".done", ".lock"}]
