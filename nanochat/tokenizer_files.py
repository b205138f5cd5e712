"""Tokenizers of other projects: reading them, and writing ours for HuggingFace's libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rustbpe
from nanochat.common import UserError, write_json
from nanochat.tokenizer import Tokenizer
from rustbpe import formats

END_OF_TEXT = "<|endoftext|>"

# Renders what Tokenizer.render_conversation renders; tests compare the ids.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "<|bos|>"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "<|user_start|>{{ (system if loop.first else '') + message['content'] }}<|user_end|>"
    "{%- elif message['role'] == 'assistant' -%}"
    "<|assistant_start|>"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'python' -%}<|python_start|>{{ part['text'] }}<|python_end|>"
    "{%- elif part['type'] == 'python_output' -%}<|output_start|>{{ part['text'] }}<|output_end|>"
    "{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "<|assistant_end|>"
    "{%- else -%}{{ raise_exception('unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant_start|>{%- endif -%}"
)


def to_huggingface(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of `tokenizer.json` and `tokenizer_config.json`, ids identical."""
    vocabulary = tokenizer.vocabulary
    specials = {name: tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    bos = tokenizer.id_to_token(tokenizer.bos_id)
    content = formats.to_huggingface(
        vocabulary.tokens, vocabulary.get_pattern(), specials, vocabulary.merges
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if "<|assistant_end|>" in specials:
        config |= {"eos_token": "<|assistant_end|>", "chat_template": CHAT_TEMPLATE}
    return content, config


def save_huggingface(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write both files into a folder of their own, which transformers can then load.

    UserError for the folder of our own tokenizer, whose `tokenizer.json` is another format.
    """
    target = Path(folder)
    if (target / "token_bytes.npy").exists():
        raise UserError(f"{target} holds a nanochat tokenizer; choose another folder")
    content, config = to_huggingface(tokenizer)
    write_json(target / "tokenizer.json", content)
    write_json(target / "tokenizer_config.json", config)


def load_tiktoken(path: str | Path, pattern: str, special_tokens: dict[str, int]) -> Tokenizer:
    """Return a tokenizer of a `.tiktoken` file. The first special token begins documents."""
    try:
        tokens = formats.load_tiktoken(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}; give the path of a .tiktoken file") from None
    vocabulary = rustbpe.Tokenizer.from_tokens(tokens, formats.named(pattern))
    return Tokenizer(vocabulary, special_tokens, bos=next(iter(special_tokens)))


def load_gpt2(vocab: str | Path, merges: str | Path) -> Tokenizer:
    """Return GPT-2's tokenizer from its two files."""
    tokens, specials = formats.load_gpt2(vocab, merges)
    vocabulary = rustbpe.Tokenizer.from_tokens(tokens, "gpt2")
    return Tokenizer(vocabulary, specials, bos=END_OF_TEXT)


def load_pickle(path: str | Path) -> Tokenizer:
    """Return the tokenizer in an original nanochat `tokenizer.pkl`; nothing in it is executed."""
    try:
        tokens, pattern, specials = formats.load_pickled_encoding(path)
    except FileNotFoundError:
        raise UserError(f"no file {path}; give the path of a tokenizer.pkl") from None
    except ValueError as error:
        raise UserError(str(error)) from error
    vocabulary = rustbpe.Tokenizer.from_tokens(tokens, formats.named(pattern))
    return Tokenizer(vocabulary, specials, trained_on="")


def from_pretrained(name: str) -> Tokenizer:
    """Return one of tiktoken's vocabularies (gpt2, cl100k_base ...), fetched or cached there.

    Documents begin with `<|endoftext|>`. UserError when it cannot be had.
    """
    try:
        import tiktoken

        encoding = tiktoken.get_encoding(name)
    except ImportError:
        raise UserError(f"{name} needs tiktoken: pip install tiktoken") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot get the vocabulary {name}: {error}") from error
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    pattern = formats.named(encoding._pat_str)
    vocabulary = rustbpe.Tokenizer.from_tokens([token for token, _ in ranks], pattern)
    return Tokenizer(vocabulary, dict(encoding._special_tokens), bos=END_OF_TEXT)
