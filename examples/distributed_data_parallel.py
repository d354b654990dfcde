"""KLDPO under DistributedDataParallel: the same 32 pairs a step, shared by all processes, and the same result.

Every process computes the log-probabilities of its own pairs, the loss is that of all of them, and the mean of the
processes' gradients, which DistributedDataParallel takes, is the gradient of the one giant batch.

    torchrun --nproc_per_node 2 examples/distributed_data_parallel.py
    torchrun --nproc_per_node 8 examples/distributed_data_parallel.py --model Qwen/Qwen3-0.6B --data pairs.jsonl \
        --learning-rate 1e-6 --batch 64
"""

import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from robustloss import GlobalBatch, KLDPOLoss, sequence_logps


def log_probabilities(model, batch):  # of the chosen and of the rejected completions, [pairs] each
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return sequence_logps(logits, batch["labels"], shift=True).chunk(2)  # chosen rows come first


def main(argv=None):
    args = tiny.parser(__doc__).parse_args(argv)
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, tokenizer, rows = tiny.load(args.model, args.data)
    batches = tiny.make_batches(rows, tokenizer, args.microbatch)[rank::processes]  # this process's share

    with torch.no_grad():  # the reference is the model as it was before training
        for batch in batches:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = log_probabilities(model, batch)

    # [start]
    policy = DistributedDataParallel(model)
    loss = GlobalBatch(KLDPOLoss(beta=0.1, tau=0.3))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)

    def arguments(batch):  # of the loss, by name; those of the policy carry the gradient
        chosen, rejected = log_probabilities(policy, batch)
        reference = {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected, **reference}

    history = []
    accumulation = tiny.accumulation(args, processes)
    for step, microbatches in enumerate(tiny.steps(batches, args.steps, accumulation), start=1):
        # Gradients are averaged over the processes in the last microbatch only.
        value, metrics = loss.step(microbatches, arguments, torch.Tensor.backward, no_sync=policy.no_sync)
        optimizer.step()
        optimizer.zero_grad()
        history.append(tiny.show(step, value, metrics))
    # [end]
    if began:
        dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
