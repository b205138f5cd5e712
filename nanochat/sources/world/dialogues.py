"""Dialogue documents: two people greet each other, ask, explain and say goodbye."""

import random

from nanochat.sources.world.people import GOODS, PLACES, THINGS, TIMES, two_people
from nanochat.sources.world.relations import all_facts
from nanochat.sources.world.split import pick

_HELLOS = (
    ("Hello, {b}!", "Hello, {a}!"),
    ("Good morning, {b}.", "Good morning, {a}."),
    ("Hi, {b}. How are you?", "I am well, thank you."),
    ("Good evening, {b}.", "Good evening, {a}. It is good to see you."),
    ("Hello, {b}. How are you today?", "I am fine, {a}. And you?"),
)
_TALK = (
    ("Where are you going?", "I am going for a walk {place}."),
    ("What have you got there?", "It is a {thing}. I found it {place}."),
    ("Do you like {goods}?", "Yes, I like {goods} very much."),
    ("Can you help me?", "Of course. What can I do for you?"),
    ("What did you do yesterday?", "I was {place} with my brother."),
    ("I have lost my {thing}.", "I am sorry to hear that. Let us look for it."),
    ("Why are you so happy?", "Because I have a new {thing}."),
    ("Why are you sad?", "Because my {thing} is broken."),
    ("What do you want to buy?", "I want to buy some {goods}."),
    ("Is it cold outside?", "Yes, it is cold. Take your coat."),
    ("Are you hungry?", "Yes, I have eaten nothing since the morning."),
)
_ASKS = ("", "", "Tell me one thing. ", "I have a question. ", "You know a lot. ")
_THANKS = (
    ("Thank you. I did not know that.", "You are welcome."),
    ("That is interesting.", "Yes, I think so too."),
    ("You are right.", "I learned it at school."),
    ("Are you sure?", "Yes, I am sure."),
)
_GOODBYES = (
    ("Goodbye, {b}!", "Goodbye, {a}!"),
    ("I must go now.", "See you tomorrow, {a}."),
    ("It is late. Good night, {b}.", "Good night, {a}."),
    ("See you soon.", "See you soon, {a}."),
)


def dialogue(rng: random.Random) -> str:
    """Write a talk of two people, as lines with names or as quoted speech."""
    first, second = two_people(rng)
    slots = {
        "a": first.name,
        "b": second.name,
        "place": pick(rng, PLACES),
        "thing": pick(rng, THINGS)[0],
        "goods": pick(rng, GOODS),
    }
    turns = [pick(rng, _HELLOS)]
    turns += rng.sample(_TALK, int(rng.random() * 3))
    for _ in range(1 + int(rng.random() * 3)):
        fact = pick(rng, all_facts())
        turns.append((pick(rng, _ASKS) + pick(rng, fact.questions), pick(rng, fact.statements)))
        if rng.random() < 0.4:
            turns.append(pick(rng, _THANKS))
    turns.append(pick(rng, _GOODBYES))
    lines = [line.format_map(slots) for turn in turns for line in turn]
    names = (first.name, second.name)
    if rng.random() < 0.6:
        return "\n".join(f"{names[i % 2]}: {line}" for i, line in enumerate(lines))
    opening = f"{pick(rng, TIMES)}, {first.name} met {second.name} {slots['place']}."
    spoken = [_said(line, names[i % 2]) for i, line in enumerate(lines)]
    return "\n".join([opening, *spoken])


def _said(line: str, name: str) -> str:
    """Return the line as quoted speech."""
    if line[-1] == ".":
        return f'"{line[:-1]}," said {name}.'
    return f'"{line}" {"asked" if line[-1] == "?" else "said"} {name}.'
