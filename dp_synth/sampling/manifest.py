"""What a data set under way was begun with: whoever continues it or joins in must go on with that."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.sampling.drawing import Source
from dp_synth.sampling.execution import Execution, asked_for
from dp_synth.sampling.sampler import Sampler
from dp_synth.sampling.shards import default_shard_size

_SHOWN = 60  # characters of a value


class Manifest:
    """The settings that decide the files of a data set, by the keys that users type.

    Args:
        source: what is drawn from.
        sampler: what is drawn; where its ``shard_size`` is None, that is settled here.
    """

    def __init__(self, source: Source, sampler: Sampler) -> None:
        self.shard_size = sampler.shard_size or default_shard_size(
            sampler.num_images, math.prod(source.shape), sampler.batch_size
        )
        self.settings: dict[str, Any] = {
            "model": source.model,
            "classes": list(source.classes),
            "label_shares": None if source.shares is None else list(source.shares),
            "seed": source.seed,
            "sampler.num_images": sampler.num_images,
            **{f"sampler.{key}": value for key, value in sampler.describe().items()},
            "sampler.batch_size": sampler.batch_size,
            "sampler.format": sampler.format,
            "sampler.shard_size": self.shard_size,
        }
        self._asked = asked_for(sampler)

    def settle(self, path: Path, choose: Callable[[], Execution]) -> Execution:
        """The execution of the data set: of the manifest file, or chosen now and written there.

        Raises:
            UserError: the file is about a data set of other settings.
        """
        if not path.exists():
            execution = choose()
            content = {"settings": self.settings, "execution": execution.describe()}
            write_atomically(path, json.dumps(content, indent=2) + "\n")
            return execution
        stored = json.loads(path.read_text())
        begun_with, now = dict(stored["settings"]), dict(self.settings)
        for name, value in self._asked.items():  # what is left to the program may be anything
            begun_with[f"sampler.{name}"], now[f"sampler.{name}"] = stored["execution"][name], value
        if begun_with != now:
            raise UserError(
                f"{path.parent} holds a data set that was begun with "
                f"{_differences(begun_with, now)}; finish it as it was begun, remove that folder, "
                "or choose another out=DIR."
            )
        return Execution(**stored["execution"])


def _differences(begun_with: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words; a key that only one of the two has is null in the other."""
    return " and ".join(
        f"{key}={_short(begun_with.get(key))}, not {_short(now.get(key))}"
        for key in {**begun_with, **now}
        if begun_with.get(key) != now.get(key)
    )


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
