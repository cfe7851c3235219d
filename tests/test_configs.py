"""Every YAML composes with the main job, and every callable it names can be built."""

import lightning
import pytest
from conftest import compose, tiny_net
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.building import build_diffusion, build_network, is_on
from dp_synth.cli import conf_dir
from dp_synth.declaration import declare

OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in conf_dir().glob("*/*.yaml")
    if path.stem != "dp_sgd"  # the base of eps1, eps5 and eps10: it names no eps
)
COMMANDS = ("train", "plan", "sample", "evaluate", "report", "audit", "ledger", "release",
            "compare_samplers")  # fmt: skip
# What an option asks of the user.
ASKED = {
    "dataset=image_folder": (
        "dataset.name=mine",
        "dataset.num_examples=1009",
        "dataset.num_classes=2",
    ),
    # Inception's weights may not be at hand.
    **{
        f"evaluator={option}": ("evaluator.fidelity.features=[efficientnet_lite0]",)
        for option in ("paper", "dpimagebench", "dpimagebench_cifar")
    },
    "public=image_folder": ("public.root=elsewhere",),
    "public=checkpoint": ("public.path=published", "dataset.image_shape=[1,4,4]"),
}


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch):
    """A folder to work in that holds a published model."""
    monkeypatch.chdir(tmp_path)
    tiny_net().save_pretrained(tmp_path / "published")


def declared(*choices):
    """The config of these options, with what they ask for and what names tell."""
    cfg = compose(*choices, *(override for choice in choices for override in ASKED.get(choice, ())))
    declare(cfg)
    return cfg


def targets(node):
    """Every config node below ``node`` that names a callable."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            yield from targets(node._get_node(key))


def test_there_are_groups_and_commands():
    assert {"dataset", "public", "model", "privacy", "sampler", "evaluator", "audit"} <= {
        group for group, _ in OPTIONS
    }
    assert {path.stem for path in conf_dir().glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids="=".join)
def test_every_option_composes_and_names_what_exists(group, option):
    cfg = declared(f"{group}={option}")
    OmegaConf.resolve(cfg)
    assert not OmegaConf.missing_keys(cfg)
    for node in targets(cfg):
        assert callable(get_method(node._target_)), node


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids="=".join)
def test_every_option_can_be_built(group, option):
    """All but what reads images, and what needs the hardware."""
    cfg = declared(f"{group}={option}")
    shape, classes = tuple(cfg.dataset.image_shape), cfg.dataset.num_classes
    net = build_network(cfg, shape, classes)
    assert net.config.num_class_embeds == classes + 1
    assert build_diffusion(cfg).timestep_law.num_timesteps > 0
    plan = instantiate(cfg.privacy)
    canaries = instantiate(cfg.audit).num_canaries if is_on(cfg.audit) else 0
    assert plan.num_examples == cfg.dataset.num_examples + canaries
    assert plan.private is (option != "none" or group != "privacy")
    for built in (cfg.sampler, cfg.evaluator, cfg.logger):
        assert not is_on(built) or callable(instantiate(built))
    if cfg.trainer.accelerator == "cpu":
        lightning.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=cfg.trainer.devices,
            precision=cfg.trainer.precision,
            max_time=cfg.trainer.max_time,
            logger=False,
            enable_checkpointing=False,
        )


@pytest.mark.parametrize("dataset", [o for g, o in OPTIONS if g == "dataset"])
@pytest.mark.parametrize("experiment", [o for g, o in OPTIONS if g == "experiment"])
@pytest.mark.parametrize("privacy", [o for g, o in OPTIONS if g == "privacy"])
def test_experiments_fit_every_data_set_and_every_privacy(dataset, experiment, privacy):
    cfg = declared(f"dataset={dataset}", f"experiment={experiment}", f"privacy={privacy}")
    OmegaConf.resolve(cfg)
    assert instantiate(cfg.privacy).batch_size <= cfg.dataset.num_examples


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["dataset=digits", "privacy.eps=3"], "privacy.eps", 3),
        (["privacy.eps=3", "dataset=digits"], "privacy.eps", 3),
        (["dataset=digits", "public=none"], "public", {}),
        (["experiment=smoke", "privacy.steps=7"], "privacy.steps", 7),
        (["privacy.steps=7", "experiment=smoke"], "privacy.steps", 7),
        (["experiment=smoke", "privacy.delta=1e-7"], "privacy.delta", 1e-7),
    ],
)
def test_what_the_user_types_wins(overrides, key, value):
    assert OmegaConf.select(compose(*overrides), key) == value


def test_the_config_of_the_other_commands_is_the_same_program():
    assert OmegaConf.to_container(compose(name="sample").sampler) == OmegaConf.to_container(
        compose().sampler
    )
    assert OmegaConf.to_container(compose(name="evaluate").evaluator) == OmegaConf.to_container(
        compose().evaluator
    )
    planned = OmegaConf.to_container(compose(name="plan"))
    assert planned.pop("plan") == {"out": None}
    assert planned == OmegaConf.to_container(compose())
