"""Conversation: who nanochat is, small talk, talks of several turns, system messages, stories."""

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from nanochat.conversation import Conversation, Message, chat
from nanochat.sources.world.people import GOODS, NAMES
from nanochat.sources.world.relations import Fact, all_facts, relations
from nanochat.sources.world.split import pick
from nanochat.sources.world.stories import PLOTS, story_slots, tell
from tasks import chat_texts as texts
from tasks.common import EvalType
from tasks.embedded_facts import LEADS, GeneratedTask

_WORD = re.compile(r"[A-Za-z0-9]+")


def says(completion: str, phrase: str) -> bool:
    """Say whether the words of `phrase` stand next to each other in the completion."""
    wanted = [word.lower() for word in _WORD.findall(phrase)]
    found = [word.lower() for word in _WORD.findall(completion)]
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found) - len(wanted) + 1))


def _about_itself(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """Return a question about nanochat and its answer."""
    kind = rng.random()
    if kind < 0.55:
        question = pick(rng, texts.HELD_OUT_WHO if held_out else texts.WHO)
        asks_for_person = question.startswith("Are you a")
        return question, texts.I_AM_NO_PERSON if asks_for_person else texts.I_AM
    if kind < 0.8:
        return pick(rng, texts.HELD_OUT_MADE if held_out else texts.MADE), texts.MADE_BY
    return pick(rng, texts.HELD_OUT_ABLE if held_out else texts.ABLE), texts.ABLE_TO


class Identity(GeneratedTask):
    """Who are you, who made you, what can you do; right when the answer says "nanochat"."""

    name = "Identity"
    eval_type: ClassVar[EvalType] = "generative"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Ask once, in training sometimes with a greeting before or thanks after it."""
        question, answer = _about_itself(rng, held_out=self.split == "test")
        if self.split == "test":
            lead = pick(rng, ("", "", "", "Good day. ", "One more thing. ", "Excuse me. "))
            return chat(lead + question, answer)
        turns = [
            pick(rng, ("", "", "", "Hello! ", "Hi. ", "I have a question. ")) + question,
            answer,
        ]
        if rng.random() < 0.15:
            turns = [*pick(rng, texts.SMALL_TALK), *turns]
        if rng.random() < 0.15:
            turns += [*_about_itself(rng, held_out=False)]
        if rng.random() < 0.1:
            turns += [*pick(rng, texts.CLOSINGS)]
        return chat(*turns)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the completion names nanochat."""
        return says(completion, "nanochat")


@cache
def _linked_facts() -> tuple[tuple[Fact, Fact], ...]:
    """Return pairs (first, second) about one subject where the second can be asked by pronoun."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in all_facts():
        by_subject.setdefault(fact.subject, []).append(fact)
    return tuple(
        (first, second)
        for facts in by_subject.values()
        for first in facts
        for second in facts
        if first is not second and second.follow_ups and first.follow_ups
    )


ANOTHER = ("And what about {s}?", "And {s}?", "What about {s}?", "The same question for {s}.")
HELD_OUT_ANOTHER = ("Now the same for {s}.", "And how about {s}?")


def _follow_up(rng: random.Random, *, held_out: bool) -> tuple[list[str], str]:
    """Return a question with its answer and a follow-up about the same thing; and the key."""
    first, second = pick(rng, _linked_facts())
    question = pick(rng, first.questions)
    follow = pick(rng, second.held_out_follow_ups if held_out else second.follow_ups)
    return [question, first.reply, follow, second.reply], second.answer


def _same_question(rng: random.Random, *, held_out: bool) -> tuple[list[str], str]:
    """Return a question with its answer and the same asked about something else; and the key."""
    names = ("capital", "continent", "language", "class", "legs", "young", "symbol", "opposite")
    first, second = rng.sample(relations()[pick(rng, names)].facts, 2)
    follow = pick(rng, HELD_OUT_ANOTHER if held_out else ANOTHER)
    question = pick(rng, first.questions)
    return [question, first.reply, follow.format(s=_as_asked(second)), second.reply], second.answer


def _as_asked(fact: Fact) -> str:
    """Return the subject as a question names it: animals with their article."""
    if fact.relation in ("class", "legs"):
        return fact.statements[0].split(" ")[0].lower() + " " + fact.subject
    return fact.subject


def _name_said(rng: random.Random, *, held_out: bool) -> tuple[list[str], str]:
    name = pick(rng, NAMES)
    said = pick(rng, texts.HELD_OUT_MY_NAME if held_out else texts.MY_NAME)
    asked = pick(rng, texts.HELD_OUT_ASK_NAME if held_out else texts.ASK_NAME)
    turns = [said, texts.NICE_TO_MEET, asked, texts.YOUR_NAME]
    return [turn.format(n=name) for turn in turns], name


def _thing_said(rng: random.Random, *, held_out: bool) -> tuple[list[str], str]:
    goods = pick(rng, GOODS)
    said = pick(rng, texts.HELD_OUT_I_LIKE if held_out else texts.I_LIKE)
    asked = pick(rng, texts.HELD_OUT_ASK_THING if held_out else texts.ASK_THING)
    turns = [said, texts.GOOD_TO_KNOW, asked, texts.YOU_SAID]
    return [turn.format(x=goods) for turn in turns], goods


_TWO_TURNS = (_follow_up, _follow_up, _same_question, _name_said, _thing_said)


class TwoTurn(GeneratedTask):
    """A second turn that means nothing without the first; right when the answer says the key.

    Of five items two ask on about the same thing ("And its continent?"), one asks the same of
    another thing, two ask for what the user said before.
    """

    name = "TwoTurn"
    eval_type: ClassVar[EvalType] = "generative"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Make one talk; training ones now and then go on for a turn or two."""
        held_out = self.split == "test"
        turns, _ = pick(rng, _TWO_TURNS)(rng, held_out=held_out)
        if not held_out:
            if rng.random() < 0.2:
                turns += _follow_up(rng, held_out=False)[0][:2]
            if rng.random() < 0.15:
                turns += pick(rng, texts.CLOSINGS)
        return chat(*turns)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the completion holds what the reference adds to the question."""
        return says(completion, expected_key(conversation))


def expected_key(conversation: Conversation) -> str:
    """Return the words a right second answer must hold: the reference without its frame."""
    reference = conversation.messages[-1].text
    key = _keys().get(reference)
    if key is not None:
        return key
    words = _WORD.findall(reference)
    return str(words[-1])


@cache
def _keys() -> dict[str, str]:
    return {fact.reply: fact.answer for fact in all_facts()}


class SmallTalk(GeneratedTask):
    """Training: greetings, thanks and goodbyes around a fact or two."""

    name = "SmallTalk"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Make a chat of one to four turns."""
        turns: list[str] = []
        if rng.random() < 0.6:
            turns += pick(rng, texts.SMALL_TALK)
        for _ in range(int(rng.random() * 3)):
            if rng.random() < 0.25:
                turns += [pick(rng, texts.UNKNOWN), texts.I_DO_NOT_KNOW]
                continue
            fact = pick(rng, all_facts())
            turns += [pick(rng, LEADS) + pick(rng, fact.questions), fact.reply]
        if not turns or rng.random() < 0.6:
            turns += pick(rng, texts.CLOSINGS)
        return chat(*turns)


class SystemMessages(GeneratedTask):
    """Training: a system message that names the user or asks for a manner of answering."""

    name = "SystemMessages"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Make a chat of one or two turns under a system message."""
        name = pick(rng, NAMES)
        kind = pick(rng, ("name", "name", "short", "polite"))
        choices: dict[str, Sequence[str]] = {
            "name": texts.SYSTEM_NAME,
            "short": texts.SYSTEM_SHORT,
            "polite": texts.SYSTEM_POLITE,
        }
        turns: list[str] = []
        for _ in range(1 + int(rng.random() * 2)):
            fact = pick(rng, all_facts())
            answers = {
                "name": f"{name}: {fact.reply}",
                "short": fact.answer,
                "polite": f"Gladly. {fact.reply}",
            }
            turns += [pick(rng, fact.questions), answers[kind]]
        system = Message("system", pick(rng, choices[kind]).format(n=name))
        return Conversation((system, *chat(*turns).messages))


class Stories(GeneratedTask):
    """Training: a short story on request, sometimes about people the user names."""

    name = "Stories"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Ask for a story and tell it."""
        slots = story_slots(rng)
        named = rng.random() < 0.5
        request = pick(rng, texts.STORY_REQUESTS_ABOUT if named else texts.STORY_REQUESTS)
        return chat(request.format_map(slots), tell(rng, pick(rng, PLOTS), slots))
