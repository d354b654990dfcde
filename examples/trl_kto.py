"""AOT or KTO in TRL's KTOTrainer: completions that are called good or bad, each on its own.

AOT sorts the rewards of the good and of the bad completions of the whole batch, however many of each there are, so it
needs no pairs, and a microbatch may hold one kind only.

    python examples/trl_kto.py
    python examples/trl_kto.py --loss kto
    accelerate launch examples/trl_kto.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --learning-rate 1e-6 --batch 64
"""

import copy

import tiny
from datasets import Dataset
from transformers import PrinterCallback
from trl import KTOConfig

from robustloss import LOSSES
from robustloss.integrations.trl import RobustKTOTrainer


def main(argv=None):
    parser = tiny.trainer_parser(__doc__)
    parser.add_argument("--loss", default="aot_unpaired", choices=("aot_unpaired", "kto"))
    args = parser.parse_args(argv)
    model, tokenizer, rows = tiny.load(args.model, args.data)
    config = KTOConfig(**tiny.trainer_settings(args))
    completions = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    dataset = Dataset.from_list(completions)

    # [start]
    loss = LOSSES[args.loss](beta=0.1)  # AOTUnpairedLoss or KTOLoss
    trainer = RobustKTOTrainer(
        model, copy.deepcopy(model), config, train_dataset=dataset, processing_class=tokenizer, loss=loss
    )
    # [end]
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return tiny.show_history(trainer)


if __name__ == "__main__":
    main()
