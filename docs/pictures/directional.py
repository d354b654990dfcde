"""The error of WDPO's directional penalty against its step, on a tiny Llama."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from robustloss import WDPOLoss
from robustloss.bench.picture_style import BLUE, RED, label, panels
from robustloss.penalty import direction_error, directional_step
from robustloss.train import LossModule

VOCABULARY, PAIRS, TOKENS = 257, 4, 24
PRECISIONS = (torch.float32, torch.bfloat16)


def tiny_llama(dtype: torch.dtype) -> torch.nn.Module:
    """Two layers of random weights, 32 wide; eager attention, whose second derivative the errors are measured by."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype)


def random_batch(model: torch.nn.Module) -> dict[str, Tensor]:
    """Pairs of random tokens, and references some nats off the model's own log-probabilities."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (2 * PAIRS, TOKENS), generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    batch["index"] = torch.arange(PAIRS)
    with torch.no_grad():
        logps = LossModule(model)(batch, output="logps")
    shift = 4 * torch.randn(PAIRS, generator=generator)
    batch["ref_chosen_logps"] = logps["chosen_logps"] - shift
    batch["ref_rejected_logps"] = logps["rejected_logps"]
    return batch


def errors(model: torch.nn.Module, batch: dict[str, Tensor], penalty: str, steps: list[float]) -> list[float]:
    """Of each step: the relative error of the penalty's gradient by the parameters, in the model's own precision."""
    losses = (WDPOLoss(beta=0.1, rho=0.1, penalty=penalty, step=step) for step in steps)
    return [direction_error(LossModule(model, loss), batch) for loss in losses]


def default_step(model: torch.nn.Module, batch: dict[str, Tensor], penalty: str) -> float:
    """The step that is taken where none is given; in half precision the first training step measures it."""
    module = LossModule(model, WDPOLoss(beta=0.1, rho=0.1, penalty=penalty))
    directional_step(module.loss, [batch], module.arguments_at, Tensor.backward)
    return module.loss.relative_step(model.dtype)


def draw(figure: Figure, count: int = 14) -> None:
    steps = torch.logspace(-5, -0.5, count).tolist()
    for axes, dtype in zip(panels(figure, "float32", "bfloat16", sharey=True), PRECISIONS, strict=True):
        model = tiny_llama(dtype)
        batch = random_batch(model)
        for penalty, color in (("one_sided", RED), ("central", BLUE)):
            axes.loglog(steps, errors(model, batch, penalty, steps), color=color, marker=".")
            if penalty == "one_sided" and dtype != torch.float32:
                continue  # it has no default
            step = default_step(model, batch, penalty)
            axes.plot(step, errors(model, batch, penalty, [step]), "o", color=color, markersize=9, fillstyle="none")
        axes.set(xlabel="step, as a fraction of the embedding's norm")
        axes.minorticks_off()
    left, right = figure.axes
    left.set(ylabel="relative error of the\npenalty's gradient", ylim=(2e-5, 4))
    left.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01%", "0.1%", "1%", "10%", "100%"])
    label(left, 2e-2, 0.06, "one-sided:\ntwo passes", RED, ha="right")
    label(left, 1.1e-2, 1e-4, "central:\nthree passes", BLUE)
    label(right, 0.02, 6e-3, "ring: the step\ntaken by default", ha="right")
