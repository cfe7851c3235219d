"""The run directory: written whole or not at all, never overwritten, damaged parts named."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import compose, files_below, tiny_diffusion, tiny_images, tiny_net, weights_of
from diffusers import DDPMPipeline, UNet2DModel

from dp_synth.data.folder import read_image_folder
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.runs import Run, default_run_dir, write_samples
from dp_synth.summary import print_summary


@pytest.mark.parametrize(
    ("eps", "label"), [(10, "eps10"), (0.5, "eps0.5"), (None, "no-privacy"), ("ten", "eps")]
)
def test_the_default_name_says_when_what_and_at_what_eps(eps, label):
    assert re.fullmatch(
        rf"runs/\d{{8}}-\d{{6}}-digits-{label}", default_run_dir(None, "digits", eps)
    )
    assert default_run_dir("there", "digits", eps) == "there"


def test_a_run_is_created_once(tmp_path):
    cfg = compose("experiment=smoke")
    run = Run.create(tmp_path / "a" / "run", cfg)
    before = files_below(run.path)
    assert set(before) == {"config.yaml"}
    with pytest.raises(UserError, match="already holds a run"):
        Run.create(run.path, compose())
    assert files_below(run.path) == before
    assert Run.open(run.path).config().privacy.steps == 3


def test_the_stored_config_needs_nothing_from_outside(tmp_path):
    text = Run.create(tmp_path, compose()).config_path.read_text()
    assert "${" not in text and "???" not in text


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        Run.open(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        Run.open(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \udcff")
    assert path.read_text() == "old"


def test_statement_and_metrics_before_there_are_any(tmp_path):
    run = Run(tmp_path)
    assert run.metrics() == {} and run.metrics_meta() == {} and not run.has_model()
    with pytest.raises(UserError, match=r"privacy\.json is missing"):
        run.statement()


def test_every_look_is_an_entry_and_outlives_a_new_statement(tmp_path):
    run = Run(tmp_path)
    run.write_statement({"eps": 1, "unaccounted_looks": []})
    for _ in range(2):
        run.record_look("first", seed=7)
    looks = [{"what": "first", "seed": 7}] * 2
    assert run.statement() == {"eps": 1, "unaccounted_looks": looks}
    run.write_statement({"eps": 2, "unaccounted_looks": []})
    assert run.statement() == {"eps": 2, "unaccounted_looks": looks}


def test_a_void_guarantee_reaches_the_summary(tmp_path, capsys):
    plan = PrivacyPlan(
        eps=3, delta=1e-5, max_grad_norm=1, batch_size=9, steps=2, num_examples=99,
        unsafe_repeatable_randomness=0,
    )  # fmt: skip
    run = Run(tmp_path)
    run.write_statement(plan.statement(2, "finished"))
    print_summary(run)
    assert "void" in capsys.readouterr().out


def test_one_process_at_a_time_trains_a_run(tmp_path):
    refused = pytest.raises(UserError, match="another process")
    with Run(tmp_path).locked(), refused, Run(tmp_path).locked():
        pass
    with Run(tmp_path).locked():
        pass


def test_a_stored_config_calls_nothing_foreign(tmp_path):
    run = Run(tmp_path)
    run.config_path.write_text("model: {network: {_target_: dp_synth.networks.unet}}")
    assert run.config().model.network._target_ == "dp_synth.networks.unet"
    run.config_path.write_text("dataset: {load: {_target_: os.system, command: 'true'}}")
    with pytest.raises(UserError, match="os.system"):
        run.config()


def test_a_model_comes_back_as_it_was(tmp_path):
    run, net = Run(tmp_path), tiny_net(seed=1)
    run.save_model(net, tiny_diffusion(), ("a", "b", "c"))
    with pytest.raises(RuntimeError, match="never replaced"):
        run.save_model(tiny_net(seed=2), tiny_diffusion(), ("a", "b", "c"))
    loaded, classes = run.load_model()
    assert classes == ("a", "b", "c") and torch.equal(weights_of(loaded), weights_of(net))
    for opened in (
        UNet2DModel.from_pretrained(run.model_dir, low_cpu_mem_usage=False),
        DDPMPipeline.from_pretrained(run.model_dir, low_cpu_mem_usage=False).unet,
    ):
        assert torch.equal(weights_of(opened), weights_of(net))
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("name", ["config.json", "classes.json"])
def test_a_damaged_model_is_named(tmp_path, name):
    run = Run(tmp_path)
    with pytest.raises(UserError, match="no model/"):
        run.load_model()
    run.save_model(tiny_net(), tiny_diffusion(), ("a", "b", "c"))
    (run.model_dir / name).write_text("{")
    with pytest.raises(UserError, match=f"{run.model_dir} cannot be read"):
        run.load_model()


def test_further_samples_are_numbered(tmp_path):
    run = Run(tmp_path)
    names = []
    for _ in range(4):
        directory = run.next_samples_dir()
        names.append(directory.name)
        directory.mkdir()
    assert names == ["samples", "samples-2", "samples-3", "samples-4"]


def test_samples_are_written_whole_or_not_at_all(tmp_path):
    images = tiny_images(7)
    write_samples(images, tmp_path / "samples", "a card")
    back = read_image_folder(tmp_path / "samples")
    order = np.argsort(images.labels, kind="stable")
    assert np.array_equal(back.pixels, images.pixels[order])
    assert np.array_equal(back.labels, images.labels[order])
    with pytest.raises(UserError, match="never overwritten"):
        write_samples(images, tmp_path / "samples", "another card")
    assert (tmp_path / "samples" / "README.md").read_text() == "a card"

    bad = tiny_images(7)
    bad = type(bad)(bad.pixels, bad.labels, ("a", "b", "../c"))
    with pytest.raises(UserError, match="cannot be a folder"):
        write_samples(bad, tmp_path / "other", "a card")
    assert not (tmp_path / "other").exists()


def test_what_an_interrupted_write_left_is_swept_up(tmp_path):
    (tmp_path / ".samples.partial" / "a").mkdir(parents=True)
    (tmp_path / ".model.partial").mkdir()
    write_samples(tiny_images(3), tmp_path / "samples", "a card")
    Run(tmp_path).save_model(tiny_net(), tiny_diffusion(), ("a", "b", "c"))
    assert {p.name for p in tmp_path.iterdir()} == {"samples", "model"}


def test_metrics_are_flat_json(tmp_path):
    run = Run(tmp_path)
    run.write_metrics({"b": 1.0, "a": 0.5}, {"a": {"private": True}, "b": {"private": False}})
    assert (
        json.loads((tmp_path / "metrics.json").read_text()) == run.metrics() == {"a": 0.5, "b": 1}
    )
    assert run.metrics_meta()["a"] == {"private": True}
