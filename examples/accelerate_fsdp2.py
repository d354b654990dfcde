"""KLDPO with Accelerate and FSDP2: model, gradients and optimizer in shards, the loss of all processes' pairs.

The output head is a shard too. FSDP2 gathers it for the duration of the wrapped module's forward, so whatever reads the
head belongs in there: `LossModule` is that module, and its log-probabilities never hold [tokens, vocabulary] logits.
Taken outside, the weight would be this process's part of the vocabulary.

    torchrun --nproc_per_node 2 examples/accelerate_fsdp2.py
    accelerate launch --num_processes 8 examples/accelerate_fsdp2.py --model Qwen/Qwen3-0.6B --data pairs.jsonl \
        --learning-rate 1e-6 --batch 64
"""

import tiny
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

from robustloss import GlobalBatch, KLDPOLoss
from robustloss.train import LossModule


def main(argv=None):
    args = tiny.parser(__doc__).parse_args(argv)
    model, tokenizer, rows = tiny.load(args.model, args.data)
    layer = type(model.get_decoder().layers[0]).__name__
    sharding = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[layer]
    )
    accelerator = Accelerator(fsdp_plugin=sharding, cpu=not torch.cuda.is_available())
    if accelerator.device.type == "cpu" and accelerator.num_processes > 1:  # where Accelerate alone does not shard
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = sharding
    rank, processes = accelerator.process_index, accelerator.num_processes
    batches = tiny.make_batches(rows, tokenizer, args.microbatch)[rank::processes]  # this process's share

    # [start]
    loss = GlobalBatch(KLDPOLoss(beta=0.1, tau=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    policy, optimizer = accelerator.prepare(LossModule(model, loss.loss), optimizer)
    accelerator.gradient_accumulation_steps = tiny.accumulation(args, processes)

    with torch.no_grad():  # the reference is the model as it was before training
        for batch in batches:
            logps = policy(batch, output="logps")
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps["chosen_logps"], logps["rejected_logps"]

    def arguments(batch):  # of the loss, by name; those of the policy carry the gradient
        logps = policy(batch, output="logps")
        reference = {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return {**{f"policy_{name}": value for name, value in logps.items()}, **reference}

    history = []
    divisor = accelerator.gradient_accumulation_steps  # accelerator.backward divides by it
    for step, microbatches in enumerate(tiny.steps(batches, args.steps, divisor), start=1):
        value, metrics = loss.step(microbatches, arguments, accelerator.backward, divisor=divisor)
        optimizer.step()
        optimizer.zero_grad()
        history.append(tiny.show(step, value, metrics))
    # [end]
    accelerator.end_training()
    return history


if __name__ == "__main__":
    main()
