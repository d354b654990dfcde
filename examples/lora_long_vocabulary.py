"""LoRA on a model with a vocabulary of 65536: the logits are never held.

Under LoRA the output head is frozen. `linear_sequence_logps` takes the last hidden states and the head's weight, and
makes the logits a tile at a time; the gradient of the hidden states comes out of the same pass, and nothing is computed
again in the backward. The reference is the base model: the same weights with the adapter switched off. (Models that cap
or scale their logits, as Gemma and Cohere do, need `softcap=` or `logit_scale=` too; `LossModule` knows them.)

    python examples/lora_long_vocabulary.py
    python examples/lora_long_vocabulary.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --learning-rate 1e-5
"""

import tiny
import torch
from peft import LoraConfig, get_peft_model

from robustloss import KLDPOLoss, linear_sequence_logps, sequence_logps


# [start]
def log_probabilities(policy, batch):  # of the chosen and of the rejected completions, [pairs] each
    model = policy.get_base_model()  # the adapter is in its layers
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return linear_sequence_logps(hidden, head.weight, batch["labels"], bias=head.bias, shift=True).chunk(2)


# [end]


def log_probabilities_through_logits(policy, batch):  # the same numbers, for comparison
    logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return sequence_logps(logits, batch["labels"], shift=True).chunk(2)


def main(argv=None):
    args = tiny.parser(__doc__, accumulates=False, batch=8, steps=6, learning_rate=1e-2).parse_args(argv)
    model, tokenizer, rows = tiny.load(args.model, args.data, vocabulary=65536)
    policy = get_peft_model(
        model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    )
    batches = tiny.make_batches(rows, tokenizer, args.batch)
    loss = KLDPOLoss(beta=0.1, tau=0.3)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)

    def gradients(log_probabilities, batch):
        with torch.no_grad(), policy.disable_adapter():
            reference = log_probabilities(policy, batch)
        value, metrics = loss(*log_probabilities(policy, batch), *reference, return_metrics=True)
        value.backward()
        return value.item(), metrics

    compared = {}
    for way in (log_probabilities, log_probabilities_through_logits):
        _, memory = tiny.peak_memory(lambda way=way: gradients(way, batches[0]))
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in trained]).item()
        optimizer.zero_grad()
        compared[way.__name__] = {"memory": memory, "gradient_norm": norm}
        print(f"{way.__name__}: {memory:.0f} MiB beyond the weights, gradient norm {norm:.6f}")
    logits = batches[0]["labels"].numel() * model.config.vocab_size * 4 / 2**20
    print(f"one copy of the logits in float32 would be {logits:.0f} MiB")

    history = []
    for step, (batch,) in enumerate(tiny.steps(batches, args.steps, 1), start=1):
        value, metrics = gradients(log_probabilities, batch)
        optimizer.step()
        optimizer.zero_grad()
        history.append(tiny.show(step, value, metrics))
    return {"history": history, "compared": compared, "logits": logits}


if __name__ == "__main__":
    main()
