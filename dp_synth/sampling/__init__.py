"""From a trained network to labelled images.

What decides an image is put together by ``sampler``: ``labels`` says of which class it is,
``streams`` where its noise comes from, ``spacing`` which noise levels are visited, ``rules`` how one
gets from each to the next (``rule`` is their calling convention, ``schedulers`` and ``heun`` are
they), ``guidance`` and ``thresholding`` what becomes of the network's predictions on the way.
``generation`` makes data sets of any size so, and ``comparison`` helps to choose a sampler.
"""

from dp_synth.sampling.sampler import Sampler

__all__ = ["Sampler"]
