"""Shared by the tests of faults: real private training on a tiny network, watched by an adversary.

The adversary sees every update before it is applied, knows every example, and wants to know whether
a canary was among them. Many canaries are tried in one training at once: each has a class of its
own, and its gradient lies in that class's row of the network, where nobody else's does. The noise
of different rows and steps is independent, so each row of each step is a trial of its own. Weights
stand still (a rate of 0), so that all trials have one law.
"""

from types import SimpleNamespace

import numpy as np
import torch
from conftest import Recorder, compose
from torch import nn

from dp_synth.data.images import Images
from dp_synth.diffusion import Diffusion
from dp_synth.fitting import fit
from dp_synth.module import DiffusionModule
from dp_synth.timestep_law import TimestepLaw

SIDE = 2  # of an image
PUBLIC_SEED = 5
# Makes an example's gradient far longer than the bound, and its class's row nearly all of it.
_GAIN = 100.0
_WHITE, _BLACK = 255, 0


class RowPerClass(nn.Module):
    """A network that predicts one picture per class; a convolution of its input adds next to nothing.

    With weights of zero the loss of an example of image x0 has the gradient -2 _GAIN x0 / SIDE**2
    in its class's row, whatever timestep and noise it draws.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.config = SimpleNamespace(
            num_class_embeds=num_classes + 1, in_channels=1, sample_size=(SIDE, SIDE)
        )
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.class_embedding = nn.Embedding(num_classes + 1, SIDE**2)
        for param in self.parameters():
            nn.init.zeros_(param)

    def forward(self, x, t, class_labels, return_dict):
        return (self.conv(x) + _GAIN * self.class_embedding(class_labels).view_as(x),)


def crowd(groups, size):
    """Images of `groups` data sets of `size` examples each, trained side by side.

    Example i of group g has the index i * groups + g and class g. The last one of each group is its
    canary, whose gradient points against that of the others. In the second half of the groups it is
    zeroed out: listed, and could not be read.
    """
    missing = groups // 2
    found = groups * size - missing
    pixels = np.full((found, SIDE, SIDE, 1), _BLACK, dtype=np.uint8)
    pixels[groups * (size - 1) :] = _WHITE
    labels = np.arange(found, dtype=np.int64) % groups
    return Images(pixels, labels, tuple(map(str, range(groups))), missing=missing)


def watch(plan, images, randomness=None):
    """Train as `plan` says, and return what the adversary sees of each class, [steps, classes].

    That is the update of the class's row along its canary's gradient, in units of max_grad_norm:
    1 for a canary, and noise of standard deviation `plan.noise_multiplier`.
    """
    recorders = []

    def recorder(parameters):
        recorders.append(Recorder(parameters))
        return recorders[-1]

    net = RowPerClass(len(images.classes))
    module = DiffusionModule(
        net=net,
        diffusion=Diffusion("x0", TimestepLaw([0, 50], [1.0])),
        optimizer=recorder,
        randomness=plan.randomness(PUBLIC_SEED) if randomness is None else randomness,
        multiplicity=plan.multiplicity,
        ema_decay=0.9,
        label_dropout=0.0,
        flip=False,
    )
    fit(module, images, plan, compose().trainer, caption="audit")
    sizes = [param.numel() for param in net.parameters()]
    (place,) = [i for i, p in enumerate(net.parameters()) if p is net.class_embedding.weight]
    rows = torch.stack(recorders[-1].seen).split(sizes, dim=1)[place]
    rows = rows.view(plan.steps, -1, SIDE**2)[:, :-1]  # the last one is "no label"
    along = -rows.sum(2).numpy() / SIDE
    return along * (plan.batch_size / plan.max_grad_norm)


def with_and_without(scores):
    """Scores [trials, classes] of classes with their canary, and of those without, each flat."""
    middle = scores.shape[1] // 2
    return scores[:, :middle].ravel(), scores[:, middle:].ravel()
