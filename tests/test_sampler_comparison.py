"""The comparison of samplers: its choice by an oracle, and what it opens, records and leaves."""

import json
import shlex
from functools import partial

import numpy as np
import pytest
import torch
from conftest import compose, files_below
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dp_synth import compare_samplers
from dp_synth.data import digits, font_digits
from dp_synth.data.images import Images
from dp_synth.files import write_atomically
from dp_synth.metrics.evidence import Evidence
from dp_synth.metrics.features.classifier import classifier_features
from dp_synth.metrics.synthetic_evaluator import SyntheticEvaluator
from dp_synth.sampling.comparison import choose, overrides_of
from dp_synth.sampling.criteria import Criteria
from dp_synth.sampling.sampler import Sampler

DEFAULTS = tuple(compose(name="compare_samplers").candidates)
# Two candidates of the default ones, tiny.
TWO = (
    *(f"~candidates.{name}" for name in DEFAULTS if name not in ("ddim_50", "unipc_10")),
    "candidates.ddim_50.steps=5",
    "candidates.unipc_10.steps=3",
    "reference=ddim_50",
    "num_images=20",
    "seeds=2",
    "evaluator.classifier.steps=5",
)


def record_of(run):
    return json.loads((run.path / compare_samplers.RECORD).read_text())


@pytest.fixture
def no_private_images(monkeypatch):
    """Whoever opens the private data set fails."""

    def load(split):
        pytest.fail(f"the private images of {split} were opened")

    monkeypatch.setattr(digits, "load", load)


@pytest.fixture
def drawn(monkeypatch):
    """The captions of all draws, as they are made."""
    captions = []
    original = Sampler.__call__

    def spy(self, net, process, classes, seed, what=None, shares=None):
        captions.append(what)
        return original(self, net, process, classes, seed, None, shares)

    monkeypatch.setattr(Sampler, "__call__", spy)
    return captions


# --- the choice --------------------------------------------------------------------------------


def test_the_choice_is_the_oracles():
    rng = np.random.default_rng(0)
    for _ in range(300):
        names = [f"s{i}" for i in range(rng.integers(1, 7))]
        entries = {
            name: {
                "network_calls": int(rng.integers(1, 4)),
                "accuracy": (value := int(rng.integers(10)) / 10),
                "ci_low": value - 0.2,
            }
            for name in names
        }
        reference = names[rng.integers(len(names))]
        choice = choose(entries, reference)
        assert choice.name in choice.reason or reference in choice.reason
        bound = entries[reference]["ci_low"]
        chosen = entries[choice.name]
        assert chosen["accuracy"] >= bound
        for other in entries.values():
            if other["accuracy"] >= bound:
                assert (chosen["network_calls"], -chosen["accuracy"]) <= (
                    other["network_calls"],
                    -other["accuracy"],
                )


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("candidates.unipc_20.guidance_interval=[0.1,2]", "candidates.unipc_20.guidance=1.5"),
        ("candidates.unipc_20.thresholding=dynamic", "candidates.unipc_20.steps=7"),
        ("sampler@candidates.unipc_20=ddim", "candidates.unipc_20.eta=0.5"),
    ],
)
def test_overrides_make_sample_draw_like_the_candidate(changes):
    candidates = compose(*changes, name="compare_samplers").candidates
    for name in ("unipc_20",) if changes else DEFAULTS:
        typed = shlex.split(overrides_of(candidates[name]))
        assert compose(*typed, name="sample").sampler == candidates[name]
    assert overrides_of(candidates.dpm_solver_20) == "sampler=dpm_solver sampler.steps=20"


# --- the criteria ------------------------------------------------------------------------------


class Always(torch.nn.Module):
    """A classifier that says the same of every image."""

    def __init__(self, label):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.eye(10)[label])

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_the_public_proxy_tests_on_public_images_that_the_public_model_never_saw(
    finished_run, no_private_images, monkeypatch
):
    seen, splits = [], []
    original = font_digits.load

    def load(split, **options):
        splits.append(split)
        return original(split, **options)

    def train(images, *, seed, flip, caption):
        seen.append((seed, flip, caption))
        return Always(images.labels[0])

    criteria = Criteria(finished_run, SyntheticEvaluator(classifier=train, validation_fraction=0.1))
    vars(criteria)["_features"] = None
    test = font_digits.load(split="test", fonts="prior", num_images=600)
    draws = [test.select([i]) for i in (0, 1, 2)]
    monkeypatch.setattr(font_digits, "load", load)
    score = criteria.public_proxy().judge(draws, 7)
    shares = [np.mean(test.labels == one.labels[0]) for one in draws]
    assert score["accuracy"] == pytest.approx(np.mean(shares))
    assert score["ci_low"] <= min(shares) and max(shares) <= score["ci_high"]
    assert score["n"] == 600
    assert [seed for seed, *_ in seen] == [7, 8, 9]
    assert splits == ["test"]


def test_the_frechet_distance_is_zero_for_the_test_images_and_grows_with_noise(finished_run):
    evaluator = instantiate(
        compose("evaluator.classifier.steps=5", name="compare_samplers").evaluator
    )
    judge = Criteria(finished_run, evaluator).public_proxy().judge
    test = font_digits.load(split="test", fonts="prior", num_images=600)
    noise = np.random.default_rng(0).integers(0, 256, test.pixels.shape, dtype=np.uint8)
    distances = [
        judge([Images(pixels, test.labels, test.classes)], 0)["frechet"]
        for pixels in (test.pixels, test.pixels // 2 + noise // 2, noise)
    ]
    assert distances[0] == pytest.approx(0, abs=1e-3 * distances[1])
    assert distances[0] < distances[1] < distances[2]


def test_features_are_those_of_the_evaluator(finished_run):
    cfg = compose("evaluator.classifier.steps=5", name="compare_samplers")
    evaluator = instantiate(cfg.evaluator)
    test = font_digits.load(split="test", fonts="prior", num_images=20)
    evidence = Evidence(
        synthetic=test,
        real_train=test,
        real_test=test,
        public=font_digits.load(split="train", fonts="prior", num_images=600),
        train_classifier=partial(evaluator.classifier, flip=False),
    )
    expected = classifier_features(evidence.public_classifier)(test.pixels)
    found = Criteria(finished_run, evaluator)._features(test.pixels)
    np.testing.assert_array_equal(found, expected)


# --- the command -------------------------------------------------------------------------------


def test_a_comparison_opens_no_private_image_and_adds_one_file(
    command, run_copy, no_private_images, state
):
    before, ledger = files_below(run_copy.path), files_below(state)
    outcome = command(compare_samplers, f"run={run_copy.path}", *TWO)
    assert outcome.code == 0, outcome.err
    after = files_below(run_copy.path)
    assert after.keys() - before.keys() <= {compare_samplers.RECORD, "checkpoints/.lock"}
    assert before.items() <= after.items()
    assert files_below(state) == ledger
    record = record_of(run_copy)
    assert set(record["candidates"]) == {"ddim_50", "unipc_10"}
    assert record["settings"]["criterion"] == "public_proxy"
    for entry in record["candidates"].values():
        assert "private" not in entry and entry["frechet"] > 0 and entry["images_per_second"] > 0
        assert entry["ci_low"] <= entry["accuracy"] <= entry["ci_high"]
    assert record["chosen"] == choose(record["candidates"], "ddim_50").name
    assert record["overrides"] in outcome.out and record["reason"] in outcome.out
    assert "private" not in outcome.out.replace("private model", "")


def test_a_stopped_comparison_goes_on_where_it_was(command, run_copy, drawn, monkeypatch):
    arguments = (f"run={run_copy.path}", *TWO)
    spy = Sampler.__call__

    def stopped(self, *args, **options):
        if self.rule_name == "unipc":
            raise KeyboardInterrupt
        return spy(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", stopped)
        assert command(compare_samplers, *arguments).code == 130
    assert list(record_of(run_copy)["candidates"]) == ["ddim_50"]
    half = record_of(run_copy)["candidates"]["ddim_50"]
    drawn.clear()

    assert command(compare_samplers, *arguments).code == 0
    assert drawn == ["unipc_10, draw 1 of 2", "unipc_10, draw 2 of 2"]
    assert record_of(run_copy)["candidates"]["ddim_50"] == half
    drawn.clear()

    # One more candidate, and one that is another by its name.
    more = (
        "+sampler@candidates.mine=ddim",
        "candidates.mine.steps=2",
        "candidates.unipc_10.steps=2",
    )
    assert command(compare_samplers, *arguments, *more).code == 0
    assert {caption.split(",")[0] for caption in drawn} == {"mine", "unipc_10"}
    drawn.clear()

    assert command(compare_samplers, *arguments, *more, "num_images=21").code == 0
    assert {caption.split(",")[0] for caption in drawn} == {"ddim_50", "mine", "unipc_10"}


def test_private_metrics_are_looks_entered_first_and_have_no_say(command, run_copy, monkeypatch):
    arguments = (f"run={run_copy.path}", *TWO)
    assert command(compare_samplers, *arguments).code == 0
    without = record_of(run_copy)
    looks = len(run_copy.statement()["unaccounted_looks"])
    original, opened = digits.load, []

    def load(split):
        opened.append((split, len(run_copy.statement()["unaccounted_looks"]) - looks))
        return original(split)

    monkeypatch.setattr(digits, "load", load)
    outcome = command(compare_samplers, *arguments, "private=true")
    assert outcome.code == 0, outcome.err
    assert opened == [("test", 1)]
    assert len(run_copy.statement()["unaccounted_looks"]) == looks + 2
    assert "looked at private images; not used for the choice" in outcome.out
    record = record_of(run_copy)
    for name, entry in record["candidates"].items():
        private = entry.pop("private")
        assert private["n"] == 360 and private["frechet"] > 0
        assert private["note"] == "looked at private images; not used for the choice"
        assert entry == without["candidates"][name]
    assert record["chosen"] == without["chosen"]

    assert command(compare_samplers, *arguments, "private=true").code == 0
    assert len(run_copy.statement()["unaccounted_looks"]) == looks + 2


def without_public_images(run):
    cfg = OmegaConf.load(run.config_path)
    cfg.public = {}
    write_atomically(run.config_path, OmegaConf.to_yaml(cfg))


def test_where_there_are_no_public_images_synthetic_ones_decide(
    command, run_copy, no_private_images, drawn
):
    without_public_images(run_copy)
    outcome = command(compare_samplers, f"run={run_copy.path}", *TWO)
    assert outcome.code == 0, outcome.err
    assert "No public proxy" in outcome.out and len(drawn) == 4
    record = record_of(run_copy)
    assert record["settings"]["criterion"] == "synthetic_validation"
    for entry in record["candidates"].values():
        assert entry["n"] == 4  # a tenth of two draws of 20
        assert "frechet" not in entry

    outcome = command(compare_samplers, f"run={run_copy.path}", *TWO, "criterion=public_proxy")
    assert outcome.code == 2 and "has no public images" in outcome.err


def test_a_public_model_that_is_gone_is_trained_again(
    command, finished_run, run_copy, tmp_path, monkeypatch
):
    monkeypatch.setenv("DP_SYNTH_CACHE", str(tmp_path / "empty"))
    outcome = command(compare_samplers, f"run={run_copy.path}", *TWO)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("trained once more") == 1
    assert list((tmp_path / "empty" / "pretrained").glob("*/model"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("reference=mine",), "reference=mine is not a candidate"),
        (("reference=null",), "reference=None is not a candidate"),
        (tuple(f"~candidates.{name}" for name in DEFAULTS), "candidates is empty"),
        (("candidates=null",), "candidates is empty"),
        (("+sampler@candidates.mine=none",), "candidates.mine is no sampler"),
        (("+candidates.mine=3",), "candidates.mine is no sampler"),
        (("candidates.ddim_50.steps=0",), "steps=0"),
        (("num_images=0",), "num_images=0"),
        (("seeds=0",), "seeds=0"),
        (("seed=-1",), "seed=-1"),
        (("private=1",), "private=1"),
        (("criterion=fid",), "criterion='fid'"),
        (("evaluator=quick",), "evaluator=synthetic"),
        (("evaluator=none",), "evaluator=synthetic"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    command, finished_run, no_private_images, arguments, words
):
    outcome = command(compare_samplers, f"run={finished_run.path}", *arguments)
    assert outcome.code == 2, outcome
    assert words in outcome.err and len(outcome.err.strip().splitlines()) == 1
    assert outcome.err.strip().endswith(".")
    assert not (finished_run.path / compare_samplers.RECORD).exists()


def test_a_run_without_a_model_is_refused(command, run_copy):
    run_copy.model_dir.rename(run_copy.path / "elsewhere")
    outcome = command(compare_samplers, f"run={run_copy.path}", *TWO)
    assert outcome.code == 2 and "has no model/" in outcome.err
