"""Published models as the public prior: read safely, refused in a sentence, carried over whole."""

import hashlib
import json
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import compose, tiny_net, weights_of
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from guided_diffusion_net import GuidedDiffusionNet
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dp_synth import plan, train
from dp_synth.building import build_diffusion, build_network
from dp_synth.data.folder import read_image_folder
from dp_synth.diffusion import Diffusion
from dp_synth.errors import UserError
from dp_synth.networks import carry_over
from dp_synth.pretraining import is_cached, load_public
from dp_synth.published import PublishedModel
from dp_synth.runs import Run
from dp_synth.timestep_law import TimestepLaw


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test asks the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def published_net(**architecture):
    """As DDPM's authors publish theirs: no labels, sines first, padding on one side."""
    options = {
        "num_class_embeds": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
    }
    torch.manual_seed(1)
    return UNet2DModel(**(settings_of(tiny_net()) | options | architecture))


def settings_of(net):
    """The arguments that a network was built with."""
    return {key: value for key, value in net.config.items() if not key.startswith("_")}


def pipeline(directory, net=None, scheduler=None):
    """A folder as ``DDPMPipeline.save_pretrained`` writes it."""
    net = published_net() if net is None else net
    DDPMPipeline(net, scheduler or DDPMScheduler()).save_pretrained(directory)
    return directory


def alone(directory, net=None):
    """A folder with a network and nothing else."""
    (published_net() if net is None else net).save_pretrained(directory)
    return directory


def pickled(directory):
    """An older folder: weights in ``.bin``, attention under the names it had then."""
    net = published_net()
    net.save_pretrained(directory, safe_serialization=False)
    file = directory / "diffusion_pytorch_model.bin"
    then = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = torch.load(file, weights_only=True)
    for new, old in then.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    torch.save(weights, file)
    return directory


def flat(directory):
    """A pipeline as the first ones on the hub were: everything in the folder itself."""
    pipeline(directory)
    for file in [*(directory / "unet").iterdir(), *(directory / "scheduler").iterdir()]:
        file.rename(directory / file.name)
    (directory / "unet").rmdir()
    (directory / "scheduler").rmdir()
    return directory


def hub(directory):
    """A repository in the cache of the hub, as a download leaves it; returns its id."""
    repository = directory.parent / "hub" / "models--google--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    flat(repository / "snapshots" / ("0" * 40))
    return "google/tiny"


class Hub(BaseHTTPRequestHandler):
    """Answers for the files of one repository as the hub does."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def answer(self):
        self.server.asked.append(self.path)
        file = self.server.folder / self.path.rpartition("/resolve/main/")[2]
        content = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("Content-Length", str(len(content)))
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return content

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("publish", [pipeline, flat])
def test_the_hub_is_asked_once(publish, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked = publish(tmp_path / "served"), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        PublishedModel("google/tiny").load()
        assert any("config.json" in path for path in server.asked)
        server.asked.clear()
        net, classes = PublishedModel("google/tiny").load()
        assert classes is None and not server.asked
        server.shutdown()
    assert torch.equal(weights_of(net), weights_of(published_net()))


def process(prediction="eps", beta_schedule="linear", timesteps=1000):
    return Diffusion(prediction, TimestepLaw([0, timesteps], [1.0]), beta_schedule)


@pytest.mark.parametrize("publish", [pipeline, alone, pickled, flat, hub])
@pytest.mark.parametrize("side", [(4, 4), (6, 10)])
def test_every_class_starts_from_what_was_published(publish, side, tmp_path):
    model = PublishedModel(publish(tmp_path / "model"))
    net = model((1, *side), 2)
    carry_over(*model.load(), net, ("cat", "dog"))
    assert net.config.num_class_embeds == 3 and tuple(net.config.sample_size) == side
    x, t = torch.randn(3, 1, *side), torch.tensor([0, 500, 999])
    with torch.no_grad():
        expected, found = published_net()(x, t).sample, net(x, t, torch.arange(3)).sample
    assert expected.std() > 0 and torch.equal(found, expected)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("num_classes", [None, 4])
def test_weights_of_guided_diffusion_are_carried_over(learn_sigma, num_classes, tmp_path):
    torch.manual_seed(0)
    oracle = GuidedDiffusionNet(
        learn_sigma=learn_sigma, num_classes=num_classes, heads=lambda channels: channels // 64
    )
    if num_classes is not None:  # all labels alike: then their mean is each of them
        with torch.no_grad():
            oracle.label_emb.weight[:] = oracle.label_emb.weight[0].clone()
    torch.save(oracle.state_dict(), tmp_path / "model.pt")
    model = PublishedModel(tmp_path / "model.pt")
    net = model((3, 8, 8), 2)
    carry_over(*model.load(), net, ("cat", "dog"))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([5, 800]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = oracle(x, t, None if num_classes is None else y)[:, :3]
        torch.testing.assert_close(net(x, t, y).sample, expected, rtol=0, atol=1e-5)


def test_a_model_of_this_program_keeps_its_classes(tmp_path):
    run = Run(tmp_path)
    run.save_model(tiny_net(num_classes=2), process(), ("cat", "dog"))
    net, classes = PublishedModel(run.model_dir).load()
    assert classes == ("cat", "dog") and net.config.num_class_embeds == 3
    (run.model_dir / "classes.json").write_text(json.dumps(["cat"]))
    with pytest.raises(UserError, match=r"names 1 classes in classes\.json.*3 rows"):
        PublishedModel(run.model_dir).load()
    (run.model_dir / "classes.json").write_text("7")
    with pytest.raises(UserError, match=r"classes\.json cannot be read as a list"):
        PublishedModel(run.model_dir).load()


def test_building_asks_for_no_weights(tmp_path):
    (pipeline(tmp_path / "model") / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    model = PublishedModel(tmp_path / "model")
    assert model((1, 4, 4), 2).config.num_class_embeds == 3
    with pytest.raises(UserError, match="has no diffusion_pytorch_model.safetensors or"):
        model.load()


@pytest.mark.parametrize(
    ("shape", "architecture", "message"),
    [
        ((3, 4, 4), {}, "images of 1 channels, and these have 3"),
        ((1, 5, 4), {}, "2 levels and needs images whose sides are multiples of 2"),
        ((1, 4, 4), {"out_channels": 3}, "gives 3 channels for 1"),
        ((1, 4, 4), {"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ((1, 4, 4), {"time_embedding_type": "fourier"}, "continuous noise levels"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(shape, architecture, message, tmp_path):
    model = PublishedModel(alone(tmp_path / "model", published_net(**architecture)))
    with pytest.raises(UserError, match=message) as caught:
        model(shape, 2)
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "of the kind UNet2DConditionModel"),
        ({"_class_name": None}, "of the kind None"),
        ({"down_block_types": ["NoBlock", "NoBlock"]}, "diffusers cannot build"),
        ({"norm_num_groups": 3}, "diffusers cannot build"),
    ],
)
def test_another_kind_of_config_is_refused(change, message, tmp_path):
    config = alone(tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        PublishedModel(tmp_path / "model")((1, 4, 4), 2)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"7"])
def test_a_damaged_config_is_refused(content, tmp_path):
    (alone(tmp_path / "model") / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read as a table"):
        PublishedModel(tmp_path / "model")((1, 4, 4), 2)


class Attack:
    """Unpickled carelessly, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("what", ["truncated", "code", "missing", "left over", "another shape"])
@pytest.mark.parametrize("publish", [alone, pickled])
def test_damaged_weights_are_refused(what, publish, tmp_path):
    folder = publish(tmp_path / "model")
    file = next(folder.glob("diffusion_pytorch_model.*"))
    net = published_net(block_out_channels=[4, 6]) if what == "another shape" else published_net()
    weights = net.state_dict()
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif what == "code":
        file.unlink()
        attack = {"conv_in.weight": Attack(tmp_path / "ran")}
        (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(attack))
    else:
        if what == "missing":
            del weights["conv_in.bias"]
        elif what == "left over":
            weights["extra"] = torch.zeros(1)
        file.unlink()
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"^The weights in .*model") as caught:
        PublishedModel(folder).load()
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "no-such-folder", "no/such", "a/b/c", "", "google/../x", "a b/c"]
)
def test_what_is_nowhere_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path == "":
        path = str(tmp_path / "empty")
        (tmp_path / "empty").mkdir()
    model = PublishedModel(path)
    for method in (lambda: model((1, 4, 4), 2), model.load):
        with pytest.raises(UserError, match=f"public.path={path} is neither a folder"):
            method()


def test_a_path_must_be_given():
    with pytest.raises(UserError, match=r"public\.path=FOLDER"):
        PublishedModel(None)


@pytest.mark.parametrize("value", [0, -64, 1.5, "64", True])
def test_the_width_of_heads_is_a_number(value, tmp_path):
    with pytest.raises(UserError, match=r"public\.attention_head_dim"):
        PublishedModel(tmp_path, attention_head_dim=value)


@pytest.mark.parametrize(
    ("trained", "settings"),
    [
        (DDPMScheduler(), {}),
        (DDPMScheduler(clip_sample=False, variance_type="learned_range"), {}),
        (DDIMScheduler(timestep_spacing="trailing"), {}),
        (
            DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
            {"prediction": "v", "beta_schedule": "squaredcos_cap_v2"},
        ),
    ],
)
def test_the_process_that_it_was_trained_for_is_accepted(trained, settings, tmp_path):
    model = PublishedModel(pipeline(tmp_path / "model", scheduler=trained))
    model.refuse_other_process(process(**settings))
    assert model.source.schedule() is not None
    shutil.rmtree(tmp_path / "model" / "scheduler")
    model.refuse_other_process(process("x0"))  # at the user's word


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"prediction_type": "v_prediction"}, r"set model\.diffusion\.prediction=v\."),
        (
            {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
            r"prediction=x0 model\.diffusion\.beta_schedule=squaredcos_cap_v2\.",
        ),
        ({"num_train_timesteps": 4000}, r"4000 timesteps: model\.diffusion\.timestep_law\.bounds"),
        ({"beta_end": 0.012}, "other betas"),
        ({"rescale_betas_zero_snr": True}, "other betas"),
        ({"trained_betas": [0.01] * 1000}, "other betas"),
    ],
)
def test_another_process_is_refused(trained, message, tmp_path):
    model = PublishedModel(pipeline(tmp_path / "model", scheduler=DDPMScheduler(**trained)))
    with pytest.raises(UserError, match=message):
        model.refuse_other_process(process())


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "EDMEulerScheduler", "sigma_max": 80},
        {"beta_schedule": "no such"},
        {"beta_schedule": "linear", "num_train_timesteps": "many"},
    ],
)
def test_a_scheduler_of_another_kind_is_refused(config, tmp_path):
    file = pipeline(tmp_path / "model") / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="a noise schedule that DDPMScheduler does not have"):
        PublishedModel(tmp_path / "model").refuse_other_process(process())


def small(directory):
    """A published network for the embedded digits."""
    return pipeline(directory, published_net(sample_size=32))


@pytest.mark.parametrize("more", [(), ("model=unet_32",), ("experiment=smoke",)])
def test_the_option_replaces_network_and_process(more, tmp_path):
    cfg = compose("public=checkpoint", f"public.path={small(tmp_path / 'model')}", *more)
    OmegaConf.resolve(cfg)
    net = build_network(cfg, (1, 8, 8), 10)
    assert net.config.downsample_padding == 0 and net.config.num_class_embeds == 11
    assert build_diffusion(cfg).prediction == "eps"
    instantiate(cfg.public.checkpoint).refuse_other_process(build_diffusion(cfg))
    assert is_cached(cfg) and load_public(cfg) is None


def test_a_run_from_a_published_model(command, tmp_path):
    shared = ("public=checkpoint", f"public.path={small(tmp_path / 'model')}", "experiment=smoke")
    price = command(plan, *shared, "plan.out=price.json")
    assert price.code == 0, price.err
    assert json.loads((tmp_path / "price.json").read_text())["hours_pretraining"] == 0
    outcome = command(train, *shared, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "run")
    assert len(read_image_folder(run.public_only_dir)) == 40
    assert not run.public_examples_dir.exists()
    metrics = run.metrics()
    assert "utility/accuracy.public_only" in metrics
    assert not any(name.startswith("fidelity/") for name in metrics)
    assert run.load_model()[0].config.downsample_padding == 0
    assert str(tmp_path) not in (run.model_dir / "config.json").read_text()


def test_a_run_is_refused_before_any_image_is_read(command, tmp_path):
    path = small(tmp_path / "model")
    for arguments, message in [
        (("public.path=null",), "public.path names no model"),
        ((f"public.path={tmp_path}",), "is neither a folder"),
        ((f"public.path={path}", "model.diffusion.prediction=x0"), "prediction=eps"),
    ]:
        outcome = command(train, "public=checkpoint", *arguments, f"run_dir={tmp_path / 'run'}")
        assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err
        assert not (tmp_path / "run").exists()
