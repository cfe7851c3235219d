"""Files as their publishers ship them become a private synthetic data set by one command."""

import json

import pytest
from conftest import Outcome
from PIL import Image
from published_fixtures import write_cifar10, write_imagenet32, write_mnist_like
from tissue import write_camelyon17

from dp_synth import train
from dp_synth.data.folder import read_image_folder
from dp_synth.data.module import Camelyon17DataModule, CIFAR10DataModule
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.runs import Run

# Every part of the real job, each as small as it goes.
TINY = (
    "experiment=smoke",
    "model.network.block_out_channels=[8,16,16]",
    "model.network.attention_head_dim=8",
    "public.batch_size=8",
    "privacy.batch_size=8",
    "run_dir=run",
)
EVALUATED = ("evaluator.classifier.steps=3", "evaluator.classifier.width=4")


def published(name, root):
    """Write the files of a data set; return the overrides that its small size asks for."""
    if name == "camelyon17":
        write_camelyon17(root, count=120)
        return ()
    if name == "cifar10":
        write_cifar10(root / "cifar-10-batches-py", per_batch=11, test=13)
        return ("dataset.verify=false", "dataset.num_examples=55")
    inner = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
    write_mnist_like(root / inner / "raw", train=53, test=13, compressed=name == "mnist")
    return ("dataset.verify=false", "dataset.num_examples=53")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fashion_mnist", (1, 28, 28)),
        ("mnist", (1, 28, 28)),
        ("cifar10", (3, 32, 32)),
        ("camelyon17", (3, 32, 32)),
    ],
)
def test_published_files_become_synthetic_images(command, tmp_path, name, shape):
    overrides = published(name, tmp_path / "data")
    outcome: Outcome = command(
        train,
        f"dataset={name}",
        f"dataset.root={tmp_path / 'data'}",
        "public.load.num_images=40",
        *TINY,
        *EVALUATED,
        *overrides,
    )
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "run")
    samples = read_image_folder(run.samples_dir)
    assert samples.shape == shape and len(samples) == 40
    statement = run.statement()
    assert statement["unit"] == "example" and 0 < statement["eps"] <= 10
    assert any("several images" in text for text in statement["not_covered"])
    metrics = json.loads(run.metrics_path.read_text())
    assert 0 <= metrics["utility/accuracy"] <= 1
    splits = {"camelyon17": ["val", "id_val"]}.get(name, [])
    for split in splits:
        assert 0 <= metrics[f"utility/accuracy.{split}"] <= 1
    (look,) = statement["unaccounted_looks"]
    assert look["splits"] == ["train", "test", *splits]
    assert run.report_path.is_file()


def test_the_down_sampled_imagenet_can_be_the_public_prior(command, tmp_path):
    write_imagenet32(tmp_path / "imagenet", per_batch=5)
    overrides = published("fashion_mnist", tmp_path / "data")
    outcome = command(
        train,
        "dataset=fashion_mnist",
        f"dataset.root={tmp_path / 'data'}",
        "public=imagenet32",
        f"public.root={tmp_path / 'imagenet'}",
        *TINY,
        *overrides,
        "sampler=none",
        "evaluator=none",
    )
    assert outcome.code == 0, outcome.err
    assert Run(tmp_path / "run").has_model()


def test_a_patient_as_the_unit_is_stated_and_counted(command, tmp_path):
    write_camelyon17(tmp_path, count=120)
    outcome = command(
        train,
        "dataset=camelyon17",
        f"dataset.root={tmp_path}",
        "dataset.unit=patient",
        *TINY,
        "privacy.batch_size=4",
        "public=none",
        "sampler=none",
        "evaluator=none",
    )
    assert outcome.code == 0, outcome.err
    statement = Run(tmp_path / "run").statement()
    module = Camelyon17DataModule(
        lambda steps_taken: [], root=tmp_path, unit="patient", cache=tmp_path / "cache"
    )
    assert statement["unit"] == "patient"
    assert statement["num_examples"] == module.images.num_examples < len(module.images)
    assert not any("several images" in text for text in statement["not_covered"])


def test_the_data_modules_serve_a_plans_batches(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py", per_batch=7)
    plan = PrivacyPlan(
        eps=10, delta=1e-3, max_grad_norm=1, batch_size=5, steps=4, num_examples=35
    ).calibrate()
    randomness = plan.randomness(seed=0)
    module = CIFAR10DataModule(
        lambda steps_taken: plan.batches(randomness, steps_taken), root=tmp_path, verify=False
    )
    batches = list(module.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert batch.pixels.shape == (len(batch.indices), 3, 32, 32)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_broken_image_of_any_split_shows_before_a_run_is_begun(command, tmp_path, split):
    for number in range(22):
        path = tmp_path / "data" / ("train", "test")[number % 2] / "tissue" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    broken = next((tmp_path / "data" / split).rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:50])
    outcome = command(
        train,
        "dataset=image_folder",
        "dataset.name=mine",
        f"dataset.root={tmp_path}/data",
        "public.load.num_images=40",
        *TINY,
    )
    assert outcome.code == 2 and str(broken) in outcome.err
    assert not (tmp_path / "run").exists()
