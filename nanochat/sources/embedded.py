"""The embedded world as pretraining text: documents made from a seed, nothing downloaded.

Document `index` of `seed` depends on these two numbers only. A third of the text states facts or
asks for them (each fact about a hundred times in three million tokens, in all its phrasings), a
third are quizzes, guesses, lists and tables that are read to be looked up in, the rest are stories,
dialogues, numbers, problems and spelled words.

Why documents do not repeat: of the fewest texts a story is made. Its plot has seven steps with
three ways each, two names, a time or a thing, a place or a number: at least 5e7 stories a plot,
of which all documents together hold 1,300. A page of sums names one of 48 people and takes ten of
some 40 second numbers (8e8 ways). All 393,216 documents of the default seed are different.
"""

import random
from collections.abc import Callable, Iterator
from itertools import accumulate

from nanochat.sources.world import (
    choices,
    dialogues,
    encyclopedia,
    memory,
    numbers,
    problems,
    quizzes,
    spelling,
    stories,
)
from nanochat.sources.world.split import make_random

DEFAULT_SEED = 1337
NUM_DOCUMENTS = 393_216  # 48 shards of 8,192 documents, 158 MB

# The first documents, easy to hard: how many of each kind.
LESSONS: tuple[tuple[int, Callable[[random.Random], str]], ...] = (
    (7_700, choices.judged_words),
    (15_000, choices.first_questions),
)

# kind -> share of the documents after the lessons. More than half are multiple choice, the one
# skill that facts and stories do not teach; they are short, and facts are learned in them as well.
KINDS: dict[Callable[[random.Random], str], float] = {
    encyclopedia.portraits: 0.03,
    encyclopedia.fact_list: 0.02,
    encyclopedia.mixed_facts: 0.03,
    encyclopedia.contrasts: 0.02,
    quizzes.questions_and_answers: 0.03,
    quizzes.guesses: 0.01,
    choices.judged_words: 0.06,
    choices.found_word: 0.08,
    choices.told_facts: 0.09,
    choices.judged_facts: 0.16,
    choices.asked_facts: 0.21,
    memory.repeated_lists: 0.06,
    memory.table: 0.01,
    memory.who_has_what: 0.01,
    stories.story: 0.03,
    stories.two_stories: 0.01,
    dialogues.dialogue: 0.02,
    numbers.number_page: 0.02,
    numbers.sum_table: 0.01,
    problems.problem_page: 0.04,
    spelling.spelling_list: 0.03,
    spelling.letter_facts: 0.02,
}


def generate_documents(seed: int, start: int, stop: int) -> Iterator[str]:
    """Yield the documents with index start (included) to stop (excluded) of the world `seed`."""
    kinds = list(KINDS)
    bounds = list(accumulate(KINDS.values()))
    lessons = [kind for count, kind in LESSONS for _ in range(count)]
    for index in range(start, stop):
        rng = make_random(seed, "document", index)
        if index < len(lessons):
            yield lessons[index](rng)
            continue
        draw = rng.random() * bounds[-1]
        kind = next(kind for kind, bound in zip(kinds, bounds, strict=True) if draw < bound)
        yield kind(rng)
