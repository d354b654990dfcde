"""KLDPO in TRL's DPOTrainer: everything is TRL's but the loss, which is that of the whole batch.

TRL's own losses are those of one microbatch of one process, which for a worst case or a sort is another loss.

    python examples/trl_dpo.py
    accelerate launch examples/trl_dpo.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --learning-rate 1e-6 --batch 64
"""

import copy

import tiny
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig

from robustloss import KLDPOLoss
from robustloss.integrations.trl import RobustDPOTrainer


def main(argv=None):
    args = tiny.trainer_parser(__doc__).parse_args(argv)
    model, tokenizer, rows = tiny.load(args.model, args.data)
    config = DPOConfig(**tiny.trainer_settings(args))
    columns = ("prompt", "chosen", "rejected")
    dataset = Dataset.from_list([{name: row[name] for name in columns if name in row} for row in rows])

    # [start]
    loss = KLDPOLoss(beta=0.1, tau=0.3)
    trainer = RobustDPOTrainer(
        model, copy.deepcopy(model), config, train_dataset=dataset, processing_class=tokenizer, loss=loss
    )
    # [end]
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return tiny.show_history(trainer)


if __name__ == "__main__":
    main()
