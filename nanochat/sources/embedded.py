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

# kind -> share of the documents. Looking back (memory, lettered quizzes) is frequent because
# finding an answer's letter is the one skill that facts and stories do not teach.
KINDS: dict[Callable[[random.Random], str], float] = {
    encyclopedia.portraits: 0.08,
    encyclopedia.fact_list: 0.06,
    encyclopedia.mixed_facts: 0.08,
    encyclopedia.contrasts: 0.04,
    quizzes.questions_and_answers: 0.08,
    quizzes.guesses: 0.06,
    quizzes.lettered_quiz: 0.07,
    quizzes.letter_lookup: 0.06,
    quizzes.fact_lookup: 0.05,
    memory.repeated_lists: 0.09,
    memory.table: 0.07,
    memory.who_has_what: 0.02,
    stories.story: 0.05,
    stories.two_stories: 0.03,
    dialogues.dialogue: 0.04,
    numbers.number_page: 0.03,
    numbers.sum_table: 0.01,
    problems.problem_page: 0.04,
    spelling.spelling_list: 0.02,
    spelling.letter_facts: 0.02,
}


def generate_documents(seed: int, start: int, stop: int) -> Iterator[str]:
    """Yield the documents with index start (included) to stop (excluded) of the world `seed`."""
    kinds = list(KINDS)
    bounds = list(accumulate(KINDS.values()))
    for index in range(start, stop):
        rng = make_random(seed, "document", index)
        draw = rng.random() * bounds[-1]
        kind = next(kind for kind, bound in zip(kinds, bounds, strict=True) if draw < bound)
        yield kind(rng)
