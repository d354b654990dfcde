"""From rows of preference data to padded batches of tokens.

Two kinds, as TRL defines them: preference (prompt, chosen, rejected) and unpaired (prompt, completion, label).
`rows.py` reads them, `texts.py` writes them out as texts, and here they become tokens and batches.

The prompt is tokenised as generation would see it, then prompt and completion together; the completion's tokens are
what is left behind the prompt's. Where a token would span the border, the completion is tokenised on its own instead,
so that the prompt's tokens are the same for chosen and rejected. A text prompt begins with the beginning token if the
tokenizer adds one (a chat template writes its own). A completion ends with the end token if the tokenizer has one. The
first completion token is predicted from the last prompt token, so an empty prompt becomes the beginning token or,
where there is none, the end token.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustloss.train.rows import detect_kind, load_rows
from robustloss.train.texts import COMPLETIONS, RowTexts, render_plain, row_texts, shorten
from robustloss.validation import check_choice

__all__ = [
    "Collator",
    "Example",
    "PreferenceExample",
    "UnpairedExample",
    "add_mismatched",
    "detect_kind",
    "fingerprint",
    "load_rows",
    "pad_token_id",
    "tokenize_rows",
]

logger = logging.getLogger(__name__)

TRUNCATIONS = ("prompt", "end")
IGNORE_INDEX = -100
# Rows tokenised per call: enough to keep a fast tokenizer's threads busy, few enough to bound the lists it returns.
TOKENIZE_ROWS = 1024


@dataclass(frozen=True)
class PreferenceExample:
    """Token ids of one pair, as 32-bit arrays (a list of Python integers takes ten times the memory)."""

    prompt_ids: array[int]
    chosen_ids: array[int]
    rejected_ids: array[int]
    group: int | None = None  # for losses of groups

    def sequences(self) -> list[tuple[array[int], array[int]]]:
        """Every (prompt, completion) that the model will see."""
        return [(self.prompt_ids, self.chosen_ids), (self.prompt_ids, self.rejected_ids)]


@dataclass(frozen=True)
class UnpairedExample:
    """Token ids of one judged completion; `mismatched` is (prompt, completion) where `add_mismatched` has filled it."""

    prompt_ids: array[int]
    completion_ids: array[int]
    desirable: bool
    mismatched: tuple[array[int], array[int]] | None = None

    def sequences(self) -> list[tuple[array[int], array[int]]]:
        """Every (prompt, completion) that the model will see, the mismatched one included."""
        own = (self.prompt_ids, self.completion_ids)
        return [own] if self.mismatched is None else [own, self.mismatched]


Example = PreferenceExample | UnpairedExample


def tokenize_rows(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    kind: str,
    max_length: int,
    truncation: str = "prompt",
    source: str,
    chat_template: str | None = None,
    groups: int | None = None,
) -> list[Example]:
    """Check and tokenise every row.

    Args:
        rows: what `load_rows` returns, or plain dictionaries.
        tokenizer: a Hugging Face tokenizer.
        kind: "preference" or "unpaired".
        max_length: most tokens of prompt and completion together, at least 2.
        truncation: what a too long row loses. "prompt": the beginning of its prompt (a beginning token stays; at
            least one token is kept), then, only where a completion alone is too long, the completion's end. A
            preference row's prompt is cut to the longer completion's need, for both sides must answer the same
            prompt. "end": the end of the completion.
        source: where the rows came from, for messages about rows that do not know their own location.
        chat_template: Jinja text used in place of the tokenizer's own template.
        groups: how many groups the column 'group' of preference data counts, from 0; None: it is let alone.

    Raises:
        ValueError: `<file>:<line>: column ...: got ..., want ...` for a bad row; a row with no completion token left.
    """
    check_choice("data.kind", kind, tuple(COMPLETIONS))
    check_choice("data.truncation", truncation, TRUNCATIONS)
    if max_length < 2:
        raise ValueError(f"data.max_length must be >= 2 (a prompt token and a completion token), got {max_length}")
    templated = chat_template is not None or tokenizer.chat_template is not None
    apply_template = functools.partial(tokenizer.apply_chat_template, tokenize=False, chat_template=chat_template)
    render = apply_template if templated else render_plain

    examples: list[Example] = []
    cut_prompts = cut_completions = apart = identical = 0
    for start in range(0, len(rows), TOKENIZE_ROWS):
        chunk = rows[start : start + TOKENIZE_ROWS]
        locations = [getattr(row, "location", f"{source}[{start + i}]") for i, row in enumerate(chunk)]
        texts = [row_texts(row, kind, render, location) for row, location in zip(chunk, locations, strict=True)]
        tokenized = _tokenize_texts(texts, tokenizer, templated)
        for row, location, (prompt, completions, apart_here) in zip(chunk, locations, tokenized, strict=True):
            for name, completion in zip(COMPLETIONS[kind], completions, strict=True):
                if not completion:
                    raise ValueError(
                        f"{location}: column {name!r}: got {shorten(row[name])}, of which the tokenizer makes no "
                        "token, want at least one"
                    )
            kept_prompt, kept = _truncate(prompt, completions, max_length, truncation, tokenizer.bos_token_id)
            if not all(kept):
                raise ValueError(
                    f"{location}: column 'prompt': got {len(prompt)} tokens, which leave none for the completion, want "
                    f"fewer than data.max_length={max_length}; raise it, or set data.truncation=prompt"
                )
            apart += apart_here
            cut_prompts += len(kept_prompt) < len(prompt)
            cut_completions += sum(len(new) < len(old) for new, old in zip(kept, completions, strict=True))
            if kind == "preference":
                identical += kept[0] == kept[1]
                group = None if groups is None else _group(row, groups, location)
                examples.append(PreferenceExample(kept_prompt, *kept, group=group))
            else:
                examples.append(UnpairedExample(kept_prompt, kept[0], _label(row, location)))

    completion_count = len(examples) * len(COMPLETIONS[kind])
    if cut_prompts or cut_completions:
        prompts = _share(cut_prompts, len(examples), "prompts")
        completions = _share(cut_completions, completion_count, "completions")
        logger.warning("%s: cut to data.max_length=%d tokens: %s, %s", source, max_length, prompts, completions)
    if apart:
        share = _share(apart, completion_count, "completions")
        logger.warning("%s: %s tokenised on their own: a token would span the border to the prompt", source, share)
    if identical:
        share = _share(identical, len(examples), "pairs")
        logger.warning("%s: %s have the same tokens in chosen and rejected and teach nothing", source, share)
    return examples


def add_mismatched(
    examples: Sequence[UnpairedExample], tokenizer: Any, *, max_length: int, truncation: str = "prompt"
) -> list[UnpairedExample]:
    """Give every example a pair that does not belong together, from which KTO estimates its reference point.

    Prompt i gets the completion of the next example, going round, whose prompt is another one: data made from pairs
    holds each prompt twice in a row. `tokenizer`, `max_length` and `truncation` are those of `tokenize_rows`.

    Raises:
        ValueError: all prompts are the same.
    """
    count = len(examples)
    partner = [-1] * count
    for i in reversed(range(2 * count)):  # twice round, so that the end knows of the beginning
        here, following = i % count, (i + 1) % count
        differs = examples[here].prompt_ids != examples[following].prompt_ids
        partner[here] = following if differs else partner[following]
    if -1 in partner:
        raise ValueError(f"mismatched pairs need two different prompts, got {count} example(s) with the same one")
    result = []
    for example, other in zip(examples, partner, strict=True):
        prompt, (completion,) = _truncate(
            example.prompt_ids, [examples[other].completion_ids], max_length, truncation, tokenizer.bos_token_id
        )
        result.append(replace(example, mismatched=(prompt, completion)))
    return result


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 (hexadecimal) of all token ids and labels in order, part of the key under which results are cached."""
    digest = hashlib.sha256()
    for example in examples:
        if isinstance(example, UnpairedExample):
            digest.update(b"+" if example.desirable else b"-")
        elif example.group is not None:
            digest.update(example.group.to_bytes(8, "little"))
        for part in itertools.chain(*example.sequences()):
            digest.update(len(part).to_bytes(8, "little"))  # lengths keep the borders apart
            digest.update(part.tobytes())
    return digest.hexdigest()


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills shorter rows: the padding token's, or the end token's, or 0 (any would do: no position that
    holds it as padding is attended to or counted)."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


@dataclass(frozen=True)
class Collator:
    """Make a batch of (index in the dataset, example) items; labels are -100 on prompt and padding, and not shifted.

    preference: input_ids, attention_mask, labels int64 [2B, T] (chosen rows first, then rejected), index int64 [B], and
    group int64 [B] where the examples have one.
    unpaired: input_ids, attention_mask, labels int64 [B, T], desirable bool [B], index int64 [B], and with `mismatched`
    also mismatched_input_ids, mismatched_attention_mask, mismatched_labels int64 [B, T'].
    """

    pad_token_id: int
    kind: str
    mismatched: bool = False

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Tensor]:
        examples = [example for _, example in items]
        index = torch.tensor([i for i, _ in items])
        if self.kind == "preference":
            chosen = [(example.prompt_ids, example.chosen_ids) for example in examples]
            rejected = [(example.prompt_ids, example.rejected_ids) for example in examples]
            batch = {**self._pad(chosen + rejected), "index": index}
            if examples[0].group is not None:
                batch["group"] = torch.tensor([example.group for example in examples])
            return batch
        batch = self._pad([(example.prompt_ids, example.completion_ids) for example in examples])
        batch["desirable"] = torch.tensor([example.desirable for example in examples])
        if self.mismatched:
            pairs = self._pad([example.mismatched for example in examples])
            batch |= {f"mismatched_{name}": value for name, value in pairs.items()}
        return {**batch, "index": index}

    def _pad(self, sequences: list[tuple[array[int], array[int]]]) -> dict[str, Tensor]:
        """On the right, so that positions count from 0 without being told."""
        shape = (len(sequences), max(len(prompt) + len(completion) for prompt, completion in sequences))
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, (prompt, completion) in enumerate(sequences):
            border, length = len(prompt), len(prompt) + len(completion)
            input_ids[row, :length] = torch.tensor(prompt + completion)
            attention_mask[row, :length] = 1
            labels[row, border:length] = input_ids[row, border:length]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _tokenize_texts(
    texts: list[RowTexts], tokenizer: Any, templated: bool
) -> list[tuple[array[int], list[array[int]], int]]:
    """For each row its prompt's tokens, its completions' tokens, and how many of these were tokenised on their own."""

    def encode(batch: list[str]) -> list[array[int]]:
        # verbose=False: a text longer than the model is no news here, as it is cut later.
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False).input_ids if batch else []
        return [array("i", ids) for ids in encoded]

    prompts = encode([text.prompt for text in texts])
    together = iter(encode([text.prompt + completion for text in texts for completion in text.completions]))
    beginning: int | None = tokenizer.bos_token_id
    end: int | None = tokenizer.eos_token_id
    # Llama's tokenizer puts its beginning token before a text; GPT-2's has one and does not.
    added = [beginning] if beginning is not None and tokenizer("a").input_ids[0] == beginning else []
    stand_in = [token for token in (beginning, end) if token is not None][:1]
    tokenized = []
    for text, prompt in zip(texts, prompts, strict=True):
        completions, apart = [], 0
        for completion in text.completions:
            full = next(together)
            if full[: len(prompt)] == prompt and len(full) > len(prompt):
                ids = full[len(prompt) :]
            else:
                (ids,) = encode([completion])
                apart += 1
            # A template may write a newline behind the end token that closes the turn.
            if end is not None and not completion.rstrip().endswith(tokenizer.eos_token):
                ids.append(end)
            completions.append(ids)
        template_wrote_it = templated and text.conversational
        if not template_wrote_it and prompt[:1].tolist() != added:
            prompt = array("i", added) + prompt
        prompt = prompt or array("i", stand_in)
        if not prompt:
            raise ValueError(
                f"{text.location}: column 'prompt': got an empty prompt, want at least one token, as the tokenizer has "
                "neither a beginning nor an end token to stand in for it"
            )
        tokenized.append((prompt, completions, apart))
    return tokenized


def _truncate(
    prompt: array[int], completions: list[array[int]], max_length: int, truncation: str, beginning: int | None
) -> tuple[array[int], list[array[int]]]:
    if truncation == "end":
        return prompt, [completion[: max(0, max_length - len(prompt))] for completion in completions]
    completions = [completion[: max_length - 1] for completion in completions]
    room = max_length - max(len(completion) for completion in completions)
    if len(prompt) <= room:
        return prompt, completions
    # Models lean on the beginning token (many attend to it throughout), so it outlives the prompt's first words.
    if prompt[0] == beginning and room > 1:
        return prompt[:1] + prompt[1 - room :], completions
    return prompt[-room:], completions


def _label(row: dict[str, Any], location: str) -> bool:
    label = row.get("label")
    if isinstance(label, str):  # CSV knows texts only
        label = {"true": True, "false": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool):
        raise ValueError(f"{location}: column 'label': got {shorten(label)}, want true or false")
    return label


def _group(row: dict[str, Any], groups: int, location: str) -> int:
    group = row.get("group")
    if isinstance(group, str) and group.strip().isdecimal():  # CSV knows texts only
        group = int(group)
    if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group < groups:
        wanted = f"an integer from 0 to {groups - 1} (loss.groups is {groups})"
        raise ValueError(f"{location}: column 'group': got {shorten(group)}, want {wanted}")
    return group


def _share(count: int, total: int, what: str) -> str:
    return f"{count} of {total} {what} ({100 * count / total:.1f}%)"
