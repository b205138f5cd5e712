"""Facts and how they are put into words.

A `Relation` is one kind of question ("capital"), a `Fact` one row of it with every phrasing
already filled in, so that writing a document is mostly picking strings. Each relation carries
statements for documents, questions for training, and questions that only evaluation may use.

Slots of a phrasing: {s} subject, {S} subject at the start of a sentence, {an} and {An} subject
with its article, {p} and {P} plural, {a} answer, {an_a} answer with its article.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from nanochat.sources.world import (
    animal_phrasings,
    calendar_phrasings,
    everyday_phrasings,
    geography_phrasings,
    science_phrasings,
)
from nanochat.sources.world.everyday import (
    COLOURS,
    DAYS,
    DAYS_OF_MONTH,
    EVENTS,
    IRREGULAR_PLURALS,
    JOBS,
    MAKERS,
    MONTHS,
    OPPOSITES,
    ORDINALS,
    PARTS,
    PAST_TENSES,
    PLACES_ONE_IS_ON,
    SIMILAR_WORDS,
    SOURCES,
    USES,
)
from nanochat.sources.world.geography import CONTINENTS, COUNTRIES
from nanochat.sources.world.nature import (
    ANIMALS,
    ELEMENTS,
    PLANET_FEATURES,
    PLANETS,
    SIMILAR_FOODS,
    SIMILAR_HOMES,
)
from nanochat.sources.world.phrasing import Phrasing

Forms = Mapping[str, str]

PHRASINGS: dict[str, Phrasing] = {
    **geography_phrasings.PHRASINGS,
    **animal_phrasings.PHRASINGS,
    **science_phrasings.PHRASINGS,
    **calendar_phrasings.PHRASINGS,
    **everyday_phrasings.PHRASINGS,
}


@dataclass(frozen=True)
class Fact:
    """One true fact with its phrasings filled in.

    `about` holds statements that begin with a pronoun ("Its capital is Paris."), for paragraphs
    and for the second turn of a chat; `wrong` the other answers a quiz may offer.
    """

    relation: str
    subject: str
    answer: str
    statements: tuple[str, ...]
    about: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    reply: str
    follow_ups: tuple[str, ...]
    held_out_follow_ups: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """One kind of question: its facts in table order, found again by subject.

    `is_inverse` marks the same facts asked from the other side; they are not counted twice.
    """

    name: str
    facts: tuple[Fact, ...]
    is_inverse: bool = False
    by_subject: Mapping[str, Fact] = field(default_factory=dict, repr=False)


def with_article(noun: str) -> str:
    """Return the noun with "a" or "an" before it."""
    takes_an = noun[0] in "aeiou" and not noun.startswith(("uni", "eu", "one"))
    return ("an " if takes_an or noun.startswith("hour") else "a ") + noun


def capitalized(text: str) -> str:
    """Return the text with its first letter in upper case and the rest as it was."""
    return text[:1].upper() + text[1:]


def _forms(subject: str, answer: str, plural: str) -> dict[str, str]:
    article_subject = with_article(subject)
    return {
        "s": subject,
        "S": capitalized(subject),
        "an": article_subject,
        "An": capitalized(article_subject),
        "p": plural,
        "P": capitalized(plural),
        "a": answer,
        "A": capitalized(answer),
        "an_a": with_article(answer),
        "An_a": capitalized(with_article(answer)),
    }


def _relation(
    name: str,
    rows: Iterable[tuple[str, str]],
    *,
    plurals: Mapping[str, str] | None = None,
    extra: Mapping[str, Forms] | None = None,
    pool: Iterable[str] | None = None,
    similar: tuple[frozenset[str], ...] = (),
    is_inverse: bool = False,
) -> Relation:
    """Fill the phrasings of `name` for each (subject, answer) row whose answer is not empty."""
    phrasing = PHRASINGS[name]
    kept = [(subject, answer) for subject, answer in rows if subject and answer]
    answers = tuple(dict.fromkeys(pool if pool is not None else (answer for _, answer in kept)))
    right = {subject: {a for s, a in kept if s == subject} for subject, _ in kept}
    facts = []
    for subject, answer in kept:
        forms = _forms(subject, answer, (plurals or {}).get(subject, subject))
        forms.update((extra or {}).get(subject, {}))
        near = set().union(*(group for group in similar if answer in group)) | right[subject]

        def fill(templates: tuple[str, ...], forms: dict[str, str] = forms) -> tuple[str, ...]:
            return tuple(template.format_map(forms) for template in templates)

        facts.append(
            Fact(
                relation=name,
                subject=subject,
                answer=answer,
                statements=fill(phrasing.statements),
                about=fill(phrasing.about),
                questions=fill(phrasing.questions),
                held_out_questions=fill(phrasing.held_out_questions),
                reply=fill((phrasing.statements[0],))[0],
                follow_ups=fill(phrasing.follow_ups),
                held_out_follow_ups=fill(phrasing.held_out_follow_ups),
                wrong=tuple(other for other in answers if other not in near),
            )
        )
    by_subject = {fact.subject: fact for fact in facts}
    return Relation(name, tuple(facts), is_inverse, by_subject)


def _geography() -> list[Relation]:
    capitals = [(name, capital) for name, capital, _, _ in COUNTRIES]
    return [
        _relation("capital", capitals),
        _relation("capital_of", [(b, a) for a, b in capitals], is_inverse=True),
        _relation("continent", [(row[0], row[2]) for row in COUNTRIES], pool=CONTINENTS),
        _relation("language", [(row[0], row[3]) for row in COUNTRIES]),
    ]


def _nature() -> list[Relation]:
    plurals = {row[0]: row[1] for row in ANIMALS}

    def animals(name: str, column: int, similar: tuple[frozenset[str], ...] = ()) -> Relation:
        rows = [(row[0], row[column]) for row in ANIMALS]
        return _relation(name, rows, plurals=plurals, similar=similar)

    classes = [(row[0], row[2]) for row in ANIMALS]
    many = {row[0]: {"as": row[2] if row[2] == "fish" else row[2] + "s"} for row in ANIMALS}
    young = [(row[4], row[0]) for row in ANIMALS]
    sounds = [(row[5], row[0]) for row in ANIMALS]
    orders = list(zip(ORDINALS, PLANETS, strict=False))
    return [
        _relation("class", classes, plurals=plurals, extra=many),
        animals("legs", 3),
        animals("young", 4),
        _relation("young_of", young, plurals=plurals, is_inverse=True),
        animals("sound", 5),
        _relation("sound_of", sounds, plurals=plurals, is_inverse=True),
        animals("home", 6, SIMILAR_HOMES),
        animals("food", 7, SIMILAR_FOODS),
        _relation("planet_order", orders),
        _relation("planet_feature", PLANET_FEATURES, pool=PLANETS),
        _relation("symbol", ELEMENTS),
        _relation("symbol_of", [(b, a) for a, b in ELEMENTS], is_inverse=True),
    ]


def _calendar() -> list[Relation]:
    after = list(zip(MONTHS, MONTHS[1:] + MONTHS[:1], strict=True))
    day_after = list(zip(DAYS, DAYS[1:] + DAYS[:1], strict=True))
    return [
        _relation("month_after", after),
        _relation("month_before", [(b, a) for a, b in after], is_inverse=True),
        _relation("month_order", zip(ORDINALS, MONTHS, strict=True)),
        _relation(
            "month_days",
            zip(MONTHS, DAYS_OF_MONTH, strict=True),
            pool=("7", "12", "24", "28", "30", "31"),
        ),
        _relation("day_after", day_after),
        _relation("day_before", [(b, a) for a, b in day_after], is_inverse=True),
    ]


def _everyday() -> list[Relation]:
    parts = {whole: {"u": unit} for whole, unit, _ in PARTS}
    both = [pair for a, b in OPPOSITES for pair in ((a, b), (b, a))]
    at = {
        job: {"at": "on", "At": "On"} if place in PLACES_ONE_IS_ON else {"at": "in", "At": "In"}
        for job, place, _ in JOBS
    }
    events = {event: {"e": capitalized(sentence), "f": sentence} for event, sentence, _ in EVENTS}
    return [
        _relation("parts", [(whole, count) for whole, _, count in PARTS], extra=parts),
        _relation("opposite", both, similar=SIMILAR_WORDS),
        _relation("colour", COLOURS),
        _relation("workplace", [(job, place) for job, place, _ in JOBS], extra=at),
        _relation("tool", [(job, tool) for job, _, tool in JOBS]),
        _relation("source", SOURCES),
        _relation("use", USES),
        _relation("year", [(event, year) for event, _, year in EVENTS], extra=events),
        _relation("maker", MAKERS),
        _relation("plural", IRREGULAR_PLURALS),
        _relation("past", PAST_TENSES),
    ]


@cache
def relations() -> Mapping[str, Relation]:
    """Return every relation by name, in a fixed order."""
    every = [*_geography(), *_nature(), *_calendar(), *_everyday()]
    return {relation.name: relation for relation in every}


@cache
def all_facts() -> tuple[Fact, ...]:
    """Return every fact of every relation, the inverse directions included."""
    return tuple(fact for relation in relations().values() for fact in relation.facts)


def count_facts() -> int:
    """Return the number of distinct facts, a pair asked in both directions counted once."""
    directed = sum(len(r.facts) for r in relations().values() if not r.is_inverse)
    return directed - len(OPPOSITES)
