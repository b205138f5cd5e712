"""Tasks: slices, mixtures, the formats of the 2025 nanochat, scoring, what is kept back."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from nanochat.common import UserError
from nanochat.conversation import Conversation, chat
from nanochat.core_bundle import bundle_digest, load_bundle
from nanochat.sources.world.numbers import is_held_out_pair
from nanochat.sources.world.problem_texts import FAMILIES
from nanochat.sources.world.relations import all_facts
from nanochat.sources.world.spelling import held_out_words, training_words
from nanochat.tools import calculate
from tasks import chat_texts, embedded_chat, embedded_facts, mixtures, spelling_phrasings
from tasks.common import (
    LETTERS,
    Task,
    TaskMixture,
    TaskSequence,
    final_answer,
    multiple_choice,
)
from tasks.customjson import CustomJSON
from tasks.embedded_core import BUNDLE, ITEMS_PER_TASK, write_bundle
from tasks.spellingbee import SimpleSpelling, SpellingBee

EVALUATION = {task.name: task for task in mixtures.evaluation_tasks("embedded")}


class Numbered(Task):
    name = "numbered"

    def __init__(self, label, size, **slicing):
        super().__init__(**slicing)
        self.label, self.size = label, size

    def num_rows(self):
        return self.size

    def row(self, index):
        return chat(f"{self.label}{index}", "yes")


def labels(task):
    return [conversation.messages[0].content for conversation in task]


def user_text(conversation):
    return "\n".join(m.text for m in conversation.messages if m.role != "assistant")


# ---- slices, sequences, mixtures ------------------------------------------------------------


def test_a_slice_counts_and_maps_rows_and_clamps_its_stop():
    assert labels(Numbered("a", 10, start=2, stop=9, step=3)) == ["a2", "a5", "a8"]
    assert len(Numbered("a", 10, start=4, stop=1000)) == 6
    assert len(Numbered("a", 10, start=20)) == 0
    with pytest.raises(IndexError):
        Numbered("a", 3)[3]


@pytest.mark.parametrize("slicing", [{"start": -1}, {"step": 0}, {"start": 5, "stop": 2}])
def test_a_slice_without_meaning_is_refused(slicing):
    with pytest.raises(UserError, match="has no meaning"):
        Numbered("a", 10, **slicing)


def test_a_sequence_keeps_the_order_of_its_tasks():
    empty = Numbered("none", 0)
    assert labels(TaskSequence([Numbered("a", 2), empty, Numbered("b", 2)])) == [
        "a0",
        "a1",
        "b0",
        "b1",
    ]


def test_a_mixture_is_the_permutation_of_random_42_and_oversamples_what_is_listed_twice():
    one, two = Numbered("a", 3), Numbered("b", 4)
    expected = labels(TaskSequence([one, two, one]))
    random.Random(42).shuffle(expected)
    mixture = labels(TaskMixture([one, two, one]))
    assert mixture == expected
    assert Counter(mixture)["a1"] == 2
    assert labels(TaskMixture([one, two, one], stop=4)) == expected[:4]


# ---- formats and scoring --------------------------------------------------------------------


def test_multiple_choice_has_the_documented_form():
    conversation = multiple_choice("What is hot?", ["ice", "fire"], 1)
    assert conversation.messages[0].content == (
        "Multiple choice: What is hot?\n- ice=A\n- fire=B\n\nAnswer with the letter only."
    )
    assert conversation.messages[1].content == "B"
    assert conversation.letters == ("A", "B")
    with pytest.raises(UserError, match="5 choices, but only 4 letters"):
        multiple_choice("?", ["a"] * 5, 0)
    with pytest.raises(UserError, match="its answer is 2, not a number from 0 to 1"):
        multiple_choice("?", ["a", "b"], 2)
    with pytest.raises(UserError, match="its letters are A, A; each must come once"):
        multiple_choice("?", ["a", "b"], 0, letters=["A", "A"])
    with pytest.raises(UserError, match=r"its choices are \['a', None\], not a list of texts"):
        multiple_choice("?", ["a", None], 0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so #### 1,234", "1234"),
        ("#### -7", "-7"),
        ("#### 2.5 m", "2.5"),
        ("it is\n#### 19.", "19."),
        ("#### 18.00", "18.00"),
        ("#### +3", None),
        ("#### $3", None),
        ("#### 3 and #### 4", "3"),
        ("####5", None),
        ("19", None),
        ("#### ,", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_first_number_after_its_mark(text, answer):
    assert final_answer(text) == answer


def test_a_task_that_trains_only_cannot_be_evaluated():
    with pytest.raises(UserError, match="numbered is for training"):
        Numbered("a", 1).evaluate(chat("a", "b"), "b")


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_accepts_the_reference_and_nothing_wrong(name):
    task = EVALUATION[name]
    assert task.eval_type in ("categorical", "generative")
    assert len(task) >= 200
    for index in range(200):
        conversation = task[index]
        reference = conversation.messages[-1].text
        assert task.evaluate(conversation, reference)
        assert task.reward(conversation, reference) == 1.0
        assert not task.evaluate(conversation, "")
        assert not task.evaluate(conversation, "I do not know. #### 123456")


def test_order_chance_and_kind_of_the_evaluation_tasks():
    kinds = [(t.name, t.eval_type, t.chance) for t in mixtures.evaluation_tasks("embedded")]
    assert kinds == [
        ("Facts", "categorical", 0.25),
        ("WordProblems", "generative", 0.0),
        ("SpellingBee", "generative", 0.0),
        ("Identity", "generative", 0.0),
        ("TwoTurn", "generative", 0.0),
    ]


def test_letters_of_right_answers_are_spread_evenly():
    for task in (EVALUATION["Facts"], embedded_facts.ChoiceQuestions(2000)):
        asked = [conversation for conversation in task if conversation.letters == LETTERS]
        counts = Counter(conversation.messages[1].content for conversation in asked)
        assert set(counts) == set(LETTERS)
        assert all(0.19 < count / len(asked) < 0.31 for count in counts.values())


def test_every_fact_of_the_evaluation_is_another_one():
    facts = EVALUATION["Facts"]
    assert len(facts) <= len(all_facts())
    questions = [conversation.messages[0].content for conversation in facts]
    assert len(set(questions)) == len(questions)


def test_no_count_is_a_good_guess_for_letter_counting():
    bee = EVALUATION["SpellingBee"]
    counts = Counter(final_answer(conversation.messages[1].text) for conversation in bee)
    assert max(counts.values()) / len(bee) < 0.5


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_tool_results_in_training_are_what_the_tool_gives(stage):
    calls = 0
    for conversation in mixtures.validation_mixture(stage, "embedded"):
        for message in conversation.messages:
            parts = message.content if isinstance(message.content, tuple) else ()
            for call, result in pairwise(parts):
                if call.type == "python":
                    calls += 1
                    assert (result.type, result.text) == ("python_output", calculate(call.text))
    assert calls > 200


def test_a_whole_phrase_must_be_said():
    assert embedded_chat.says("It is in South America.", "South America")
    assert embedded_chat.says("I am nanochat!", "nanochat")
    assert not embedded_chat.says("It is in America, in the South.", "South America")
    assert not embedded_chat.says("Annabel", "Anna")


# ---- what evaluation keeps back -------------------------------------------------------------


def test_held_out_phrasings_are_not_among_the_training_phrasings():
    pairs = [
        (chat_texts.WHO, chat_texts.HELD_OUT_WHO),
        (chat_texts.MADE, chat_texts.HELD_OUT_MADE),
        (chat_texts.ABLE, chat_texts.HELD_OUT_ABLE),
        (chat_texts.MY_NAME, chat_texts.HELD_OUT_MY_NAME),
        (chat_texts.ASK_NAME, chat_texts.HELD_OUT_ASK_NAME),
        (chat_texts.I_LIKE, chat_texts.HELD_OUT_I_LIKE),
        (chat_texts.ASK_THING, chat_texts.HELD_OUT_ASK_THING),
        (embedded_chat.ANOTHER, embedded_chat.HELD_OUT_ANOTHER),
        (spelling_phrasings.COMPACT_COUNTING, spelling_phrasings.HELD_OUT_COUNTING),
    ]
    pairs += [(family.training, family.held_out) for family in FAMILIES.values()]
    for training, held_out in pairs:
        assert not {t.lower() for t in training} & {t.lower() for t in held_out}
        assert not [h for h in held_out for t in training if h.lower() in t.lower()]


def check_training_conversation(conversation, held_out_questions, held_out_vocabulary):
    text = user_text(conversation)
    assert not held_out_questions & {clean(line) for line in text.split("\n")}
    for message in conversation.messages:
        for part in message.content if isinstance(message.content, tuple) else ():
            if part.type == "python" and "count" not in part.text:
                assert not is_held_out_pair(*map(int, re.findall(r"\d+", part.text)))
    everything = text + conversation.messages[-1].text
    assert not held_out_vocabulary & set(re.findall(r"['\"]([a-z]{2,})['\"]", everything))
    assert not held_out_vocabulary & set(re.findall(r"\b([a-z]+):[a-z]", everything))


def clean(line):
    for lead in ("Multiple choice: ", embedded_facts.AGAIN + " ", *embedded_facts.LEADS):
        line = line.removeprefix(lead)
    return line


def all_held_out_questions():
    questions = {q for f in all_facts() for q in (*f.held_out_questions, *f.held_out_follow_ups)}
    lists = (chat_texts.HELD_OUT_WHO, chat_texts.HELD_OUT_MADE, chat_texts.HELD_OUT_ABLE)
    return questions.union(*lists)


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_training_never_sees_held_out_questions_numbers_or_words(stage):
    questions, words = all_held_out_questions(), set(held_out_words())
    mixture = mixtures.training_mixture(stage, "embedded")
    for index in range(0, len(mixture), len(mixture) // 4000):
        check_training_conversation(mixture[index], questions, words)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_not_one_training_conversation_sees_held_out_questions_numbers_or_words(stage):
    questions, words = all_held_out_questions(), set(held_out_words())
    for conversation in mixtures.training_mixture(stage, "embedded"):
        check_training_conversation(conversation, questions, words)


def test_evaluation_uses_only_held_out_questions_numbers_and_words():
    questions, words = all_held_out_questions(), set(held_out_words())
    for conversation in EVALUATION["Facts"]:
        line = conversation.messages[0].content.split("\n")[0].removeprefix("Multiple choice: ")
        for lead in embedded_facts.HELD_OUT_LEADS:
            line = line.removeprefix(lead)
        assert line in questions
    for conversation in EVALUATION["WordProblems"]:
        expression = conversation.messages[1].content[1].text
        assert is_held_out_pair(*map(int, re.findall(r"\d+", expression)))
    for conversation in EVALUATION["SpellingBee"]:
        call = conversation.messages[1].content[1].text
        assert re.match(r'"([a-z]+)"', call).group(1) in words


def test_mixtures_do_not_repeat_items_and_do_not_share_them_between_stages():
    mid = mixtures.training_mixture("mid", "embedded")
    sft = mixtures.training_mixture("sft", "embedded")
    assert len(mid) > 200_000
    assert len(sft) > 60_000
    seen = Counter(str(mid[index].to_json()) for index in range(3000))
    assert sum(count - 1 for count in seen.values()) < 150  # greetings and identity are few
    assert [mid[i] for i in range(20)] != [sft[i] for i in range(20)]
    assert mid[17] == mixtures.training_mixture("mid", "embedded")[17]
    with pytest.raises(UserError, match="no mixture of conversations for stage 'base'"):
        mixtures.training_mixture("base", "embedded")


# ---- spelling -------------------------------------------------------------------------------


def test_there_are_51_phrasings_of_the_counting_question():
    assert len(set(spelling_phrasings.COUNTING)) == len(spelling_phrasings.COUNTING) == 51


@pytest.mark.parametrize("split", ["train", "test"])
def test_full_spelling_bee_spells_enumerates_and_checks(split):
    bee = SpellingBee(300, split, words=("strawberry", "egg", "profile"))
    assert [bee[i] for i in range(20)] == [
        SpellingBee(300, split, words=("strawberry", "egg", "profile"))[i] for i in range(20)
    ]
    for conversation in bee:
        text, call, output, closing = conversation.messages[1].content
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call.text).groups()
        assert f"{word}:{','.join(word)}\n" in text.text
        assert len(re.findall(r"^\d+:\w", text.text, re.MULTILINE)) == len(word)
        assert output.text == str(word.count(letter))
        assert closing.text.endswith(f"#### {output.text}")
        assert bee.evaluate(conversation, conversation.messages[1].text)


def test_the_splits_of_spelling_bee_are_different_items():
    words = training_words()
    train, test = SpellingBee(50, "train", words=words), SpellingBee(50, "test", words=words)
    assert not {str(c) for c in train} & {str(c) for c in test}


def test_simple_spelling_answers_with_the_letters():
    for style in ("full", "compact"):
        for conversation in SimpleSpelling(50, style=style, words=("egg", "cat")):
            assert conversation.messages[1].content in ("egg:e,g,g", "cat:c,a,t")


def test_the_word_list_is_read_from_the_base_folder_when_a_word_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    bee = SpellingBee(10)
    assert [asset.place for asset in bee.assets()] == ["words_alpha.txt"]
    assert SpellingBee(10, style="compact").assets() == ()
    with pytest.raises(UserError, match=r"words cannot be read from .*prefetch words"):
        bee[0]
    (tmp_path / "words_alpha.txt").write_text("zebra\nquilt\n")
    assert bee.words == ("zebra", "quilt")
    (tmp_path / "words_alpha.txt").write_text("")
    with pytest.raises(UserError, match="holds no words"):
        SpellingBee(10)[0]


# ---- own conversations ----------------------------------------------------------------------


def test_custom_json_reads_one_conversation_a_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps(turns) + "\n\n" + json.dumps(turns * 2) + "\n")
    task = CustomJSON(path)
    assert [len(conversation.messages) for conversation in task] == [2, 4]
    assert task[0] == Conversation.from_json(turns)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an array of at least two messages"),
        ('{"role": "user"}', "line 2: expected an array"),
        ('[{"role": "user", "content": "a"}, {"role": "assistant"}]', "line 2, message 1: the con"),
        ('[{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]', "the role is 'x'"),
        (
            '[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]',
            "line 2: message 0 is from assistant, expected user",
        ),
    ],
)
def test_custom_json_names_the_line_that_is_wrong(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        CustomJSON(path)


def test_custom_json_without_its_file_is_empty_and_warns(tmp_path, caplog):
    assert len(CustomJSON(tmp_path / "none.jsonl")) == 0
    assert "none.jsonl is not there" in caplog.text


# ---- CORE bundle ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(folder)
    return folder


def test_the_bundle_is_read_as_a_core_bundle(bundle):
    tasks = load_bundle(bundle)
    assert [task.label for task in tasks] == [task.label for task in BUNDLE]
    assert {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    for task in tasks:
        items = task.items()
        assert len(items) == ITEMS_PER_TASK == len({json.dumps(item) for item in items})
        assert all(len(prompt) > 10 for prompt in task.prompts(items, 0))


def test_the_bundle_is_the_same_byte_for_byte_each_time(bundle, tmp_path):
    write_bundle(tmp_path)
    first = {p.relative_to(bundle): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    second = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert first == second
    assert len(first) == len(BUNDLE) + 2


class Ranks:
    """One of several ranks; what the others have done when it comes to the barrier."""

    def __init__(self, is_main, meanwhile):
        self.is_main, self.barrier = is_main, meanwhile


def test_one_rank_writes_the_bundle_and_the_others_wait_until_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "eval_bundle_embedded"
    met = []

    def others_come() -> None:
        met.append(len(load_bundle(folder)))

    def main_rank_writes() -> None:
        assert not folder.exists()
        write_bundle(folder)
        met.append(len(load_bundle(folder)))

    assert mixtures.core_bundle("embedded", Ranks(False, main_rank_writes)) == folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    assert mixtures.core_bundle("embedded", Ranks(True, others_come)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")} == before
    (folder / "core.yaml").unlink()
    assert mixtures.core_bundle("embedded", Ranks(True, others_come)) == folder
    assert met == [len(BUNDLE)] * 3


def test_only_files_that_the_bundle_names_change_its_digest(tmp_path):
    """A writer's temporary file may be gone by the time that somebody looks at it."""
    write_bundle(tmp_path)
    before = bundle_digest(tmp_path)
    (tmp_path / ".core.yaml.usrqi3vp").symlink_to(tmp_path / "gone")
    (tmp_path / "eval_data/embedded/notes.txt").write_text("mine")
    assert bundle_digest(tmp_path) == before
    items = load_bundle(tmp_path)[0].path
    items.write_text(items.read_text() + "\n")
    changed = bundle_digest(tmp_path)
    items.unlink()  # a task without items is left out, which is another evaluation
    assert len({before, changed, bundle_digest(tmp_path)}) == 3


def test_gold_options_of_the_bundle_are_spread(bundle):
    for task in load_bundle(bundle):
        if task.kind != "language_modeling":
            golds = Counter(item["gold"] for item in task.items())
            assert max(golds.values()) / ITEMS_PER_TASK < task.chance + 0.12


def test_language_modeling_answers_are_found_in_their_context_or_follow_from_it(bundle):
    for task in load_bundle(bundle):
        if task.label in ("embedded_cloze", "embedded_repetition"):
            assert all(item["continuation"] in item["context"] for item in task.items())
