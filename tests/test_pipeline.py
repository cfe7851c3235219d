"""One finished run against the contract: names, contents, the statement, and what may follow it."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import SHORT, compose, files_below, weights_of
from diffusers import DDPMPipeline, UNet2DModel
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image

from dp_synth import evaluate, report, sample, train
from dp_synth.checkpoints import newest_first
from dp_synth.data.folder import read_image_folder
from dp_synth.errors import UserError
from dp_synth.networks import carry_over
from dp_synth.pretraining import pretrained
from dp_synth.privacy.wording import round_up
from dp_synth.runs import Run

DIGITS = {str(digit) for digit in range(10)}


def test_the_run_directory_is_the_contracts(finished_run):
    assert {path.name for path in finished_run.path.iterdir()} == {
        "config.yaml",
        "privacy.json",
        "privacy.html",
        "model",
        "checkpoints",
        "samples",
        "public",
        "logs",
        "local",
        "metrics.json",
        "metrics_meta.json",
        "report.html",
    }
    assert {path.name for path in finished_run.logs_dir.iterdir()} == {"metrics.csv"}
    assert {path.name for path in (finished_run.path / "public").iterdir()} == {
        "samples",
        "examples",
    }


def test_samples_hold_class_folders_and_their_papers_and_nothing_else(finished_run):
    papers = {
        finished_run.samples_dir: {"README.md", "SHA256SUMS"},
        finished_run.public_only_dir: {"README.md"},
    }
    for directory, beside in papers.items():
        assert {path.name for path in directory.iterdir()} == DIGITS | beside
        files = [path for path in directory.rglob("*") if path.is_file()]
        assert len(files) == 40 + len(beside)
        for name in DIGITS:
            assert len(list((directory / name).glob("*.png"))) == 4
        for file in files:
            if file.suffix == ".png":
                with Image.open(file) as image:
                    assert image.size == (8, 8) and image.mode == "L" and not image.info
    statement = finished_run.statement()
    card = (finished_run.samples_dir / "README.md").read_text()
    for words in (f"eps = {round_up(statement['eps'])}", "delta = 0.0001", "1437", "zero-out"):
        assert words in card


def test_synthetic_images_are_not_the_public_baseline(finished_run):
    mine, baseline = (
        read_image_folder(directory).pixels
        for directory in (finished_run.samples_dir, finished_run.public_only_dir)
    )
    assert mine.shape == baseline.shape and not np.array_equal(mine, baseline)


def pld_epsilon(noise_multiplier, sample_rate, steps, delta):
    """The same mechanism, accounted for by another library."""
    step = PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    return accountant.compose(SelfComposedDpEvent(step, steps)).get_epsilon(delta)


def test_the_stated_eps_is_what_another_accountant_finds(finished_run):
    statement = finished_run.statement()
    keys = ("noise_multiplier", "sample_rate", "steps", "delta")
    found = pld_epsilon(*(statement[key] for key in keys))
    assert found * 0.999 <= statement["eps"] <= found * 1.01
    (query,) = statement["queries"]
    assert {key: query[key] for key in keys} == {key: statement[key] for key in keys}
    assert query["eps"] == statement["eps"] <= statement["eps_planned"] == 10


def test_the_statement_says_what_the_config_asked_for(finished_run):
    statement, cfg = finished_run.statement(), finished_run.config()
    assert statement["status"] == "finished"
    assert statement["steps"] == statement["steps_taken"] == cfg.privacy.steps
    assert statement["sample_rate"] == cfg.privacy.batch_size / cfg.dataset.num_examples
    for key in ("delta", "max_grad_norm", "multiplicity", "batch_size", "num_examples"):
        assert statement[key] == cfg.privacy[key]
    assert statement["adjacency"] == "zero_out" and statement["sampling"] == "poisson"
    assert statement["unit"] == "example" and statement["world_size"] == 1
    covered = " ".join(statement["not_covered"])
    for words in ("Hyper-parameter search", "Evaluation", "Floating point", "test split"):
        assert words in covered
    assert {"python", "torch", "dp-synth"} <= set(statement["versions"])


def test_every_private_metric_is_listed_as_an_unaccounted_look(finished_run):
    metrics, meta = finished_run.metrics(), finished_run.metrics_meta()
    assert set(metrics) == set(meta)
    assert all(isinstance(value, float | int) for value in metrics.values())
    assert all({"private", "n"} <= set(entry) and entry["n"] > 0 for entry in meta.values())
    for name in ("utility/accuracy", "utility/accuracy.public_only", "utility/accuracy.real"):
        assert metrics[f"{name}.ci_low"] <= metrics[name] <= metrics[f"{name}.ci_high"]
        assert meta[name]["private"] and meta[name]["n"] == 360
    assert "fidelity/frechet.classifier" in metrics
    assert not meta["utility/accuracy.synthetic_validation"]["private"]
    (look,) = finished_run.statement()["unaccounted_looks"]
    assert look["samples"] == "samples" and look["evaluator"].endswith("Evaluator")


def test_the_log_of_the_private_phase_holds_steps_and_eps(finished_run):
    header, *rows = (finished_run.logs_dir / "metrics.csv").read_text().splitlines()
    assert sorted(header.split(",")) == ["eps", "step"]
    table = [dict(zip(header.split(","), map(float, row.split(",")), strict=True)) for row in rows]
    assert [row["step"] for row in table] == [1, 2, 3]
    assert [row["eps"] for row in table] == sorted(row["eps"] for row in table)
    assert table[-1]["eps"] == finished_run.statement()["eps"]


def test_the_model_opens_in_diffusers_and_holds_the_averaged_weights(finished_run):
    """Averaged weights: those in the last checkpoint, not the last step's."""
    net = UNet2DModel.from_pretrained(finished_run.model_dir)
    pipeline = DDPMPipeline.from_pretrained(finished_run.model_dir)
    checkpoint = torch.load(newest_first(finished_run.checkpoints_dir)[0], weights_only=True)
    averaged = torch.cat([p.flatten() for p in checkpoint["ema"]["shadow_params"]])
    assert torch.equal(weights_of(net), averaged)
    assert torch.equal(weights_of(pipeline.unet), averaged)
    state = checkpoint["state_dict"]
    last = torch.cat([state[f"net.{name}"].flatten() for name, _ in net.named_parameters()])
    assert not torch.equal(averaged, last)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.num_train_timesteps == 1000
    classes = json.loads((finished_run.model_dir / "classes.json").read_text())
    assert set(classes) == DIGITS and net.config.num_class_embeds == 11


def test_private_training_started_from_the_public_model(finished_run):
    """Every class has the same name in both, so the step-0 checkpoint would be the public model."""
    cfg = finished_run.config()
    prior, classes = pretrained(cfg, None)  # the cache has it, so no public image is needed
    net = UNet2DModel.from_pretrained(finished_run.model_dir)
    distance = float((weights_of(net) - weights_of(prior)).norm() / weights_of(prior).norm())
    other = UNet2DModel.from_config(net.config)
    far = float((weights_of(net) - weights_of(other)).norm() / weights_of(other).norm())
    assert 0 < distance < 0.2 < far
    carry_over(prior, classes, net, classes)
    assert torch.equal(weights_of(net), weights_of(prior))


def test_the_report_is_one_page_that_loads_nothing(finished_run):
    page = finished_run.report_path.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page) and "<script" not in page
    assert f"{finished_run.metrics()['utility/accuracy']:.1%}"[:3] in page


def test_no_path_of_this_machine_and_no_private_seed_is_in_the_statement(finished_run):
    text = finished_run.privacy_path.read_text()
    assert str(finished_run.path) not in text and "seed" not in text


@pytest.fixture
def sampled(command):
    """A function: run, overrides -> the images of a ``sample`` command."""

    def draw(run, *overrides):
        out = run.next_samples_dir()
        few = ("sampler.num_images=13", "sampler.steps=2")
        assert command(sample, f"run={run.path}", *few, *overrides).code == 0
        return read_image_folder(out)

    return draw


def test_further_samples_depend_on_the_public_seed_alone(sampled, run_copy):
    privacy = run_copy.privacy_path.read_bytes()
    one, again, other = (sampled(run_copy, f"seed={seed}") for seed in (5, 5, 6))
    names = {path.name for path in run_copy.path.glob("samples*")}
    assert names == {"samples", "samples-2", "samples-3", "samples-4"}
    assert np.array_equal(one.pixels, again.pixels) and np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.pixels, other.pixels) and len(one) == 13
    # Drawing costs no eps and is no look at private images.
    assert run_copy.privacy_path.read_bytes() == privacy


def test_samples_go_where_they_are_sent(command, run_copy, tmp_path):
    few = ("sampler=unipc", "sampler.num_images=3", "sampler.steps=2", f"out={tmp_path}/there")
    before = files_below(run_copy.path)
    outcome = command(sample, f"run={run_copy.path}", *few)
    assert outcome.code == 0 and f"{tmp_path}/there" in outcome.out
    assert len(read_image_folder(tmp_path / "there")) == 3
    assert files_below(run_copy.path) == before


def test_evaluate_again_gives_the_same_metrics_and_is_another_look(command, run_copy):
    """The run's seed is 0 and so is the command's."""
    before = files_below(run_copy.path)
    outcome = command(evaluate, f"run={run_copy.path}", "evaluator.classifier.steps=20")
    assert outcome.code == 0 and "real training data" in outcome.out
    after = files_below(run_copy.path)
    for name in ("metrics.json", "metrics_meta.json"):
        assert after[name] == before[name], name
    assert len(run_copy.statement()["unaccounted_looks"]) == 2


def test_other_images_leave_the_metrics_of_the_run_alone(command, run_copy):
    before = files_below(run_copy.path)
    others = f"samples={run_copy.public_only_dir}"
    outcome = command(evaluate, f"run={run_copy.path}", others, "evaluator.classifier.steps=5")
    assert outcome.code == 0 and "synthetic data" in outcome.out
    after = files_below(run_copy.path)
    for name in ("metrics.json", "metrics_meta.json"):
        assert after[name] == before[name], name
    assert len(run_copy.statement()["unaccounted_looks"]) == 2


def test_reports_of_several_runs_go_into_one_page(command, finished_run, run_copy, tmp_path):
    runs = f"runs=[{finished_run.path},{run_copy.path}]"
    assert command(report, runs).code == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_run_without_privacy_says_so_everywhere(command, tmp_path):
    run = Run(tmp_path / "run")
    few = ("sampler=ddim", "sampler.steps=2", "sampler.num_images=10")
    outcome = command(
        train, *SHORT, *few, "public=none", "privacy=none", "privacy.steps=3", f"run_dir={run.path}"
    )
    assert outcome.code == 0 and "Privacy    none" in outcome.out
    statement = run.statement()
    assert statement["private"] is False and statement["eps"] is None
    assert statement["steps_taken"] == 3 and statement["queries"] == []
    assert "no privacy guarantee" in (run.samples_dir / "README.md").read_text()
    assert run.has_model() and run.report_path.is_file()


def test_the_proxy_of_the_private_data_is_a_data_set_like_another(command, tmp_path):
    outcome = command(
        train,
        *SHORT,
        "dataset=font_digits",
        "dataset.num_examples=101",
        "public=none",
        f"run_dir={tmp_path}/run",
    )
    assert outcome.code == 0, outcome
    assert Run(tmp_path / "run").statement()["num_examples"] == 101


def test_a_sweep_gets_the_objective(command, monkeypatch, tmp_path):
    """The value that ``train`` returns to Hydra is the metric that ``objective`` names."""
    run = Run.create(tmp_path, compose())
    run.write_statement({"eps": None, "unaccounted_looks": []})
    run.write_metrics({"utility/accuracy.synthetic_validation": 0.25, "other": 3.0}, {})
    monkeypatch.setattr(train, "train", lambda cfg, path: run)
    monkeypatch.setattr(train, "print_summary", lambda run: None)
    task = train.main.__wrapped__
    monkeypatch.setattr(train.HydraConfig, "get", lambda: compose_hydra(tmp_path))
    assert task(compose()) == 0.25
    assert task(compose("objective=other")) == 3.0
    with pytest.raises(UserError, match="objective=nothing"):
        task(compose("objective=nothing"))
    run.write_metrics({"other": 3.0}, {"other": {"private": True}})
    assert task(compose("objective=other")) == 3.0
    (look,) = run.statement()["unaccounted_looks"]
    assert look["metric"] == "other"


def compose_hydra(directory):
    """As much of Hydra's own config as the command reads."""
    return OmegaConf.create(
        {
            "runtime": {"output_dir": str(directory)},
            "overrides": {"task": []},
            "mode": RunMode.MULTIRUN,
        }
    )
