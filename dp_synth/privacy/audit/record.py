"""``audit.json``: what attacks on a run have shown, beside what it claims; and the same as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_synth.files import write_atomically
from dp_synth.privacy.audit.membership import Membership
from dp_synth.privacy.wording import is_void, round_up

_WHAT = (
    "Lower bounds on eps that attacks have shown. A bound above the claimed eps means that the "
    "claim is wrong; one below it proves nothing. Private: no part of a release."
)
_NAMES = {
    "gradient_canaries": "canaries in the gradients, white-box",
    "image_canaries.loss": "canary images, by the model's loss",
    "image_canaries.samples": "canary images, by the samples",
    "membership.loss": "training images, by the model's loss",
}


def read_record(path: Path) -> dict[str, Any]:
    """The record of earlier audits; an empty one where there was none."""
    return json.loads(path.read_text()) if path.is_file() else {"attacks": {}, "memorization": {}}


def write_record(
    path: Path,
    statement: Mapping[str, Any],
    *,
    attacks: Mapping[str, Mapping[str, Any]],
    memorization: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Add what attacks showed to a record, in place of what the same attacks showed before.

    Args:
        path: the record; it need not exist.
        statement: of the run, which says what it claims.
        attacks: by name, fit for JSON.
        memorization: metrics of the search for copies, or None to keep those there are.

    Returns:
        The whole record.
    """
    before = read_record(path)
    record = {
        "private": True,
        "what": _WHAT,
        "claimed": {
            "guarantee": statement["guarantee"],
            "eps": statement["eps"],
            "delta": statement.get("delta"),
        },
        "attacks": before["attacks"] | {name: dict(found) for name, found in attacks.items()},
        "memorization": (
            before["memorization"]
            if memorization is None
            else {name: {"value": v, "private": True} for name, v in memorization.items()}
        ),
    }
    write_atomically(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
    path.chmod(0o600)
    return record


def membership_entry(found: Membership, *, delta: float, confidence: float) -> dict[str, Any]:
    """An entry of ``attacks``: what membership inference by the loss showed."""

    def interval(estimate: Any) -> dict[str, Any] | None:
        if estimate is None:
            return None
        return {
            "value": estimate.value,
            "ci_low": estimate.ci_low,
            "ci_high": estimate.ci_high,
            "n": estimate.n,
        }

    return {
        "adversary": "has the released model, and compares its losses of single images",
        "members": found.members,
        "others": found.others,
        "auc": interval(found.auc),
        "tpr_at_fpr": {f"{rate:g}": interval(tpr) for rate, tpr in found.tpr.items()},
        "eps_lower": found.eps_lower,
        "ceiling": found.ceiling,
        "delta": delta,
        "confidence": confidence,
        "caveat": "Suggests a bound and does not prove one: no coins decided which images are "
        "training images. Needs held-out images that were drawn as the training images were.",
        "private": True,
    }


def table(record: Mapping[str, Any]) -> str:
    """The record for a terminal: each attack's bound beside its ceiling, then the claim."""
    attacks = record["attacks"]
    lines = [f"{'Attack':<38}{'eps is at least':>16}{'could show':>12}"]
    for name, found in attacks.items():
        lines.append(
            f"  {_NAMES.get(name, name):<36}{found['eps_lower']:>16.3g}{found['ceiling']:>12.3g}"
            f"   {_evidence(found)}"
        )
    lines.append(f"  {'claimed':<36}{_claim(record['claimed']):>16}")
    confidences = sorted({f"{found['confidence']:.3g}" for found in attacks.values()})
    lines.append(f"Each bound holds with a confidence of {', '.join(confidences)} by itself.")
    if (verdict := _verdict(record)) is not None:
        lines.append(verdict)
    roc = attacks.get("membership.loss")
    if roc is not None:
        lines.append(f"ROC of the loss: AUC {_shown(roc['auc'])}")
        lines += [
            f"  true positives at {float(rate):.1%} false ones: {_shown(tpr)}"
            for rate, tpr in roc["tpr_at_fpr"].items()
        ]
    return "\n".join(lines)


def _evidence(found: Mapping[str, Any]) -> str:
    if "canaries" in found:
        return f"{found['right']} of {found['guesses']} guesses right, {found['canaries']} canaries"
    return f"{found['members']} training and {found['others']} held-out units"


def _claim(claimed: Mapping[str, Any]) -> str:
    if claimed["eps"] is None:
        return "nothing"
    return "void" if is_void(claimed) else round_up(claimed["eps"])


def _verdict(record: Mapping[str, Any]) -> str | None:
    """What canaries say about the claim, in a sentence; None without canaries or a claim."""
    claimed = record["claimed"]["eps"]
    by_canaries = [found for found in record["attacks"].values() if "canaries" in found]
    if claimed is None or not by_canaries:
        return None
    if max(found["eps_lower"] for found in by_canaries) > claimed:
        return "THE CLAIM IS WRONG, unless chance was against it: canaries show a larger eps."
    if (highest := max(found["ceiling"] for found in by_canaries)) < claimed:
        return (
            f"So many canaries cannot refute the claim: {highest:.3g} is the most they could show."
        )
    return "The canaries, which could have refuted the claim, do not."


def _shown(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "too few held-out units to tell"
    return f"{estimate['value']:.3f} [{estimate['ci_low']:.3f}, {estimate['ci_high']:.3f}]"
