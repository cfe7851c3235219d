"""Units that own several images: exactly K rows each, spread evenly, clipped once, all their own."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import tiny_module, tiny_net
from omegaconf import OmegaConf
from scipy import stats

from dp_synth.building import load_images
from dp_synth.data.images import Images
from dp_synth.data.module import ImageDataModule
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError
from dp_synth.fitting import fit
from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.randomness import RepeatablePrivateRandomness
from dp_synth.privacy.units import Units, spread

COUNTS = [1, 2, 3, 7, 1, 2]
IDS = [40, -3, 7, 2**40, 0, 12]
BY_ID = [1, 4, 2, 5, 0, 3]  # places of IDS in ascending order: how units are numbered
# Far below any critical value: a right implementation never fails.
IMPOSSIBLE = 1e-9
PLAN = PrivacyPlan(
    eps=10,
    delta=1e-2,
    max_grad_norm=0.5,
    batch_size=4,
    steps=2,
    num_examples=len(COUNTS),
    multiplicity=3,
    noise_multiplier=1e-9,
    unsafe_repeatable_randomness=7,
)


def grouped():
    """Random images of units, all mixed up; a unit has images of several classes."""
    units = np.repeat(np.array(IDS, dtype=np.int64), COUNTS)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (len(units), 4, 4, 1), dtype=np.uint8)
    order = generator.permutation(len(units))
    return Images(pixels, np.arange(len(units)) % 3, ("a", "b", "c"), units[order])


def neighbour(images, number, count):
    """The same data set, but that one unit owns `count` images, all new, here and there."""
    unit = images.units[images_of(images, number)[0]]
    others = np.flatnonzero(images.units != unit)
    generator = np.random.default_rng(1)
    places = np.sort(generator.integers(0, len(others) + 1, count))
    pixels = generator.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return Images(
        np.insert(images.pixels[others], places, pixels, axis=0),
        np.insert(images.labels[others], places, generator.integers(0, 3, count)),
        images.classes,
        np.insert(images.units[others], places, unit),
    )


def images_of(images, number):
    """The oracle of the numbering: where unit `number`'s images stand."""
    unit = sorted(set(images.units.tolist()))[number]
    return [i for i in range(len(images)) if images.units[i] == unit]


def batch_of(images, numbers):
    """The logical batch of these units."""
    data = ImageDataModule(images, lambda steps_taken: [np.array(numbers, dtype=np.int64)])
    (batch,) = data.train_dataloader()
    return batch


def rows_of(images, numbers, plan=PLAN, net=None, step=1, **options):
    """Rows [K, B, ...] of these units, x0 and noise in float64, and the module."""
    module = tiny_module(plan, net=net, **({"label_dropout": 0.0, "flip": False} | options))
    rows = module.draw_rows(batch_of(images, numbers), step)
    shape = (plan.multiplicity, len(numbers))
    rows = [r.double() if r.is_floating_point() else r for r in rows]
    return [r.unflatten(0, shape) for r in rows], module


def double_net():
    """In double precision, so that the engine is compared to the last digits."""
    return tiny_net().double()


def clipped_sum_by_hand(module, rows, max_grad_norm):
    """For each unit the gradient of the mean loss of its rows, clipped once; then added."""
    params = list(module.net.parameters())
    loss = module.diffusion.row_loss(module.net)
    total, norms = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype), []
    for i in range(rows[0].shape[1]):
        grads = [
            torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), params)])
            for value in (loss(*(r[k, i : i + 1] for r in rows)) for k in range(len(rows[0])))
        ]
        grad = torch.stack(grads).mean(0)
        norms.append(float(grad.norm()))
        total += grad * min(1.0, max_grad_norm / norms[-1])
    return total, norms


def clipped_sum(module, rows, max_grad_norm):
    """The same by the engine."""
    module.net.zero_grad()
    engine = ClippingEngine(module.net, max_grad_norm)
    multiplicity = len(rows[0])
    flat = tuple(r.flatten(0, 1) for r in rows)
    engine.accumulate(module.diffusion.row_loss(module.net), flat, multiplicity)
    return torch.cat([p.grad.flatten() for p in module.net.parameters()])


@pytest.mark.parametrize("ids", [[5], [3, 3, 3], [9, -2, 9, 4, -2, 9], list(range(11, 0, -1)), []])
def test_units_are_numbered_by_ascending_id_and_own_their_images(ids):
    units = Units.from_ids(np.array(ids, dtype=np.int64))
    names = sorted(set(ids))
    assert len(units) == len(names)
    for numbers in [[], [0], list(range(len(names))), list(range(len(names)))[::-2]]:
        if max(numbers, default=-1) >= len(names):
            continue
        found, counts = units.images(torch.tensor(numbers, dtype=torch.int64))
        expected = [[i for i, own in enumerate(ids) if own == names[n]] for n in numbers]
        assert [part.tolist() for part in found.split(counts.tolist())] == expected


@pytest.mark.parametrize("multiplicity", [1, 2, 3, 7, 128])
@pytest.mark.parametrize("counts", [[], [1], [1, 1], [7, 1], [1, 2, 3, 7, 500], [3, 14, 2, 6, 21]])
def test_every_unit_has_exactly_its_rows_spread_as_evenly_as_can_be(counts, multiplicity):
    uniform = torch.rand(multiplicity * len(counts), generator=torch.Generator().manual_seed(5))
    # The ends of the range, too: a product must not round up to the number of images.
    uniform[::3], uniform[1::3] = 0.0, 1 - 2**-24
    chosen = spread(torch.tensor(counts, dtype=torch.int64), multiplicity, uniform)
    assert chosen.shape == (multiplicity * len(counts),) and chosen.dtype == torch.int64
    first = 0
    for i, count in enumerate(counts):
        own = chosen[i :: len(counts)] - first
        assert int(own.min()) >= 0 and int(own.max()) < count
        shown = torch.bincount(own, minlength=count)
        assert int(shown.sum()) == multiplicity
        assert set(shown.tolist()) <= {multiplicity // count, -(-multiplicity // count)}
        first += count


@pytest.mark.parametrize(
    ("count", "multiplicity"), [(2, 1), (7, 1), (5, 2), (4, 3), (5, 7), (3, 8)]
)
def test_every_set_of_images_is_equally_likely(count, multiplicity):
    """Which ones are shown once more than the others; and so are all images, over many steps."""
    rounds = 6000
    uniform = torch.rand(multiplicity * rounds, generator=torch.Generator().manual_seed(3))
    chosen = spread(torch.full((rounds,), count), multiplicity, uniform)
    own = (chosen.view(multiplicity, rounds) - count * torch.arange(rounds)).T
    shown = torch.stack([torch.bincount(row, minlength=count) for row in own])
    more = (shown > multiplicity // count).tolist()
    sets = list(combinations(range(count), multiplicity % count))
    found = [tuple(i for i, is_more in enumerate(row) if is_more) for row in more]
    assert stats.chisquare([found.count(each) for each in sets]).pvalue > IMPOSSIBLE
    assert len(sets) > 1 and set(found) == set(sets)


@pytest.mark.parametrize("multiplicity", [1, 3, 7])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4, 5], [5, 0], [2], []])
def test_rows_show_images_of_their_unit_with_their_labels(numbers, multiplicity):
    images = grouped()
    plan = replace(PLAN, multiplicity=multiplicity)
    (x0, _, _, y), _ = rows_of(images, numbers, plan)
    assert x0.shape == (multiplicity, len(numbers), 1, 4, 4) and y.shape == x0.shape[:2]
    for i, number in enumerate(numbers):
        own = images_of(images, number)
        assert len(own) == COUNTS[BY_ID[number]]
        known = to_float(images.pixels[own]).double()
        for k in range(multiplicity):
            (place,) = [j for j in range(len(own)) if torch.equal(known[j], x0[k, i])]
            assert int(y[k, i]) == images.labels[own[place]]


@pytest.mark.parametrize("multiplicity", [1, 3, 7])
@pytest.mark.parametrize(("number", "count"), [(2, 1), (2, 9), (0, 4), (5, 1), (5, 8), (3, 2)])
def test_other_images_of_a_unit_or_more_of_them_change_no_other_units_rows(
    number, count, multiplicity
):
    plan = replace(PLAN, multiplicity=multiplicity)
    images = grouped()
    everyone = list(range(len(COUNTS)))
    options = {"label_dropout": 0.3, "flip": True}
    rows, _ = rows_of(images, everyone, plan, **options)
    others, _ = rows_of(neighbour(images, number, count), everyone, plan, **options)
    rest = [i for i in everyone if i != number]
    for one, other in zip(rows, others, strict=True):
        assert torch.equal(one[:, rest], other[:, rest])
    assert not torch.equal(rows[0][:, number], others[0][:, number])


@pytest.mark.parametrize("alone", range(len(COUNTS)))
def test_a_units_rows_do_not_depend_on_its_companions(alone):
    """Not even on whether these own several images, so that there is anything to choose."""
    images = grouped()
    options = {"label_dropout": 0.3, "flip": True}
    together, _ = rows_of(images, list(range(len(COUNTS))), **options)
    for one, other in zip(together, rows_of(images, [alone], **options)[0], strict=True):
        assert torch.equal(one[:, [alone]], other)


@pytest.mark.parametrize("multiplicity", [1, 3])
def test_one_unit_moves_the_clipped_sum_by_no_more_than_it_may(multiplicity):
    plan = replace(PLAN, multiplicity=multiplicity)
    everyone, number = list(range(len(COUNTS))), 2
    rows, module = rows_of(grouped(), everyone, plan, net=double_net())
    # Below every unit's norm, so that the bound of a unit that is blanked out is met.
    bound = 0.9 * min(clipped_sum_by_hand(module, rows, 1.0)[1])
    whole = clipped_sum(module, rows, bound)
    blanked = [r[:, [i for i in everyone if i != number]] for r in rows]
    moved = float((whole - clipped_sum(module, blanked, bound)).norm())
    assert moved == pytest.approx(bound, rel=1e-9)
    for count in (1, 9):
        images = neighbour(grouped(), number, count)
        replaced, _ = rows_of(images, everyone, plan)
        moved = float((whole - clipped_sum(module, replaced, bound)).norm())
        assert 1e-3 * bound < moved <= 2 * bound * (1 + 1e-9)


@pytest.mark.parametrize("multiplicity", [1, 3, 7])
def test_the_mean_gradient_of_a_units_rows_is_clipped_once(multiplicity):
    plan = replace(PLAN, multiplicity=multiplicity)
    rows, module = rows_of(grouped(), list(range(len(COUNTS))), plan, net=double_net())
    _, norms = clipped_sum_by_hand(module, rows, 1.0)
    bound = float(np.median(norms))
    expected, _ = clipped_sum_by_hand(module, rows, bound)
    found = clipped_sum(module, rows, bound)
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


def test_the_steps_of_a_private_run_are_those_by_hand(trainer_cfg):
    """Poisson batches of units, an empty one among them; weights stand still, noise is naught."""
    images, plan = grouped(), replace(PLAN, steps=6, batch_size=2)
    trained = tiny_module(plan, label_dropout=0.0, flip=False)
    fit(trained, images, plan, trainer_cfg, caption="fit")
    found = trained.optimizers().optimizer.original_optimizer.seen
    randomness, sizes = RepeatablePrivateRandomness(7), []
    for step, gradient in enumerate(found):
        chosen = randomness.selection(step, len(COUNTS)) < plan.sample_rate
        numbers = np.flatnonzero(chosen).tolist()
        sizes.append(len(numbers))
        rows, module = rows_of(images, numbers, plan, net=double_net(), step=step)
        expected, _ = clipped_sum_by_hand(module, rows, plan.max_grad_norm)
        expected = (expected / plan.batch_size).float()
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    assert len(found) == plan.steps and min(sizes) == 0 and max(sizes) > 1


def test_an_epoch_of_public_training_passes_over_the_units(trainer_cfg):
    images = grouped()
    plan = PublicPlan(batch_size=2, steps=6, num_examples=len(COUNTS), multiplicity=2)
    data = ImageDataModule(images, lambda first: plan.batches(plan.randomness(0), first))
    batches = list(data.train_dataloader())
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat([b.indices for b in epoch]).tolist()) == list(range(len(COUNTS)))
        shown = torch.cat([b.pixels.flatten(1) for b in epoch]).tolist()
        assert sorted(shown) == sorted(images.pixels.reshape(len(images), -1).tolist())
    module = tiny_module(plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    fit(module, images, plan, trainer_cfg, caption="public")
    assert module.trainer.global_step == plan.steps


def load(split):
    """What `dataset.load` calls below."""
    return grouped()


def test_the_declared_number_is_that_of_units(trainer_cfg):
    dataset = {
        "load": {"_target_": f"{__name__}.load"},
        "num_examples": len(COUNTS),
        "image_shape": [1, 4, 4],
        "num_classes": 3,
    }
    cfg = OmegaConf.create({"dataset": dataset})
    assert load_images(cfg, split="train").num_units == len(COUNTS)
    cfg.dataset.num_examples = sum(COUNTS)
    told = r"dataset\.num_examples=16, .* 6 units \(dataset\.unit\); .*num_examples=6\."
    with pytest.raises(UserError, match=told):
        load_images(cfg, split="train")
    plan = replace(PLAN, num_examples=sum(COUNTS))
    with pytest.raises(ValueError, match=r"num_examples=16, not 6 units \(dataset\.unit\)"):
        fit(tiny_module(plan), grouped(), plan, trainer_cfg, caption="fit")


# ------------------------------------------------------------- images that lie in a file, or nowhere


def test_images_in_a_file_make_the_batches_that_those_in_memory_make(tmp_path):
    images = grouped()
    np.save(tmp_path / "pixels.npy", images.pixels)
    on_disk = replace(images, pixels=np.load(tmp_path / "pixels.npy", mmap_mode="r"))
    for numbers in ([], [3], [5, 0, 2]):
        for ours, theirs in ((images, on_disk), (no_units(images), no_units(on_disk))):
            a, b = batch_of(ours, numbers), batch_of(theirs, numbers)
            assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


def no_units(images):
    return replace(images, units=None)


@pytest.mark.parametrize("kind", [grouped, lambda: no_units(grouped())], ids=["units", "images"])
def test_an_example_that_could_not_be_read_counts_in_n_and_contributes_nothing(kind, trainer_cfg):
    images = replace(kind(), missing=2)
    assert images.num_examples == images.num_units + 2
    last = images.num_units - 1
    with_missing = batch_of(images, [0, last + 1, last, last + 2])
    without = batch_of(images, [0, last])
    assert with_missing.indices.tolist() == without.indices.tolist() == [0, last]
    assert torch.equal(with_missing.pixels, without.pixels)
    assert len(batch_of(images, [last + 1, last + 2]).pixels) == 0

    declared = replace(PLAN, num_examples=images.num_examples)
    fit(tiny_module(declared), images, declared, trainer_cfg, caption="test")
    with pytest.raises(ValueError, match=f"not {images.num_examples}"):
        found = replace(PLAN, num_examples=images.num_units)
        fit(tiny_module(found), images, found, trainer_cfg, caption="test")
