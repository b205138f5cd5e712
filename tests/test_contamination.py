"""Contamination: shared runs of words are found, by whatever way the texts are read."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.contamination import (
    BATCH_CHARS,
    Contamination,
    run_length,
    training_conversations,
    training_documents,
)
from nanochat.conversation import chat
from nanochat.sources.parquet import ParquetSource

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
PROBLEM = " ".join(WORDS)


def seen(problems: list[str], *texts: str) -> frozenset[int]:
    check = Contamination({"set": problems})
    check.read(texts)
    return check.results()["set"].seen


def test_the_run_is_the_5th_percentile_of_the_lengths_between_8_and_13() -> None:
    assert run_length([3] * 100) == 8
    assert run_length([10] * 100) == 10
    assert run_length([40] * 100) == 13
    assert run_length([9] * 10 + [50] * 90) == 9
    assert run_length([9] * 2 + [50] * 98) == 13
    assert run_length([]) == 13


@pytest.mark.parametrize(
    ("text", "is_seen"),
    [
        (PROBLEM, True),
        (f"It begins here: {' '.join(WORDS[:13])}!", True),
        (" ".join(WORDS[1:]), True),
        (" ".join(WORDS[:12]), False),  # a run of 13 words is needed
        (PROBLEM.upper().replace(" ", ",\n - "), True),  # neither case nor punctuation counts
        (PROBLEM.replace("seven", "Seven-ish"), False),
        (" ".join(reversed(WORDS)), False),
        ("", False),
    ],
)
def test_a_problem_is_seen_where_13_words_of_it_stand_in_a_row(text: str, is_seen: bool) -> None:
    assert seen([PROBLEM, "another text " * 20], text) == ({0} if is_seen else frozenset())


def test_a_run_does_not_go_over_the_border_of_two_texts() -> None:
    assert seen([PROBLEM], " ".join(WORDS[:7]), " ".join(WORDS[7:])) == frozenset()


def test_other_scripts_are_compared_too() -> None:
    words = [f"\u8bcd{chr(0x4E00 + i)}" for i in range(20)]
    assert seen([" ".join(words)], " ".join(words)) == {0}
    assert seen([" ".join(words)], " ".join(words[::-1])) == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        PROBLEM.replace("one", "\u201cone\u201d").replace("two", "\u2018two\u2019"),
        PROBLEM.replace(" ", "\u2014"),  # em dashes
        PROBLEM.replace(" ", "\u00a0\u2026 "),  # a space that does not break, an ellipsis
        PROBLEM.replace(" ", "\u3001"),  # ideographic commas
        PROBLEM.replace(" ", "\uff0c"),  # and one of full width
    ],
)
def test_typographic_punctuation_does_not_count(text: str) -> None:
    assert seen([PROBLEM], text) == {0}
    assert seen([text], PROBLEM) == {0}


def test_curly_and_straight_apostrophes_are_the_same() -> None:
    problem = f"I don't know, but {PROBLEM}, isn't it?"
    assert seen([" ".join(problem.split()[:13])], problem.replace("'", "\u2019")) == {0}


def test_case_does_not_count_in_other_scripts() -> None:
    words = [
        "\u041f\u0440\u0438\u0432\u0435\u0442",
        "\u00c9cole",
        "Stra\u00dfe",
        "\u03a3\u03af\u03b3\u03bc\u03b1",
    ]
    problem = " ".join(f"{words[i % 4]}{i}" for i in range(16))
    assert problem.upper() != problem != problem.lower()
    assert seen([problem], problem.upper()) == {0}
    assert seen([problem], problem.lower()) == {0}


def test_marks_are_part_of_their_words() -> None:
    words = [f"\u0939\u093f\u0928\u094d\u0926\u0940{i}" for i in range(13)]  # with vowel signs
    assert seen([" ".join(words)], " ".join(words)) == {0}
    check = Contamination({"set": [" ".join(words[:4])]})  # 4 words, not the 12 of its letters
    assert check.results()["set"].num_checked == 0


def test_problems_that_are_too_short_are_not_checked() -> None:
    check = Contamination({"set": ["Why?", PROBLEM, "And what about this?"]})
    check.read(["Why?", "And what about this?"])
    result = check.results()["set"]
    assert (result.run_length, result.num_checked, result.seen) == (8, 1, frozenset())
    assert result.share == 0.0


def test_each_set_has_a_run_length_of_its_own() -> None:
    check = Contamination({"long": [PROBLEM], "short": [" ".join(WORDS[:8])], "none": []})
    check.read([" ".join(WORDS[:9])])
    results = check.results()
    assert [results[name].run_length for name in results] == [13, 8, 13]
    assert [results[name].share for name in results] == [0.0, 1.0, 0.0]


def test_no_problems_at_all_are_no_error() -> None:
    check = Contamination({"none": []})
    check.read([PROBLEM])
    assert check.results()["none"].num_checked == 0


def test_it_agrees_with_comparing_all_runs_of_words() -> None:
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(4)]
    problems = [" ".join(draw.choices(vocabulary, k=draw.randint(5, 30))) for _ in range(60)]
    texts = [" ".join(draw.choices(vocabulary, k=200)) for _ in range(20)]
    length = run_length([len(problem.split()) for problem in problems])
    runs = {
        tuple(words[i : i + length])
        for words in (text.split() for text in texts)
        for i in range(len(words) - length + 1)
    }
    expected = {
        index
        for index, words in enumerate(problem.split() for problem in problems)
        if any(tuple(words[i : i + length]) in runs for i in range(len(words) - length + 1))
    }
    assert 5 < len(expected) < 55
    assert seen(problems, *texts) == expected


def test_two_readers_find_together_what_one_finds() -> None:
    problems = [f"{i} " + " ".join(WORDS[i:] + WORDS[:i]) for i in range(5)]
    texts = [problems[1], "nothing of it", problems[4]]
    together = Contamination({"set": problems})
    for rank in range(2):
        reader = Contamination({"set": problems})
        reader.read(texts[rank::2])
        together.add(reader.found())
    assert together.results()["set"].seen == seen(problems, *texts) != frozenset()


def test_documents_and_conversations_are_dealt_to_ranks(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(300)]
    for number in range(2):
        table = pa.table({"text": texts[number * 150 : number * 150 + 150]})
        pq.write_table(table, tmp_path / f"shard_{number}.parquet", row_group_size=40)
    source = ParquetSource.from_folder(tmp_path)
    parts = [list(training_documents(source, rank=rank, size=3)) for rank in range(3)]
    assert sorted(text for part in parts for text in part) == sorted(texts[:150])
    assert all(parts)
    conversations = [chat(f"question {i}", f"answer {i}") for i in range(5)]
    read = [list(training_conversations(conversations, rank=rank, size=2)) for rank in range(2)]
    assert read[0] == [f"question {i}\nanswer {i}" for i in (0, 2, 4)]
    assert len(read[1]) == 2


def test_texts_longer_than_a_batch_are_read() -> None:
    filler = "filler " * (BATCH_CHARS // 7)
    assert seen([PROBLEM], filler, f"{filler} {PROBLEM} {filler}") == {0}
