"""From a row of data to the texts of its prompt and completions, checked.

The prompt and the completions are either texts, joined as they are (nothing is put between them), or lists of
{"role": ..., "content": ...} messages, written out by the tokenizer's chat template. Preference data may leave the
prompt out: it is then what the beginnings of chosen and rejected have in common.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

COMPLETIONS = {"preference": ("chosen", "rejected"), "unpaired": ("completion",)}


@dataclass(frozen=True)
class RowTexts:
    """`prompt + completions[i]` is what will be tokenised; `conversational` says that it was written from messages."""

    prompt: str
    completions: list[str]
    conversational: bool
    location: str


def row_texts(row: dict[str, Any], kind: str, render: Callable[..., str], location: str) -> RowTexts:
    """Check one row and write its messages out.

    Args:
        row: column -> value; other columns than the kind's are let alone.
        kind: "preference" or "unpaired".
        render: messages, add_generation_prompt -> text: a chat template, or `render_plain`.
        location: opens every error.

    Raises:
        ValueError: `<location>: column ...: got ..., want ...`.
    """
    names = COMPLETIONS[kind]
    prompt, completions = _prompt_and_completions(row, kind, location)
    for name, completion in zip(names, completions, strict=True):
        _check_completion(name, completion, location)
    if isinstance(prompt, str):
        return RowTexts(prompt, completions, False, location)
    try:
        prompt_text = render(prompt, add_generation_prompt=True)
        full_texts = [render(prompt + completion, add_generation_prompt=False) for completion in completions]
    except Exception as error:  # a template may raise anything, its own refusals included
        raise ValueError(f"{location}: the chat template failed on these messages: {error}") from error
    for name, full_text in zip(names, full_texts, strict=True):
        if not full_text.startswith(prompt_text):
            raise ValueError(
                f"{location}: column {name!r}: the chat template writes the prompt differently once a completion "
                f"follows (alone it ends in {prompt_text[-40:]!r}), so the completion's text cannot be told; "
                "set model.chat_template to one that only adds to what stands there"
            )
    return RowTexts(prompt_text, [full_text[len(prompt_text) :] for full_text in full_texts], True, location)


def render_plain(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """Lines of `role: content`, for tokenizers without a chat template; says so once."""
    _announce_plain_chat()
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join([*lines, "assistant:"] if add_generation_prompt else lines)


def shorten(value: object) -> str:
    """A value for an error message: its type and the beginning of its repr."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@functools.cache
def _announce_plain_chat() -> None:
    logger.warning(
        "the tokenizer has no chat template: messages are written as plain 'role: content' lines; "
        "set model.chat_template, or use a tokenizer that has one, to train in the format the model will be used in"
    )


def _prompt_and_completions(row: dict[str, Any], kind: str, location: str) -> tuple[Any, list[Any]]:
    """The prompt, found where it is implicit, and the completions: all texts or all messages."""
    names = COMPLETIONS[kind]
    completions = [_column(row, name, location) for name in names]
    has_prompt = kind == "unpaired" or row.get("prompt") is not None
    columns = {"prompt": _column(row, "prompt", location)} if has_prompt else {}
    columns |= dict(zip(names, completions, strict=True))
    is_text = {name: isinstance(value, str) for name, value in columns.items()}

    # Some sets repeat the first message as a text prompt beside whole conversations: the messages say it better.
    repeated = kind == "preference" and has_prompt and is_text == {"prompt": True, "chosen": False, "rejected": False}
    if len(set(is_text.values())) > 1 and not repeated:
        forms = ", ".join(f"{name!r} {'text' if text else 'messages'}" for name, text in is_text.items())
        raise ValueError(f"{location}: column {names[0]!r}: got {forms}, want all text or all messages")
    if has_prompt and not repeated:
        return columns["prompt"], completions
    prompt, *completions = _split_implicit_prompt(*completions)
    if isinstance(prompt, list) and not prompt:
        raise ValueError(
            f"{location}: column 'rejected': got no first message in common with 'chosen', want the prompt"
        )
    return prompt, completions


def _column(row: dict[str, Any], name: str, location: str) -> str | list[dict[str, Any]]:
    """A column's text or messages, checked."""
    value = row.get(name)
    if value is None:
        present = ", ".join(repr(column) for column in row if row[column] is not None) or "nothing"
        raise ValueError(
            f"{location}: column {name!r}: got nothing (missing or null; the row has {present}), want text"
        )
    if isinstance(value, str):
        _check_characters(value, name, location)
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{location}: column {name!r}: got {shorten(value)}, want text or a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{location}: column {name!r}: got the message {shorten(message)}, "
                "want {'role': text, 'content': text}"
            )
        _check_characters(message["content"], name, location)
    return value


def _check_characters(text: str, name: str, location: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # of which JSON can hold one half alone
        half = text[error.start : error.end]
        raise ValueError(f"{location}: column {name!r}: got half a character, {half!r}, want Unicode text") from error


def _check_completion(name: str, completion: str | list[dict[str, Any]], location: str) -> None:
    contents = [completion] if isinstance(completion, str) else [message["content"] for message in completion]
    if not all(content.strip() for content in contents):
        raise ValueError(f"{location}: column {name!r}: got an empty completion, want at least one character")
    if not isinstance(completion, str) and completion[0]["role"] != "assistant":
        role = completion[0]["role"]
        raise ValueError(f"{location}: column {name!r}: got a completion by {role!r}, want it by 'assistant'")


def _split_implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split chosen and rejected behind what they begin with in common: by messages, or by whole words of a text.

    At least the last message or word is left to each side. A space at the border goes to the completions, as most
    tokenizers keep it with the word behind it.
    """
    shorter = min(len(chosen), len(rejected))
    common = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(0, shorter - 1))
    if isinstance(chosen, str):
        while common > 0 and chosen[common - 1].isalnum() and (chosen[common].isalnum() or rejected[common].isalnum()):
            common -= 1
        if common > 0 and chosen[common - 1] == " ":
            common -= 1
    return chosen[:common], chosen[common:], rejected[common:]
