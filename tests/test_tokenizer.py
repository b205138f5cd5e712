"""The tokenizer of conversations: special tokens, rendering and masks, files, scripts."""

import itertools
import json
import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rustbpe
from nanochat import tokenizer_files
from nanochat.common import UserError, tokenizer_dir
from nanochat.conversation import Conversation, Message, Part, chat
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, get_tokenizer
from rustbpe import reference

TEXTS = [
    "the cat sat on the mat, and the other cat sat on the hat. " * 3,
    "It's 12345 o'clock; they'll say 'hello' to caf\u00e9 \u4f60\u597d \U0001f30d\n\n\tdone",
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(TEXTS, 320, trained_on="embedded")


def names(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.id_to_token(token_id) for token_id in ids]


# ---- vocabulary -------------------------------------------------------------------------------


def test_special_tokens_follow_the_learned_ones_in_order(tokenizer):
    first = tokenizer.vocabulary.vocab_size
    assert tokenizer.vocab_size == tokenizer.get_vocab_size() == 320
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(first, 320))
    assert tokenizer.bos_id == tokenizer.get_bos_token_id() == first
    assert tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)


def test_special_ids_follow_what_was_really_learned(caplog):
    with caplog.at_level(logging.WARNING):
        small = Tokenizer.train_from_iterator(["ab"], 1000)
    assert small.bos_id == 257
    assert small.vocab_size == 266
    assert "allows only 1 of 735 merges" in caplog.text


def test_a_vocabulary_too_small_is_a_user_error():
    with pytest.raises(UserError, match="264 tokens is too small"):
        Tokenizer.train_from_iterator(["a"], 264)


def test_special_tokens_in_plain_text_are_text(tokenizer):
    text = "".join(SPECIAL_TOKENS)
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.bos_id
    assert tokenizer.decode(ids) == text


def test_an_unknown_special_token_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match="not a special token"):
        tokenizer.encode_special("<|eos|>")


def test_token_bytes_are_raw_lengths_and_zero_for_special_tokens(tokenizer):
    lengths = tokenizer.token_bytes
    assert lengths.dtype == np.int32
    assert lengths.shape == (320,)
    assert set(lengths[:256].tolist()) == {1}  # also those that are no UTF-8 alone
    assert set(lengths[-9:].tolist()) == {0}
    ids = tokenizer.encode(TEXTS[1])
    assert lengths[ids].sum() == len(TEXTS[1].encode())


# ---- text -------------------------------------------------------------------------------------


def test_prepend_and_append_take_ids_and_names(tokenizer):
    plain = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", prepend="<|bos|>", append=65) == [
        tokenizer.bos_id,
        *plain,
        65,
    ]
    assert tokenizer(["the cat", ""], prepend="<|bos|>") == [
        [tokenizer.bos_id, *plain],
        [tokenizer.bos_id],
    ]


def test_encode_batch_is_flat(tokenizer):
    ids, offsets = tokenizer.encode_batch(TEXTS, prepend=tokenizer.bos_id)
    rows = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert rows == tokenizer.encode(TEXTS, prepend=tokenizer.bos_id)


def test_ids_equal_tiktoken_with_the_same_ranks(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding(
        "t",
        pat_str=reference.PATTERNS["nanochat"],
        mergeable_ranks=dict(tokenizer.vocabulary.get_mergeable_ranks()),
        special_tokens={},
    )
    for text in TEXTS:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


def test_decoding_an_id_that_does_not_exist_is_a_user_error(tokenizer):
    for wrong in (-1, 320):
        with pytest.raises(UserError, match="is not a token id"):
            tokenizer.decode([wrong])


# ---- conversations ----------------------------------------------------------------------------


def test_rendering_and_mask_of_a_simple_chat(tokenizer):
    ids, mask = tokenizer.render_conversation(chat("the", "cat", "sat", "on"))
    assert "".join(names(tokenizer, ids)) == (
        "<|bos|><|user_start|>the<|user_end|><|assistant_start|>cat<|assistant_end|>"
        "<|user_start|>sat<|user_end|><|assistant_start|>on<|assistant_end|>"
    )
    supervised = [token_id for token_id, bit in zip(ids, mask, strict=True) if bit]
    assert tokenizer.decode(supervised) == "cat<|assistant_end|>on<|assistant_end|>"


def test_tool_calls_are_supervised_and_their_output_is_not(tokenizer):
    parts = (Part("text", "so "), Part("python", "1+1"), Part("python_output", "2"))
    answer = Message("assistant", (*parts, Part("text", " it is")))
    ids, mask = tokenizer.render_conversation(Conversation((Message("user", "?"), answer)))
    spoken = [token_id for token_id, bit in zip(ids, mask, strict=True) if bit]
    read = [token_id for token_id, bit in zip(ids, mask, strict=True) if not bit]
    assert tokenizer.decode(spoken) == "so <|python_start|>1+1<|python_end|> it is<|assistant_end|>"
    assert tokenizer.decode(read) == (
        "<|bos|><|user_start|>?<|user_end|><|assistant_start|><|output_start|>2<|output_end|>"
    )


def test_a_system_message_goes_in_front_of_the_first_user_message(tokenizer):
    conversation = Conversation(
        (Message("system", "Be kind."), Message("user", "hi"), Message("assistant", "hello"))
    )
    before = conversation.to_json()
    merged = chat("Be kind.\n\nhi", "hello")
    assert tokenizer.render_conversation(conversation) == tokenizer.render_conversation(merged)
    assert conversation.to_json() == before


def test_rendering_is_cut_to_the_limit(tokenizer):
    full_ids, full_mask = tokenizer.render_conversation(chat("the cat", "sat on the mat"))
    ids, mask = tokenizer.render_conversation(chat("the cat", "sat on the mat"), max_tokens=5)
    assert (ids, mask) == (full_ids[:5], full_mask[:5])


def test_completion_ends_where_the_assistant_begins(tokenizer):
    prompt = tokenizer.render_for_completion(chat("the", "cat", "sat", "on"))
    ids, _ = tokenizer.render_conversation(chat("the", "cat", "sat", "on"))
    assert prompt == ids[: len(prompt)]
    assert prompt[-1] == tokenizer.encode_special("<|assistant_start|>")
    with pytest.raises(UserError, match="ends with user"):
        tokenizer.render_for_completion(chat("the"))


def test_visualisation_shows_every_token_in_its_colour(tokenizer):
    ids, mask = tokenizer.render_conversation(chat("the", "cat"))
    shown = tokenizer.visualize_tokenization(ids, mask)
    assert shown.count("|\033[") == len(ids) - 1
    assert shown.count("\033[92m") == sum(mask)


# ---- files ------------------------------------------------------------------------------------


def test_saved_and_read_again_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.hash == tokenizer.hash
    assert again.trained_on == "embedded"
    assert again.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert np.array_equal(np.load(tmp_path / "token_bytes.npy"), tokenizer.token_bytes)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["pattern"] == reference.PATTERNS["nanochat"]


def test_hash_tells_vocabularies_apart_but_not_their_origin(tokenizer):
    other = Tokenizer.train_from_iterator(TEXTS[:1], 300)
    renamed = Tokenizer(tokenizer.vocabulary, trained_on="elsewhere")
    assert other.hash != tokenizer.hash
    assert renamed.hash == tokenizer.hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not a nanochat-tokenizer-1 file"),
        ('{"model": {}}', "is not a nanochat-tokenizer-1 file"),
        ('{"format": "nanochat-tokenizer-1", "pattern": "gpt2"}', "is damaged"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_a_user_error(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_a_missing_tokenizer_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        get_tokenizer()


def test_huggingface_files_give_the_same_ids_special_tokens_and_chats(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    jinja2 = pytest.importorskip("jinja2")
    tokenizer_files.save_huggingface(tokenizer, tmp_path)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert exported.get_vocab_size() == tokenizer.vocab_size
    for text in TEXTS:
        assert exported.encode(text).ids == tokenizer.encode(text)
    parts = (Part("text", "so "), Part("python", "1+1"), Part("python_output", "2"))
    conversation = Conversation(
        (
            Message("system", "Be kind.\n"),
            Message("user", " hi "),
            Message("assistant", (*parts, Part("text", " it is "))),
            Message("user", "bye\n"),
            Message("assistant", "bye"),
        )
    )
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(config["chat_template"])
    messages = conversation.to_json()
    rendered = template.render(messages=messages, add_generation_prompt=False)
    assert exported.encode(rendered).ids == tokenizer.render_conversation(conversation)[0]
    prompt = template.render(messages=messages[:-1], add_generation_prompt=True)
    assert exported.encode(prompt).ids == tokenizer.render_for_completion(conversation)


def test_transformers_loads_the_export(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_files.save_huggingface(tokenizer, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    messages = chat("the cat", "sat").to_json()
    ids = loaded.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(ids) == tokenizer.render_conversation(chat("the cat", "sat"))[0]
    assert loaded.bos_token_id == tokenizer.bos_id


def test_the_export_does_not_overwrite_our_own_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="choose another folder"):
        tokenizer_files.save_huggingface(tokenizer, tmp_path)


def test_a_pickle_of_the_original_nanochat_is_imported(tokenizer, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=reference.PATTERNS["nanochat"],
        mergeable_ranks=dict(tokenizer.vocabulary.get_mergeable_ranks()),
        special_tokens={name: tokenizer.encode_special(name) for name in SPECIAL_TOKENS},
    )
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    imported = tokenizer_files.load_pickle(tmp_path / "tokenizer.pkl")
    assert imported.encode(TEXTS, prepend="<|bos|>") == tokenizer.encode(TEXTS, prepend="<|bos|>")
    imported.save(tmp_path / "ours")
    again = Tokenizer.from_directory(tmp_path / "ours")
    assert again.encode(TEXTS) == tokenizer.encode(TEXTS)
    (tmp_path / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="not allowed"):
        tokenizer_files.load_pickle(tmp_path / "tokenizer.pkl")


def test_a_tiktoken_file_is_imported(tokenizer, tmp_path):
    rustbpe.formats.dump_tiktoken(tokenizer.vocabulary.tokens, tmp_path / "t.tiktoken")
    path, specials = tmp_path / "t.tiktoken", {"<|endoftext|>": 311}
    imported = tokenizer_files.load_tiktoken(path, "nanochat", specials)
    assert imported.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert imported.bos_id == 311


# ---- scripts ----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """A folder of two parquet shards; the base folder is a fresh one."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        table = pa.table({"text": [f"{text} {shard} {i}" for i, text in enumerate(TEXTS)]})
        pq.write_table(table, folder / f"shard_{shard:05d}.parquet")
    return folder


def test_tok_train_and_tok_eval(shards, capsys):
    from scripts import tok_eval, tok_train

    tok_train.main(tok_train.Config(data=str(shards), vocab_size=300))
    tokenizer = get_tokenizer()
    assert tokenizer.vocab_size == 300
    assert tokenizer.trained_on == str(shards)
    assert sorted(path.name for path in tokenizer_dir().iterdir()) == [
        "token_bytes.npy",
        "tokenizer.json",
    ]
    tok_eval.main(tok_eval.Config())
    shown = capsys.readouterr().out
    for name in ("news", "korean", "code", "math", "science", "-train", "-val"):
        assert name in shown


def test_tok_train_respects_its_limits(shards):
    from nanochat.dataset import open_source
    from scripts import tok_train

    source = open_source(str(shards))
    limited = list(tok_train.documents(source, max_chars=100, doc_cap=30))
    assert [len(text) for text in limited] == [30, 30, 30, 30]
    with pytest.raises(UserError, match="--doc_cap is 0"):
        tok_train.main(tok_train.Config(data=str(shards), doc_cap=0))


def test_tok_eval_goes_on_without_the_other_vocabularies(shards, caplog, capsys):
    from scripts import tok_eval, tok_train

    tok_train.main(tok_train.Config(data=str(shards), vocab_size=280))
    with caplog.at_level(logging.WARNING):
        tok_eval.main(tok_eval.Config())
    assert "GPT-2 is left out: vocabulary/gpt2/encoder.json cannot be read" in caplog.text
    assert "prefetch vocabulary/cl100k_base/cl100k_base.tiktoken" in caplog.text
    assert "news" in capsys.readouterr().out


def test_tok_eval_compares_with_a_vocabulary_that_was_fetched(shards, capsys):
    from nanochat.assets import Manifest, record_file, write_manifest
    from nanochat.vocabularies import BASELINES
    from rustbpe.formats import dump_tiktoken
    from scripts import tok_eval, tok_train

    (asset,) = BASELINES[1].assets
    asset.path.parent.mkdir(parents=True)
    dump_tiktoken([bytes([i]) for i in range(256)] + [b"th", b"the"], asset.path)
    write_manifest(asset, Manifest((record_file(asset.folder, asset.path),)))
    tok_train.main(tok_train.Config(data=str(shards), vocab_size=280))
    tok_eval.main(tok_eval.Config())
    shown = capsys.readouterr().out
    assert "Comparison with GPT-4 (263 tokens)" in shown  # 258 and five special ones
    assert "Comparison with GPT-2" not in shown


def test_a_row_reports_the_share_of_tokens_saved():
    from scripts.tok_eval import Row

    cells = Row("news", 1000, 250, 200).cells()
    assert cells == ("news", "1,000", "250", "4.00", "200", "5.00", "+20.0 %")
