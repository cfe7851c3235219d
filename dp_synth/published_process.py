"""Whether a published model was trained for the process that a run uses, by its scheduler's config.

What the network is shown and gives, and how noisy each timestep is, must agree. Whatever else a
scheduler's config says (variance, clipping, spacing) is about sampling alone.
"""

from typing import Any

import torch
from diffusers import DDPMScheduler

from dp_synth.diffusion import PREDICTION_TYPES, Diffusion
from dp_synth.edm import EDM
from dp_synth.errors import UserError
from dp_synth.process import Process

_PREDICTIONS = {word: prediction for prediction, word in PREDICTION_TYPES.items()}


def refuse_other_process(path: str, schedule: dict[str, Any], process: Process) -> None:
    """UserError unless a model with this scheduler's config was trained for this process.

    Args:
        path: of the model, for messages.
        schedule: the config of a scheduler of diffusers, of any class.
        process: the one that the run uses.
    """
    if "sigma_data" in schedule:  # as every scheduler of EDM's preconditioning has it
        _refuse_other_than_edm(path, schedule, process)
    else:
        _refuse_other_than_ddpm(path, _discrete(path, schedule), process)


def _refuse_other_than_edm(path: str, theirs: dict[str, Any], process: Process) -> None:
    word = theirs.get("prediction_type", "epsilon")
    if word != "epsilon":
        raise UserError(
            f"public.path={path} was trained with EDM's preconditioning and "
            f"prediction_type={word}; one with epsilon, as the paper has it, would work."
        )
    keys = ("sigma_data", "sigma_min", "sigma_max")
    settings = {key: theirs[key] for key in keys if key in theirs}
    if not isinstance(process, EDM):
        raise UserError(
            f"public.path={path} was trained with EDM's preconditioning: set model/diffusion=edm "
            f"{_assignments(settings)}."
        )
    wrong = {key: value for key, value in settings.items() if value != getattr(process, key)}
    if wrong:
        raise UserError(f"public.path={path} was trained otherwise: set {_assignments(wrong)}.")


def _refuse_other_than_ddpm(path: str, theirs: DDPMScheduler, process: Process) -> None:
    word = theirs.config.prediction_type
    settings = {
        "prediction": _PREDICTIONS.get(word, word),
        "beta_schedule": theirs.config.beta_schedule,
    }
    if not isinstance(process, Diffusion):
        raise UserError(
            f"public.path={path} was trained at discrete timesteps: set model/diffusion=ddpm "
            f"{_assignments(settings)}."
        )
    if theirs.config.num_train_timesteps != process.num_timesteps:
        raise UserError(
            f"public.path={path} was trained with {theirs.config.num_train_timesteps} timesteps: "
            "model.diffusion.timestep_law.bounds must end with that number."
        )
    wrong = {key: value for key, value in settings.items() if value != getattr(process, key)}
    if wrong:
        raise UserError(f"public.path={path} was trained otherwise: set {_assignments(wrong)}.")
    if not torch.allclose(theirs.alphas_cumprod, process.schedule.alphas_cumprod, rtol=1e-4):
        raise UserError(
            f"public.path={path} was trained with other betas than diffusers has for "
            f"{theirs.config.beta_schedule}; only those are supported."
        )


def _assignments(settings: dict[str, Any]) -> str:
    """Settings as they are typed."""
    return " ".join(f"model.diffusion.{key}={value}" for key, value in settings.items())


def _discrete(path: str, schedule: dict[str, Any]) -> DDPMScheduler:
    """The schedule that a scheduler of any class was given, as that of DDPM's."""
    try:
        if "beta_schedule" in schedule:
            return DDPMScheduler.from_config(schedule)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        pass
    raise UserError(
        f"public.path={path} was trained for {schedule.get('_class_name')} with a noise "
        "schedule that DDPMScheduler does not have; a model that was trained for it would work."
    )
