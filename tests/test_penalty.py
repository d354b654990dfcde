"""Directional WDPO: first-order passes that have the gradient of exact WDPO, through models of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustloss import DPOLoss, WDPOLoss
from robustloss.penalty import computing_dtype, direction_error, directional_step

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent / "train"))

from tiny_models import tiny_gpt2, tiny_llama  # noqa: E402

from robustloss.train.loss_module import LossModule  # noqa: E402

BETA, RHO, PAIRS, TOKENS = 0.1, 0.1, 4, 24


def tiny_qwen2():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "vocab_size": 257, "max_position_embeddings": 128}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**options, tie_word_embeddings=True))


MODELS = {"gpt2": partial(tiny_gpt2, dropout=0.0), "llama": tiny_llama, "qwen2": tiny_qwen2}


def make_batch(model: nn.Module, seed: int = 1, pairs: int = PAIRS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (2 * pairs, TOKENS), generator=generator)
    labels = tokens.clone()
    labels[:, :6] = -100  # the prompt
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (2 * pairs, 1), generator=generator)
    attention_mask = (torch.arange(TOKENS) < lengths).long()
    labels[attention_mask == 0] = -100
    batch = {
        "input_ids": tokens,
        "attention_mask": attention_mask,
        "labels": labels,
        "index": torch.arange(pairs),
    }
    with torch.no_grad():
        logps = LossModule(model)(batch, output="logps")
    shift = 4 * torch.randn(pairs, generator=generator)
    return batch | {
        "ref_chosen_logps": logps["chosen_logps"].to(shift.dtype) - shift,
        "ref_rejected_logps": logps["rejected_logps"].to(shift.dtype),
    }


def arguments_at(module: LossModule, item, offset):
    """A microbatch is a batch, or (batch, weights)."""
    batch, weights = item if isinstance(item, tuple) else (item, None)
    arguments, embeddings = module.arguments_at(batch, offset)
    return arguments if weights is None else arguments | {"weights": weights}, embeddings


def gradients(model: nn.Module) -> Tensor:
    parts = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


def gradient_of_step(module: LossModule, microbatches, **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    value, metrics = directional_step(
        module.loss, microbatches, partial(arguments_at, module), Tensor.backward, **options
    )
    return gradients(module), value, metrics


def exact_gradient(model: nn.Module, items, rho: float = RHO, squared: bool = True) -> tuple[Tensor, Tensor]:
    """The gradient and the value of all microbatches' loss together, by double backward."""
    loss = WDPOLoss(BETA, rho, squared, penalty="exact")
    module = LossModule(model, loss)
    mass, total, squares = 0.0, 0.0, 0.0
    for item in items:
        arguments, embeddings = arguments_at(module, item, None)
        pc, pr, rc, rr, *given = arguments.values()
        weights = given[0] if given else torch.ones_like(pc)
        losses = loss.losses(pc, pr, rc, rr)
        (gradient,) = torch.autograd.grad(losses.sum(), embeddings, create_graph=True)
        chosen, rejected = gradient.square().flatten(1).sum(1).chunk(2)
        mass = mass + weights.sum()
        total = total + (weights * losses).sum()
        squares = squares + (weights * (chosen + rejected)).sum()
    value = total / mass + rho * (squares / mass if squared else (squares / mass).sqrt())
    value.backward()
    return gradients(model), value.detach()


def error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def penalty_error(name: str, dtype: torch.dtype, penalty: str) -> float:
    """The relative error of the penalty's own gradient in `dtype`, against double backward in float64."""
    model = MODELS[name]().to(dtype)
    precise = MODELS[name]().to(dtype).double()
    batch = make_batch(precise)
    precise.set_attn_implementation("eager")
    expected = exact_gradient(precise, [batch])[0] - exact_gradient(precise, [batch], rho=0.0)[0]
    module = LossModule(model, WDPOLoss(BETA, RHO, penalty=penalty))
    if penalty == "one_sided":
        gradient_of_step(module, [batch])  # the first step learns what to expect
    plain = LossModule(model, WDPOLoss(BETA, 0.0, penalty="exact"))
    model.set_attn_implementation("eager")
    plain(batch).backward()
    without = gradients(model)
    model.set_attn_implementation("sdpa")
    return error(gradient_of_step(module, [batch])[0] - without, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("dtype", "penalty", "bar"),
    [(torch.float32, "central", 0.01), (torch.float32, "one_sided", 0.01), (torch.bfloat16, "central", 0.05)],
    ids=["float32-central", "float32-one_sided", "bfloat16-central"],
)
def test_the_penaltys_gradient_is_within_its_bar(name, dtype, penalty, bar):
    assert penalty_error(name, dtype, penalty) < bar


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("precision", "penalty", "bar"),
    [
        ("float32", "central", 0.01),
        ("float32", "one_sided", 0.01),
        ("bfloat16", "central", 0.05),
        ("autocast", "central", 0.05),
    ],
)
def test_the_losss_gradient_is_within_its_bar_where_half_of_it_is_the_penaltys(name, precision, penalty, bar):
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model, precise = MODELS[name]().to(dtype), MODELS[name]().to(dtype).double()
    batch = make_batch(precise)
    precise.set_attn_implementation("eager")
    plain = exact_gradient(precise, [batch], rho=0.0)[0]
    rho = float(plain.norm() / (exact_gradient(precise, [batch], rho=1.0)[0] - plain).norm())
    expected = exact_gradient(precise, [batch], rho=rho)[0]
    module = LossModule(model, WDPOLoss(BETA, rho, penalty=penalty))

    def arguments(item, offset):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            return arguments_at(module, item, offset)

    options = {"dtype": torch.bfloat16} if precision == "autocast" else {}
    for _ in range(2 if penalty == "one_sided" else 1):  # its first step learns what to expect
        model.zero_grad()
        directional_step(module.loss, [batch], arguments, Tensor.backward, **options)
    assert error(gradients(model), expected) < bar


@pytest.mark.parametrize("autocast", [False, True])
def test_a_one_sided_difference_in_half_precision_wants_a_step(autocast):
    model = MODELS["llama"]().to(torch.float32 if autocast else torch.bfloat16)
    batch = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ValueError, match=r"'one_sided' has no good step in bfloat16, .* choose penalty 'central'"):
            gradient_of_step(LossModule(model, WDPOLoss(penalty="one_sided")), [batch])
        given = LossModule(model, WDPOLoss(penalty="one_sided", step=0.01))
        assert gradient_of_step(given, [batch])[0].isfinite().all()
        with torch.no_grad():  # where there is nothing to step for
            values = [LossModule(model, loss)(batch) for loss in (WDPOLoss(penalty="one_sided"), WDPOLoss())]
        assert torch.equal(*values)


def test_autocast_leaves_embeddings_in_float64_alone():
    assert computing_dtype(torch.float32, torch.bfloat16) == torch.bfloat16
    assert computing_dtype(torch.float64, torch.bfloat16) == torch.float64
    assert computing_dtype(torch.float32, None) == torch.float32


def test_under_autocast_the_first_step_measures_how_far_to_go():
    model = MODELS["llama"]()
    module = LossModule(model, WDPOLoss(BETA, RHO))
    batch = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(batch)
    loss.backward()
    assert 0.005 <= float(module.loss.measured_step) <= 0.1


WEIGHTED = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.3, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "rooted"])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_has_the_exact_gradient_of_all_microbatches_together(count, weighted, squared):
    model = MODELS["gpt2"]().double()
    items = [make_batch(model, seed) for seed in range(count)]
    if weighted:
        items = list(zip(items, WEIGHTED, strict=False))
    model.set_attn_implementation("eager")
    expected, value = exact_gradient(model, items, squared=squared)
    model.set_attn_implementation("sdpa")
    module = LossModule(model, WDPOLoss(BETA, RHO, squared, step=1e-4))
    ours, got, _ = gradient_of_step(module, items)
    assert error(ours, expected) < 1e-7
    torch.testing.assert_close(got, value, rtol=1e-9, atol=0)
    masses = [float(weights.sum()) for _, weights in items] if weighted else [PAIRS] * count
    known, _, _ = gradient_of_step(module, items, masses=masses)
    torch.testing.assert_close(known, ours, rtol=1e-9, atol=1e-12)

    one_sided = LossModule(model, WDPOLoss(BETA, RHO, squared, penalty="one_sided", step=1e-7))
    gradient_of_step(one_sided, items)
    ours, got, metrics = gradient_of_step(one_sided, items)
    assert error(ours, expected) < 1e-5
    torch.testing.assert_close(got, value, rtol=1e-9, atol=0)
    assert metrics["penalty/skipped"] == 0


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "rooted"])
@pytest.mark.parametrize("penalty", ["central", "one_sided"])
def test_one_loss_has_the_same_gradient_and_without_gradients_the_same_value(penalty, squared):
    model = MODELS["gpt2"]().double()
    batch = make_batch(model)
    model.set_attn_implementation("eager")
    expected, value = exact_gradient(model, [batch], squared=squared)
    step = {"central": 1e-4, "one_sided": 1e-7}[penalty]
    module = LossModule(model, WDPOLoss(BETA, RHO, squared, penalty=penalty, step=step))
    loss = module(batch)
    loss.backward()
    assert error(gradients(model), expected) < 1e-6
    torch.testing.assert_close(loss.detach(), value, rtol=1e-9, atol=0)
    module.eval()
    with torch.no_grad():
        evaluated = module(batch)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, value, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("penalty", "calls"), [("central", 3), ("one_sided", 2)])
@pytest.mark.parametrize("squared", [True, False])
def test_backward_is_called_as_often_as_the_loss_says_on_one_graph_at_a_time(penalty, calls, squared):
    model = MODELS["gpt2"]()
    module = LossModule(model, WDPOLoss(BETA, RHO, squared, penalty=penalty))
    alive, most, backwards = [0], [0], [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logps):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return logps.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive[0] -= 1
            return gradient

    def logps_fn(batch, offset):
        arguments, embeddings = module.arguments_at(batch, offset)
        if torch.is_grad_enabled():
            arguments["policy_chosen_logps"] = Counted.apply(arguments["policy_chosen_logps"])
        return arguments, embeddings

    def backward(value):
        backwards[0] += 1
        value.backward()

    directional_step(module.loss, [make_batch(model, seed) for seed in range(3)], logps_fn, backward)
    assert backwards[0] == 3 * calls == 3 * module.loss.backwards_per_microbatch
    assert most[0] == 1


def test_what_the_framework_divides_by_is_made_up_for():
    model = MODELS["gpt2"]().double()
    items = [make_batch(model, seed) for seed in range(2)]
    module = LossModule(model, WDPOLoss(BETA, RHO))
    expected, _, _ = gradient_of_step(module, items)
    directional_step(
        module.loss, items, partial(arguments_at, module), lambda value: (value / 6).backward(), divisor=6.0
    )
    torch.testing.assert_close(gradients(model), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("penalty", ["central", "one_sided"])
def test_a_radius_of_zero_is_plain_dpo(penalty):
    model = MODELS["gpt2"]().double()
    batch = make_batch(model)
    plain = LossModule(model, DPOLoss(BETA))(batch)
    plain.backward()
    expected = gradients(model)
    ours, value, _ = gradient_of_step(LossModule(model, WDPOLoss(BETA, 0.0, penalty=penalty)), [batch])
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(value, plain.detach())


@pytest.mark.parametrize("link", ["hinge", "ipo", "robust", "squared_hinge"])
def test_every_link_has_the_exact_gradient(link):
    model = MODELS["gpt2"]().double()
    batch = make_batch(model)
    model.set_attn_implementation("eager")
    options = {"link": link, **({"label_smoothing": 0.2} if link == "robust" else {})}
    LossModule(model, WDPOLoss(BETA, RHO, penalty="exact", **options))(batch).backward()
    expected = gradients(model)
    ours, _, _ = gradient_of_step(LossModule(model, WDPOLoss(BETA, RHO, step=1e-4, **options)), [batch])
    assert error(ours, expected) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_of_either_kind_changes_nothing(reentrant):
    model = tiny_gpt2(dropout=0.1).double()
    batch = make_batch(model.eval())
    module = LossModule(model.train(), WDPOLoss(BETA, RHO))
    torch.manual_seed(3)
    expected, _, _ = gradient_of_step(module, [batch])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(3)
    ours, _, _ = gradient_of_step(module, [batch])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-10)


def test_all_passes_share_their_dropout():
    """With a mask of its own each pass would differ by far more than the step makes it."""
    model = tiny_gpt2(dropout=0.1).double()
    batch = make_batch(model.eval())
    module = LossModule(model.train(), WDPOLoss(BETA, RHO, step=1e-4))
    model.set_attn_implementation("eager")
    torch.manual_seed(3)
    expected, _ = exact_gradient(model, [batch])
    torch.manual_seed(3)
    ours, _, _ = gradient_of_step(module, [batch])
    assert error(ours, expected) < 1e-6


def test_an_adapter_over_frozen_embeddings_has_the_exact_gradient():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama().double(), config).double()
    model.set_attn_implementation("eager")
    batch = make_batch(model)
    LossModule(model, WDPOLoss(BETA, RHO, penalty="exact"))(batch).backward()
    expected = gradients(model)
    ours, _, _ = gradient_of_step(LossModule(model, WDPOLoss(BETA, RHO, step=1e-3)), [batch])
    assert error(ours, expected) < 2e-3  # Llama's norms are float32


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "rooted"])
def test_padding_changes_neither_step_nor_gradient(squared):
    model = MODELS["gpt2"]().double()
    batch = make_batch(model)
    module = LossModule(model, WDPOLoss(BETA, RHO, squared, step=0.05))
    expected, _, _ = gradient_of_step(module, [batch])
    values = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    padded = {key: nn.functional.pad(batch[key], (0, 5), value=value) for key, value in values.items()}
    ours, _, _ = gradient_of_step(module, [batch | padded])
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-11)


def test_a_one_sided_loss_remembers_what_to_expect():
    model = MODELS["gpt2"]().double()
    batches = [make_batch(model, seed) for seed in range(2)]
    module = LossModule(model, WDPOLoss(BETA, RHO, penalty="one_sided"))
    plain = LossModule(model, DPOLoss(BETA))
    plain(batches[0]).backward()
    without = gradients(model)
    first, _, metrics = gradient_of_step(module, batches[:1])
    # The first microbatch of a training has no penalty, and all of its pairs are counted.
    torch.testing.assert_close(first, without, rtol=1e-8, atol=1e-12)
    assert metrics["penalty/skipped"] == PAIRS
    stretch, square = float(module.loss.stretch), float(module.loss.mean_square)
    assert stretch > 0
    assert square == pytest.approx(float(metrics["penalty/gradient_norm"]) ** 2)
    _, _, metrics = gradient_of_step(module, batches[1:])
    assert metrics["penalty/skipped"] == 0
    assert float(module.loss.stretch) != stretch
    assert float(module.loss.mean_square) == pytest.approx(
        0.9 * square + 0.1 * float(metrics["penalty/gradient_norm"]) ** 2
    )

    again = WDPOLoss(BETA, RHO, penalty="one_sided")
    again.load_state_dict(module.loss.state_dict())
    resumed, _, _ = gradient_of_step(LossModule(model, again.bfloat16()), batches[:1])
    expected, _, _ = gradient_of_step(module, batches[:1])
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def test_a_pair_that_the_running_means_put_off_has_the_plain_gradient_and_is_counted():
    model = MODELS["gpt2"]().double()
    batch = make_batch(model)
    module = LossModule(model, WDPOLoss(BETA, RHO, penalty="one_sided"))
    gradient_of_step(module, [batch])
    plain = LossModule(model, DPOLoss(BETA))
    plain(batch).backward()
    without = gradients(model)
    module.loss.stretch.mul_(30)
    ours, _, metrics = gradient_of_step(module, [batch])
    assert metrics["penalty/skipped"] == PAIRS
    torch.testing.assert_close(ours, without, rtol=1e-6, atol=1e-10)
    assert metrics["penalty/value"] > 0  # what is reported is exact all the same


def test_a_sequence_without_completion_has_no_penalty_and_no_nan():
    model = MODELS["gpt2"]().double()
    batch = make_batch(model)
    batch["labels"][0] = -100
    batch["labels"][1] = -100
    batch["labels"][1 + PAIRS] = -100
    ours, value, _ = gradient_of_step(LossModule(model, WDPOLoss(BETA, RHO, step=1e-4)), [batch])
    model.set_attn_implementation("eager")
    expected, exact = exact_gradient(model, [batch])
    assert error(ours, expected) < 1e-6
    torch.testing.assert_close(value, exact)


@pytest.mark.filterwarnings("ignore")
def test_in_half_precision_the_first_step_measures_how_far_to_go_and_keeps_it():
    model = MODELS["qwen2"]().bfloat16()
    batch = make_batch(model)
    module = LossModule(model, WDPOLoss(BETA, RHO))
    _, _, metrics = gradient_of_step(module, [batch])
    step = float(module.loss.measured_step)
    assert 0.005 <= step <= 0.1
    assert module.loss.relative_step(torch.bfloat16) == step
    assert metrics["penalty/slope_error"] < 0.03
    gradient_of_step(module, [make_batch(model, 2)])
    assert float(module.loss.measured_step) == step
    assert module.bfloat16().loss.measured_step.dtype == torch.float64


def test_the_slope_error_grows_with_the_square_of_the_step():
    model = MODELS["llama"]().double()
    batch = make_batch(model)
    errors = []
    for step in (0.05, 0.1):
        module = LossModule(model, WDPOLoss(BETA, RHO, step=step))
        errors.append(float(gradient_of_step(module, [batch])[2]["penalty/slope_error"]))
    assert errors[1] / errors[0] == pytest.approx(4, rel=0.15)


def test_the_direction_error_is_that_of_the_penaltys_gradient():
    model = MODELS["gpt2"]().double()
    batch = make_batch(model)
    model.set_attn_implementation("eager")
    expected = exact_gradient(model, [batch])[0] - exact_gradient(model, [batch], rho=0.0)[0]
    module = LossModule(model, WDPOLoss(BETA, RHO, step=0.1))
    ours = gradient_of_step(module, [batch])[0] - exact_gradient(model, [batch], rho=0.0)[0]
    assert direction_error(module, batch) == pytest.approx(error(ours, expected), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="SDPA"):
        direction_error(module, batch)
    with pytest.raises(ValueError, match="exact"):
        direction_error(LossModule(model, WDPOLoss(penalty="exact")), batch)


@pytest.mark.distributed
@pytest.mark.parametrize("squared", [True, False], ids=["squared", "rooted"])
def test_two_processes_with_ragged_microbatches_have_the_gradient_of_one(squared, tmp_path):
    worker = Path(__file__).with_name("penalty_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SQUARED": str(int(squared))}
    finished = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for key in ("value", "metrics"):
        torch.testing.assert_close(results[0][key], results[1][key], rtol=0, atol=0)
    alone = results[0]["alone"]
    torch.testing.assert_close(
        (results[0]["gradient"] + results[1]["gradient"]) / 2, alone["gradient"], rtol=1e-6, atol=1e-10
    )
    torch.testing.assert_close(results[0]["value"], alone["value"])
    torch.testing.assert_close(results[0]["metrics"], alone["metrics"])


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "rooted"])
def test_gradients_are_synchronised_in_the_last_pass_of_a_step_only(squared):
    apart, seen = [], []
    module = LossModule(MODELS["gpt2"]().double(), WDPOLoss(BETA, RHO, squared))

    @contextmanager
    def no_sync():
        apart.append(True)
        yield
        apart.pop()

    def watched(batch, offset):
        if torch.is_grad_enabled():
            seen.append(bool(apart))
        return arguments_at(module, batch, offset)

    def backward(scalar):
        seen.append(bool(apart))
        scalar.backward()

    batches = [make_batch(module.model, index) for index in range(2)]
    directional_step(module.loss, batches, watched, backward, no_sync=no_sync)
    # Forward and backward of each pass.
    assert seen == (2 * 2 * module.loss.backwards_per_microbatch - 2) * [True] + [False, False]


class _OnlyLogps(torch.autograd.Function):
    """Both leave, as of a compiled model, but no gradient comes by the embeddings."""

    @staticmethod
    def forward(ctx, logps, embeddings):
        ctx.set_materialize_grads(False)
        return logps.clone(), embeddings.clone()

    @staticmethod
    def backward(ctx, logps, embeddings):
        return logps, embeddings


def test_what_does_not_fit_is_refused():
    model = MODELS["gpt2"]()
    batch = make_batch(model)
    module = LossModule(model, WDPOLoss())
    with pytest.raises(ValueError, match="penalty 'exact' has no directions"):
        directional_step(WDPOLoss(penalty="exact"), [batch], module.arguments_at, Tensor.backward)

    def detached(batch, offset):
        arguments, embeddings = module.arguments_at(batch, offset)
        return arguments, embeddings.detach().requires_grad_()

    with pytest.raises(ValueError, match="embeddings must be part of the graph"):
        directional_step(module.loss, [batch], detached, Tensor.backward)

    def leaves_only(batch, offset):
        arguments, embeddings = module.arguments_at(batch, offset)
        logps = arguments["policy_chosen_logps"]
        arguments["policy_chosen_logps"], embeddings = _OnlyLogps.apply(logps, embeddings)
        return arguments, embeddings

    with pytest.raises(ValueError, match="embeddings must be part of the graph"):
        directional_step(module.loss, [batch], leaves_only, Tensor.backward)

    def too_few(batch, offset):
        arguments, embeddings = module.arguments_at(batch, offset)
        return arguments, embeddings[1:]

    with pytest.raises(ValueError, match=rf"embeddings must be \[{2 * PAIRS}, tokens, hidden\]"):
        directional_step(module.loss, [batch], too_few, Tensor.backward)
    with pytest.raises(ValueError, match=r"penalty='central'\) needs the model.*directional_step"):
        WDPOLoss()(*(torch.zeros(2) for _ in range(4)), embeddings=torch.zeros(4, 3, 2, requires_grad=True))
    with pytest.raises(ValueError, match="penalty must be"):
        WDPOLoss(penalty="both")
    with pytest.raises(ValueError, match="step must be > 0"):
        WDPOLoss(step=0.0)
    with pytest.raises(ValueError, match=r"step .*'exact'"):
        WDPOLoss(penalty="exact", step=0.1)
