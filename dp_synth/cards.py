"""The card that travels with a synthetic data set."""

from dp_synth.data.images import Images
from dp_synth.privacy.wording import eps_at_delta, is_void
from dp_synth.runs import Run


def sample_card(run: Run, images: Images) -> str:
    """``samples/README.md``: what the images are, what protects whom, what they are not."""
    statement = run.statement()
    channels, height, width = images.shape
    classes = ", ".join(images.classes)
    return f"""# Synthetic images

{len(images)} synthetic images of {height}x{width} pixels and {channels} channel(s), in one folder per class
({classes}), equally many of each to within one. No image here is a real one.

{_guarantee(statement)}

The proportions of the classes are uniform by design: the true ones are private.
"""


def _guarantee(statement: dict) -> str:
    if statement["eps"] is None:
        return "**There is no privacy guarantee**: the model was trained without privacy."
    if is_void(statement):
        return f"**There is no privacy guarantee** ({statement['guarantee']})."
    return (
        "The model was trained with differential privacy: "
        f"{eps_at_delta(statement['eps'], statement['delta'])}, for one {statement['unit']} under "
        f"{statement['adjacency'].replace('_', '-')} adjacency, with N = "
        f"{statement['num_examples']} taken as public. Drawing these images costs nothing more. "
        "The assumptions and what is not covered stand in the run's privacy.json."
    )
