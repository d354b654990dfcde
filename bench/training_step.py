"""`training_step`: the gradients of one optimizer step of a Llama of 12 million parameters, in microbatches.

Passes
    KLDPO    the loss of all microbatches as one batch, against DPO, which knows no batch, at the same microbatches
    WDPO     the Wasserstein penalty, directional and exact, against DPO
Every contestant has the same model, batches and output head (`linear_sequence_logps`), and attention without fused
kernels, as exact WDPO needs; one giant batch has the memory to hold all of them at once. DPO computes another loss, so
it is held against none; the others must agree with one giant batch, or with double backward to 1%.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .cases import Absent, Case, Peer, Problem, Suite, ours
from .results import OURS

KLDPO, WDPO = "KLDPO", "WDPO"
DPO, GIANT, EXACT = "DPO, microbatch by microbatch", "one giant batch", "double backward"
ONE_SIDED = f"{OURS}, one-sided"
BETA, TAU, RHO = 0.1, 0.1, 0.01
ALLOWED = {"float32": 0.01, "bfloat16": 0.05}
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}

Batch = dict[str, Tensor]
# From a causal language model to what leaves a step's gradients in its parameters.
Build = Callable[[Any], Callable[[list[Batch]], None]]


def _module(model: Any, loss: Any) -> Any:
    from robustloss.train.loss_module import LossModule

    return LossModule(model, loss)


def _arguments(module: Any, batch: Batch, **options: Any) -> Batch:
    from robustloss.train.loss_module import loss_arguments

    return loss_arguments(module.loss, module(batch, output="logps", **options), batch)


def _alone(name: str, **options: Any) -> Build:
    """Each microbatch has a loss of its own."""

    def build(model: Any) -> Callable[[list[Batch]], None]:
        module = _module(model, ours(name)(beta=BETA, **options))

        def step(batches: list[Batch]) -> None:
            for batch in batches:
                (module(batch) / len(batches)).backward()

        return step

    return build


def _global_batch(model: Any) -> Callable[[list[Batch]], None]:
    module = _module(model, ours("KLDPOLoss")(beta=BETA, tau=TAU))
    global_batch = ours("GlobalBatch")(module.loss)

    def surrogate(batch: Batch, cotangents: Batch) -> Tensor:
        named = {name.removeprefix("policy_"): value for name, value in cotangents.items()}
        return module(batch, output="surrogate", cotangents=named)

    def step(batches: list[Batch]) -> None:
        global_batch.step(batches, partial(_arguments, module), Tensor.backward, surrogate_fn=surrogate)

    return step


def _giant_batch(model: Any) -> Callable[[list[Batch]], None]:
    module = _module(model, ours("KLDPOLoss")(beta=BETA, tau=TAU))
    return lambda batches: module(_joined(batches)).backward()


def _directional(penalty: str) -> Build:
    def build(model: Any) -> Callable[[list[Batch]], None]:
        from robustloss.penalty import directional_step

        module = _module(model, ours("WDPOLoss")(beta=BETA, rho=RHO, penalty=penalty))

        def arguments(batch: Batch, offset: Tensor | None) -> tuple[Batch, Tensor]:
            return _arguments(module, batch, embedding_offset=offset), module.embeddings

        def step(batches: list[Batch]) -> None:
            sizes = [float(len(batch["index"])) for batch in batches]
            directional_step(module.loss, batches, arguments, Tensor.backward, masses=sizes)

        return step

    return build


def _joined(batches: list[Batch]) -> Batch:
    """All as one batch: chosen rows first, then rejected."""
    sides = {name: [batch[name].chunk(2) for batch in batches] for name in ("input_ids", "attention_mask", "labels")}
    joined = {name: torch.cat([part[side] for side in (0, 1) for part in parts]) for name, parts in sides.items()}
    return joined | {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name not in sides}


REFERENCE = {KLDPO: _giant_batch, WDPO: _alone("WDPOLoss", rho=RHO, penalty="exact")}


class TrainingStep(Suite):
    op = "training_step"
    cpu_shapes: ClassVar = [{"microbatches": 4, "B": 4, "T": 64}]
    gpu_shapes: ClassVar = [{"microbatches": 4, "B": 8, "T": 512}]
    tiny_shape: ClassVar = {"microbatches": 2, "B": 2, "T": 8}
    seconds = 20.0
    in_turn = True
    # Each loads what it does, by pass.
    peers: ClassVar = {
        OURS: Peer(lambda: {KLDPO: _global_batch, WDPO: _directional("central")}),
        ONE_SIDED: Peer(lambda: {WDPO: _directional("one_sided")}),
        GIANT: Peer(lambda: {KLDPO: REFERENCE[KLDPO]}),
        EXACT: Peer(lambda: {WDPO: REFERENCE[WDPO]}),
        DPO: Peer(lambda: dict.fromkeys((KLDPO, WDPO), _alone("DPOLoss"))),
    }

    def dtypes(self, on_gpu: bool) -> tuple[str, ...]:
        return ("float32", "bfloat16") if on_gpu else ("float32",)

    def passes(self, dtype: str, on_gpu: bool) -> tuple[str, ...]:
        return (KLDPO, WDPO)

    def cases(self, device: torch.device, tiny: bool = False) -> list[Case]:
        return [
            case
            for case in super().cases(device, tiny)
            if case.pass_name in case.contestant.load()
            and not (case.peer == ONE_SIDED and case.dtype == "bfloat16")  # where it has no good step
        ]

    def reference(self) -> dict[str, Build]:
        return REFERENCE

    def check_agreement(self, case: Case, device: torch.device) -> None:
        """As one vector: the gradients of single parameters may vanish."""
        small = replace(case, shape=self.tiny_shape)
        problem = self.build(small, device)
        if case.peer == ONE_SIDED:
            problem.run()  # the first of its steps has no penalty yet
        gradients = [problem.run()]
        if case.peer == DPO:
            return
        torch.manual_seed(0)
        gradients.append(self.problem(small, self.reference(), device).run())
        got, exact = (torch.cat([gradient.double().flatten() for gradient in side]) for side in gradients)
        error = float((got - exact).norm() / exact.norm())
        allowed = ALLOWED[case.dtype]
        if not error <= allowed:
            raise Absent(f"its gradient differs from the reference's by {error:.2%}; {allowed:.0%} is allowed")

    def problem(self, case: Case, builds: dict[str, Build], device: torch.device) -> Problem:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(device, getattr(torch, case.dtype))
        batches = [_batch(case, device) for _ in range(case.shape["microbatches"])]
        step = builds[case.pass_name](model)

        def run() -> list[Tensor]:
            model.zero_grad()
            step(batches)
            return [parameter.grad for parameter in model.parameters()]

        return Problem(run, [*model.parameters(), *(value for batch in batches for value in batch.values())])


def _batch(case: Case, device: torch.device) -> Batch:
    pairs, tokens = case.shape["B"], case.shape["T"]
    input_ids = torch.randint(MODEL["vocab_size"], (2 * pairs, tokens), device=device)
    labels = input_ids.clone()
    labels[:, : tokens // 2] = -100  # the prompt
    # About what a random model gives, so that margins are of order one.
    reference = -9.0 * (tokens // 2) + torch.randn(2, pairs, device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
        "index": torch.arange(pairs, device=device),
    }


SUITE = TrainingStep()
