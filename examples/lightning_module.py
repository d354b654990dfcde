"""KLDPO in a LightningModule: automatic optimisation for one microbatch a step, manual optimisation for several.

Lightning's own `accumulate_grad_batches` would add up losses of microbatches, which is another loss than that of the
batch. So the data loader gives the pairs of a whole step here, and `GlobalBatch.step` accumulates. With several
processes both ways give the loss of all processes' pairs.

    python examples/lightning_module.py
    python examples/lightning_module.py --microbatch 32   # one microbatch: automatic optimisation
    python examples/lightning_module.py --devices 8 --batch 64 --model Qwen/Qwen3-0.6B --data pairs.jsonl \
        --learning-rate 1e-6
"""

import lightning
import tiny
import torch

from robustloss import GlobalBatch, KLDPOLoss, sequence_logps


# [start]
class KLDPO(lightning.LightningModule):
    """Each batch is the list of a step's microbatches."""

    def __init__(self, model, learning_rate, accumulation):
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        self.loss = GlobalBatch(KLDPOLoss(beta=0.1, tau=0.3))
        self.automatic_optimization = accumulation == 1
        self.history = []

    def log_probabilities(self, batch):  # of the chosen and of the rejected completions, [pairs] each
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return sequence_logps(logits, batch["labels"], shift=True).chunk(2)  # chosen rows come first

    def arguments(self, batch):  # of the loss, by name; those of the policy carry the gradient
        chosen, rejected = self.log_probabilities(batch)
        reference = {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected, **reference}

    def training_step(self, microbatches):
        if self.automatic_optimization:
            value, metrics = self.loss(**self.arguments(microbatches[0]), return_metrics=True)
        else:
            value, metrics = self.loss.step(microbatches, self.arguments, self.manual_backward)
            self.optimizers().step()
            self.optimizers().zero_grad()
        self.log("loss", value.detach())
        self.history.append(tiny.show(len(self.history) + 1, value.detach(), metrics))
        return value

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


# [end]


def main(argv=None):
    parser = tiny.parser(__doc__)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args(argv)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    # Lightning's own sampler would shuffle.
    trainer = lightning.Trainer(max_epochs=1, devices=args.devices, use_distributed_sampler=False, **quiet)
    model, tokenizer, rows = tiny.load(args.model, args.data)
    batches = tiny.make_batches(rows, tokenizer, args.microbatch)[trainer.global_rank :: trainer.world_size]
    accumulation = tiny.accumulation(args, trainer.world_size)
    module = KLDPO(model, args.learning_rate, accumulation)

    with torch.no_grad():  # the reference is the model as it was before training
        for batch in batches:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = module.log_probabilities(batch)

    steps = tiny.steps(batches, args.steps, accumulation)
    trainer.fit(module, torch.utils.data.DataLoader(steps, batch_size=None))
    return module.history


if __name__ == "__main__":
    main()
