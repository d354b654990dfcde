"""A tiny policy, batches of every shape, and the giant batch that all ways of cutting them must equal.

Shared by test_global_batch.py and by global_batch_worker.py, which is started under torchrun.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustloss import (
    AOTPairedLoss,
    AOTUnpairedLoss,
    BetaDPOLoss,
    DPOLoss,
    GlobalBatch,
    GroupDROLoss,
    KLDPOLoss,
    KTOLoss,
    linear_sequence_logps_with_cotangent,
    sequence_logps,
)

VOCABULARY, TOKENS, WIDTH, ROWS, STEPS = 11, 5, 6, 10, 5
# (name, loss, what a batch holds besides the log-probabilities)
LOSSES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "kldpo tau": (lambda: KLDPOLoss(0.5, tau=0.2), ()),
    "kldpo rho": (lambda: KLDPOLoss(0.5, rho=0.3), ()),
    "aot paired hard": (lambda: AOTPairedLoss(0.5), ()),
    "aot paired soft": (lambda: AOTPairedLoss(0.5, sort="soft_l2"), ()),
    "aot paired sinkhorn": (lambda: AOTPairedLoss(0.5, sort="sinkhorn", strength=0.5), ()),
    "aot unpaired hard": (lambda: AOTUnpairedLoss(0.5), ()),
    "aot unpaired soft": (lambda: AOTUnpairedLoss(0.5, sort="soft_l2"), ()),
    "kto": (lambda: KTOLoss(0.5, 1.5, 0.7), ("kl_logratios",)),
    "group dro": (lambda: GroupDROLoss(0.5, 3, 0.5), ("groups",)),
    "group dro sized": (lambda: GroupDROLoss(0.5, 3, 0.5, group_sizes=[1, 3, 6]), ("groups", "weights")),
    "beta dpo": (lambda: BetaDPOLoss(0.5, 0.3, 0.3, filtering="nearest"), ()),
    "beta dpo drawn": (lambda: BetaDPOLoss(0.5, 0.3, 0.3), ("weights",)),
    "dpo weighted": (lambda: DPOLoss(0.5), ("weights",)),
}
UNCOUPLED = ("dpo weighted",)
# How a step's ten rows are dealt: {(processes, microbatches): rows[process][microbatch]}. Ragged; one microbatch is
# empty; the unpaired rows are sorted by class, so that the last process of 2 x 1 has one class only.
SHARES: dict[tuple[int, int], list[list[range]]] = {
    (1, 1): [[range(10)]],
    (1, 4): [[range(3), range(3, 4), range(4, 4), range(4, 10)]],
    (2, 1): [[range(7)], [range(7, 10)]],
    (2, 2): [[range(4), range(4, 7)], [range(7, 10), range(10, 10)]],
}


class Policy(nn.Module):
    """An embedding and an MLP that give next-token logits."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.body(self.embed(tokens))

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B]
        return sequence_logps(self.head(self.hidden(tokens)), tokens, shift=True)


def make_policy(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Policy:
    torch.manual_seed(0)
    return Policy(dropout).to(dtype)


def make_batch(name: str, step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The rows of one step, all of them."""
    generator = torch.Generator().manual_seed(100 + step)
    loss, extras = LOSSES[name][0](), LOSSES[name][1]

    def numbers(scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(ROWS, generator=generator, dtype=torch.float64)).to(dtype)

    def tokens() -> Tensor:
        return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)

    if loss.paired:
        batch = {"chosen": tokens(), "rejected": tokens(), "ref_chosen_logps": numbers(3) - 10}
        batch["ref_rejected_logps"] = numbers(3) - 10
    else:
        batch = {"tokens": tokens(), "ref_logps": numbers(3) - 10, "desirable": torch.arange(ROWS) < 6}
    if "weights" in extras:
        batch["weights"] = numbers().abs() * (torch.arange(ROWS) % 4 != step % 4)
    if "groups" in extras:
        batch["groups"] = torch.randint(3, (ROWS,), generator=generator)
    if "kl_logratios" in extras:
        batch["kl_logratios"] = numbers()[:8] + 0.5  # fewer mismatched pairs than samples
    return batch


def take(batch: dict[str, Tensor], rows: range) -> dict[str, Tensor]:
    return {key: value[rows.start : rows.stop] for key, value in batch.items()}


def logps_of(policy: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """logps_fn of a policy that gives [B] log-probabilities of [B, T] tokens."""

    def logps_fn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {key: value for key, value in batch.items() if key not in ("tokens", "chosen", "rejected")}
        if "tokens" in batch:
            return {"policy_logps": policy(batch["tokens"]), **named}
        chosen, rejected = policy(torch.cat([batch["chosen"], batch["rejected"]])).chunk(2)
        return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected, **named}

    return logps_fn


def surrogate_of(policy: Policy) -> Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]:
    """surrogate_fn by the head that takes the cotangents in its forward."""

    def surrogate_fn(batch: dict[str, Tensor], cotangents: dict[str, Tensor]) -> Tensor:
        tokens = batch["tokens"] if "tokens" in batch else torch.cat([batch["chosen"], batch["rejected"]])
        cotangent = torch.cat(list(cotangents.values()))
        hidden = policy.hidden(tokens)
        return linear_sequence_logps_with_cotangent(hidden, policy.head.weight, tokens, cotangent, shift=True)[0]

    return surrogate_fn


def mass_of(batch: dict[str, Tensor]) -> float:
    return float(batch["weights"].sum()) if "weights" in batch else float(len(next(iter(batch.values()))))


def train_giant(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """SGD on whole batches, the loss called and differentiated directly: what everything else is held against."""
    policy, loss = make_policy(dtype), LOSSES[name][0]()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    result: dict[str, Any] = {"values": [], "metrics": [], "gradients": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        value, metrics = loss(**logps_of(policy)(make_batch(name, step, dtype)), return_metrics=True)
        value.backward()
        result["values"].append(value.item())
        result["metrics"].append({key: metric.item() for key, metric in metrics.items()})
        result["gradients"].append([parameter.grad.double().flatten().tolist() for parameter in policy.parameters()])
        optimizer.step()
    return finished(result, policy, loss)


def finished(
    result: dict[str, Any], policy: nn.Module, loss: nn.Module, full: Callable = lambda x: x
) -> dict[str, Any]:
    result["parameters"] = [full(value).detach().double().flatten().tolist() for value in policy.parameters()]
    result["state"] = {key: value.double().flatten().tolist() for key, value in loss.state_dict().items()}
    return result


def train_cut(
    name: str,
    dtype: torch.dtype,
    shares: list[range],
    *,
    policy: Policy,
    forward: nn.Module | None = None,
    reduce: Callable[[nn.Module], None] = lambda policy: None,
    full: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    global_batch: bool = True,
    divisor: float = 1.0,
    masses: bool = False,
    no_sync: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """The same SGD on this process's microbatches.

    Args:
        shares: which rows each microbatch holds.
        forward: the wrapped policy, where a wrapper averages the gradients.
        reduce: averages the gradients where none does.
        full: a gradient or parameter in full, where it is sharded.
        global_batch: False trains every microbatch by itself, the usual accumulation.
        divisor: what this framework divides each backward by.
        masses: whether they are known beforehand.
        no_sync: as `GlobalBatch.step`'s.
    """
    loss = LOSSES[name][0]()
    whole, optimizer = GlobalBatch(loss), torch.optim.SGD(policy.parameters(), lr=0.05)
    logps_fn = logps_of(policy if forward is None else forward)
    result: dict[str, Any] = {"values": [], "metrics": [], "gradients": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        microbatches = [take(make_batch(name, step, dtype), rows) for rows in shares]
        if global_batch:
            value, metrics = whole.step(
                microbatches,
                logps_fn,
                lambda scalar: (scalar / divisor).backward(),
                masses=[mass_of(batch) for batch in microbatches] if masses else None,
                divisor=divisor,
                no_sync=no_sync,
            )
        else:
            for batch in microbatches:
                value, metrics = loss(**logps_fn(batch), return_metrics=True)
                (value / len(microbatches)).backward()
        reduce(policy)
        result["values"].append(value.item())
        result["metrics"].append({key: metric.item() for key, metric in metrics.items()})
        gradients = [full(parameter.grad) for parameter in policy.parameters()]
        result["gradients"].append([gradient.double().flatten().tolist() for gradient in gradients])
        optimizer.step()
    return finished(result, policy, loss, full)


def distance(got: Any, want: Any) -> float:
    """The largest relative difference of two results of one shape: of vectors in norm, of numbers by themselves.

    A name or a number that only one of them has is an infinite one; NaN equals NaN.
    """
    if isinstance(want, dict):
        if got.keys() != want.keys():
            return float("inf")
        return max((distance(got[key], want[key]) for key in want), default=0.0)
    if isinstance(want, list) and (not want or not isinstance(want[0], float)):
        return max((distance(one, other) for one, other in zip(got, want, strict=True)), default=0.0)
    one, other = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in (got, want))
    if not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    one, other = one.nan_to_num(), other.nan_to_num()
    return float((one - other).norm() / other.norm().clamp(min=1e-3))
