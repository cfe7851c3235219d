"""The ledger's file under many writers, kills at random moments and writes cut at any byte.

The writers load the file's own module alone, without torch: a process costs a tenth of a second.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dp_synth
from dp_synth.privacy.ledger.chain import FIRST, Chain

# Reads lines "name count file" and forks a writer for each, whose process id it prints. A writer
# appends entries, and notes the number of each in its file once the chain says that it is on disk.
# The operating system may write less than it is asked to: here seven bytes at a time, and slowly
# where that is asked for, so that a kill finds a line half-written.
HOST = """
import os, signal, sys, time, types
from pathlib import Path
for name in ("", "/privacy", "/privacy/ledger"):  # packages whose own modules are not run
    package = types.ModuleType("dp_synth" + name.replace("/", "."))
    package.__path__ = [sys.argv[1] + name]
    sys.modules[package.__name__] = package
from dp_synth.privacy.ledger.chain import Chain

assert "torch" not in sys.modules
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
whole_write, chain, pause = os.write, Chain(Path(sys.argv[2])), float(sys.argv[3])

def slow_write(descriptor, data):
    time.sleep(pause)
    return whole_write(descriptor, bytes(data[:7]))

for line in sys.stdin:
    name, count, notes = line.split()
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.write = slow_write
    with open(notes, "ab", buffering=0) as file:
        for number in range(int(count)):
            chain.extend(lambda e: [{"writer": name, "number": number, "seen": len(e)}])
            whole_write(file.fileno(), f"{number}\\n".encode())
    os._exit(0)
"""


class Writers:
    """Processes that write one file; they are forked by a small one, in milliseconds."""

    def __init__(self, path, notes, pause=0.0):
        package = Path(dp_synth.__file__).parent
        command = [sys.executable, "-c", HOST, str(package), str(path), str(pause)]
        self._host = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, bufsize=1)
        self._notes = notes

    def start(self, name, count):
        self._host.stdin.write(f"{name} {count} {self._notes / name}\n")
        return int(self._host.stdout.readline())

    def acknowledged(self, name):
        notes = self._notes / name
        return [int(line) for line in notes.read_text().splitlines()] if notes.exists() else []

    def stop(self):
        self._host.communicate(timeout=60)


@pytest.fixture
def writers(tmp_path):
    started = []

    def make(path, pause=0.0):
        (tmp_path / "notes").mkdir()
        started.append(Writers(path, tmp_path / "notes", pause))
        return started[-1]

    yield make
    for one in started:
        one.stop()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def is_gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def entered(path):
    return [(entry["writer"], entry["number"]) for entry in Chain(path).read().entries]


def test_twenty_processes_write_at_once(tmp_path, writers):
    path = tmp_path / "new" / "folder" / "ledger.jsonl"
    host = writers(path)
    processes = [host.start(f"w{writer}", 5) for writer in range(20)]
    wait_until(lambda: all(is_gone(process) for process in processes))

    content = Chain(path).read()
    assert sorted(entered(path)) == sorted((f"w{w}", n) for w in range(20) for n in range(5))
    assert all(host.acknowledged(f"w{writer}") == [0, 1, 2, 3, 4] for writer in range(20))
    assert [entry["seen"] for entry in content.entries] == list(range(100))
    assert content.torn == 0


def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path, writers):
    """Thirty times, three writers at once, each killed at a random moment."""
    path = tmp_path / "ledger.jsonl"
    host = writers(path, pause=0.0002)
    chance = random.Random(0)
    acknowledged = set()
    for attempt in range(30):
        names = [f"{attempt}-{writer}" for writer in range(3)]
        processes = [host.start(name, 10_000) for name in names]
        wait_until(lambda names=names: any(map(host.acknowledged, names)))
        for process in processes:
            time.sleep(chance.uniform(0, 0.02))
            os.kill(process, signal.SIGKILL)
        wait_until(lambda processes=processes: all(map(is_gone, processes)))
        acknowledged.update((name, number) for name in names for number in host.acknowledged(name))
        found = entered(path)  # verifies the chain
        assert len(set(found)) == len(found)
        assert acknowledged <= set(found)
    assert Chain(path).read().torn > 0  # kills did find lines half-written


@pytest.fixture(scope="module")
def two_lines(tmp_path_factory):
    """The bytes of a file with two entries."""
    path = tmp_path_factory.mktemp("whole") / "ledger.jsonl"
    for number in range(2):
        Chain(path).extend(lambda entries, number=number: [{"number": number}])
    return path.read_bytes()


def test_a_write_cut_at_any_byte_loses_no_earlier_line(tmp_path, two_lines):
    path = tmp_path / "ledger.jsonl"
    for size in range(len(two_lines) + 1):
        cut = two_lines[:size]
        path.write_bytes(cut)
        # A line counts as soon as it is all there: to count an entry that nobody was told of is safe.
        expected = [n for n in range(2) if len(cut.splitlines()[: n + 1]) > n and _is_whole(cut, n)]
        assert [entry["number"] for entry in Chain(path).read().entries] == expected

        Chain(path).extend(lambda entries: [{"number": "new"}])
        after = Chain(path).read()
        assert [entry["number"] for entry in after.entries] == [*expected, "new"]
        assert path.read_bytes().startswith(cut)  # nothing that was there is taken away
        assert after.torn == int(_rest(cut) != b"" and len(cut.splitlines()) > len(expected))


def _is_whole(cut, number):
    return cut.splitlines()[number].endswith(b'"}')


def _rest(cut):
    """What stands behind the last newline."""
    return cut[cut.rfind(b"\n") + 1 :]


def test_a_second_crash_in_the_same_place_loses_nothing_either(tmp_path, two_lines):
    """The next writer, who marks a torn line, may die in the middle of that."""
    path = tmp_path / "ledger.jsonl"
    newline = two_lines.index(b"\n")
    for first in range(1, newline, 11):
        path.write_bytes(two_lines[: newline + 1] + two_lines[newline + 1 :][:first])
        before = path.stat().st_size
        Chain(path).extend(lambda entries: [{"number": "lost"}])
        again = path.read_bytes()
        for second in (before + 1, before + 5, before + 6, before + 7, len(again) - 3):
            path.write_bytes(again[:second])
            Chain(path).extend(lambda entries: [{"number": "new"}])
            numbers = [entry["number"] for entry in Chain(path).read().entries]
            assert numbers == [0, "new"], (first, second)


def test_zeros_that_a_power_failure_leaves_are_a_torn_line(tmp_path, two_lines):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(two_lines + b"\0" * 100)
    Chain(path).extend(lambda entries: [{"number": "new"}])
    assert [entry["number"] for entry in Chain(path).read().entries] == [0, 1, "new"]


def test_a_file_is_on_disk_before_anybody_is_told(tmp_path, monkeypatch):
    """Entries and their file's name are synced, in this order, before ``extend`` returns."""
    path = tmp_path / "state" / "ledger.jsonl"
    synced = []
    sync = os.fsync

    def recording(descriptor):
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), path.read_bytes()))
        sync(descriptor)

    Chain(path).extend(lambda entries: [])
    monkeypatch.setattr(os, "fsync", recording)
    Chain(path).extend(lambda entries: [{"number": 1}])
    assert [place for place, _ in synced] == [path, path.parent]
    assert all(content == path.read_bytes() for _, content in synced)
    assert FIRST.encode() in path.read_bytes()
