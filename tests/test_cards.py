"""Cards: others' libraries read them, hostile names do not break them, printed programs run."""

import re
import runpy
from dataclasses import replace

import pytest
import torch
from conftest import refusal, tiny_diffusion, tiny_net
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt
from omegaconf import OmegaConf
from processes import tiny_edm

from dp_synth.cards import (
    SampleFacts,
    model_card,
    read_card,
    read_facts,
    rewrite_sample_card,
    sample_card,
    write_model_card,
)
from dp_synth.cards.header import check_license
from dp_synth.formats import checksums
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.reporting.numbers import Numbers
from dp_synth.runs import Run

_FACTS = SampleFacts(
    num_images=1009,
    shape=(1, 4, 6),
    classes=("a", "b", "c"),
    format="png",
    sampler={"rule": "heun", "steps": 7, "guidance_interval": [0.5, 2.0], "guidance": None},
    seed=11,
    labels="uniform",
    model="0123abcd",
    precision="32-true",
)
_HOSTILE = (
    "\n---\nlicense: mit\n---\n# No privacy",
    "`` ``` ~~~\n```",
    "a | b |\n|---|",
    "<script>alert(1)</script> <!--",
    "[x](http://example.org) ![y](z) **b** _u_ __w__",
    "{{ 7 * 7 }} {% raw %} $x$ $$",
    "'\"\\ &amp; \udcff \x00 \u202e \u2028",
    "- x: {y: [z",
    "null",
    "0x1F",
    "# heading",
    "1. a",
    "2)",
    "---",
    "=",
    "",
)


def _plan(**more):
    return PrivacyPlan(
        eps=3.0, delta=1e-3, max_grad_norm=1, batch_size=10, steps=7, num_examples=101,
        accountant="rdp", **more,
    ).calibrate()  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return _run(tmp_path / "run", _plan().statement(7, "finished"))


def _run(path, statement, dataset="moles"):
    config = {"dataset": {"name": dataset}, "public": {"path": "/srv/models/unet.pt"}}
    run = Run.create(path, OmegaConf.create(config))
    run.write_statement(statement)
    return run


def _outline(card):
    """The kinds of a card's blocks and inline parts in order, and what it says."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    inline = [child for token in tokens for child in token.children or []]
    marks = [child.type for child in inline if child.type not in ("text", "softbreak")]
    says = "".join(c.content for c in inline if c.type == "text")
    return [token.type for token in tokens], marks, says


def test_hugging_face_reads_the_header(run):
    data = DatasetCard(sample_card(run, _FACTS, "cc-by-4.0")).data
    assert data.license == "cc-by-4.0" and data.pretty_name == "Synthetic moles"
    assert data.size_categories == ["1K<n<10K"]
    assert data.task_categories == ["image-classification"]
    said = run.statement()
    assert data.dp_synth["eps"] == said["eps"] and data.dp_synth["delta"] == said["delta"]
    assert data.dp_synth["unit"] == "example" and data.dp_synth["adjacency"] == "zero_out"
    assert data.dp_synth["num_examples"] == 101 and data.dp_synth["public"] == "unet.pt"
    assert SampleFacts.from_plain(data.dp_synth) == _FACTS


def test_hugging_face_reads_a_models_header(run):
    run.save_model(tiny_net(), tiny_diffusion(), ("a", "b", "c"))
    card = ModelCard(model_card(run, "apache-2.0"))
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert card.data.dp_synth["eps"] == run.statement()["eps"]
    assert card.data.dp_synth["classes"] == ["a", "b", "c"]
    assert card.data.dp_synth["shape"] == [1, 4, 4]


def test_the_text_says_what_the_header_says(run):
    text = DatasetCard(sample_card(run, _FACTS)).text
    for words in (
        "1,009 synthetic images of 4 x 6 pixels, grey",
        "eps = 2.9", "delta = 0.001", "one image", "zero-out", "N = 101",
        "rule = heun, steps = 7", "| Seed | 11 |", "unet.pt", "0123abcd",
        "For k images at once", "The test split",
    ):  # fmt: skip
        assert words in text, words
    assert "private" in text and "/srv" not in text


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 9_999, 10_000, 123_457, 10**6, 10**9 + 1])
def test_the_size_category_holds_the_size(count):
    low, high = re.fullmatch(
        r"(?:(\d+[KMB]?)<)?n<(\d+[KMBT]?)", replace(_FACTS, num_images=count).size_category
    ).groups(default="0")
    scale = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

    def number(name):
        digits = name.rstrip("KMBT")
        return int(digits) * scale[name.removeprefix(digits)]

    assert number(low) <= count < number(high)


@pytest.mark.parametrize("evil", _HOSTILE)
def test_hostile_names_break_neither_header_nor_text(tmp_path, evil):
    facts = replace(_FACTS, classes=(evil, "b"), labels=evil, model=evil, sampler={evil: evil})
    statement = _plan(unit="patient").statement(7, "finished")
    statement |= {"unit": evil, "not_covered": [evil]}
    card = DatasetCard(sample_card(_run(tmp_path / "evil", statement, evil or "e"), facts))
    header = card.data.to_dict()
    assert SampleFacts.from_plain(header["dp_synth"]) == facts
    assert header["license"] == "other" and header["dp_synth"]["unit"] == evil

    tame = replace(_FACTS, classes=("x", "b"), labels="x", model="x", sampler={"x": "x"})
    statement |= {"unit": "x", "not_covered": ["x"]}
    blocks, marks, _ = _outline(
        DatasetCard(sample_card(_run(tmp_path / "x", statement, "x"), tame))
    )
    found_blocks, found_marks, says = _outline(card)
    assert found_marks == marks
    if evil:  # an item that says nothing has no paragraph
        assert found_blocks == blocks
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in evil)
        assert says.count(shown) > 5


def test_an_underscore_in_a_word_is_left_as_it_is(run):
    facts = replace(_FACTS, sampler={"churn_interval": "dpm_solver"})
    assert "churn_interval = dpm_solver" in sample_card(run, facts)


@pytest.mark.parametrize(
    ("statement", "title"),
    [
        (
            PublicPlan(batch_size=9, steps=7, num_examples=101).statement(7, "finished"),
            "No privacy",
        ),
        (_plan(unsafe_repeatable_randomness=0).statement(7, "finished"), "void"),
        (_plan().statement(7, "finished") | {"audit": "canaries"}, "An audit run"),
        (_plan().statement(3, "interrupted"), "Unfinished"),
    ],
)
def test_what_is_not_for_release_says_so_at_the_top(tmp_path, statement, title):
    run = _run(tmp_path / "run", statement)
    run.save_model(tiny_net(), tiny_diffusion(), ("a", "b", "c"))
    for card in (sample_card(run, _FACTS), model_card(run)):
        top = DatasetCard(card).text.partition("\n## ")[0]
        assert title in top


@pytest.mark.parametrize("void", [True, False])
def test_without_a_guarantee_no_eps_is_promised(tmp_path, void):
    plan = (
        _plan(unsafe_repeatable_randomness=0)
        if void
        else PublicPlan(batch_size=9, steps=7, num_examples=101)
    )
    card = sample_card(_run(tmp_path / "run", plan.statement(7, "finished")), _FACTS)
    text = DatasetCard(card).text
    assert "There is no privacy guarantee" in text and "Treat them as private" in text
    assert "**eps" not in text and "costs nothing" not in text


def test_label_policies_are_told(run):
    assert "equally many of each class" in sample_card(run, _FACTS)
    assert "asked for with noise" in sample_card(run, replace(_FACTS, labels="dp_histogram"))


def test_many_classes_are_named_in_the_header_alone(run):
    facts = replace(_FACTS, classes=tuple(f"class{n}" for n in range(101)))
    card = DatasetCard(sample_card(run, facts))
    assert "81 more classes" in card.text and "class99" not in card.text
    assert card.data.dp_synth["classes"] == list(facts.classes)


def test_only_metrics_that_are_given_are_in_a_card(run):
    meta = {"fidelity/kid.x": {"private": True, "n": 7, "what": "A | b."}}
    metrics = {
        "fidelity/kid.x": 0.1234567,
        "fidelity/kid.x.ci_low": 0.1,
        "fidelity/kid.x.ci_high": 2,
    }
    run.write_metrics(metrics, meta)
    assert "Measured" not in sample_card(run, _FACTS)
    text = sample_card(run, _FACTS, numbers=Numbers(metrics, meta))
    assert "| fidelity/kid.x | 0.1235 | 0.1 – 2 | 7 | A \\| b. **Computed from private" in text


def test_an_unset_licence_says_how_to_set_it(run):
    card = DatasetCard(sample_card(run, _FACTS))
    assert card.data.license == "other" and "release.license=" in card.text
    assert "release.license=" not in sample_card(run, _FACTS, "mit")


@pytest.mark.parametrize("bad", ["my licence", "a\nb", "", 4, True, "---", "[mit]"])
def test_a_licence_is_an_identifier(bad):
    assert "release.license=" in refusal(check_license, bad)
    assert check_license("CC-BY-4.0") == "cc-by-4.0"


def test_a_card_is_read_and_written_again(run, tmp_path):
    directory = tmp_path / "samples"
    directory.mkdir()
    (directory / "README.md").write_text(sample_card(run, _FACTS))
    checksums.write(directory)
    assert read_facts(directory / "README.md") == _FACTS
    rewrite_sample_card(run, directory, "mit")
    assert read_card(directory / "README.md")["license"] == "mit"
    assert read_facts(directory / "README.md") == _FACTS
    assert {path.name for path in directory.iterdir()} == {"README.md", "SHA256SUMS"}
    checksums.verify(directory)


@pytest.mark.parametrize(
    "text",
    ["# Synthetic images\n", "---\n- a\n---\n", "---\na: [\n---\n", "---\nlicense: mit\n---\n",
     "---\ndp_synth: {seed: 1}\n---\n", "---\ndp_synth: 3\n---\n", None],
)  # fmt: skip
def test_a_card_without_facts_is_named(tmp_path, text):
    path = tmp_path / "README.md"
    if text is not None:
        path.write_text(text)
    assert str(path) in refusal(read_facts, path)


@pytest.mark.parametrize("process", [tiny_diffusion("eps"), tiny_diffusion("v"), tiny_edm()])
def test_the_printed_program_samples_the_model(run, tmp_path, monkeypatch, process):
    run.save_model(tiny_net(), process, ("a", "b", "c"))
    write_model_card(run)
    text = (run.model_dir / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(run.path)
    (tmp_path / "program.py").write_text(program)
    found = runpy.run_path(str(tmp_path / "program.py"))
    images = found["images"]
    assert images.shape == (3, 1, 4, 4) and images.dtype == torch.uint8
    assert found["classes"] == ["a", "b", "c"] and len(images.unique()) > 3
