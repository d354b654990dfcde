"""From files to batches: what is read, what is refused and how it is said, what is cut, what is masked."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from robustloss.train import data, texts
from robustloss.train.data import Collator, add_mismatched, detect_kind, fingerprint, load_rows, tokenize_rows

REAL_DATA = Path(__file__).parents[3] / "shared" / "data" / "preference"
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAIR = {"prompt": "What colour is the sky?", "chosen": " It is blue.", "rejected": " It is green."}
SAMPLE = {"prompt": "What colour is the sky?", "completion": " It is blue.", "label": True}
CHAT_SAMPLE = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "completion": [{"role": "assistant", "content": "Yo"}],
    "label": True,
}


def make_tokenizer(*, adds_beginning=False, chat_template=None, **special):
    special = special or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["What colour is the sky? It is blue. It is green. foobar foobar foobar"], trainer)
    if adds_beginning:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_tokenizer(chat_template=CHATML)


def tokenize(rows, tokenizer, *, kind="preference", max_length=512, **options):
    return tokenize_rows(rows, tokenizer, kind=kind, max_length=max_length, source="memory", **options)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def counted_text(tokenizer, batch, row, prefix=""):
    """What the labels count, decoded."""
    labels = batch[f"{prefix}labels"][row]
    return tokenizer.decode(labels[labels != -100])


# ---- reading ------------------------------------------------------------------------------------------------------


def write_file(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("row", [PAIR, SAMPLE], ids=["preference", "unpaired"])
def test_every_format_gives_back_the_rows_that_were_written(tmp_path, suffix, row):
    rows = [row, {**row, "prompt": 'Two\nlines, a "quote" and ünïcode \u2028'}, {**row, "prompt": "NA"}]
    expected = [{**row, "label": str(row["label"])} for row in rows] if suffix == ".csv" and "label" in row else rows
    assert load_rows(write_file(tmp_path / f"rows{suffix}", rows), "train") == expected


def test_csv_labels_are_texts_and_those_of_preference_data_are_let_alone(tmp_path, tokenizer):
    unpaired = [{**SAMPLE, "label": label} for label in ("true", "False", " TRUE")]
    rows = load_rows(write_file(tmp_path / "unpaired.csv", unpaired), "train")
    assert [example.desirable for example in tokenize(rows, tokenizer, kind="unpaired")] == [True, False, True]
    rows = load_rows(write_file(tmp_path / "pairs.csv", [{**PAIR, "label": 0}, {**PAIR, "label": 1}]), "train")
    assert tokenize(rows, tokenizer) == tokenize([PAIR, PAIR], tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_messages_survive_every_format_that_can_hold_them(tmp_path, suffix):
    rows = [{"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]}]
    assert load_rows(write_file(tmp_path / f"rows{suffix}", rows), "train") == rows


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    write_jsonl(tmp_path / "rows.json", [PAIR, PAIR])
    assert load_rows(str(tmp_path / "rows.json"), "train") == [PAIR, PAIR]


def test_a_folder_gives_the_files_of_the_split_in_order(tmp_path):
    write_jsonl(tmp_path / "train-1.jsonl", [{**PAIR, "prompt": "second"}])
    write_jsonl(tmp_path / "train-0.jsonl", [{**PAIR, "prompt": "first"}])
    write_jsonl(tmp_path / "test.jsonl", [PAIR])
    assert [row["prompt"] for row in load_rows(str(tmp_path), "train")] == ["first", "second"]
    with pytest.raises(FileNotFoundError, match=r"no file named validation\*.*it holds: test.jsonl, train-0.jsonl"):
        load_rows(str(tmp_path), "validation")


def test_a_missing_file_is_named_and_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'missing\.jsonl'"):
        load_rows("missing.jsonl", "train")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_rows(str(tmp_path / "folder"), "train")


def test_any_other_name_is_a_dataset_of_the_hub(monkeypatch):
    import datasets

    def load_dataset(name, split):
        if name != "owner/name" or split != "train":
            raise ValueError(f"Unknown split {split!r}\nmore lines")
        return datasets.Dataset.from_list([PAIR, PAIR])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("owner/name", "train")
    assert rows == [PAIR, PAIR]
    assert rows[1].location == "owner/name[1]"
    with pytest.raises(ValueError, match=r"cannot load 'owner/name', split 'nope', .*Unknown split 'nope' \(a local"):
        load_rows("owner/name", "nope")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"a": 1}\n\n{"a": \n', r"bad\.jsonl:3: not JSON: Expecting value"),
        ("bad.jsonl", '{"a": 1}\n[1]\n', r"bad\.jsonl:2: got a JSON list, want an object"),
        ("bad.json", '[{"a": 1},\n{"a": }]', r"bad\.json:2: not JSON"),
        ("bad.json", '[{"a": 1}, 2]', r"bad\.json\[1\]: got a JSON int, want an object"),
        ("bad.csv", "prompt,completion\na,b,c\n", r"bad\.csv:2: got more cells than the 2 columns"),
        ("bad.csv", 'prompt,completion\n"a,b\n', r"bad\.csv:\d: not CSV"),
        ("bad.parquet", "no parquet", r"bad\.parquet: not a Parquet file"),
        ("empty.jsonl", "\n", r"empty\.jsonl: no rows, want at least one"),
        ("rows.txt", "text", r"rows\.txt: got a file ending in '\.txt', want one of \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name), "train")


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "für"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl: not UTF-8 text"):
        load_rows(str(tmp_path / "latin.jsonl"), "train")


def test_a_row_keeps_its_line_through_slicing(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR, PAIR, PAIR])
    assert [row.location for row in load_rows(path, "train")[::-1][:2]] == [f"{path}:3", f"{path}:2"]


def test_the_kind_is_told_by_the_columns():
    assert detect_kind([PAIR], "x") == "preference"
    assert detect_kind([{"chosen": "a b", "rejected": "a c"}], "x") == "preference"
    assert detect_kind([{**SAMPLE, "extra": 1}], "x") == "unpaired"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"x: missing column 'rejected'; present: 'prompt', 'chosen'; want"),
        ({"prompt": "a", "completion": "b"}, r"x: missing column 'label'; present: 'prompt', 'completion'; want"),
        ({"text": "a"}, r"x: missing column 'prompt', 'completion', 'label'; present: 'text'; want"),
        ({**PAIR, **SAMPLE}, r"x: holds preference and unpaired columns at once; set data\.kind"),
    ],
)
def test_missing_columns_are_named_beside_those_present(row, message):
    with pytest.raises(ValueError, match=message):
        detect_kind([row], "x")


# ---- bad rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("preference", {"chosen": ""}, "column 'chosen': got an empty completion, want at least one character"),
        ("preference", {"rejected": " \n"}, "column 'rejected': got an empty completion"),
        ("preference", {"rejected": None}, "column 'rejected': got nothing .*the row has 'prompt', 'chosen'"),
        ("preference", {"chosen": 3}, "column 'chosen': got int 3, want text or a list of messages"),
        ("preference", {"chosen": []}, r"column 'chosen': got list \[\], want text or a list of messages"),
        ("preference", {"chosen": ["a"]}, "column 'chosen': got the message str 'a', want {'role': text"),
        ("preference", {"chosen": [assistant(None)]}, "column 'chosen': got the message dict .*None"),
        (
            "preference",
            {"chosen": [assistant("a")]},
            "column 'chosen': got 'prompt' text, 'chosen' messages, 'rejected'",
        ),
        (
            "preference",
            {"prompt": [user("a")], "chosen": [user("b")], "rejected": [assistant("c")]},
            "column 'chosen': got a completion by 'user', want it by 'assistant'",
        ),
        (
            "preference",
            {"prompt": None, "chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "column 'rejected': got no first message in common with 'chosen'",
        ),
        ("unpaired", {"prompt": None}, "column 'prompt': got nothing"),
        (
            "unpaired",
            {"completion": [assistant(" ")], "prompt": [user("a")]},
            "column 'completion': got an empty completion",
        ),
        ("unpaired", {"label": 1}, "column 'label': got int 1, want true or false"),
        ("unpaired", {"label": "1"}, "column 'label': got str '1', want true or false"),
        ("unpaired", {"label": None}, "column 'label': got NoneType None, want true or false"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_column(tmp_path, tokenizer, kind, change, message):
    good = PAIR if kind == "preference" else SAMPLE
    path = write_jsonl(tmp_path / "rows.jsonl", [good, {**good, **change}])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {message}"):
        tokenize(load_rows(path, "train"), tokenizer, kind=kind)


def test_rows_of_unknown_origin_are_named_by_source_and_index(tokenizer):
    with pytest.raises(ValueError, match=r"memory\[1\]: column 'chosen'"):
        tokenize([PAIR, {**PAIR, "chosen": ""}], tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pairs"}, "data.kind must be one of 'preference', 'unpaired', got 'pairs'"),
        ({"truncation": "middle"}, "data.truncation must be one of 'prompt', 'end', got 'middle'"),
        ({"max_length": 1}, "data.max_length must be >= 2 .*, got 1"),
    ],
)
def test_wrong_options_are_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize([PAIR], tokenizer, **options)


# ---- texts and messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not "The sky is bl"
        ("Q: 1+1?\nA: two", "Q: 1+1?\nA: three", "Q: 1+1?\nA:"),
        ("Q?\n2", "Q?\n3", "Q?\n"),
        ("one two", "one two three", "one"),  # each side keeps a word
        ("one two", "one two", "one"),
        ("yes", "no", ""),
        ("yes", "yesterday", ""),
    ],
)
def test_an_implicit_text_prompt_is_the_common_beginning_in_whole_words(tokenizer, chosen, rejected, prompt):
    (example,) = tokenize([{"chosen": chosen, "rejected": rejected}], tokenizer)
    expected = prompt or "<s>"
    assert tokenizer.decode(example.prompt_ids.tolist()) == expected
    assert tokenizer.decode(example.chosen_ids.tolist()) == chosen[len(prompt) :] + "</s>"
    assert tokenizer.decode(example.rejected_ids.tolist()) == rejected[len(prompt) :] + "</s>"


def test_an_implicit_conversational_prompt_is_the_common_messages(chat_tokenizer):
    common = [user("Hi"), assistant("Hello!"), user("What colour is the sky?")]
    row = {"chosen": [*common, assistant("It is blue.")], "rejected": [*common, assistant("It is black.")]}
    explicit = {"prompt": common, "chosen": [assistant("It is blue.")], "rejected": [assistant("It is black.")]}
    repeated = {**row, "prompt": "Hi"}
    expected = tokenize([explicit], chat_tokenizer)
    assert tokenize([row], chat_tokenizer) == expected
    assert tokenize([repeated], chat_tokenizer) == expected


def test_the_chat_template_writes_prompt_and_completion(chat_tokenizer):
    row = {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]}
    (example,) = tokenize([row], chat_tokenizer)
    assert chat_tokenizer.decode(example.prompt_ids.tolist()) == "<|user|>Hi</s>\n<|assistant|>"
    # The template has closed the turn: no second end token.
    assert chat_tokenizer.decode(example.chosen_ids.tolist()) == "Hello!</s>\n"


def test_a_given_chat_template_replaces_the_tokenizers_own(chat_tokenizer):
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    row = {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]}
    (example,) = tokenize([row], chat_tokenizer, chat_template=template)
    assert chat_tokenizer.decode(example.prompt_ids.tolist()) == "[Hi]"
    assert chat_tokenizer.decode(example.rejected_ids.tolist()) == "[What?]</s>"


def test_a_chat_template_that_rewrites_its_prompt_is_refused(tokenizer):
    template = "{{ messages | length }} messages{% for message in messages %}{{ message.content }}{% endfor %}"
    row = {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]}
    with pytest.raises(ValueError, match=r"memory\[0\]: column 'chosen': the chat template writes the prompt diff"):
        tokenize([row], tokenizer, chat_template=template)


def test_a_chat_template_that_refuses_a_conversation_is_reported_with_its_row(tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    row = {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]}
    with pytest.raises(ValueError, match=r"memory\[0\]: the chat template failed .*: roles must alternate"):
        tokenize([row], tokenizer, chat_template=template)


def test_without_a_chat_template_messages_become_plain_lines_and_that_is_said_once(tokenizer, caplog):
    texts._announce_plain_chat.cache_clear()
    row = {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]}
    with caplog.at_level(logging.WARNING):
        tokenize([row, row], tokenizer)
        (example,) = tokenize([row], tokenizer)
    assert tokenizer.decode(example.prompt_ids.tolist()) == "user: Hi\nassistant:"
    assert tokenizer.decode(example.chosen_ids.tolist()) == " Hello!</s>"
    assert caplog.text.count("set model.chat_template") == 1


# ---- tokens -------------------------------------------------------------------------------------------------------


def test_the_end_token_is_added_once(tokenizer):
    (plain,) = tokenize([SAMPLE], tokenizer, kind="unpaired")
    (closed,) = tokenize([{**SAMPLE, "completion": " It is blue.</s>"}], tokenizer, kind="unpaired")
    assert plain == closed
    assert plain.completion_ids[-1] == tokenizer.eos_token_id
    assert plain.completion_ids.count(tokenizer.eos_token_id) == 1


def test_the_beginning_token_is_added_where_the_tokenizer_adds_it():
    beginning = make_tokenizer(adds_beginning=True, chat_template=CHATML)
    (text,) = tokenize([SAMPLE], beginning, kind="unpaired")
    (given,) = tokenize([{**SAMPLE, "prompt": "<s>" + SAMPLE["prompt"]}], beginning, kind="unpaired")
    (chat,) = tokenize([CHAT_SAMPLE], beginning, kind="unpaired")
    (without,) = tokenize([SAMPLE], make_tokenizer(), kind="unpaired")
    assert text == given
    assert text.prompt_ids.tolist() == [beginning.bos_token_id, *without.prompt_ids]
    assert beginning.bos_token_id not in text.completion_ids
    assert beginning.bos_token_id not in chat.prompt_ids  # this template writes none


def test_plain_lines_of_messages_get_the_beginning_token_too():
    beginning = make_tokenizer(adds_beginning=True)
    (chat,) = tokenize([CHAT_SAMPLE], beginning, kind="unpaired")
    assert beginning.decode(chat.prompt_ids.tolist()) == "<s>user: Hi\nassistant:"


def test_an_empty_prompt_becomes_the_beginning_or_the_end_token():
    row = {**SAMPLE, "prompt": ""}
    for special, token in (({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"), ({"eos_token": "</s>"}, "</s>")):
        tokenizer = make_tokenizer(**special)
        (example,) = tokenize([row], tokenizer, kind="unpaired")
        assert tokenizer.decode(example.prompt_ids.tolist()) == token
    with pytest.raises(ValueError, match=r"memory\[0\]: column 'prompt': got an empty prompt, want at least one token"):
        tokenize([row], make_tokenizer(pad_token="<pad>"), kind="unpaired")


def test_a_token_across_the_border_leaves_the_prompt_as_generation_sees_it(tokenizer, caplog):
    assert len(tokenizer("foobar").input_ids) < len(tokenizer("foo").input_ids) + len(tokenizer("bar").input_ids)
    with caplog.at_level(logging.WARNING):
        (example,) = tokenize([{**PAIR, "prompt": "foo", "chosen": "bar", "rejected": " blue"}], tokenizer)
    assert example.prompt_ids.tolist() == tokenizer("foo").input_ids
    assert example.chosen_ids.tolist() == [*tokenizer("bar").input_ids, tokenizer.eos_token_id]
    assert "1 of 2 completions (50.0%) tokenised on their own" in caplog.text


def test_pairs_that_teach_nothing_are_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        tokenize([PAIR, {**PAIR, "rejected": PAIR["chosen"]}], tokenizer)
    assert "1 of 2 pairs (50.0%) have the same tokens in chosen and rejected" in caplog.text


def test_rows_beyond_one_chunk_keep_their_order(tokenizer, monkeypatch):
    rows = [{**PAIR, "chosen": f" {i}"} for i in range(7)]
    expected = tokenize(rows, tokenizer)
    monkeypatch.setattr(data, "TOKENIZE_ROWS", 3)
    assert tokenize(rows, tokenizer) == expected
    with pytest.raises(ValueError, match=r"memory\[5\]"):
        tokenize([*rows[:5], {**PAIR, "chosen": ""}], tokenizer)


# ---- truncation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tokenizer):
    (example,) = tokenize([PAIR], tokenizer)
    return example


def test_prompt_truncation_cuts_the_prompts_beginning_to_what_the_longer_side_leaves(tokenizer, whole, caplog):
    longer = max(len(whole.chosen_ids), len(whole.rejected_ids))
    with caplog.at_level(logging.WARNING):
        (example,) = tokenize([PAIR], tokenizer, max_length=longer + 3)
    assert example.prompt_ids == whole.prompt_ids[-3:]
    assert (example.chosen_ids, example.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)
    assert "1 of 1 prompts (100.0%), 0 of 2 completions (0.0%)" in caplog.text


def test_prompt_truncation_cuts_a_completion_only_where_it_alone_is_too_long(tokenizer, whole):
    for max_length in range(2, 10):
        (example,) = tokenize([PAIR], tokenizer, max_length=max_length)
        longer = max(len(example.chosen_ids), len(example.rejected_ids))
        assert example.chosen_ids == whole.chosen_ids[: max_length - 1]
        assert example.rejected_ids == whole.rejected_ids[: max_length - 1]
        assert example.prompt_ids == whole.prompt_ids[-(max_length - longer) :]


def test_prompt_truncation_keeps_the_beginning_token():
    tokenizer = make_tokenizer(adds_beginning=True)
    (whole,) = tokenize([SAMPLE], tokenizer, kind="unpaired")
    (cut,) = tokenize([SAMPLE], tokenizer, kind="unpaired", max_length=len(whole.completion_ids) + 3)
    assert cut.prompt_ids.tolist() == [tokenizer.bos_token_id, *whole.prompt_ids[-2:]]
    assert cut.completion_ids == whole.completion_ids


def test_end_truncation_cuts_the_completions_end(tokenizer, whole):
    max_length = len(whole.prompt_ids) + 2
    (example,) = tokenize([PAIR], tokenizer, max_length=max_length, truncation="end")
    assert example.prompt_ids == whole.prompt_ids
    assert (example.chosen_ids, example.rejected_ids) == (whole.chosen_ids[:2], whole.rejected_ids[:2])


def test_end_truncation_that_leaves_no_completion_token_is_refused(tokenizer, whole):
    length = len(whole.prompt_ids)
    message = rf"memory\[1\]: column 'prompt': got {length} tokens, .*data\.max_length={length}"
    with pytest.raises(ValueError, match=message):
        tokenize([{**PAIR, "prompt": "a"}, PAIR], tokenizer, max_length=length, truncation="end")


def test_a_completion_that_the_tokenizer_drops_is_named_by_its_own_column():
    tokenizer = make_tokenizer(bos_token="<s>")  # no end token that would stand in its place
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    message = r"memory\[0\]: column 'rejected': got str '\\u200b', of which the tokenizer makes no token"
    with pytest.raises(ValueError, match=message):
        tokenize([{**PAIR, "rejected": "\u200b"}], tokenizer)


def test_nothing_is_said_where_nothing_is_cut(tokenizer, whole, caplog):
    longer = max(len(whole.chosen_ids), len(whole.rejected_ids))
    with caplog.at_level(logging.WARNING):
        (example,) = tokenize([PAIR], tokenizer, max_length=len(whole.prompt_ids) + longer)
    assert example == whole
    assert not caplog.records


# ---- batches ------------------------------------------------------------------------------------------------------


def test_preference_batch_holds_chosen_rows_first_and_counts_completions_only(tokenizer):
    rows = [PAIR, {"prompt": "Hi", "chosen": " yes", "rejected": " no, not at all"}]
    examples = tokenize(rows, tokenizer)
    batch = Collator(tokenizer.pad_token_id, "preference")([(7, examples[0]), (3, examples[1])])
    assert batch["index"].tolist() == [7, 3]
    assert [counted_text(tokenizer, batch, row) for row in range(4)] == [
        row[side] + "</s>" for side in ("chosen", "rejected") for row in rows
    ]
    for i, (row, side) in enumerate((row, side) for side in ("chosen", "rejected") for row in rows):
        present = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert tokenizer.decode(present) == row["prompt"] + row[side] + "</s>"
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()
    assert (batch["labels"][padding] == -100).all()
    # On the right: once padding begins, nothing else follows.
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    assert all(batch[name].dtype == torch.int64 for name in batch)


def test_unpaired_batch_carries_labels_of_desirability(tokenizer):
    rows = [SAMPLE, {"prompt": "Hi", "completion": " no", "label": False}]
    examples = tokenize(rows, tokenizer, kind="unpaired")
    batch = Collator(tokenizer.pad_token_id, "unpaired")(list(enumerate(examples)))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "desirable", "index"}
    assert batch["desirable"].tolist() == [True, False]
    assert [counted_text(tokenizer, batch, row) for row in range(2)] == [" It is blue.</s>", " no</s>"]


def test_the_padding_id_falls_back_to_the_end_token_and_to_zero():
    assert data.pad_token_id(make_tokenizer(bos_token="<s>", pad_token="<pad>")) == 1
    assert data.pad_token_id(make_tokenizer(bos_token="<s>", eos_token="</s>")) == 1
    assert data.pad_token_id(make_tokenizer(bos_token="<s>")) == 0


def test_mismatched_pairs_take_the_next_completion_of_another_prompt(tokenizer):
    rows = [
        {"prompt": prompt, "completion": completion, "label": True}
        for prompt, completion in (("A", " 0"), ("A", " 1"), ("B", " 2"), ("C", " 3"))
    ]
    examples = add_mismatched(tokenize(rows, tokenizer, kind="unpaired"), tokenizer, max_length=64)
    batch = Collator(tokenizer.pad_token_id, "unpaired", mismatched=True)(list(enumerate(examples)))
    expected = [" 2", " 2", " 3", " 0"]
    assert [counted_text(tokenizer, batch, i, "mismatched_") for i in range(4)] == [text + "</s>" for text in expected]
    for row, text, ids, mask in zip(
        rows, expected, batch["mismatched_input_ids"], batch["mismatched_attention_mask"], strict=True
    ):
        assert tokenizer.decode(ids[mask.bool()]) == row["prompt"] + text + "</s>"
    assert [counted_text(tokenizer, batch, i) for i in range(4)] == [row["completion"] + "</s>" for row in rows]


def test_mismatched_pairs_fit_the_length_too(tokenizer):
    rows = [SAMPLE, {"prompt": "Hi", "completion": " It is green." * 3, "label": True}]
    for truncation in ("prompt", "end"):
        options = {"max_length": 16, "truncation": truncation}
        examples = add_mismatched(tokenize(rows, tokenizer, kind="unpaired", **options), tokenizer, **options)
        for example in examples:
            prompt, completion = example.mismatched
            assert prompt
            assert completion
            assert len(prompt) + len(completion) <= 16


def test_mismatched_pairs_need_two_prompts(tokenizer):
    examples = tokenize([SAMPLE, SAMPLE], tokenizer, kind="unpaired")
    with pytest.raises(ValueError, match=r"two different prompts, got 2 example\(s\)"):
        add_mismatched(examples, tokenizer, max_length=64)


def test_the_fingerprint_tells_apart_order_borders_and_labels(tokenizer):
    other = {**PAIR, "prompt": "Hi"}
    moved = {"prompt": PAIR["prompt"] + " It", "chosen": " is blue.", "rejected": " is green."}
    sets = [[PAIR], [PAIR, other], [other, PAIR], [moved]]
    prints = {fingerprint(tokenize(rows, tokenizer)) for rows in sets}
    samples = tokenize([SAMPLE, {**SAMPLE, "prompt": "Hi"}], tokenizer, kind="unpaired")
    undesirable = tokenize([SAMPLE, {**SAMPLE, "prompt": "Hi", "label": False}], tokenizer, kind="unpaired")
    prints |= {fingerprint(samples), fingerprint(undesirable)}
    prints |= {fingerprint(add_mismatched(samples, tokenizer, max_length=64))}
    assert len(prints) == 7
    assert fingerprint(tokenize([PAIR], tokenizer)) == fingerprint(tokenize([dict(PAIR)], make_tokenizer()))


# ---- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real preference data at {REAL_DATA}")
@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_real_conversations_come_through_whole(chat_tokenizer, kind):
    source = str(REAL_DATA / {"preference": "pairs.jsonl", "unpaired": "unpaired.jsonl"}[kind])
    rows = load_rows(source, "train")[:40]
    assert detect_kind(rows, source) == kind
    examples = tokenize(rows, chat_tokenizer, kind=kind, max_length=10**6)
    batch = Collator(chat_tokenizer.pad_token_id, kind)(list(enumerate(examples)))
    sides = ("chosen", "rejected") if kind == "preference" else ("completion",)
    expected = [row[side][-1]["content"] + "</s>\n" for side in sides for row in rows]
    assert [counted_text(chat_tokenizer, batch, i) for i in range(len(expected))] == expected
