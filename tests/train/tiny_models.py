"""Random models of a few thousand weights and a byte-level tokenizer, built offline as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

POSITIONS = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and an end token; no merges, nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "</s>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_gpt2(*, tied: bool = True, dropout: float = 0.1, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=257,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=tied,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=256,
    )
    return GPT2LMHeadModel(config)


def tiny_llama(*, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        max_position_embeddings=POSITIONS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=256,
    )
    return LlamaForCausalLM(config)


def save_tiny(folder: Path, model: PreTrainedModel) -> str:
    """The folder of the model and its tokenizer, as a `model.name_or_path`."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


WORDS = (
    "ant",
    "bee",
    "cat",
    "dog",
    "elk",
    "fox",
    "gnu",
    "hen",
    "ibis",
    "jay",
    "kite",
    "lark",
    "mole",
    "newt",
    "orca",
    "puma",
)


def pair_rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": f"a {word}?", "chosen": f" yes, {word}" + "!" * (index % 3), "rejected": f" no {word[::-1]}"}
        for index, word in enumerate(WORDS[:count])
    ]


def unpaired_rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"a {word}?",
            "completion": f" yes, {word}" if index % 2 else f" no {word}",
            "label": bool(index % 2),
        }
        for index, word in enumerate(WORDS[:count])
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
