"""Each loss against its paper in float64, and the door that losses come in by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import run_config

from megatron_gpc.algo.kl import k3
from megatron_gpc.algo.losses import LossInputs, LossOutputs, Objective
from megatron_gpc.algo.losses.check import LENGTHS, made_up, part
from megatron_gpc.algo.losses.cispo import CISPO
from megatron_gpc.algo.losses.clip_cov import ClipCov
from megatron_gpc.algo.losses.gspo import GSPO
from megatron_gpc.errors import PartError, UserError
from megatron_gpc.types import TokenStats

SLICES = [
    slice(int(end - length), int(end))
    for length, end in zip(LENGTHS, LENGTHS.cumsum(0), strict=True)
]


def float64(inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ln p with gradient, ln q, advantages) of the made-up example."""
    logp_T = inputs.logp_T.detach().double().requires_grad_()
    return logp_T, inputs.streams.old_logp_T.double(), inputs.advantages_T.double()


def hold(
    outputs: LossOutputs, logp_T: torch.Tensor, inputs: LossInputs, want: torch.Tensor
) -> None:
    """Assert that the loss, and its gradient, are those of the reference."""
    assert float(outputs.loss_sum.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    (got_T,) = torch.autograd.grad(outputs.loss_sum, inputs.logp_T)
    (want_T,) = torch.autograd.grad(want, logp_T)
    torch.testing.assert_close(got_T.double(), want_T, rtol=1e-5, atol=1e-7)
    assert (want_T != 0).any()


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_gspo_is_the_paper_s_mean_over_sequences(average):
    inputs = made_up(False)
    outputs = GSPO(eps_low=0.05, eps_high=0.1, average=average)(inputs)
    logp_T, old_T, a_T = float64(inputs)
    terms, ratios = [], []
    for at in SLICES:
        s = (logp_T[at] - old_T[at]).mean().exp()
        a = a_T[at][0]
        terms.append(torch.minimum(s * a, s.clamp(0.95, 1.1) * a))
        ratios += [s.detach()] * len(logp_T[at])
    weights = LENGTHS if average == "token" else torch.full((4,), LENGTHS.sum() / 4)
    hold(outputs, logp_T, inputs, -(torch.stack(terms) * weights).sum())
    torch.testing.assert_close(outputs.ratio_T.double(), torch.stack(ratios), rtol=1e-6, atol=0)
    assert (outputs.clipped_low_T | outputs.clipped_high_T).any()


def test_gspo_adds_up_a_sequence_that_two_ranks_share():
    """Each rank's own sums are made first, then both get the total."""
    inputs, loss = made_up(False), GSPO(eps_low=0.05, eps_high=0.1)
    whole = loss(inputs)
    odd_T = torch.arange(len(inputs.logp_T)) % 2 == 1
    alone: list[torch.Tensor] = []
    parts_ = [part(inputs, held_T) for held_T in (odd_T, ~odd_T)]
    for held in parts_:
        loss(replace(held, add_over_ranks=lambda sums: alone.append(sums.clone()) or sums))
    found = [loss(replace(held, add_over_ranks=lambda sums: sum(alone))) for held in parts_]
    assert torch.equal(found[0].ratio_T, whole.ratio_T[odd_T])
    assert torch.equal(found[1].ratio_T, whole.ratio_T[~odd_T])
    total = float((found[0].loss_sum + found[1].loss_sum).detach())
    assert total == pytest.approx(float(whole.loss_sum.detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "low", "high"),
    [
        (CISPO(), lambda p: 0.0, lambda p: 1.5 - 0.25 * p),
        (CISPO(eps_high=0.1), lambda p: 0.0, lambda p: 1.1),
        (CISPO(eps_high=0.3, eps_low=0.2), lambda p: 0.8, lambda p: 1.3),
    ],
    ids=["bounds", "high", "both"],
)
def test_cispo_bounds_the_weight_and_keeps_every_gradient(loss, low, high):
    inputs = made_up(False)
    logp_T, old_T, a_T = float64(inputs)
    r_T, p_T = (logp_T.detach() - old_T).exp(), logp_T.detach().exp()
    low_T, high_T = low(p_T) + torch.zeros_like(p_T), high(p_T) + torch.zeros_like(p_T)
    w_T = torch.minimum(torch.maximum(r_T, low_T), high_T)
    outputs = loss(inputs)
    hold(outputs, logp_T, inputs, -(w_T * a_T * logp_T).sum())
    assert outputs.clipped_high_T.tolist() == (r_T > high_T).tolist()
    assert outputs.clipped_low_T.tolist() == (r_T < low_T).tolist()
    (gradient_T,) = torch.autograd.grad(loss(inputs).loss_sum, inputs.logp_T)
    assert outputs.clipped_high_T.any() and ((gradient_T != 0) == (a_T != 0)).all()


def scored(logp_T: torch.Tensor) -> TokenStats:
    return TokenStats(*logp_T.detach().expand(4, -1))


def test_clip_cov_leaves_out_a_share_of_the_band_by_seed_and_step_alone():
    draw = torch.Generator().manual_seed(0)
    logp_T, advantages_T = torch.randn(2, 1000, generator=draw)
    streams = SimpleNamespace(advantages_T=advantages_T)
    loss = ClipCov(share=0.02, low=0.5, high=2.0)

    def left_out(step=1, seed=0, logp_T=logp_T):
        return loss.prepare(streams, scored(logp_T), step, seed)["left_out"]

    a_T, lnp_T = advantages_T.double(), logp_T.double()
    covariance_T = (lnp_T - lnp_T.mean()) * (a_T - a_T.mean())
    band_T = (covariance_T >= 0.5) & (covariance_T <= 2.0)
    found_T = left_out()
    assert found_T.sum() == 20 and not (found_T & ~band_T).any()
    assert torch.equal(found_T, left_out())
    assert not torch.equal(found_T, left_out(step=2)) and not torch.equal(found_T, left_out(seed=1))
    # what rounding could do at another layout: one token leaves the band
    gone = int(found_T.nonzero()[3])
    moved_T = logp_T.clone()
    moved_T[gone] = logp_T.mean()
    assert int((left_out(logp_T=moved_T) ^ found_T).sum()) == 2, "it, and who stands in for it"


def test_clip_cov_leaves_out_no_more_than_the_band_holds():
    logp_T = torch.zeros(100)
    logp_T[:3] = 5.0
    streams = SimpleNamespace(advantages_T=torch.ones(100).index_fill(0, torch.arange(3), 2.0))
    found_T = ClipCov(share=0.5).prepare(streams, scored(logp_T), 1, 0)["left_out"]
    assert found_T.nonzero().flatten().tolist() == [0, 1, 2]
    none_T = ClipCov(share=0.5, low=50, high=60).prepare(streams, scored(logp_T), 1, 0)["left_out"]
    assert not none_T.any()


def test_clip_cov_s_tokens_give_no_gradient_and_the_others_that_of_the_default(tmp_path):
    inputs = made_up(False)
    default = objective(tmp_path, "train.loss=clip")(inputs)
    left_out_T = torch.arange(len(inputs.logp_T)) % 3 == 0
    inputs = replace(inputs, streams=replace(inputs.streams, prepared={"left_out": left_out_T}))
    outputs = objective(tmp_path, "train.loss=clip-cov")(inputs)
    got_T, want_T = (torch.autograd.grad(o.loss_sum, inputs.logp_T)[0] for o in (outputs, default))
    assert torch.equal(got_T, want_T.masked_fill(left_out_T, 0.0)) and (got_T != 0).any()
    assert torch.equal(outputs.metrics["loss_left_out"], left_out_T)


def test_k3_and_its_gradient():
    logp_T = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    reference_T = torch.tensor([-1.0, -1.5, -0.5001, -7.0])
    kl_T = k3(logp_T, reference_T)
    kl_T.sum().backward()
    for got, gradient, logp, ref in zip(
        kl_T.tolist(), logp_T.grad.tolist(), logp_T.tolist(), reference_T.tolist(), strict=True
    ):
        r = math.exp(ref - logp)
        assert got == pytest.approx(r - 1 - math.log(r), rel=1e-3, abs=1e-9) and got >= 0
        assert gradient == pytest.approx(1 - r, rel=1e-3, abs=1e-7)


def test_where_a_probability_is_0_k3_is_finite_and_its_gradient_right():
    logp_T = torch.tensor([-1.0, -torch.inf, -torch.inf, -1.0], requires_grad=True)
    reference_T = torch.tensor([-torch.inf, -1.0, -torch.inf, -1.0])
    kl_T = k3(logp_T, reference_T)
    kl_T.sum().backward()
    assert kl_T.isfinite().all() and kl_T[0] > 1e20 and kl_T[1] > 1e10
    assert kl_T[2:].tolist() == [0.0, 0.0]
    assert logp_T.grad[0] == 1 and logp_T.grad[1] < -1e10 and not logp_T.grad[2:].any()


def objective(folder: Path, *overrides: str) -> Objective:
    return Objective(run_config(folder, folder, *overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.loss=gspo", "train.loss_arguments.eps=1"], "train.loss_arguments"),
        (["train.loss=gspo", "train.loss_arguments.eps_low=1.5"], "train.loss_arguments.eps_low: "),
        (["train.loss=gspo", "train.loss_arguments.average=all"], "train.loss_arguments.average: "),
        (["train.loss=clip-cov", "train.loss_arguments.share=x"], "train.loss_arguments.share: "),
        (["train.loss_arguments.eps_low=0.1"], "train.loss_arguments"),
        (["train.loss=nowhere:name"], "there is no module 'nowhere'"),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_made_is_refused(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        objective(tmp_path, *overrides)


GOOD = """
from megatron_gpc.algo.losses import LossInputs, LossOutputs

def reinforce(inputs: LossInputs, scale: float = 1.0) -> LossOutputs:
    ratio_T = (inputs.logp_T - inputs.streams.old_logp_T).exp()
    none_T = ratio_T < 0
    loss_sum = -scale * (inputs.advantages_T * inputs.logp_T).sum()
    return LossOutputs(loss_sum, ratio_T, none_T, none_T, {"surprise": -inputs.logp_T})
"""


def test_a_loss_of_one_s_own_is_called_with_its_arguments(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    loss = objective(
        tmp_path, f"train.loss={tmp_path}/mine.py:reinforce", "train.loss_arguments.scale=2"
    )
    inputs = made_up(False)
    outputs = loss(inputs)
    want = -2 * (inputs.advantages_T * inputs.logp_T).sum()
    assert torch.equal(outputs.loss_sum, want)
    assert loss.metrics == ("loss_surprise",) and not outputs.ratio_T.requires_grad
    assert torch.equal(outputs.metrics["loss_surprise"], -inputs.logp_T.detach())
    assert not loss.prepares and objective(tmp_path, "train.loss=clip-cov").prepares


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.replace(".sum()", ".mean()"), "has to be a sum over tokens, not a mean"),
        (lambda s: s.replace(".sum()", ".sum() / max(1, len(ratio_T))"), "a sum over tokens"),
        (lambda s: s.replace(".sum()", ""), "expected a tensor of one value"),
        (
            lambda s: s.replace(".sum()", ".sum() * 1e30"),
            r"loss_sum is not finite, or beyond 1e.18",
        ),
        (lambda s: s.replace("loss_sum, ratio_T,", "loss_sum.detach(), ratio_T,"), "no gradient"),
        (lambda s: s.replace("inputs.logp_T).sum()", "inputs.logp_T.log()).sum()"), "not finite"),
        (lambda s: s.replace("loss_sum, ratio_T,", "loss_sum, ratio_T[:2],"), r"expected a tensor"),
        (lambda s: s.replace("none_T = ratio_T < 0", "none_T = ratio_T"), "expected a bool tensor"),
        (lambda s: s.replace("return LossOutputs(", "return tuple, ("), "returned tuple"),
        (
            lambda s: s.replace("return LossOutputs(", "return loss_sum / 14  # ("),
            "returned Tensor, expected LossOutputs .*; wanted is a function of .inputs., or",
        ),
        (
            lambda s: s.replace("inputs: LossInputs, ", "logp, old_logp, advantages, "),
            "takes .logp, .* missing a required argument: 'logp'; .*; wanted is a function of .inp"
            ".*; if it is the loss itself, call its first parameter `inputs`, not `logp`",
        ),
        (
            lambda s: s.replace("inputs: LossInputs, ", ""),
            "cannot be made .*; wanted is a function of .inputs., or a class",
        ),
        (
            lambda s: s + "\nreinforce = lambda batch=None: 3.5",
            "made float, which cannot be called; .*its first parameter `inputs`, not `batch`",
        ),
        (lambda s: s.replace("-inputs.logp_T}", "-inputs.logp_T.sum()}"), r"metrics\['surprise'\]"),
        (lambda s: s.replace("inputs.advantages_T", "inputs.advantage_T"), r"mine.py, line 7"),
        (lambda s: s.replace("scale: float = 1.0", "scale"), "scale"),
        (lambda s: s + "\nreinforce.prepare = lambda *given: 3\n", "prepare.. returned int"),
        (lambda s: s + "\nreinforce.prepare = lambda *given: {'a': 1}\n", r"prepare\(\)\['a'\]"),
        (lambda s: s + "\nreinforce.prepare = lambda streams: {}\n", "takes 1 positional"),
        (lambda s: s.replace("def reinforce", "def other"), "no 'reinforce'"),
        (lambda s: s.replace("ratio_T = (", "ratio_T = float('nan') * ("), "ratio_T is not finite"),
        (
            lambda s: s.replace("    ratio_T =", "    inputs.advantages_T.mul_(0)\n    ratio_T ="),
            "changed inputs.advantages_T in place",
        ),
    ],
)
def test_a_loss_that_would_fail_or_depend_on_the_layout_is_refused(
    tmp_path, change: Callable[[str], str], said
):
    assert change(GOOD) != GOOD
    (tmp_path / "mine.py").write_text(change(GOOD))
    name = f"{tmp_path}/mine.py:reinforce"
    with pytest.raises(UserError, match=said) as caught:
        objective(tmp_path, f"train.loss={name}")
    assert str(caught.value).startswith("train.loss: ") and "mine.py" in str(caught.value)


def test_a_loss_that_fails_later_is_named_and_keeps_its_traceback(tmp_path):
    divides = "    1 / inputs.mini_batch_samples\n    ratio_T ="
    (tmp_path / "mine.py").write_text(GOOD.replace("    ratio_T =", divides))
    loss = objective(tmp_path, f"train.loss={tmp_path}/mine.py:reinforce")
    with pytest.raises(PartError, match="train.loss: .*mine.py:reinforce .*ZeroDiv") as caught:
        loss(replace(made_up(False), mini_batch_samples=0))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ("loss_sum.expand(2), ratio_T,", "expected a tensor of one value"),
        ("loss_sum.detach(), ratio_T,", "loss_sum has no gradient"),
        ("loss_sum, ratio_T[:1],", r"ratio_T is torch.float32 \[1\], expected a tensor of shape"),
    ],
)
def test_a_loss_that_gives_something_else_later_is_named(tmp_path, late, said):
    text = GOOD.replace("loss_sum, ratio_T,", f"*(({late}) if LATE else (loss_sum, ratio_T)),")
    (tmp_path / "mine.py").write_text("LATE = False\n" + text)
    loss = objective(tmp_path, f"train.loss={tmp_path}/mine.py:reinforce")
    loss(made_up(False))
    loss.loss.__globals__["LATE"] = True
    with pytest.raises(PartError, match=f"train.loss: .*mine.py:reinforce failed at .*{said}"):
        loss(made_up(False))


def test_reference_log_probs_are_there_if_the_run_has_a_reference(tmp_path):
    source = GOOD.replace("    none_T", "    inputs.streams.reference_logp_T.sum()\n    none_T")
    (tmp_path / "mine.py").write_text(source)
    name = f"train.loss={tmp_path}/mine.py:reinforce"
    objective(tmp_path, name, "kl.coef=0.1")
    with pytest.raises(UserError, match="NoneType"):
        objective(tmp_path, name)


@pytest.mark.parametrize("name", ["clip", "gspo", "cispo", "clip-cov"])
@pytest.mark.parametrize("impossible", ["logp", "old_logp"])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_token_without_probability_spoils_neither_the_loss_nor_other_sequences(
    tmp_path, name, impossible, advantage
):
    example = made_up(reference=False)
    logp_T, old_logp_T = example.logp_T.detach().clone(), example.streams.old_logp_T.clone()
    (logp_T if impossible == "logp" else old_logp_T)[3] = -torch.inf
    advantages_T = torch.where(example.streams.sample_T == 0, advantage, example.advantages_T)
    streams = replace(example.streams, old_logp_T=old_logp_T, advantages_T=advantages_T)
    loss = objective(tmp_path, f"train.loss={name}")
    if loss.prepares:
        scored = TokenStats(logp_T, *example.entropy_T.expand(3, -1))
        streams = loss.prepare(streams, scored, 1, 0)
    logp_T.requires_grad_()
    inputs = replace(example, logp_T=logp_T, advantages_T=advantages_T, streams=streams)
    outputs = loss(inputs)
    (grad_T,) = torch.autograd.grad(outputs.loss_sum, logp_T)
    assert outputs.loss_sum.isfinite() and grad_T.isfinite().all()
    assert outputs.ratio_T.isfinite().all()
    assert (grad_T[streams.sample_T == 1] != 0).all(), "other sequences are trained on"
