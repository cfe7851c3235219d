"""A comparison of samplers: what each candidate is worth and how fast it is, and which to take."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.books import Books
from dp_synth.building import build_diffusion, is_on
from dp_synth.checks import count, whole
from dp_synth.cli import conf_dir
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.metrics.classifiers import default_device
from dp_synth.runs import Run
from dp_synth.sampling.criteria import Criterion, Model
from dp_synth.sampling.sampler import Sampler

Entry = dict[str, Any]  # what the record has of a candidate

PRIVATE_NOTE = "looked at private images; not used for the choice"
_LOOK = "A comparison of samplers judged images of the model by private images, without noise."


def build_candidates(cfg: DictConfig) -> dict[str, Sampler]:
    """The samplers to compare, by name, each for ``num_images`` images.

    Raises:
        UserError: there are none, one cannot be built, or the reference is not among them.
    """
    if not cfg.get("candidates"):
        raise UserError(
            "candidates is empty; add samplers to compare, such as +sampler@candidates.mine=ddim."
        )
    names = [str(name) for name in cfg.candidates]
    for name in names:
        candidate = cfg.candidates[name]
        if not (isinstance(candidate, DictConfig) and is_on(candidate)):
            raise UserError(f"candidates.{name} is no sampler; remove it by ~candidates.{name}.")
    if cfg.reference not in names:
        raise UserError(
            f"reference={cfg.reference} is not a candidate; these are: {', '.join(names)}."
        )
    num_images = count("num_images", cfg.num_images)
    return {name: instantiate(cfg.candidates[name], num_images=num_images) for name in names}


def overrides_of(candidate: DictConfig) -> str:
    """What to type for a candidate: its sampler, its steps, and what is not that one's default."""
    with _configs():
        default = hydra.compose("sample", [f"sampler={candidate.rule}"]).sampler
    options = OmegaConf.to_container(candidate, resolve=True)
    assert isinstance(options, dict)
    words = [f"sampler={candidate.rule}"]
    for key, value in options.items():
        if key == "steps" or value != default.get(key):
            words.append(f"sampler.{key!s}={_typed(value)}")
    return shlex.join(words)


def _configs() -> AbstractContextManager[Any]:
    """Where configs can be composed; within a command they can be already, and only once."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(str(conf_dir()), version_base="1.3")


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


class Record:
    """A file with what is known of each candidate, written whenever that becomes more.

    Args:
        path: the file; what it says of other settings is replaced by the first that is added.
        settings: what scores depend on beside the run and the sampler, plain values.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = settings
        stored = json.loads(path.read_text()) if path.is_file() else {}
        same = stored.get("settings") == settings
        self.candidates: dict[str, Entry] = stored["candidates"] if same else {}

    def entry(self, name: str, sampler: Sampler) -> Entry:
        """What is known of a candidate; of one that is new, or was another, only what it is."""
        known = self.candidates.get(name, {})
        described = {"sampler": sampler.describe(), "network_calls": sampler.network_calls}
        return known if known.get("sampler") == described["sampler"] else described

    def add(self, name: str, entry: Entry) -> None:
        """Keep what is known of a candidate."""
        self.candidates[name] = entry
        self.conclude()

    def conclude(self, **conclusion: Any) -> None:
        """Keep what follows from all that is known."""
        content = {"settings": self.settings, "candidates": self.candidates, **conclusion}
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")


class Comparison:
    """Draws images of each candidate and has them judged, all in the same way.

    Args:
        run: a finished run, whose diffusion process the samplers reverse.
        samplers: the candidates, by name.
        seed: of the first draw, and of the classifiers.
        seeds: draws of a candidate, each with every class equally often.
        record: keeps what is found; what it has is not measured again.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self, run: Run, samplers: Mapping[str, Sampler], seed: int, seeds: int, record: Record
    ) -> None:
        self.process = build_diffusion(run.config())
        self.samplers = samplers
        self.seed = whole("seed", seed)
        self.seeds = count("seeds", seeds)
        self.record = record

    @property
    def entries(self) -> dict[str, Entry]:
        """What is known of the candidates, by name."""
        return {name: self.record.entry(name, one) for name, one in self.samplers.items()}

    def measure(self, criterion: Criterion) -> None:
        """Find what each candidate is worth and how fast it is."""
        for name, entry in self.entries.items():
            if "accuracy" not in entry:
                draws, speed = self._draw(name, criterion.model())
                score = criterion.judge(draws, self.seed)
                self.record.add(name, {**entry, "images_per_second": speed, **score})

    def look(self, criterion: Criterion, books: Books) -> None:
        """Find what each candidate, measured already, is worth by private images.

        Each is a look that eps does not cover, entered before it is taken.
        """
        for name, entry in self.entries.items():
            if "private" not in entry:
                draws, _ = self._draw(name, criterion.model())
                books.record_look(_LOOK, sampler=entry["sampler"], splits=["test"])
                score = criterion.judge(draws, self.seed)
                self.record.add(name, {**entry, "private": {"note": PRIVATE_NOTE, **score}})

    def _draw(self, name: str, model: Model) -> tuple[list[Images], float]:
        """The draws of a candidate, and images per second in the median one."""
        net, classes = model
        net.to(default_device(None))
        draws: list[Images] = []
        speeds: list[float] = []
        for number in range(self.seeds):
            caption = f"{name}, draw {number + 1} of {self.seeds}"
            sampler = self.samplers[name]
            begin = time.perf_counter()
            draws.append(sampler(net, self.process, classes, self.seed + number, caption))
            speeds.append(sampler.num_images / (time.perf_counter() - begin))
        return draws, statistics.median(speeds)


@dataclass(frozen=True)
class Choice:
    """The candidate that is chosen, and why, in a sentence."""

    name: str
    reason: str


def choose(entries: Mapping[str, Entry], reference: str) -> Choice:
    """Return the fastest candidate that reaches the lower end of the reference's interval.

    The fastest is the one with the fewest network calls an image; of several, the one with the best
    accuracy. Not the one with the best time: samplers with as many calls take turns at that.

    Args:
        entries: ``network_calls``, ``accuracy`` and ``ci_low`` by name.
        reference: the name of one of them.
    """
    bound = entries[reference]["ci_low"]

    def rank(name: str) -> tuple[int, float]:
        return entries[name]["network_calls"], -entries[name]["accuracy"]

    name = min((n for n, entry in entries.items() if entry["accuracy"] >= bound), key=rank)
    calls, value = entries[name]["network_calls"], entries[name]["accuracy"]
    limit = f"{bound:.2%}, the lower end of the interval of {reference}"
    if name == reference:
        return Choice(
            name, f"no candidate with fewer network calls than its {calls} reaches {limit}."
        )
    return Choice(
        name,
        f"its accuracy of {value:.2%} is not below {limit}, and no candidate of which that is true "
        f"takes fewer network calls than its {calls} an image.",
    )


def table(entries: Mapping[str, Entry], reference: str, part: str | None = None) -> str:
    """Speed and scores of the candidates, as lines to read.

    Args:
        entries: by name.
        reference: the name of the one whose speed is 1.
        part: where in an entry its scores are; None: they are the entry's own.
    """
    width = max(map(len, entries))
    lines = [f"{'sampler':<{width}}  calls  images/s    speed  accuracy  95 % interval     Frechet"]
    for name, entry in entries.items():
        score = entry[part] if part else entry
        speed = entry["images_per_second"] / entries[reference]["images_per_second"]
        interval = f"[{score['ci_low']:.2%}, {score['ci_high']:.2%}]"
        distance = f"{score['frechet']:.4g}" if "frechet" in score else "-"
        lines.append(
            f"{name:<{width}}  {entry['network_calls']:>5}  {entry['images_per_second']:>8.1f}  "
            f"{speed:>6.1f}x  {score['accuracy']:>8.2%}  {interval:<16}  {distance:>7}"
        )
    return "\n".join(lines)
