"""docs/guide/migration.md: what TRL computes for an option is what our loss beside it in the table computes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from robustloss import AOTPairedLoss, AOTUnpairedLoss, DPOLoss, KTOLoss

dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="compares with TRL: pip install trl")
kto_trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="compares with TRL: pip install trl")
if not hasattr(dpo_trainer.DPOTrainer, "_compute_loss"):
    pytest.skip("this TRL has no DPOTrainer._compute_loss", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "migration.md"
PAIRS, TOKENS, PROMPT, BETA, EPSILON = 6, 9, 2, 0.3, 0.1
ONE_PROCESS = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


class Metrics(dict):
    def __missing__(self, name: str) -> list:
        return self.setdefault(name, [])


class Model:
    """In a causal language model's place: the token log-probabilities it is given, [2B, T - 1]."""

    training = True

    def __init__(self, logps: Tensor):
        self.logps = logps

    def __call__(self, **inputs) -> SimpleNamespace:
        zeros = torch.zeros_like(self.logps)
        shown = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "log_sum_sq_probs": zeros}
        return SimpleNamespace(log_probs=self.logps, **shown)


def token_logps(seed: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities [2B, T - 1], completion mask [2B, T]): completions of several lengths, prompts of two."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9, 5, 7, 6, 8, 4, 6, 9, 5, 7, 4, 8])[:, None]
    mask = ((torch.arange(TOKENS) >= PROMPT) & (torch.arange(TOKENS) < lengths)).long()
    logps = -5 * torch.rand(2 * PAIRS, TOKENS - 1, generator=generator, dtype=torch.float64)
    return logps * mask[:, 1:], mask


def trl_dpo(policy: Tensor, reference: Tensor, mask: Tensor, loss_type: str, label_smoothing: float) -> Tensor:
    """What DPOTrainer computes, in one process without accumulation."""
    trainer = SimpleNamespace(
        model=Model(policy),
        ref_model=Model(reference),
        accelerator=ONE_PROCESS,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        beta=BETA,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return dpo_trainer.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)


def trl_kto(policy: Tensor, reference: Tensor, mask: Tensor, loss_type: str, kl: Tensor | None) -> Tensor:
    """What KTOTrainer computes, in one process without accumulation; `kl` are mismatched log-ratios."""
    trainer = SimpleNamespace(
        model=Model(policy),
        accelerator=ONE_PROCESS,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=BETA,
        loss_type=loss_type,
        desirable_weight=2.0,
        undesirable_weight=0.5,
        calculate_KL=kl is not None,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: kl,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.arange(2 * PAIRS) < PAIRS,
        "ref_logps": reference.sum(1),
        "ref_KL_logps": None if kl is None else torch.zeros_like(kl),
    }
    return kto_trainer.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)


def ours(loss, policy: Tensor, reference: Tensor, average: Tensor | None) -> Tensor:
    logps = [logps.sum(1) / (1 if average is None else average) for logps in (policy, reference)]
    if isinstance(loss, (AOTUnpairedLoss, KTOLoss)):
        return loss(*logps, torch.arange(2 * PAIRS) < PAIRS)
    (pc, pr), (rc, rr) = (each.chunk(2) for each in logps)
    return loss(pc, pr, rc, rr)


# TRL's loss_type and label_smoothing, our loss, whether of averages per token, and a constant factor.
TABLE = [
    ("sigmoid", 0.0, DPOLoss(BETA), False, 1),
    ("sigmoid", EPSILON, DPOLoss(BETA), False, 1),  # which ignores label_smoothing
    ("sigmoid_norm", 0.0, DPOLoss(BETA), True, 1),
    ("hinge", 0.0, DPOLoss(BETA, link="hinge"), False, 1),
    ("ipo", 0.0, DPOLoss(BETA, link="ipo"), True, 1),
    ("robust", EPSILON, DPOLoss(BETA, EPSILON, "robust"), False, 1),
    ("aot", 0.0, AOTPairedLoss(BETA), False, 1),
    ("aot", EPSILON, AOTPairedLoss(BETA, label_smoothing=EPSILON), False, 1),
    ("aot_unpaired", 0.0, AOTUnpairedLoss(BETA), False, 1),
    ("aot_unpaired", EPSILON, AOTUnpairedLoss(BETA, label_smoothing=EPSILON), False, 1),
    ("apo_zero", 0.0, KTOLoss(BETA), False, 2),
]


@pytest.mark.parametrize(("loss_type", "label_smoothing", "loss", "averaged", "factor"), TABLE)
def test_a_row_of_the_table_of_dpo_trainer(loss_type, label_smoothing, loss, averaged, factor):
    policy, mask = token_logps(0)
    reference, _ = token_logps(1)
    policy.requires_grad_()
    theirs = trl_dpo(policy, reference, mask, loss_type, label_smoothing)
    mine = factor * ours(loss, policy, reference, mask.sum(1) if averaged else None)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(value, policy)[0] for value in (mine, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "kl"),
    [("kto", torch.tensor([-1.0, 4.0, 2.0])), ("kto", torch.tensor([-1.0, -4.0])), ("apo_zero_unpaired", None)],
)
def test_a_row_of_the_table_of_kto_trainer(loss_type, kl):
    policy, mask = token_logps(0)
    reference, _ = token_logps(1)
    policy.requires_grad_()
    theirs = trl_kto(policy, reference, mask, loss_type, kl)
    desirable = torch.arange(2 * PAIRS) < PAIRS
    loss = KTOLoss(BETA, desirable_weight=2.0, undesirable_weight=0.5)
    mine = loss(policy.sum(1), reference.sum(1), desirable, kl_logratios=kl)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    gradients = (torch.autograd.grad(value, policy)[0] for value in (mine, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_the_table_names_every_loss_type_of_trl():
    from trl import DPOConfig

    page = PAGE.read_text(encoding="utf-8")
    types = set(re.findall(r"'(\w+)'", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]))
    assert {"sigmoid", "aot", "ipo"} <= types
    assert {name for name in types if f"`{name}`" not in page} == set()
    assert {row[0] for row in TABLE} <= types
