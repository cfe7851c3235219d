"""Exact per-example clipped gradient sums at about the price of an ordinary backward.

What is computed. For B examples with K draws each (augmentation multiplicity), and the loss l_ik of
draw k of example i, DP-SGD needs

    sum_i c_i g_i,    g_i = (1/K) sum_k grad l_ik,    c_i = min(1, max_grad_norm / ||g_i||).

An ordinary backward gives sum_i g_i: it adds up over examples before anyone sees a norm.

Why it need not cost more. Say a layer's forward costs F. Its ordinary backward costs 2 F: F for the
input's gradient, F for the weight's, a product summed over all rows. To sum over the K rows of each
example apart is the same product, cut differently: F again, so 3 F in all as in ordinary training,
plus b P numbers written, read for the norms, and read for the weighted sum (P parameters, b
examples at a time). With K draws of an image each, that traffic is small beside the products.
Others pay more: hooks, 4 F, since autograd makes the weight's gradient too, to be thrown away;
"ghost" norms, 6 F, since a second backward follows, and inner products of an example's
N = K x positions rows, which grow with K where the product does not.

How it is cut. Rows are draw-major, n = k B + i, so that (K B, C, H, W) is, without moving anything,
(K, B C, H, W): K images with a group of channels per example. A convolution over B times the groups
has the wanted weight gradient, and group normalisation with B times the groups the wanted scale and
shift. Linear layers are one product per example.

Where b P numbers are too many (one draw, wide layers, low resolution), inner products do pay off,
and nothing is written at all: see ``book_keeping``. Which way is fastest for which layer is measured
once: see ``tuning``. How many examples go into one backward follows from memory: see ``memory``.

The modules, as a reader meets them: ``engine`` (chunks, and what happens to the network),
``recording`` (how gradients are caught), ``rules`` (one per layer type), ``contributions`` and
``book_keeping`` (forms of a layer's gradients), ``gradients`` (norms, factors, the sum), ``loop`` (the
way that works for any network), ``network`` and ``loss`` (what is asked of them), ``check`` (brute
force, before every run), ``opacus`` (a second opinion), ``choice`` (of the engine).
"""

from dp_synth.privacy.clipping.check import check_engine
from dp_synth.privacy.clipping.engine import ClippingEngine, EnginePlan

__all__ = ["ClippingEngine", "EnginePlan", "check_engine"]
