"""Multiple choice as documents, in the very format a chat asks it in, easy to hard.

To answer with a letter, a model must find the choice that fits the question and say the letter
beside it. Nothing in a story asks for that. These documents teach it in steps that are each
learned in a few hundred thousand tokens (dev/LOG.md, 2026-11-21): lists whose lines say whether
their word was asked for, then the letter of a word that the question names, then of a fact that
it states, then of a fact that must be known.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from nanochat.conversation import CHOICE_INSTRUCTION, choice_lines
from nanochat.sources.world import dialogues, encyclopedia, problems, stories
from nanochat.sources.world.quizzes import make_options
from nanochat.sources.world.relations import Fact, all_facts
from nanochat.sources.world.spelling import held_out_words
from nanochat.sources.world.split import make_random, pick

LETTERS = "ABCDEF"
BLOCKS = 2  # questions of a document about facts: with one, documents would repeat
# Evaluation has four; with two, what tells a right choice from a wrong one is learned sooner.
NUM_CHOICES = (2, 3, 4, 4)
_NUM_READ = 400  # documents of each kind whose words the lists are made of
_COMMON = 3  # times a word is in them: one that is rare has no token of its own


@cache
def common_words() -> tuple[str, ...]:
    """Return the words that other documents use often, so that nearly every one is one token.

    There should be many: with a few hundred a model learns the words instead of the look-up.
    """
    kinds: tuple[Callable[[random.Random], str], ...] = (
        encyclopedia.portraits,
        encyclopedia.mixed_facts,
        stories.story,
        dialogues.dialogue,
        problems.problem_page,
    )
    counts: Counter[str] = Counter()
    for kind in kinds:
        for index in range(_NUM_READ):
            counts.update(re.findall("[A-Za-z]{3,}", kind(make_random(0, kind.__name__, index))))
    held_out = set(held_out_words())
    return tuple(sorted(w for w, n in counts.items() if n >= _COMMON and w not in held_out))


def _pages(rng: random.Random, block: Callable[[random.Random], str]) -> str:
    return "\n\n".join(block(rng) for _ in range(BLOCKS))


def _judged(question: str, options: Sequence[str], right: Sequence[str]) -> str:
    """Return a question with lettered options that say "yes" or "no" for themselves."""
    first, *lines = choice_lines(question, options, LETTERS[: len(options)])
    checks = [" yes" if option in right else " no" for option in options]
    return "\n".join([first, *(line + check for line, check in zip(lines, checks, strict=True))])


def _asked(question: str, options: Sequence[str], place: int) -> str:
    """Return a question with lettered options and the right letter at the end."""
    lines = choice_lines(question, options, LETTERS[: len(options)])
    return "\n".join([*lines, "", CHOICE_INSTRUCTION, LETTERS[place]])


ASK_WORDS = (
    "Which of these are here: {w}?",
    "Which of these were named: {w}?",
    "Find {w}.",
    "Choose {w}.",
    "Look for {w}.",
)
ASK_WORD = (
    "Which of these is {w}?",
    "Which letter has {w}?",
    "Find the word {w}.",
    "The answer is {w}. Which letter is it?",
    "Choose {w}.",
)


def _judged_fact(rng: random.Random) -> str:
    fact = pick(rng, all_facts())
    options, place = make_options(rng, fact, 3 + int(rng.random() * 3))
    if rng.random() < 0.35 and len(options) > 2:
        del options[place]  # so that no line is right only because no other was
    return _judged(pick(rng, fact.questions), options, [fact.answer])


def _asked_fact(rng: random.Random, lead: Callable[[Fact], str] = lambda fact: "") -> str:
    fact = pick(rng, all_facts())
    options, place = make_options(rng, fact, pick(rng, NUM_CHOICES))
    return _asked(lead(fact) + pick(rng, fact.questions), options, place)


def judged_words(rng: random.Random) -> str:
    """Ask for several words; each line of the list says whether its word is one of them."""
    words = rng.sample(common_words(), 3 + int(rng.random() * 4))
    share = pick(rng, (0.3, 0.5, 0.6))
    right = [word for word in words if rng.random() < share]
    asked = right + rng.sample(common_words(), pick(rng, (0, 0, 1, 2)) if right else 1)
    rng.shuffle(asked)
    return _judged(pick(rng, ASK_WORDS).format(w=", ".join(asked)), words, right)


def _found_word(rng: random.Random, count: int) -> str:
    words = rng.sample(common_words(), count)
    place = int(rng.random() * count)
    return _asked(pick(rng, ASK_WORD).format(w=words[place]), words, place)


def found_word(rng: random.Random) -> str:
    """Ask for the letter of a word; twice where there are only two, or documents would repeat."""
    count = pick(rng, NUM_CHOICES)
    return "\n\n".join(_found_word(rng, count) for _ in range(2 if count == 2 else 1))


def told_facts(rng: random.Random) -> str:
    """State a fact, then ask for it with choices."""
    return _pages(rng, lambda rng: _asked_fact(rng, lambda fact: f"{pick(rng, fact.statements)} "))


def judged_facts(rng: random.Random) -> str:
    """Ask for a fact; each line of the list says whether it is right."""
    return _pages(rng, _judged_fact)


def asked_facts(rng: random.Random) -> str:
    """Ask for a fact with choices."""
    return _pages(rng, _asked_fact)


def first_questions(rng: random.Random) -> str:
    """Write `judged_words` or, twice as often, `found_word`."""
    return judged_words(rng) if rng.random() < 0.33 else found_word(rng)
