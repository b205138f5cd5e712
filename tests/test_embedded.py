"""The embedded world: documents that do not repeat, true facts, and what training never sees."""

import difflib
import re
from itertools import pairwise

import pytest

from nanochat.sources.embedded import (
    DEFAULT_SEED,
    KINDS,
    LESSONS,
    NUM_DOCUMENTS,
    generate_documents,
)
from nanochat.sources.world import choices
from nanochat.sources.world.everyday import OPPOSITES
from nanochat.sources.world.geography import COUNTRIES
from nanochat.sources.world.numbers import is_held_out_pair
from nanochat.sources.world.practice_texts import PRACTICE
from nanochat.sources.world.problem_texts import FAMILIES
from nanochat.sources.world.problems import draw_numbers, make_problem
from nanochat.sources.world.quizzes import facts_with_different_answers, look_ups, make_options
from nanochat.sources.world.relations import all_facts, count_facts, relations, with_article
from nanochat.sources.world.spelling import held_out_words, spell, training_words
from nanochat.sources.world.split import is_held_out, make_random
from nanochat.sources.world.words import WORDS
from nanochat.tools import calculate
from tasks.common import multiple_choice

SPELLED = re.compile(r"\b([a-z]+):([a-z](?:,[a-z])+)")
QUOTED = re.compile(r"['\"]([a-z]{2,})['\"]")
CALCULATION = re.compile(r"(\d+(?: ?[-+*/] ?\d+)+) ?= ?(\d+)")
# "a hour", "an dog"; letters that stand for themselves ("how often is a in") are left out.
WRONG_ARTICLE = re.compile(
    r"\b(?:[Aa] (?!uni|one|eu|in\b|is\b)[aeiou]\w|[Aa]n (?!hour)[^aeiou])\w*"
)


NUM_LESSONS = sum(count for count, _ in LESSONS)
BLOCK = re.compile(
    r"Multiple choice: (.*)\n((?:- .*\n?)+)(?:\nAnswer with the letter only\.\n([A-F]))?"
)


@pytest.fixture(scope="module")
def documents():
    return list(generate_documents(DEFAULT_SEED, NUM_LESSONS, NUM_LESSONS + 8000))


def test_a_document_depends_on_its_seed_and_number_only(documents):
    start = NUM_LESSONS + 100
    assert list(generate_documents(DEFAULT_SEED, start, start + 3)) == documents[100:103]
    assert list(generate_documents(DEFAULT_SEED + 1, start, start + 3)) != documents[100:103]
    assert list(generate_documents(DEFAULT_SEED, 5, 5)) == []


def test_fifty_thousand_documents_are_all_different_and_there_are_over_100_mb_of_them():
    seen = set()
    num_bytes = 0
    for start in range(0, NUM_DOCUMENTS, NUM_DOCUMENTS // 50):
        for text in generate_documents(DEFAULT_SEED, start, start + 1000):
            seen.add(text)
            num_bytes += len(text.encode())
    assert len(seen) >= 50_000
    assert num_bytes / len(seen) * NUM_DOCUMENTS > 100e6


@pytest.mark.slow
def test_no_document_of_the_default_seed_repeats():
    seen = {hash(text) for text in generate_documents(DEFAULT_SEED, 0, NUM_DOCUMENTS)}
    assert len(seen) == NUM_DOCUMENTS


def test_the_first_documents_are_the_lessons_in_their_order():
    done = 0
    for count, kind in LESSONS:
        for index in (done, done + count - 1):
            (text,) = generate_documents(DEFAULT_SEED, index, index + 1)
            assert text == kind(make_random(DEFAULT_SEED, "document", index))
        done += count


def test_each_line_of_a_judged_list_says_whether_its_word_was_asked_for():
    said = set()
    for index in range(300):
        (block,) = BLOCK.finditer(choices.judged_words(make_random(4, "judged", index)))
        (asked,) = (
            found[1].split(", ")
            for shape in choices.ASK_WORDS
            if (found := re.fullmatch(re.escape(shape).replace(r"\{w\}", "(.*)"), block[1]))
        )
        for line in block[2].splitlines():
            word, judgement = re.fullmatch(r"- (.*)=[A-F] (yes|no)", line).groups()
            assert (judgement == "yes") == (word in asked)
            said.add(judgement)
    assert said == {"yes", "no"}


@pytest.mark.parametrize("kind", [choices.found_word, choices.told_facts])
def test_the_letter_after_a_list_is_that_of_the_choice_the_question_names(kind):
    for index in range(200):
        text = kind(make_random(5, "asked", index))
        blocks = list(BLOCK.finditer(text))
        assert blocks
        assert all(block[3] for block in blocks)
        for block in blocks:
            named = dict(line[2:].rsplit("=", 1)[::-1] for line in block[2].split("\n") if line)
            assert named[block[3]].lower() in block[1].lower(), text


def test_facts_with_choices_are_true_and_asked_as_in_training():
    answers = {(q, fact.answer) for fact in all_facts() for q in fact.questions}
    checked = 0
    for index in range(200):
        for block in BLOCK.finditer(choices.asked_facts(make_random(6, "facts", index))):
            named = dict(line[2:].rsplit("=", 1)[::-1] for line in block[2].split("\n") if line)
            assert (block[1], named[block[3]]) in answers
            checked += 1
        for block in BLOCK.finditer(choices.judged_facts(make_random(6, "facts", index))):
            for line in block[2].splitlines():
                option, judgement = re.fullmatch(r"- (.*)=[A-F] (yes|no)", line).groups()
                assert ((block[1], option) in answers) == (judgement == "yes")
    assert checked == 200 * choices.BLOCKS


def test_documents_ask_in_the_format_of_the_chat():
    conversation = multiple_choice("What is hot?", ["ice", "fire"], 1)
    assert choices._asked("What is hot?", ["ice", "fire"], 1) == (
        f"{conversation.messages[0].content}\n{conversation.messages[1].content}"
    )


def test_shares_of_the_kinds_add_up_to_one():
    assert sum(KINDS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "kind", {**KINDS, choices.first_questions: 1}, ids=lambda kind: kind.__name__
)
def test_text_is_clean(kind):
    for index in range(300):
        text = kind(make_random(3, "clean", index))
        assert text.isascii()
        assert text == text.strip()
        assert "  " not in text.replace("\n  ", "\n")
        assert not re.search(r"[{}|]", text)
        assert 50 <= len(text) <= 2500
        assert not WRONG_ARTICLE.search(text), text


def test_calculations_are_right_and_never_with_held_out_numbers(documents):
    found = 0
    for text in documents:
        for expression, value in CALCULATION.findall(text):
            found += 1
            assert calculate(expression) == value
            assert not is_held_out_pair(*map(int, re.findall(r"\d+", expression)))
    assert found > 2000


def test_only_training_words_are_spelled_and_quoted(documents):
    held_out = set(held_out_words())
    spelled = 0
    for text in documents:
        for word, letters in SPELLED.findall(text):
            spelled += 1
            assert letters == ",".join(word)
            assert word not in held_out
        assert not held_out.intersection(QUOTED.findall(text))
    assert spelled > 2000


def test_words_are_split_completely_and_without_overlap():
    training, held_out = set(training_words()), set(held_out_words())
    assert training | held_out == set(WORDS.split())
    assert not training & held_out
    assert len(WORDS.split()) == len(set(WORDS.split())) > 1500
    assert 150 < len(held_out) < 250


def test_numbers_are_held_out_in_any_order():
    share = sum(is_held_out_pair(a, b) for a in range(2, 100) for b in range(2, 100)) / 98**2
    assert 0.08 < share < 0.12
    assert all(
        is_held_out_pair(a, b) == is_held_out_pair(b, a) for a in range(100) for b in range(100)
    )
    assert is_held_out("numbers", 7, 12) == is_held_out_pair(12, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_of_the_two_splits_share_neither_texts_nor_numbers(family):
    texts = FAMILIES[family]
    assert not set(texts.training) & set(texts.held_out)
    assert len(texts.training) >= (25 if family in ("add", "subtract", "multiply", "divide") else 6)
    rng = make_random(0, "draw", 0)
    for _ in range(300):
        assert not is_held_out_pair(*draw_numbers(rng, family, held_out=False))
        assert is_held_out_pair(*draw_numbers(rng, family, held_out=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_to_practise_share_no_text_with_those_taught_or_tested(family):
    texts = FAMILIES[family]
    assert len(PRACTICE[family]) >= (14 if len(texts.training) >= 25 else 6)
    assert len(set(PRACTICE[family])) == len(PRACTICE[family])
    for practised in PRACTICE[family]:
        for text in (*texts.training, *texts.held_out):
            assert difflib.SequenceMatcher(None, practised, text).ratio() < 0.9, practised


def test_problems_to_practise_keep_numbers_held_out_of_training():
    for index in range(300):
        for held_out in (False, True):
            rng = make_random(2, "practice", index)
            problem = make_problem(rng, held_out=held_out, practice=True)
            numbers = map(int, re.findall(r"\d+", problem.expression))
            assert is_held_out_pair(*numbers) == held_out
            assert "{" not in problem.question


def test_problems_are_solved_by_their_expression():
    for index in range(3000):
        problem = make_problem(make_random(1, "problem", index), held_out=index % 2 == 0)
        assert calculate(problem.expression) == str(problem.value)
        assert problem.value >= 2
        for number in re.findall(r"\d+", problem.expression):
            assert number in re.findall(r"\d+", problem.question)


def test_there_are_some_hundred_facts_each_with_wrong_answers_to_offer():
    assert 400 <= count_facts() <= 700
    assert count_facts() == (
        sum(len(r.facts) for r in relations().values() if not r.is_inverse) - len(OPPOSITES)
    )
    for fact in all_facts():
        assert len(fact.wrong) >= 3, fact
        assert fact.answer not in fact.wrong
        assert len(set(fact.questions)) == len(fact.questions) >= 4
        assert len(fact.held_out_questions) >= 2


def test_a_question_has_one_right_answer_among_its_options():
    right = {(f.relation, f.subject): set() for f in all_facts()}
    for fact in all_facts():
        right[fact.relation, fact.subject].add(fact.answer)
    for index, fact in enumerate(all_facts()):
        options, gold = make_options(make_random(0, "options", index), fact)
        assert options[gold] == fact.answer
        assert len(set(options)) == 4
        assert len(right[fact.relation, fact.subject].intersection(options)) == 1


def test_no_held_out_question_is_asked_in_training():
    asked = {question for fact in all_facts() for question in fact.questions}
    asked |= {question for fact in all_facts() for question in fact.follow_ups}
    held_out = {question for fact in all_facts() for question in fact.held_out_questions}
    held_out |= {question for fact in all_facts() for question in fact.held_out_follow_ups}
    assert not asked & held_out
    everything = "\n".join(sorted(asked))
    assert not [question for question in held_out if question in everything]


def test_no_document_holds_a_held_out_question(documents):
    sentences = set()
    for text in documents:
        for sentence in re.split(r"(?<=[.?!])\s+|\n", text):
            sentences.add(sentence.split(": ")[-1].strip(' -"'))
    held_out = {first_sentence(q) for fact in all_facts() for q in fact.held_out_questions}
    assert not held_out & sentences
    asked = {first_sentence(q) for fact in all_facts() for q in fact.questions}
    assert len(asked & sentences) > 2000  # the search does find questions


def first_sentence(question):
    return re.split(r"(?<=[.?!])\s", question)[0]


def test_look_ups_never_ask_twice_in_a_row_and_facts_of_a_list_do_not_compete():
    rng = make_random(0, "look-ups", 0)
    for name in relations():
        facts = facts_with_different_answers(rng, relations()[name], 4)
        assert len({fact.answer for fact in facts}) == len(facts) >= 3
        places = look_ups(rng, len(facts), 8)
        assert all(a != b for a, b in pairwise(places))


def test_capitals_and_countries_are_unique_and_articles_follow_the_sound():
    assert (
        len({row[0] for row in COUNTRIES}) == len({row[1] for row in COUNTRIES}) == len(COUNTRIES)
    )
    assert [with_article(word) for word in ("owl", "hour", "unicorn", "dog", "umbrella")] == [
        "an owl",
        "an hour",
        "a unicorn",
        "a dog",
        "an umbrella",
    ]


def test_spelling_is_the_word_and_its_letters():
    assert spell("cat") == "cat:c,a,t"
