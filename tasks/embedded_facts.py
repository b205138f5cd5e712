"""Questions about the facts of the embedded world: chosen by letter, and answered in a sentence.

Training asks with the phrasings a `Fact` keeps for training, evaluation with those held out.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from nanochat.conversation import Conversation, Message, chat
from nanochat.sources.world.choices import ASK_WORD, NUM_CHOICES, common_words
from nanochat.sources.world.everyday import COLOURS, DAYS, JOBS, MONTHS
from nanochat.sources.world.geography import COUNTRIES
from nanochat.sources.world.nature import ANIMALS, ELEMENTS, PLANETS
from nanochat.sources.world.people import NAMES
from nanochat.sources.world.quizzes import facts_with_different_answers, look_ups, make_options
from nanochat.sources.world.relations import Fact, all_facts, relations
from nanochat.sources.world.split import make_random, pick
from tasks.common import (
    EvalType,
    Task,
    multiple_choice,
    reference_text,
)

# Put before a question now and then, so that a question is recognised anywhere in a message.
LEADS = (
    "",
    "",
    "",
    "",
    "",
    "Hello! ",
    "I have a question. ",
    "Please tell me. ",
    "Next question. ",
)
AGAIN = "Same choices:"  # before a further question about choices that were listed before
HELD_OUT_LEADS = ("", "", "", "Here is something I wonder about. ", "Help me with this one. ")


class GeneratedTask(Task):
    """A task whose item `index` is made from (seed, split, index) alone."""

    def __init__(
        self,
        size: int,
        split: str = "train",
        *,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        self.size, self.split, self.seed = size, split, seed

    def num_rows(self) -> int:
        """Return the number of items asked for."""
        return self.size

    def row(self, index: int) -> Conversation:
        """Make item `index`."""
        return self.make(make_random(self.seed, f"{self.name}/{self.split}", index), index)

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Make one item with `rng`, which belongs to it alone."""
        raise NotImplementedError


@cache
def _evaluation_order() -> tuple[Fact, ...]:
    facts = list(all_facts())
    make_random(0, "evaluation order", 0).shuffle(facts)
    return tuple(facts)


class Facts(GeneratedTask):
    """Multiple choice with four options; every fact comes once, asked as never in training."""

    name = "Facts"
    eval_type: ClassVar[EvalType] = "categorical"
    chance = 0.25

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Ask for fact `index` of a fixed random order."""
        facts = _evaluation_order()
        fact = facts[index % len(facts)]
        question = pick(rng, HELD_OUT_LEADS) + pick(rng, fact.held_out_questions)
        options, gold = make_options(rng, fact)
        return multiple_choice(question, options, gold)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the chosen letter is the right one."""
        return completion.strip() == reference_text(conversation)


class ChoiceQuestions(GeneratedTask):
    """Training: multiple choice questions about facts, in the format of evaluation."""

    name = "ChoiceQuestions"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Ask for a fact in a training phrasing: once, or with more after it."""
        fact = pick(rng, all_facts())
        if rng.random() < 0.65:
            options, gold = make_options(rng, fact, pick(rng, NUM_CHOICES))
            question = pick(rng, LEADS) + pick(rng, fact.questions)
            return multiple_choice(question, options, gold)
        facts = facts_with_different_answers(rng, relations()[fact.relation], 4)
        asked = look_ups(rng, len(facts), 2 + int(rng.random() * 3))
        questions = [pick(rng, facts[place].questions) for place in asked]
        return series(questions, [fact.answer for fact in facts], asked)


def series(questions: Sequence[str], choices: Sequence[str], asked: Sequence[int]) -> Conversation:
    """Return a multiple choice question followed by more about the same choices.

    Choice `asked[i]` answers `questions[i]`. One list of choices then teaches several letters, at
    a third of the tokens.
    """
    first = multiple_choice(questions[0], choices, asked[0])
    turns = list(first.messages)
    for question, place in zip(questions[1:], asked[1:], strict=True):
        turns.append(Message("user", f"{AGAIN} {question}"))
        turns.append(Message("assistant", first.letters[place]))
    return Conversation(tuple(turns), letters=first.letters)


@cache
def _kinds() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return kinds of things with their members, no word in two of them."""
    kinds = {
        "an animal": [row[0] for row in ANIMALS],
        "a country": [row[0] for row in COUNTRIES],
        "a capital city": [row[1] for row in COUNTRIES],
        "a language": [row[3] for row in COUNTRIES if row[3]],
        "a chemical element": [row[0] for row in ELEMENTS if row[0] != "mercury"],
        "a planet": [name for name in PLANETS if name != "Mercury"],
        "a month": list(MONTHS),
        "a day of the week": list(DAYS),
        "a job": [row[0] for row in JOBS],
        "a colour": [row[1] for row in COLOURS],
        "the name of a person": list(NAMES),
    }
    return tuple((kind, tuple(dict.fromkeys(members))) for kind, members in kinds.items())


def _by_kind(rng: random.Random) -> tuple[str, list[str], int]:
    (kind, members), (_, others) = rng.sample(_kinds(), 2)
    options = [*rng.sample(others, 3)]
    gold = int(rng.random() * 4)
    options.insert(gold, pick(rng, members))
    shape = pick(rng, ("Which of these is {k}?", "Which word names {k}?", "Find {k}."))
    return shape.format(k=kind), options, gold


def _by_word(rng: random.Random) -> Conversation:
    kind = pick(rng, _kinds())[1]
    options = rng.sample(common_words() if rng.random() < 0.6 else kind, pick(rng, NUM_CHOICES))
    asked = look_ups(rng, len(options), 1 + int(rng.random() * 5))
    shape = pick(rng, ASK_WORD)
    return series([shape.format(w=options[place]) for place in asked], options, asked)


def _by_size(rng: random.Random) -> tuple[str, list[str], int]:
    numbers = rng.sample(range(2, 100), 4)
    largest = rng.random() < 0.5
    gold = numbers.index(max(numbers) if largest else min(numbers))
    word = "largest" if largest else "smallest"
    return f"Which number is the {word}?", [str(number) for number in numbers], gold


class BindingExercises(GeneratedTask):
    """Training: multiple choice that needs no knowledge, only the way from answer to letter.

    The answer is named in the question, stated before it, or told apart by its kind or size.
    """

    name = "BindingExercises"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Make one of four kinds of exercise."""
        shape = rng.random()
        if shape < 0.35:
            return _by_word(rng)
        if shape < 0.6:
            return multiple_choice(*_by_kind(rng))
        if shape < 0.7:
            return multiple_choice(*_by_size(rng))
        fact = pick(rng, all_facts())
        options, gold = make_options(rng, fact, pick(rng, NUM_CHOICES))
        question = f"{pick(rng, fact.statements)} {pick(rng, fact.questions)}"
        return multiple_choice(question, options, gold)


class Guesses(GeneratedTask):
    """Training: a question with a guess, answered by yes or no, then further guesses."""

    name = "Guesses"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Guess one to four times, in random order."""
        fact = pick(rng, all_facts())
        options, _ = make_options(rng, fact, 1 + int(rng.random() * 4))
        turns: list[str] = []
        for option in options:
            turns += [f"Is it {option}?", "Yes." if option == fact.answer else "No."]
        turns[0] = f"{pick(rng, fact.questions)} {turns[0]}"
        return chat(*turns)


class FactQuestions(GeneratedTask):
    """Training: facts asked in many ways and answered in a sentence, one to three a chat."""

    name = "FactQuestions"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Ask for one fact, sometimes for two or three in turn."""
        turns: list[str] = []
        count = 1 if rng.random() < 0.7 else 2 + int(rng.random() * 2)
        for _ in range(count):
            fact = pick(rng, all_facts())
            turns += [pick(rng, LEADS) + pick(rng, fact.questions), fact.reply]
        return chat(*turns)
