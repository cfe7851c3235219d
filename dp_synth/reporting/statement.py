"""What a report takes from ``privacy.json``: warnings, the eps curve, and its fields in words."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dp_synth.errors import UserError
from dp_synth.privacy.accounting import ACCOUNTANTS, Mechanism
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.statement import mechanism_of
from dp_synth.privacy.wording import is_void
from dp_synth.reporting import charts

_CURVE_POINTS = 20

_LABELS = {
    "adjacency": "Neighbouring data sets",
    "unit": "Protected unit",
    "num_examples": "Protected units in the training split, N",
    "accountant": "Accountant",
    "eps_rdp": "eps by Renyi accounting (cross-check)",
    "noise_multiplier": "Noise multiplier",
    "max_grad_norm": "Clipping norm",
    "clipping": "Clipping rule",
    "sampling": "Batches",
    "sample_rate": "Sampling rate, q",
    "batch_size": "Expected batch size",
    "steps": "Steps accounted for",
    "steps_planned": "Steps planned",
    "steps_abandoned": "Steps of abandoned branches, accounted for too",
    "label_histogram_eps": "eps of the histogram of labels, by itself",
    "secure_noise": "Noise from a cryptographic generator",
    "eps_all_queries": "eps of all queries of this run together",
    "multiplicity": "Augmentation multiplicity",
    "engine": "Clipping engine",
    "world_size": "Training processes",
    "trust_model": "Trust model",
    "guarantee": "Guarantee",
    "status": "Status",
}
_QUERY_LABELS = {
    **_LABELS,
    "query": "Query",
    "mechanism": "Mechanism",
    "released": "What it is for",
    "steps": "Steps",
    "eps": "eps",
    "delta": "delta",
}
_MEANINGS = {
    "zero_out": "zero-out: one unit's contribution becomes zero; N is public and fixed",
    "poisson": "Poisson: each unit enters each step on its own with probability q",
    "poisson_subsampled_gaussian": "Poisson-subsampled Gaussian",
    "dp_sgd": "DP-SGD, training of the generator",
    "label_histogram": "Histogram of the labels, noised",
    "private_search": "Private search, training of the generator included",
    "random_stopping": "best of a random number of runs",
    "dp_sgd_classifier": "DP-SGD, training of a classifier as a baseline",
    "flat": "flat: one bound on the norm of all gradients of a unit together",
    "prv": "PRV (numerical composition, Gopi et al. 2021)",
    "rdp": "RDP (Renyi, Mironov et al. 2019)",
}


@dataclass(frozen=True)
class Banner:
    """A warning that stands above everything else."""

    title: str
    text: str


def banners(statement: Mapping[str, Any]) -> list[Banner]:
    """Why the run must not be released as it is, as far as the statement tells."""
    if not statement:
        return [
            Banner(
                "No privacy statement",
                "This run has no privacy.json: it never began to train, or the file was removed. "
                "Treat whatever it holds as private.",
            )
        ]
    found = []
    if statement.get("eps") is None:
        found.append(
            Banner(
                "No privacy",
                "This model was trained without differential privacy. Nothing on this page "
                "protects anyone in its training data; do not release it as private data.",
            )
        )
    if is_void(statement) and statement.get("search"):
        found.append(
            Banner(
                "Not the run that was chosen",
                "This run belongs to a private search, which promises something for its best run "
                "alone, and only while no other leaves. The eps below does not hold for this one.",
            )
        )
    elif is_void(statement):
        found.append(
            Banner(
                "The guarantee is void: repeatable randomness",
                "The run was made with privacy.unsafe_repeatable_randomness, a setting for tests: "
                "whoever knows its seed can undo the noise. The eps below does not hold.",
            )
        )
    if statement.get("audit"):
        found.append(
            Banner(
                "An audit run: not for release",
                "Canaries, made to be found again, were among what this model was trained on. It "
                "shows whether the program keeps its promise; its model and its samples are not for "
                "release.",
            )
        )
    status = statement.get("status", "unknown")
    if status != "finished":
        whole_plan = (
            " The eps below is that of the whole plan, since a run in progress must not "
            "under-state what it may spend."
        )
        found.append(
            Banner(
                "Unfinished",
                f"The status of this run is “{status}”, not “finished”. Do not release its files."
                + (whole_plan if status == "running" else ""),
            )
        )
    return found


def curve(statement: Mapping[str, Any]) -> Markup | None:
    """The eps curve of the statement's mechanism; None without a mechanism to compute it from."""
    if statement.get("search"):  # its steps are those of one run, its eps is that of many
        return None
    accountant = str(statement.get("accountant", "")).partition(" ")[0]
    try:
        # The plan warns of a large delta when it is made, before the run: no need to say it again.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = PrivacyPlan(
                eps=statement.get("eps_planned", statement["eps"]),
                delta=statement["delta"],
                max_grad_norm=statement["max_grad_norm"],
                batch_size=round(statement["sample_rate"] * statement["num_examples"]),
                steps=statement["steps"],
                num_examples=statement["num_examples"],
                noise_multiplier=statement["noise_multiplier"],
                label_histogram_eps=statement.get("label_histogram_eps"),
                abandoned_steps=statement.get("steps_abandoned", 0),
                accountant=accountant if accountant in ACCOUNTANTS else ACCOUNTANTS[0],
            )
            return charts.epsilon_curve(plan.epsilon_curve(_CURVE_POINTS))
    except (KeyError, TypeError, UserError):
        return None


def rows(statement: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The fields of the statement that have a name on the page, in its order, unless unset."""
    return [
        (label, plain(statement[key]))
        for key, label in _LABELS.items()
        if statement.get(key) is not None
    ]


def queries(statement: Mapping[str, Any]) -> list[list[tuple[str, Any]]]:
    """The fields of each query on the private data."""
    return [
        [(query_label(key), plain(value)) for key, value in query.items()]
        for query in statement.get("queries", [])
    ]


def mechanisms(queries: Iterable[Mapping[str, Any]]) -> list[Mechanism]:
    """What entries of ``queries`` say of their mechanisms; empty where one of them does not say."""
    try:
        return [mechanism_of(query) for query in queries]
    except (UserError, KeyError):  # of an earlier version, or damaged
        return []


def looks(statement: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The looks at private images that eps does not cover: a sentence and the metrics released."""
    return [_look(look) for look in statement.get("unaccounted_looks", [])]


def _look(look: Any) -> tuple[str, list[str]]:
    """A look is a sentence, or ``{"what": sentence, "metrics": names}``."""
    if isinstance(look, Mapping):
        return str(look.get("what", "")), [str(name) for name in look.get("metrics", [])]
    return str(look), []


def query_label(key: str) -> str:
    """A field of a query in words."""
    return _QUERY_LABELS.get(key, key)


def plain(value: Any) -> Any:
    """A value of a statement in words, where there are any."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _MEANINGS.get(value, value) if isinstance(value, str) else value
