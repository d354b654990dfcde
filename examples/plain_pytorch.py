"""KLDPO in a loop of one's own: a batch of 32 pairs, of which memory holds 8 at a time.

The worst reweighting of a batch depends on all of its pairs, so the loss of a microbatch is another loss than that of
the batch. `GlobalBatch.step` computes the loss of the whole batch once and sends each microbatch its own gradient.

    python examples/plain_pytorch.py
    python examples/plain_pytorch.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --learning-rate 1e-6
"""

import tiny
import torch

from robustloss import GlobalBatch, KLDPOLoss, sequence_logps


def log_probabilities(model, batch):  # of the chosen and of the rejected completions, [pairs] each
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return sequence_logps(logits, batch["labels"], shift=True).chunk(2)  # chosen rows come first


def main(argv=None):
    parser = tiny.parser(__doc__)
    parser.add_argument(
        "--tau", type=float, default=0.3, help="temperature of the worst case: small looks at few pairs"
    )
    args = parser.parse_args(argv)
    model, tokenizer, rows = tiny.load(args.model, args.data)
    batches = tiny.make_batches(rows, tokenizer, args.microbatch)

    with torch.no_grad():  # the reference is the model as it was before training
        for batch in batches:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = log_probabilities(model, batch)

    # [start]
    loss = GlobalBatch(KLDPOLoss(beta=0.1, tau=args.tau))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    def arguments(batch):  # of the loss, by name; those of the policy carry the gradient
        chosen, rejected = log_probabilities(model, batch)
        reference = {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected, **reference}

    history = []
    for step, microbatches in enumerate(tiny.steps(batches, args.steps, tiny.accumulation(args, processes=1)), start=1):
        value, metrics = loss.step(microbatches, arguments, torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad()
        history.append(tiny.show(step, value, metrics))
    # [end]
    return history


if __name__ == "__main__":
    main()
