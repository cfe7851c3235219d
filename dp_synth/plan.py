"""``python -m dp_synth.plan``: the price of a run, before any image is opened."""

import json
from pathlib import Path

from omegaconf import DictConfig

from dp_synth.cli import command
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.price_list import print_price
from dp_synth.pricing import plan_run


@command("plan")
def main(cfg: DictConfig) -> None:
    """Print the price of a run; with ``plan.out`` write it as JSON too."""
    out = Path(cfg.plan.out) if cfg.plan.out else None
    if out is not None and not out.parent.is_dir():
        raise UserError(f"plan.out={out} lies in no existing folder; make {out.parent} first.")
    price = plan_run(cfg)
    if out is not None:
        write_atomically(out, json.dumps(price, indent=2) + "\n")
    print_price(price)


if __name__ == "__main__":
    main()
