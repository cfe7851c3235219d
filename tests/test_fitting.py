"""Lightning's trainer as this program sets it up: nothing of Lightning's own touches a run."""

import pytest
import torch
from conftest import compose
from lightning.pytorch.plugins.environments import SLURMEnvironment

from dp_synth.errors import UserError
from dp_synth.fitting import _TimeLimit, build_trainer
from dp_synth.module import MeanGradient


def test_no_checkpoint_that_lies_about_is_taken_up_under_slurm(monkeypatch, tmp_path):
    """Lightning would resume public training from a private run's requeue file."""
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_NTASKS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "1")
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    assert SLURMEnvironment.detect()
    trainer = build_trainer(compose().trainer, logger=False)
    assert trainer._checkpoint_connector._hpc_resume_path is None
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true", "nonsense"])
def test_a_precision_whose_sums_are_not_float32_is_refused(precision):
    with pytest.raises(UserError, match="trainer.precision"):
        build_trainer(compose(f"trainer.precision={precision}").trainer)


def test_a_time_limit_is_for_one_sitting():
    """Lightning's own timer would stop a resumed run at once."""
    assert _TimeLimit("00:00:00:01").state_dict() == {}


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 7, None])
def test_the_mean_gradient_does_not_depend_on_how_rows_are_cut(rows, micro_batch_size):
    net = torch.nn.Linear(5, 2).double()
    x = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(x):
        return net(x).square().sum(1)

    engine = MeanGradient(micro_batch_size)
    engine.accumulate(loss, (x,), multiplicity=1)
    expected = torch.autograd.grad(loss(x).mean(), list(net.parameters()))
    torch.testing.assert_close([p.grad for p in net.parameters()], list(expected))
    assert engine.loss == pytest.approx(loss(x).mean().item())
