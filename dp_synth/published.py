"""A published diffusion model: private fine-tuning starts from it, nothing is pre-trained."""

from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from dp_synth.checks import count
from dp_synth.diffusers_folder import DiffusersFolder
from dp_synth.errors import UserError
from dp_synth.guided_diffusion import GuidedDiffusionWeights
from dp_synth.networks import predicts_variance, refuse_unless_halved
from dp_synth.process import Process
from dp_synth.published_process import refuse_other_process


class PublishedModel:
    """A model that others have trained on public images, as ``public.path`` names it.

    Args:
        path: a folder in diffusers' format, the id (owner/name) of a repository of Hugging Face's
            hub, or a file of weights from OpenAI's guided-diffusion or improved-diffusion.
        attention_head_dim: of a file of weights, see ``GuidedDiffusionWeights``.
        use_new_attention_order: of a file of weights, see ``GuidedDiffusionWeights``.

    Raises:
        UserError: no path, or a head width that is no number. Every method raises one where the
            model is not there, is damaged or cannot be used.
    """

    def __init__(
        self,
        path: str | None,
        attention_head_dim: int | None = 64,
        use_new_attention_order: bool = False,
    ) -> None:
        if path is None:
            raise UserError(
                "public.path names no model: give public.path=FOLDER in diffusers' format, "
                "public.path=OWNER/NAME on Hugging Face's hub, or public.path=FILE.pt of "
                "guided-diffusion."
            )
        if attention_head_dim is not None:
            count("public.attention_head_dim", attention_head_dim)
        self.path = str(path)
        expanded = Path(self.path).expanduser()
        self.source = (
            GuidedDiffusionWeights(expanded, attention_head_dim, use_new_attention_order)
            if expanded.is_file()
            else DiffusersFolder(str(expanded))
        )

    def __call__(self, image_shape: tuple[int, int, int], num_classes: int) -> UNet2DModel:
        """The model's architecture for images of one shape, with a label table of one's own.

        The weights are initial ones; ``networks.carry_over`` brings the published ones. The table
        has one row more than there are classes, for "no label", and a learned variance is left out.

        Args:
            image_shape: (C, H, W); any height and width that can be halved once per level.
            num_classes: number of classes.
        """
        channels, height, width = image_shape
        architecture = self.source.architecture()
        self._refuse_unusable(architecture, channels)
        levels = len(architecture["block_out_channels"])
        refuse_unless_halved(f"public.path={self.path}", levels, height, width)
        own = {
            "sample_size": (height, width),
            "out_channels": channels,
            "num_class_embeds": num_classes + 1,
        }
        try:
            return UNet2DModel.from_config(architecture | own)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"diffusers cannot build the network of public.path={self.path}: {error}"
            ) from error

    def load(self) -> tuple[UNet2DModel, tuple[str, ...] | None]:
        """The model with its weights, and its classes where they are known (see ``carry_over``)."""
        net, classes = self.source.network(), self.source.classes()
        if classes is not None and net.config.num_class_embeds != len(classes) + 1:
            raise UserError(
                f"public.path={self.path} names {len(classes)} classes in classes.json, which do "
                f"not fit a label table of {net.config.num_class_embeds} rows."
            )
        return net, classes

    def refuse_other_process(self, process: Process) -> None:
        """UserError unless the model was trained for this diffusion process.

        A model that comes without a scheduler, as weights alone do, is taken at the user's word.
        """
        schedule = self.source.schedule()
        if schedule is not None:
            refuse_other_process(self.path, schedule, process)

    def _refuse_unusable(self, architecture: dict[str, Any], channels: int) -> None:
        if architecture["in_channels"] != channels:
            raise UserError(
                f"public.path={self.path} is a network for images of {architecture['in_channels']} "
                f"channels, and these have {channels}; choose one for {channels}."
            )
        if architecture["out_channels"] != channels and not predicts_variance(architecture):
            raise UserError(
                f"public.path={self.path} gives {architecture['out_channels']} channels for "
                f"{channels}; a denoiser gives as many, or twice as many with a learned variance."
            )
        if architecture.get("class_embed_type") is not None:
            raise UserError(
                f"public.path={self.path} takes labels by class_embed_type="
                f"{architecture['class_embed_type']}; a label table, or no labels, would work."
            )
        if architecture.get("time_embedding_type", "positional") == "fourier":
            raise UserError(
                f"public.path={self.path} takes continuous noise levels; a model that takes "
                "discrete timesteps, such as one for DDPMScheduler, would work."
            )
