"""torch.export of log-probabilities, of losses, and of a model with its loss: the program computes the same, for other
sizes too, and can be trained."""

from __future__ import annotations

import pytest
import torch
from compiled_cases import VOCABULARY, WIDTH, Step, losses_of_logps, make_batch
from torch import nn
from torch.export import Dim, export

from robustloss import KLDPOLoss, linear_sequence_logps, sequence_logps

B, T = Dim("B", min=2, max=64), Dim("T", min=4, max=64)
STRICT = pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])


def labels_of(n_sequences, n_tokens):
    labels = torch.randint(VOCABULARY, (n_sequences, n_tokens))
    labels[:, 0] = labels[0, -1] = -100
    return labels


class FromLogits(nn.Module):
    def forward(self, logits, labels):
        return sequence_logps(logits, labels, shift=True, return_entropy=True)


class FromHidden(nn.Module):
    def __init__(self, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.requires_grad_(not frozen)

    def forward(self, hidden, labels):
        options = {"bias": self.head.bias, "softcap": 5.0, "logit_scale": 0.5}
        return linear_sequence_logps(self.first(hidden), self.head.weight, labels, shift=True, **options)


@STRICT
def test_logps_of_logits(strict):
    example = torch.randn(4, 6, VOCABULARY), labels_of(4, 6)
    program = export(FromLogits(), example, dynamic_shapes=({0: B, 1: T}, {0: B, 1: T}), strict=strict)
    for arguments in (example, (torch.randn(3, 9, VOCABULARY), labels_of(3, 9))):
        torch.testing.assert_close(program.module()(*arguments), FromLogits()(*arguments))


@pytest.mark.parametrize(
    ("strict", "frozen"),
    [(False, False), (True, False), (False, True)],
    ids=["trainable head", "trainable head, strict", "frozen head"],
)
def test_logps_of_hidden_states(strict, frozen):
    torch._dynamo.reset()  # strict export is traced by dynamo, which remembers what it has seen
    model = FromHidden(frozen)
    example = torch.randn(4, 6, WIDTH), labels_of(4, 6)
    program = export(model, example, dynamic_shapes=({0: B, 1: T}, {0: B, 1: T}), strict=strict)
    exported = program.module()
    for arguments in (example, (torch.randn(3, 9, WIDTH), labels_of(3, 9))):
        values = exported(*arguments), model(*arguments)
        torch.testing.assert_close(*values)
        for module, value in zip((exported, model), values, strict=True):
            module.zero_grad()
            value.sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(exported.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_exported_model_and_loss_are_saved_loaded_and_decomposed(tmp_path):
    step = Step(KLDPOLoss(tau=0.1)).requires_grad_(False)
    batch = make_batch(step.loss, 4, 6)
    program = export(step, batch, strict=False)
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    for each in (program, loaded, program.run_decompositions()):
        torch.testing.assert_close(each.module()(*batch), step(*batch))


class Called(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, logps, others):
        return self.loss(*logps, **others, return_metrics=True)


@pytest.mark.parametrize("loss", [loss.eval() for loss in losses_of_logps()], ids=str)
def test_a_loss_of_any_number_of_pairs(loss):
    """In evaluation, where a loss with a state leaves it as it is; strict tracing is torch.compile's."""

    def arguments(n):
        tokens, refs, others = make_batch(loss, n, 5)
        return [(-3 * ids.float()).mean(-1) for ids, _ in tokens] + list(refs), others

    logps, others = arguments(6)
    sizes = ([{0: B} for _ in logps], {name: {0: B} for name in others})
    exported = export(Called(loss), (logps, others), dynamic_shapes=sizes, strict=False).module()
    for n in (6, 9):
        torch.testing.assert_close(exported(*arguments(n)), Called(loss)(*arguments(n)))
