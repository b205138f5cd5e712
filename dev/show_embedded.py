"""Print samples of the embedded world and, with a tokenizer, what they cost in tokens.

python -m dev.show_embedded --samples=2
python -m dev.show_embedded --samples=0 --tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nanochat import configurator
from nanochat.conversation import Conversation
from nanochat.sources.embedded import KINDS
from nanochat.sources.world.problem_texts import FAMILIES
from nanochat.sources.world.relations import all_facts, count_facts, relations
from nanochat.sources.world.spelling import held_out_words, training_words
from nanochat.sources.world.split import make_random
from nanochat.tokenizer import Tokenizer, get_tokenizer
from tasks import mixtures

COUNTED = 300  # items of each kind for a mean; a few per cent of error do not matter here


@dataclass(frozen=True)
class Config:
    """Flags of show_embedded."""

    samples: int = 2
    """Samples of each kind of document, conversation and evaluation item."""
    tokens: bool = False
    """Count tokens with the tokenizer of the base folder."""
    seed: int = 0
    """Which samples."""


def main(config: Config) -> None:
    """Print the world's size, samples, and token counts."""
    show_size()
    show_documents(config)
    for stage, rows in (("mid", mixtures.MID_ROWS), ("sft", mixtures.SFT_ROWS)):
        for kind, task in mixtures.parts(stage).items():
            conversations = [task[config.seed + index] for index in range(config.samples)]
            show_conversations(f"{stage} {kind}, {rows[kind]:,} rows", conversations)
    for task in mixtures.evaluation_tasks("embedded"):
        conversations = [task[config.seed + index] for index in range(config.samples)]
        show_conversations(f"evaluation {task.name}", conversations)
    if config.tokens:
        show_tokens(get_tokenizer())


def show_size() -> None:
    """Print how many facts, phrasings, problem texts and words there are."""
    questions = sum(len(r.facts[0].questions) for r in relations().values())
    held_out = sum(len(r.facts[0].held_out_questions) for r in relations().values())
    print(f"facts: {count_facts()}, asked in {len(all_facts())} ways round")
    print(f"question templates: {questions} for training, {held_out} held out")
    for name, family in FAMILIES.items():
        print(f"problems, {name}: {len(family.training)} texts, {len(family.held_out)} held out")
    print(f"words: {len(training_words())} for training, {len(held_out_words())} held out")


def show_documents(config: Config) -> None:
    """Print documents of each kind."""
    for kind, share in KINDS.items():
        for index in range(config.samples):
            print(f"\n=== document: {kind.__name__}, {share:.0%}")
            print(kind(make_random(config.seed, kind.__name__, index)))


def show_conversations(title: str, conversations: Iterable[Conversation]) -> None:
    """Print conversations, the tool's calls and outputs in angle brackets."""
    for conversation in conversations:
        print(f"\n=== {title}")
        for message in conversation.messages:
            if isinstance(message.content, str):
                text = message.content
            else:
                text = "".join(
                    part.text if part.type == "text" else f"<{part.type}: {part.text}>"
                    for part in message.content
                )
            print(f"[{message.role}] {text}")


def show_tokens(tokenizer: Tokenizer) -> None:
    """Print mean tokens of each kind and its share of all tokens and of all targets."""
    print("\ndocuments: kind, mean tokens, share of tokens")
    weighted = {}
    for kind, share in KINDS.items():
        texts = [kind(make_random(1, kind.__name__, index)) for index in range(COUNTED)]
        weighted[kind.__name__] = mean(len(tokenizer.encode(text)) + 1 for text in texts), share
    total = sum(tokens * share for tokens, share in weighted.values())
    for name, (tokens, share) in weighted.items():
        print(f"  {name:<22} {tokens:6.1f} {tokens * share / total:6.1%}")
    print(f"  {'all':<22} {total:6.1f}")
    show_mixture_tokens(tokenizer, "mid", mixtures.MID_ROWS)
    show_mixture_tokens(tokenizer, "sft", mixtures.SFT_ROWS)


def show_mixture_tokens(tokenizer: Tokenizer, stage: str, rows: Mapping[str, int]) -> None:
    """Print what the conversations of one stage cost."""
    print(f"\n{stage}: kind, rows, mean tokens, mean targets, share of tokens and of targets")
    counts = {}
    for name, task in mixtures.parts(stage).items():
        rendered = [tokenizer.render_conversation(task[index]) for index in range(COUNTED)]
        counts[name] = mean(len(ids) for ids, _ in rendered), mean(sum(m) for _, m in rendered)
    num_tokens = sum(rows[name] * tokens for name, (tokens, _) in counts.items())
    num_targets = sum(rows[name] * targets for name, (_, targets) in counts.items())
    for name, (tokens, targets) in counts.items():
        print(
            f"  {name:<12} {rows[name]:7,} {tokens:6.1f} {targets:6.1f} "
            f"{rows[name] * tokens / num_tokens:6.1%} {rows[name] * targets / num_targets:6.1%}"
        )
    print(f"  {'all':<12} {sum(rows.values()):7,} {num_tokens / sum(rows.values()):6.1f}")


def mean(values: Iterable[int]) -> float:
    """Return the mean of some numbers."""
    known = list(values)
    return sum(known) / len(known)


if __name__ == "__main__":
    configurator.run(main, Config)
