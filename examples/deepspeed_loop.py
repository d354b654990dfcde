"""KLDPO in a hand-written DeepSpeed loop: ZeRO's shards of the model, the loss of all processes' pairs.

`LossModule` is what DeepSpeed wraps: a model and a loss, whose output head never holds [tokens, vocabulary] logits.
`robustloss train` is this loop with checkpoints, evaluation and a report.

    python examples/deepspeed_loop.py
    torchrun --nproc_per_node 8 examples/deepspeed_loop.py --zero-stage 3 --model Qwen/Qwen3-0.6B --data pairs.jsonl \
        --learning-rate 1e-6 --batch 64
"""

import deepspeed
import tiny
import torch
import torch.distributed as dist

from robustloss import GlobalBatch, KLDPOLoss
from robustloss.train import LossModule
from robustloss.train.distributed import start, stop


def main(argv=None):
    parser = tiny.parser(__doc__)
    parser.add_argument("--zero-stage", type=int, default=2, choices=range(4))
    parser.add_argument("--local_rank", help="which the launcher `deepspeed` passes")
    args = parser.parse_args(argv)
    _, began = start()  # deepspeed.init_distributed, for a plain `python` and on CPUs too
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, tokenizer, rows = tiny.load(args.model, args.data)
    batches = tiny.make_batches(rows, tokenizer, args.microbatch)[rank::processes]  # this process's share

    # [start]
    loss = GlobalBatch(KLDPOLoss(beta=0.1, tau=0.3))
    accumulation = tiny.accumulation(args, processes)
    config = {
        "train_micro_batch_size_per_gpu": args.microbatch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # 1.0 where it is not written
        "zero_optimization": {"stage": args.zero_stage},
        "steps_per_print": None,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    engine, *_ = deepspeed.initialize(model=LossModule(model, loss.loss), optimizer=optimizer, config=config)

    with torch.no_grad():  # the reference is the model as it was before training
        for batch in batches:
            logps = engine(batch, output="logps")
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps["chosen_logps"], logps["rejected_logps"]

    def arguments(batch):  # of the loss, by name; those of the policy carry the gradient
        logps = engine(batch, output="logps")
        reference = {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return {**{f"policy_{name}": value for name, value in logps.items()}, **reference}

    def backward(value):  # DeepSpeed counts microbatches by calls of step, and updates the weights at the last
        engine.backward(value)
        engine.step()

    history = []
    for step, microbatches in enumerate(tiny.steps(batches, args.steps, accumulation), start=1):
        # engine.backward divides by the accumulation steps, hence the divisor.
        value, metrics = loss.step(microbatches, arguments, backward, divisor=accumulation)
        history.append(tiny.show(step, value, metrics))
    # [end]
    if began:
        stop()
    return history


if __name__ == "__main__":
    main()
