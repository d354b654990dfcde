"""KLDPO in Hugging Face's Trainer: its loop, logging, checkpoints and accelerators, and the loss of the whole batch.

`GlobalBatchMixin` looks at all microbatches of an optimizer step, of all processes, before the first is trained.

    python examples/transformers_trainer.py
    torchrun --nproc_per_node 8 examples/transformers_trainer.py --model Qwen/Qwen3-0.6B --data pairs.jsonl \
        --learning-rate 1e-6 --batch 64
"""

import tiny
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from robustloss import KLDPOLoss, sequence_logps
from robustloss.integrations.transformers import GlobalBatchMixin


def log_probabilities(model, batch):  # of the chosen and of the rejected completions, [pairs] each
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return sequence_logps(logits, batch["labels"], shift=True).chunk(2)  # chosen rows come first


# [start]
class PreferenceTrainer(GlobalBatchMixin, Trainer):
    def loss_arguments(self, model, inputs):  # by name; those of the policy carry the gradient
        chosen, rejected = log_probabilities(model, inputs)
        reference = {name: inputs[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected, **reference}


# [end]
def main(argv=None):
    args = tiny.trainer_parser(__doc__).parse_args(argv)
    model, tokenizer, rows = tiny.load(args.model, args.data)
    collate = tiny.collator(tokenizer)

    with torch.no_grad():  # the reference is the model as it was before training
        batches = tiny.make_batches(rows, tokenizer, args.microbatch)
        every = [torch.stack(log_probabilities(model, batch)).cpu() for batch in batches]
        chosen, rejected = torch.cat(every, dim=1)

    def with_reference(items):
        batch = collate(items)
        index = batch["index"]
        return {**batch, "ref_chosen_logps": chosen[index], "ref_rejected_logps": rejected[index]}

    settings = TrainingArguments(**tiny.trainer_settings(args), remove_unused_columns=False)
    trainer = PreferenceTrainer(
        model,
        settings,
        train_dataset=tiny.make_items(rows, tokenizer),
        data_collator=with_reference,
        loss=KLDPOLoss(beta=0.1, tau=0.3),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return tiny.show_history(trainer)


if __name__ == "__main__":
    main()
