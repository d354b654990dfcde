"""Everything that is read before a model is loaded: rows, tokenizer, tokens, a held-out split, the order of batches."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustloss.losses import PreferenceLoss
from robustloss.train import data
from robustloss.train.config import InputError, RunConfig, check_data_kind, input_errors
from robustloss.train.engine import load_model_config, load_tokenizer


@dataclass(frozen=True)
class Inputs:
    tokenizer: Any
    examples: dict[str, list[Any]]  # by split
    collator: data.Collator

    def collate(self, split: str, rows: list[int], device: torch.device) -> dict[str, Tensor]:
        """The batch of these rows of a split, on the device."""
        batch = self.collator([(row, self.examples[split][row]) for row in rows])
        return {name: value.to(device) for name, value in batch.items()}


def load_inputs(config: RunConfig, loss: PreferenceLoss) -> Inputs:
    """Read and tokenise the data, and hold a part out where there is no split for evaluation.

    Raises:
        InputError: what is wrong, and in which file and line.
    """
    options = config.data
    sources = {"train": options.train, "eval": options.eval if options.eval is not None else options.train}
    with input_errors():
        given = {"train": options.train_split}
        if options.eval is not None:
            given["eval"] = options.eval_split
        rows = {split: data.load_rows(sources[split], part) for split, part in given.items()}
        if options.kind == "auto":
            for split in rows:
                found = data.detect_kind(rows[split], sources[split])
                check_data_kind(loss, found, f"data.{split} {sources[split]!r} holds")
        if options.eval is None:
            rows["train"], rows["eval"] = _hold_out(rows["train"], options.eval_fraction, config.seed)
        kind = "preference" if loss.paired else "unpaired"
        tokenizer = load_tokenizer(config.model)
        limits = {"max_length": options.max_length, "truncation": options.truncation}
        groups = getattr(loss, "groups", None)
        examples = {}
        for split, source in sources.items():
            examples[split] = data.tokenize_rows(
                rows[split],
                tokenizer,
                kind=kind,
                source=source,
                chat_template=config.model.chat_template,
                groups=groups,
                **limits,
            )
            matches_classes = loss.coupled and not loss.paired and split == "train"
            if matches_classes and len({example.desirable for example in examples[split]}) == 1:
                raise InputError(f"{source} holds one value of 'label' only, and this loss matches the two classes")
            if loss.needs_mismatched and examples[split]:
                try:
                    examples[split] = data.add_mismatched(examples[split], tokenizer, **limits)
                except ValueError as error:
                    held_out = split == "eval" and options.eval is None
                    remedy = "; raise data.eval_fraction or give data.eval" if held_out else ""
                    raise InputError(f"the {split} rows of {source}: {error}{remedy}") from error
        _check_fit(examples["train"] + examples["eval"], load_model_config(config.model))
    collator = data.Collator(data.pad_token_id(tokenizer), kind, mismatched=loss.needs_mismatched)
    return Inputs(tokenizer, examples, collator)


def _check_fit(examples: list[Any], model_config: Any) -> None:
    """Refuse tokens and lengths that the model has no embedding for (on a GPU they end as an unreadable CUDA error)."""
    sequences = [sequence for example in examples for sequence in example.sequences()]
    text_config = model_config.get_text_config()
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"data.max_length lets {longest} tokens through, but the model has {positions} positions; "
            f"set data.max_length={positions} or less"
        )
    largest = max(max(prompt + completion) for prompt, completion in sequences)
    if largest >= text_config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, but the model's vocabulary has {text_config.vocab_size}; "
            "is the tokenizer another model's?"
        )


def _hold_out(rows: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """A random part for evaluation, the same for the same seed; the others stay in their order."""
    count = math.ceil(fraction * len(rows))
    if count >= len(rows):
        raise InputError(
            f"data.eval_fraction {fraction:g} of {len(rows)} row(s) leaves none to train on; lower it or give data.eval"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:count])
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


@dataclass(frozen=True)
class BatchOrder:
    """Which rows each microbatch holds: a pure function of the seed, so that a resumed run needs no state for it.

    The rows are shuffled anew for each epoch, and the epochs follow each other as one stream that is cut into steps of
    `effective_batch`. So every optimizer step has its full batch, and the step at the end of an epoch takes its last
    rows from the next one. A step's rows are the same whatever the number of processes; they are dealt to the
    processes' microbatches as evenly as they go.

    Raises:
        InputError: a step has fewer rows than there are microbatches to fill.
    """

    rows: int
    effective_batch: int
    microbatch: int  # the most rows of one
    processes: int
    seed: int

    def __post_init__(self) -> None:
        if self.effective_batch < self.processes * self.accumulation:
            raise InputError(
                f"batch.effective_batch {self.effective_batch} cannot be dealt to {self.processes} processes in "
                f"microbatches of {self.microbatch}, {self.accumulation} each; use a multiple of {self.processes}"
            )

    @property
    def accumulation(self) -> int:
        """Microbatches of one process in a step."""
        return math.ceil(self.effective_batch / (self.processes * self.microbatch))

    def total_steps(self, epochs: float) -> int:
        return max(1, math.ceil(epochs * self.rows / self.effective_batch))

    def microbatch_rows(self, step: int, rank: int, microstep: int) -> list[int]:
        parts = self.processes * self.accumulation
        part = rank * self.accumulation + microstep  # in the order in which a global batch is gathered
        start, end = (step * self.effective_batch + bound * self.effective_batch // parts for bound in (part, part + 1))
        return [self._row(position) for position in range(start, end)]

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.rows)
        return _shuffled(self.rows, self.seed, epoch)[index]


@functools.lru_cache(maxsize=2)  # a microbatch spans two epochs at most, unless it is larger than the data
def _shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).tolist()
