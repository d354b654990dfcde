"""WDPO in a DeepSpeed engine and outside of one, for every ZeRO stage, in one process; started by test_wdpo_engine.py.

python directional_worker.py FILE   (what the tests ask about is written to FILE, as JSON)
"""

from __future__ import annotations

import json
import sys
import traceback

import torch
from tiny_models import tiny_llama

from robustloss import WDPOLoss
from robustloss.functional import sequence_logps
from robustloss.penalty import check_double_backward, directional_step
from robustloss.train import distributed
from robustloss.train.loss_module import LossModule

BETA, RHO, PAIRS = 0.5, 0.005, 3


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(257, (2 * PAIRS, 10), generator=generator)
    reference = -50 + torch.randn(2, PAIRS, generator=generator)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
        "index": torch.arange(PAIRS),
    }


BATCHES = [make_batch(seed) for seed in (1, 2)]


def model(attention: str = "sdpa"):
    model = tiny_llama()
    model.set_attn_implementation(attention)
    for parameter in model.parameters():  # so that the penalty is no rounding error beside the loss
        parameter.data.mul_(2)
    return model


def engine_of(module: torch.nn.Module, stage: int, accumulation: int):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": PAIRS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with distributed.quiet_stdout():
        return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def weights_of(engine) -> torch.Tensor:
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        return torch.cat([parameter.detach().double().flatten() for parameter in parameters])


def gradient_in(engine, train) -> torch.Tensor:
    """What one step of SGD with learning rate 1 takes off the weights."""
    before = weights_of(engine)
    train(lambda value: (engine.backward(value), engine.step()))
    return before - weights_of(engine)


def exact_gradient(penalised: bool = True) -> torch.Tensor:
    """Of the mean over all batches, by double backward in float64."""
    module = LossModule(model("eager").double(), WDPOLoss(BETA, RHO if penalised else 0.0, penalty="exact"))
    for batch in BATCHES:
        (module(batch) / len(BATCHES)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def error(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    return float((gradient - expected).norm() / expected.norm())


def attempt(action):
    try:
        return action()
    except Exception:
        return traceback.format_exc()


def directional(stage: int, penalty: str) -> dict:
    loss = WDPOLoss(BETA, RHO, penalty=penalty)
    engine = engine_of(LossModule(model(), loss), stage, loss.backwards_per_microbatch * len(BATCHES))
    values = []

    def train(backward):
        def logps_fn(batch, offset):
            logps = engine(batch, output="logps", embedding_offset=offset)
            arguments = {f"policy_{name}": value for name, value in logps.items()}
            references = {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
            return arguments | references, engine.module.embeddings

        values.append(directional_step(loss, BATCHES, logps_fn, backward, divisor=engine.gradient_accumulation_steps()))

    if penalty == "one_sided":  # its first microbatch has no penalty, so it knows what to expect from before
        loss.stretch.fill_(STRETCH)
        loss.mean_square.fill_(1.0)
    engine.eval()
    with torch.no_grad():
        evaluated = float(engine(BATCHES[0]))
    engine.train()
    gradient = gradient_in(engine, train)
    return {
        "error": error(gradient, exact_gradient()),
        "value": float(values[0][0]),
        "evaluated": evaluated,
        "skipped": float(values[0][1].get("penalty/skipped", 0)),
    }


def as_one_loss(stage: int, penalty: str) -> dict:
    attention = "eager" if penalty == "exact" else "sdpa"
    engine = engine_of(LossModule(model(attention), WDPOLoss(BETA, RHO, penalty=penalty)), stage, len(BATCHES))
    refused = attempt(lambda: check_double_backward(engine)) if penalty == "exact" else None

    def train(backward):
        for batch in BATCHES:
            backward(engine(batch))

    trained = attempt(lambda: error(gradient_in(engine, train), exact_gradient()))
    return {"refused": refused, "trained": trained}


def outside(stage: int) -> dict:
    """Exact WDPO on the outputs of an engine that holds the model alone."""
    engine = engine_of(model("eager"), stage, len(BATCHES))
    refused = attempt(lambda: check_double_backward(engine))
    loss = WDPOLoss(BETA, RHO, penalty="exact")

    def train(backward):
        for batch in BATCHES:
            embeddings = engine.module.get_input_embeddings()(batch["input_ids"])
            logits = engine(inputs_embeds=embeddings, use_cache=False).logits
            logps = sequence_logps(logits, batch["labels"], shift=True).chunk(2)
            backward(loss(*logps, batch["ref_chosen_logps"], batch["ref_rejected_logps"], embeddings=embeddings))

    trained = attempt(lambda: error(gradient_in(engine, train), exact_gradient()))
    return {"refused": refused, "trained": trained}


def stretch_of_a_step() -> float:
    loss = WDPOLoss(BETA, RHO, penalty="one_sided")
    module = LossModule(model(), loss)
    directional_step(loss, BATCHES, module.arguments_at, torch.Tensor.backward)
    return float(loss.stretch)


STRETCH = stretch_of_a_step()


def main(file: str) -> None:
    torch.set_num_threads(1)
    distributed.start()
    results: dict = {"without penalty": error(exact_gradient(penalised=False), exact_gradient())}
    exact = LossModule(model("eager").double(), WDPOLoss(BETA, RHO, penalty="exact"))
    results["values"] = [float(exact(batch).detach()) for batch in BATCHES]
    for stage in range(4):
        for penalty in ("central", "one_sided"):
            results[f"directional {stage} {penalty}"] = attempt(lambda s=stage, p=penalty: directional(s, p))
        results[f"one loss {stage} central"] = attempt(lambda s=stage: as_one_loss(s, "central"))
        results[f"one loss {stage} exact"] = attempt(lambda s=stage: as_one_loss(s, "exact"))
        results[f"outside {stage}"] = attempt(lambda s=stage: outside(s))
    with open(file, "w") as out:
        json.dump(results, out, indent=1)
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1])
