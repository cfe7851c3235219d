"""Loggers: what they are told of a run, and that nothing else of a private run reaches them."""

import csv
import json
import os
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import wandb
from conftest import SHORT, call, compose
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from dp_synth import evaluate, train
from dp_synth.errors import UserError
from dp_synth.loggers import packages, weights_and_biases
from dp_synth.loggers.choice import log_run
from dp_synth.loggers.journal import Journal, read_journal
from dp_synth.loggers.record import flat, read_record
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.runs import Run

TINY = (*SHORT, "model.network.block_out_channels=[8,16,16]")
# The journal of public training has a row every 50 steps.
PRETRAINED = ("public.load.num_images=60", "public.steps=50", "public.batch_size=8")
SECRET = 271828.1875  # a float32, too


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    """An empty home and no W&B variable; whatever dials out of this process fails the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    connect = socket.socket.connect

    def refuse(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


class Leak(Callback):
    """Says what must not be known by every way that a callback has."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("secret_log", SECRET)
        pl_module.log("secret_rows", float(len(batch.labels)))
        trainer.logger.log_metrics({"secret_metric": SECRET, "eps": SECRET}, step=batch_idx)
        trainer.logger.log_hyperparams({"secret_parameter": SECRET})
        with suppress(wandb.Error, AttributeError):
            wandb.log({"secret_direct": SECRET})
        with suppress(AttributeError):  # a journal has no experiment
            trainer.logger.experiment.log({"secret_experiment": SECRET})
        print("secret_print", SECRET)
        print("secret_print", SECRET, file=sys.stderr)


@pytest.fixture
def planted(monkeypatch):
    """Every phase, private or public, has the leak among its callbacks."""
    for plan in (PrivacyPlan, PublicPlan):
        callbacks = plan.callbacks

        def more(self, *args, callbacks=callbacks):
            return [*callbacks(self, *args), Leak()]

        monkeypatch.setattr(plan, "callbacks", more)


def tell(run, logger, *overrides):
    """Tell a logger of ``conf/logger`` about a run."""
    log_run(run, compose(f"logger={logger}", *overrides).logger)


def wandb_records(directory):
    """The records of the one offline run there, of the format of LevelDB's log.

    https://github.com/google/leveldb/blob/main/doc/log_format.md, after 7 bytes of W&B's own.
    """
    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    for _ in range(600):  # W&B's own process writes it out a moment after a run is finished
        records = list(leveldb_records(file.read_bytes()))
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def leveldb_records(data):
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield WandbRecord.FromString(parts)
            parts = b""


def begun(records):
    """What W&B was told of a run when it was begun."""
    return next(record.run for record in records if record.HasField("run"))


def items(record):
    """W&B's key-value pairs, values in JSON; without nested keys, which are of images and tables."""
    flat_items = [item for item in record if len(item.nested_key) < 2]
    return {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in flat_items}


def wandb_rows(directory):
    """The history of the offline run, without what W&B counts for itself but the time."""
    rows = [items(r.history.item) for r in wandb_records(directory) if r.HasField("history")]
    return [{k: v for k, v in row.items() if k not in ("_step", "_runtime")} for row in rows]


def events(directory):
    """TensorBoard's own reader, at the run's event file."""
    return EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def csv_rows(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def told(logger, directory):
    """{name: [(step, value)]} of all scalars that a logger has written."""
    found: dict[str, list] = {}
    if logger == "tensorboard":
        reader = events(directory)
        for name in reader.Tags()["scalars"]:
            found[name] = [(event.step, event.value) for event in reader.Scalars(name)]
        return found
    if logger == "csv":
        rows = csv_rows(directory / "metrics.csv")
        if (directory / "public.csv").exists():
            for row in csv_rows(directory / "public.csv"):
                rows.append({"public/step": row.pop("step"), **row})
    else:
        rows = wandb_rows(directory)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("step", "public/step", "_timestamp"):
                step = row["step" if "step" in row else "public/step"]
                found.setdefault(name, []).append((step, value))
    return found


@pytest.mark.parametrize("logger", ["wandb", "tensorboard", "csv"])
def test_what_a_private_phase_says_reaches_no_logger(logger, planted, tmp_path, command):
    directory = tmp_path / "run"
    overrides = ("public=none", "privacy.batch_size=4", "privacy.engine=loop")
    outcome = command(train, *TINY, *overrides, f"logger={logger}", f"run_dir={directory}")
    assert outcome.code == 0
    assert "secret" not in outcome.out + outcome.err
    run = Run(directory)
    found = told(logger, run.logs_dir)
    for path in run.logs_dir.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
        assert path.is_dir() or str(SECRET).encode() not in path.read_bytes(), path
    assert set(found) <= {"eps", "delta", "noise_multiplier", "sample_rate", "steps"}
    eps = dict(found["eps"])
    assert list(eps) == [1, 2, 3]
    assert eps[3] == pytest.approx(run.statement()["eps"])
    assert list(eps.values()) == sorted(eps.values())


def test_without_privacy_the_same_callback_is_heard(planted, tmp_path):
    """So that silence above means something; the other loggers are told what CSV is told."""
    directory = tmp_path / "run"
    assert call(train, *TINY, "public=none", "privacy=none", f"run_dir={directory}") == 0
    text = (Run(directory).logs_dir / "metrics.csv").read_text()
    assert "secret_metric" in text and str(SECRET) in text


@pytest.fixture(scope="module")
def run(tmp_path_factory, finished_run):
    """A run with public pre-training of 50 steps, and with the metrics of the finished one."""
    directory = tmp_path_factory.mktemp("logged") / "run"
    overrides = (*TINY, *PRETRAINED, "sampler=dpm_solver", "sampler.num_images=20")
    assert call(train, *overrides, f"run_dir={directory}") == 0
    result = Run(directory)
    result.write_metrics(finished_run.metrics(), finished_run.metrics_meta())
    for logger in ("csv", "tensorboard", "wandb"):
        tell(result, logger, "logger.tags=[mine]" if logger == "wandb" else "seed=0")
    return result


def test_all_loggers_use_the_same_names_steps_and_values(run):
    in_csv, in_tensorboard, in_wandb = (
        told(logger, run.logs_dir) for logger in ("csv", "tensorboard", "wandb")
    )
    assert set(in_csv) == {"eps", "public/loss"}
    assert in_csv["public/loss"][0][0] == 50
    results = run.metrics() | {"eps": run.statement()["eps"], "delta": 1e-4}
    for found in (in_tensorboard, in_wandb):
        for name, rows in in_csv.items():
            assert dict(found[name]) == pytest.approx(dict(rows))
        for name, value in results.items():
            assert found[name][-1] == (3, pytest.approx(value))
    assert set(in_tensorboard) == set(in_wandb)


def test_no_row_tells_when_a_step_was_taken(run):
    """All were written after training had ended, which the statement is the last to say."""
    ended = run.privacy_path.stat().st_mtime
    reader = events(run.logs_dir)
    times = [e.wall_time for name in reader.Tags()["scalars"] for e in reader.Scalars(name)]
    times += [row["_timestamp"] for row in wandb_rows(run.logs_dir)]
    assert len(times) > 10 and min(times) >= ended


def test_metrics_of_unknown_kinds_are_not_told(run_copy):
    metrics, meta = run_copy.metrics(), run_copy.metrics_meta()
    run_copy.write_metrics(metrics | {"secret/loss": SECRET, "batch": 7.0}, meta)
    assert set(read_record(run_copy).summary) == {
        *("eps", "delta", "noise_multiplier", "sample_rate", "steps"),
        *metrics,
    }


def test_the_config_is_told_without_places(run_copy):
    cfg = run_copy.config()
    for key in ("dataset.root", "dataset.load.root", "public.root", "public.load.root"):
        OmegaConf.update(cfg, key, "wards/seven", force_add=True)
    for key in ("dataset.secret", "evaluator.weights", "sampler.file"):
        OmegaConf.update(cfg, key, "/wards/seven", force_add=True)
    OmegaConf.update(cfg, "model.home", "~/wards/seven", force_add=True)
    OmegaConf.save(cfg, run_copy.config_path)
    config = read_record(run_copy).config
    assert "wards" not in json.dumps(config) and str(run_copy.path) not in json.dumps(config)
    assert config["privacy"]["eps"] == 10 and config["dataset"]["num_examples"] == 1437
    assert config["model"]["lr"] == cfg.model.lr and config["seed"] == 0


def test_grids_show_synthetic_and_public_images_alone(run):
    """Their folders are the only ones that are opened: the data set need not be there."""
    images = read_record(run).images
    assert set(images) == {"samples", "public/samples", "public/examples"}
    (media,) = run.logs_dir.glob("wandb/*/files/media/images")
    files = [path.relative_to(media).as_posix() for path in media.rglob("*.png")]
    assert {file.partition("_")[0] for file in files} == set(images)
    assert set(events(run.logs_dir).Tags()["images"]) == set(images)
    assert all(min(image.size) >= 256 for image in images.values())


def test_wandb_knows_group_job_type_config_statement_and_the_point_of_the_scatter(run):
    records = wandb_records(run.logs_dir)
    first = begun(records)
    assert (first.project, first.run_group, first.job_type) == ("dp_synth", "digits", "train")
    assert first.display_name == run.path.name
    assert set(first.tags) == {"digits", "private", "mine"}
    assert "utility/accuracy" in first.notes and run.statement()["guarantee"] in first.notes
    config = items(first.config.update)
    assert config["privacy"]["eps"] == 10 and config["privacy_statement"] == run.statement()
    summary: dict = {}
    for record in records:
        summary |= items(record.summary.update)
    metrics = run.metrics()
    assert summary["eps"] == run.statement()["eps"]
    assert summary["utility/accuracy"] == metrics["utility/accuracy"]
    (file,) = run.logs_dir.glob("wandb/*/files/media/table/eps_against_utility*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["eps", "utility/accuracy"]
    assert table["data"] == [[summary["eps"], summary["utility/accuracy"]]]


def test_wandb_watches_nothing(run_copy, monkeypatch):
    """Not even a print or an argument of the moments in which it is open."""
    log_results = weights_and_biases._log_results

    def log_and_print(*args):
        print("secret_print")
        os.write(1, b"secret_write\n")
        log_results(*args)

    monkeypatch.setattr(weights_and_biases, "_log_results", log_and_print)
    monkeypatch.setattr(sys, "argv", ["secret_program", "secret_argument=1"])
    for name, value in (("WANDB_CONSOLE", "wrap"), ("WANDB_SAVE_CODE", "true")):
        monkeypatch.setenv(name, value)
    tell(run_copy, "wandb")
    records = wandb_records(run_copy.logs_dir)
    for kind in ("output", "output_raw", "stats", "environment"):
        assert not any(record.HasField(kind) for record in records), kind
    first = begun(records)
    assert not first.git.commit and not first.git.remote_url and not first.host
    for path in run_copy.logs_dir.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
    (files,) = run_copy.logs_dir.glob("wandb/offline-run-*/files")
    assert {path.name for path in files.iterdir()} == {"media"}


def test_wandb_writes_into_the_run_alone(run_copy, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = dict(os.environ)
    tell(run_copy, "wandb")
    assert not list((tmp_path / "cwd").iterdir())
    assert not list((tmp_path / "home").iterdir())
    assert dict(os.environ) == before
    assert wandb.run is None


def test_a_run_that_is_told_again_is_one_run(run_copy):
    for _ in range(2):
        for logger in ("csv", "tensorboard", "wandb"):
            tell(run_copy, logger)
    first = begun(wandb_records(run_copy.logs_dir))
    assert len(list((run_copy.logs_dir / "tensorboard").iterdir())) == 1
    assert [row["step"] for row in csv_rows(run_copy.logs_dir / "metrics.csv")] == [1, 2, 3]
    tell(run_copy, "wandb")
    assert begun(wandb_records(run_copy.logs_dir)).run_id == first.run_id


def test_evaluating_a_run_tells_its_logger_again(run_copy, command):
    run_copy.metrics_path.unlink()
    cfg = run_copy.config()
    cfg.logger = compose("logger=tensorboard").logger
    OmegaConf.save(cfg, run_copy.config_path)
    assert command(evaluate, f"run={run_copy.path}", "evaluator.classifier.steps=2").code == 0
    assert "utility/accuracy" in told("tensorboard", run_copy.logs_dir)


def test_runs_of_a_sweep_are_one_group(run_copy, tmp_path):
    sweep = tmp_path / "20261123-sweep"
    sweep.mkdir()
    (sweep / "multirun.yaml").write_text("hydra: {}\n")
    run_copy.path.rename(sweep / "3")
    job = Run(sweep / "3")
    record = read_record(job)
    assert (record.group, record.name) == ("20261123-sweep", "20261123-sweep/3")
    tell(job, "wandb", "logger.group=ours")
    assert begun(wandb_records(job.logs_dir)).run_group == "ours"


def test_tensorboard_compares_runs_by_their_config(run):
    reader = events(run.logs_dir)
    content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["privacy.eps"].number_value == 10 and given["dataset.name"].string_value
    content = reader.SummaryMetadata("_hparams_/experiment").plugin_data.content
    compared = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {"eps", "utility/accuracy"} <= {info.name.tag for info in compared}
    assert {"config/text_summary", "privacy_statement/text_summary"} <= set(
        reader.Tags()["tensors"]
    )


@pytest.fixture
def asked(monkeypatch, run_copy):
    """A function that tells W&B and returns the modes that it was begun in; none is reachable."""
    modes = []

    def init(mode, **options):
        modes.append(mode)
        raise wandb.errors.CommError("no answer\nfor long")

    monkeypatch.setattr(wandb, "init", init)

    def ask():
        with pytest.raises((UserError, wandb.errors.CommError)):
            tell(run_copy, "wandb")
        return modes

    return ask


def test_wandb_is_offline_without_a_key(asked):
    assert asked() == ["offline"]


def test_wandb_is_online_with_a_key_and_stays_offline_where_it_is_not_reached(
    asked, monkeypatch, capsys
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert asked() == ["online", "offline"]
    assert "no answer" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["api.wandb.ai", urlsplit(wandb.Settings().base_url).netloc])
def test_wandb_is_online_after_its_login(asked, host):
    (Path.home() / ".netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    assert asked()[0] == "online"


def test_the_key_of_another_host_is_none(asked):
    (Path.home() / ".netrc").write_text("machine elsewhere\n  login user\n  password x\n")
    assert asked() == ["offline"]


def test_wandbs_own_variable_wins(asked, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert asked() == ["offline"]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_package_that_is_missing_is_named_before_anything_is_done(
    package, command, monkeypatch, tmp_path
):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    outcome = command(train, *TINY, f"logger={package}", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert f"logger={package}" in outcome.err and f"dp-synth[{package}]" in outcome.err
    assert not (tmp_path / "run").exists()


def test_no_logger_leaves_no_logs(tmp_path):
    overrides = (*TINY, "public=none", "privacy=none", "logger=none")
    assert call(train, *overrides, f"run_dir={tmp_path / 'run'}") == 0
    assert not (tmp_path / "run" / "logs").exists()


def test_a_journal_survives_crashes_and_resumes(tmp_path):
    path = tmp_path / "logs" / "journal.jsonl"
    assert read_journal(path) == []
    for step, loss in ((50, 3.0), (100, 2.0), (150, 9.0)):
        Journal(path).log_metrics({"loss": loss}, step)
    with path.open("a") as file:
        file.write('{"step": 200, "lo\n')
    for step, loss in ((150, 1.0), (200, 0.5)):  # of a second sitting, from step 100
        Journal(path).log_metrics({"loss": loss}, step)
    assert read_journal(path) == [
        (50, {"loss": 3.0}),
        (100, {"loss": 2.0}),
        (150, {"loss": 1.0}),
        (200, {"loss": 0.5}),
    ]


def test_nested_names_are_dotted():
    assert flat({"a": {"b": {"c": 1}, "d": 2}, "e": {}}) == {"a.b.c": 1, "a.d": 2}


def test_every_logger_is_built_by_its_config_alone():
    for logger in ("csv", "tensorboard", "wandb"):
        assert callable(instantiate(compose(f"logger={logger}").logger))
