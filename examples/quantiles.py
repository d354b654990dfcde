"""What a distribution-minded loss looks at: which pairs the worst case is made of, and where rewards fall short.

A few steps of plain DPO on pairs of which most prefer a long polite answer and some a single word. The mean is soon
small; the diagnostics show whom it leaves behind. Two files are written: `quantiles.png` and `worst_case.jsonl`.

    python examples/quantiles.py
    python examples/quantiles.py --model path/to/trained --reference path/to/base --data pairs.jsonl --steps 0
"""

from pathlib import Path

import tiny
import torch
from matplotlib import pyplot

from robustloss import DPOLoss, KLTilt, sequence_logps
from robustloss.diagnostics import dominance_violation, plot_quantile_curves, plot_worst_case, worst_case


def log_probabilities(model, batch):  # of the chosen and of the rejected completions, [pairs] each
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return sequence_logps(logits, batch["labels"], shift=True).chunk(2)  # chosen rows come first


def main(argv=None):
    parser = tiny.parser(__doc__, accumulates=False, batch=8)
    parser.add_argument("--reference", help="the model before training; --model itself where it is left out")
    parser.add_argument("--margin", type=float, default=1.0, help="by which chosen rewards are to exceed, in nats")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the two files")
    args = parser.parse_args(argv)
    model, tokenizer, rows = tiny.load(args.model, args.data)
    reference = tiny.load(args.reference, args.data)[0] if args.reference else model
    batches = tiny.make_batches(rows, tokenizer, args.batch)

    with torch.no_grad():
        references = [log_probabilities(reference, batch) for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    for step in range(args.steps):
        which = step % len(batches)
        DPOLoss(beta=0.1)(*log_probabilities(model, batches[which]), *references[which]).backward()
        optimizer.step()
        optimizer.zero_grad()

    # [start]
    with torch.no_grad():
        policies = [log_probabilities(model, batch) for batch in batches]
    policy = [torch.cat(side) for side in zip(*policies, strict=True)]  # chosen and rejected, [pairs] each
    reference = [torch.cat(side) for side in zip(*references, strict=True)]
    loss = DPOLoss(beta=0.1, reduction="none")
    losses = loss(*policy, *reference)
    chosen, rejected = map(loss.rewards, policy, reference)

    worst = worst_case(losses, KLTilt(rho=0.5))
    short = dominance_violation(chosen, rejected + args.margin)
    print(f"mean loss {losses.mean():.4f}; the worst case within 0.5 nats of the data: {worst.value:.4f}")
    print(f"it is made of {worst.effective_sample_size:.1f} of {len(rows)} pairs; the heaviest ask:")
    for i in worst.top(5).tolist():
        print(f"{worst.weights[i] * len(rows):5.2f} times its share: {rows[i].get('prompt')}")
    area, w1 = short.area, short.w1
    print(f"the quantiles of chosen rewards exceed the rejected's by {args.margin:g} nats, but at {area.estimate:.0%}")
    print(f"of the levels ({area.low:.0%} to {area.high:.0%}); {w1.estimate:.3f} nats are missing on average")

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = ("chosen", f"rejected + {args.margin:g}")
    plot_quantile_curves(chosen, rejected + args.margin, labels=labels, ax=left).set_ylabel("reward")
    plot_worst_case(worst, ax=right)
    figure.savefig(args.output / "quantiles.png")
    worst.to_jsonl(args.output / "worst_case.jsonl", texts=[str(row.get("prompt")) for row in rows])
    # [end]
    print(f"written: {args.output / 'quantiles.png'}, {args.output / 'worst_case.jsonl'}")
    pyplot.close(figure)
    return {"losses": losses, "rewards": (chosen, rejected), "worst": worst, "short": short, "rows": rows}


if __name__ == "__main__":
    main()
