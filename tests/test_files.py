"""Where the program keeps files of its own."""

from pathlib import Path

import pytest

from dp_synth.files import cache_folder, state_folder


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        ("given", "named", "given"),
        (None, "named", "named"),
        (None, "~/named", "HOME/named"),
        (None, "", "HOME/.cache/dp_synth"),
        (None, None, "HOME/.cache/dp_synth"),
    ],
)
def test_the_cache_is_where_it_is_said_to_be(given, variable, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DP_SYNTH_CACHE")
    if variable is not None:
        monkeypatch.setenv("DP_SYNTH_CACHE", variable)
    assert cache_folder(given) == Path(expected.replace("HOME", str(tmp_path)))


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/named", "/shared", "/named"),
        ("~/named", None, "HOME/named"),
        (None, "/shared", "/shared/dp_synth"),
        ("", "relative", "HOME/.local/state/dp_synth"),
        (None, "", "HOME/.local/state/dp_synth"),
        (None, None, "HOME/.local/state/dp_synth"),
    ],
)
def test_the_ledger_is_where_it_is_said_to_be(own, shared, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in (("DP_SYNTH_STATE", own), ("XDG_STATE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
    assert state_folder() == Path(expected.replace("HOME", str(tmp_path)))
