"""A network and its noise schedule in diffusers' own format: a folder, or a repository of the hub."""

import json
import re
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError

from dp_synth.errors import UserError

# A pipeline has its parts in subfolders; a network that was saved alone, and older pipelines of
# the hub, have everything in the folder itself.
_CONFIGS = ("unet/config.json", "config.json")
_SCHEDULES = ("scheduler/scheduler_config.json", "scheduler_config.json")
_CLASSES = "classes.json"  # this program writes it into model/
_WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class DiffusersFolder:
    """A pipeline such as ``DDPMPipeline``, or a ``UNet2DModel`` alone.

    Args:
        path: a folder, or the id (owner/name) of a repository of the hub. What the hub's cache
            has is taken from there; the network is asked only for what it lacks.

    Raises:
        UserError: by every method, where a part is not there, is damaged, or is not of a
            ``UNet2DModel``.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def architecture(self) -> dict[str, Any]:
        """The arguments of ``diffusers.UNet2DModel`` that build this network."""
        file = self._find(_CONFIGS)
        if file is None:
            raise UserError(
                f"public.path={self.path} is neither a folder with unet/config.json or config.json "
                "nor a file of weights, and the hub of Hugging Face does not give a model of this "
                "name: it has an owner/name, and its cache serves where there is no network."
            )
        config = _read_table(file)
        kind = config.get("_class_name")
        if kind != "UNet2DModel":
            raise UserError(
                f"public.path={self.path} holds a network of the kind {kind}; a UNet2DModel, "
                "which works on pixels, is needed."
            )
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def network(self) -> UNet2DModel:
        """The network with its weights: safetensors first, else tensors that were pickled."""
        self.architecture()
        weights = self._find(_WEIGHTS)
        if weights is None:
            raise UserError(f"public.path={self.path} has no {' or '.join(_WEIGHTS[2:])}.")
        folder = weights.parent
        try:
            net, found = UNet2DModel.from_pretrained(
                folder, low_cpu_mem_usage=False, output_loading_info=True
            )
        except Exception as error:  # whatever a damaged file makes the readers stumble over
            raise UserError(
                f"The weights in {folder} cannot be read: they are damaged, of another network, "
                "or hold objects other than tensors, which are never loaded."
            ) from error
        strays = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
        if strays:
            raise UserError(
                f"The weights in {folder} are not those of its config.json: {strays[0]} is missing "
                "there or too many."
            )
        return net.float()

    def classes(self) -> tuple[str, ...] | None:
        """The classes of the label table, its last row excepted; None where they are not known."""
        file = Path(self.path, _CLASSES)
        if not file.is_file():
            return None
        try:
            return tuple(map(str, json.loads(file.read_text())))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a list of classes.") from error

    def schedule(self) -> dict[str, Any] | None:
        """The config of the scheduler that it was trained with; None where there is none."""
        file = self._find(_SCHEDULES)
        return None if file is None else _read_table(file)

    def _find(self, names: tuple[str, ...]) -> Path | None:
        """The first of these files that is there; from the hub where the path is no folder."""
        if Path(self.path).is_dir():
            files = (Path(self.path, name) for name in names)
            return next((file for file in files if file.is_file()), None)
        return _from_hub(self.path, names) if _HUB_ID.fullmatch(self.path) else None


def _from_hub(repository: str, names: tuple[str, ...]) -> Path | None:
    """The first of a repository's files that is there; the cache is asked before the network."""
    for name in names:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError:  # no network: the next file would wait for it as long
            return None
        except (HfHubHTTPError, OSError, ValueError):
            continue
    return None


def _read_table(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as a table of settings; the file is damaged."
        ) from error
