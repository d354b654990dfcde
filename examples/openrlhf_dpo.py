"""KLDPO in OpenRLHF: its own DPO command with another loss, over all GPUs and all accumulation steps.

Takes the arguments of `openrlhf.cli.train_dpo`, save those of its loss (--model.beta, --model.label_smoothing,
--model.ipo_enable), which belong to the loss below.

    deepspeed examples/openrlhf_dpo.py \
        --model.model_name_or_path Qwen/Qwen3-0.6B --ref.model_name_or_path Qwen/Qwen3-0.6B \
        --data.dataset trl-lib/ultrafeedback_binarized --data.apply_chat_template \
        --train.batch_size 64 --train.micro_batch_size 4 --adam.lr 1e-6 --ckpt.output_dir runs/openrlhf
"""

from robustloss import KLDPOLoss
from robustloss.integrations import openrlhf

if __name__ == "__main__":
    openrlhf.train_dpo(KLDPOLoss(beta=0.1, tau=0.5))
