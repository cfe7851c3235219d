"""The U-Net of guided-diffusion, written from its papers: what its weights mean, as an oracle.

Layers carry the names that they have in published ``.pt`` files. Options carry the names of the
program's flags; ``attention`` is a set of levels. Nichol and Dhariwal 2021 (arXiv 2102.09672),
Dhariwal and Nichol 2021 (arXiv 2105.05233), https://github.com/openai/guided-diffusion.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def _norm(channels):
    return nn.GroupNorm(32, channels)


class _ResBlock(nn.Module):
    def __init__(self, before, after, embedded, scale_shift, resample=lambda x: x):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            _norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, after * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            _norm(after), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x, embedding):
        norm, activation, convolution = self.in_layers
        h = convolution(self.resample(activation(norm(x))))
        condition = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + condition)
        return self.skip_connection(self.resample(x)) + h


class _Attention(nn.Module):
    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, embedding):
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        each = qkv.shape[1] // (3 * self.heads)
        outputs = []
        for head in range(self.heads):
            if self.new_order:  # all queries, all keys, all values
                starts = [(part * self.heads + head) * each for part in range(3)]
            else:  # queries, keys and values of one head after the other
                starts = [(head * 3 + part) * each for part in range(3)]
            query, key, value = (qkv[:, start : start + each] for start in starts)
            weights = (query.transpose(1, 2) @ key / math.sqrt(each)).softmax(-1)
            outputs.append(value @ weights.transpose(1, 2))
        return (flat + self.proj_out(torch.cat(outputs, 1))).view_as(x)


class _Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        return self.op(x)


class _Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        return self.conv(_doubled(x))


class _Plain(nn.Conv2d):
    def forward(self, x, embedding):
        return super().forward(x)


class _Block(nn.Sequential):
    def forward(self, x, embedding):
        for layer in self:
            x = layer(x, embedding)
        return x


def _halved(x):
    return F.avg_pool2d(x, 2)


def _doubled(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class GuidedDiffusionNet(nn.Module):
    """Called as (images [B,C,H,W], timesteps [B], labels [B] or None)."""

    def __init__(
        self,
        in_channels=3,
        num_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention=(1,),
        heads=lambda channels: 1,
        use_new_attention_order=False,
        learn_sigma=False,
        num_classes=None,
        use_scale_shift_norm=False,
        resblock_updown=False,
    ):
        super().__init__()
        embedded = 4 * num_channels
        self.num_channels = num_channels
        self.time_embed = nn.Sequential(
            nn.Linear(num_channels, embedded), nn.SiLU(), nn.Linear(embedded, embedded)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedded)

        def res_block(before, after, **options):
            return _ResBlock(before, after, embedded, use_scale_shift_norm, **options)

        def attend(channels):
            return _Attention(channels, heads(channels), use_new_attention_order)

        first = channels = channel_mult[0] * num_channels
        last = len(channel_mult) - 1
        skips = [channels]
        self.input_blocks = nn.ModuleList([_Block(_Plain(in_channels, channels, 3, padding=1))])
        for level, factor in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [res_block(channels, factor * num_channels)]
                channels = factor * num_channels
                if level in attention:
                    layers.append(attend(channels))
                self.input_blocks.append(_Block(*layers))
                skips.append(channels)
            if level < last:
                self.input_blocks.append(
                    _Block(
                        res_block(channels, channels, resample=_halved)
                        if resblock_updown
                        else _Downsample(channels)
                    )
                )
                skips.append(channels)
        self.middle_block = _Block(
            res_block(channels, channels), attend(channels), res_block(channels, channels)
        )
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(channels + skips.pop(), factor * num_channels)]
                channels = factor * num_channels
                if level in attention:
                    layers.append(attend(channels))
                if level > 0 and i == num_res_blocks:
                    layers.append(
                        res_block(channels, channels, resample=_doubled)
                        if resblock_updown
                        else _Upsample(channels)
                    )
                self.output_blocks.append(_Block(*layers))
        self.out = nn.Sequential(
            _norm(first),
            nn.SiLU(),
            nn.Conv2d(first, in_channels * (1 + learn_sigma), 3, padding=1),
        )

    def forward(self, x, t, y=None):
        half = self.num_channels // 2
        frequencies = torch.tensor([10_000 ** (-i / half) for i in range(half)])
        angles = t[:, None] * frequencies
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            embedding = embedding + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.out(x)
