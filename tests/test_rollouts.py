"""Rollouts: which tokens are learned, what each is worth, and that nothing depends on luck."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from scripted_model import byte_tokenizer, scripted_model, tokens_of
from torch.testing import assert_close

from nanochat.common import UserError
from nanochat.conversation import Conversation, chat
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig, softcap
from nanochat.objectives import next_token_loss_sum
from nanochat.rollouts import RolloutLoader, RolloutSettings, advantages, pass_at_k
from nanochat.runtime import Runtime, World
from tests import short_memory

SETTINGS = RolloutSettings(
    examples_per_step=2, num_samples=4, max_new_tokens=6, temperature=1.0, top_k=None, seed=3
)


class Questions:
    """Numbered questions of different lengths; an answer earns the share of its small letters."""

    name = "Questions"
    eval_type = "generative"

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Conversation:
        return chat("which" * (index + 1), "a")

    def reward(self, conversation: Conversation, completion: str) -> float:
        return sum(letter.islower() for letter in completion) / max(len(completion), 1)


class Counted(Questions):
    """The first answer earns 1, all others nothing."""

    def __init__(self, count: int = 1, *, first: float = 1.0) -> None:
        super().__init__(count)
        self.first, self.seen = first, [""][:0]

    def reward(self, conversation: Conversation, completion: str) -> float:
        self.seen.append(completion)
        return self.first if len(self.seen) == 1 else 0.0


def small_model(seed: int = 1) -> GPT:
    """A random model of bytes whose head is not silent."""
    vocab_size = byte_tokenizer().vocab_size
    model = GPT(GPTConfig(sequence_len=64, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=32))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, 0.1, generator=generator)
    return model


def make_loader(
    task: Any = None, *, world: World | None = None, model: GPT | None = None, **settings: Any
) -> RolloutLoader:
    return RolloutLoader(
        model or small_model(),
        byte_tokenizer(),
        Questions() if task is None else task,
        settings=RolloutSettings(**{**vars(SETTINGS), **settings}),
        world=world or World(),
    )


def rows_of(batch: Batch) -> list[tuple[list[int], list[int], list[float]]]:
    """Inputs, targets and weights of each row without its padding."""
    assert batch.weights is not None
    rows = []
    for inputs, targets, weights in zip(batch.inputs, batch.targets, batch.weights, strict=True):
        end = int((targets >= 0).nonzero().max()) + 1
        rows.append((inputs[:end].tolist(), targets[:end].tolist(), weights[:end].tolist()))
    return rows


# ---- the policy gradient ----------------------------------------------------------------------


def test_policy_gradient_equals_a_hand_computed_example() -> None:
    """Two tokens, equally likely: raising one by its advantage lowers the other by as much."""
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    head = torch.zeros(2, 2, requires_grad=True)
    weights = torch.tensor([[0.5, -0.25]])

    loss = next_token_loss_sum(hidden, head, torch.tensor([[0, 1]]), weights=weights)
    loss.backward()  # type: ignore[no-untyped-call]

    assert_close(loss.item(), (0.5 - 0.25) * math.log(2.0))
    # -advantage x (1 - p) for the token that was chosen, +advantage x p for the other; p = 1/2.
    expected = torch.tensor([[-0.5 * 0.5, -0.25 * 0.5 * 2.0], [0.5 * 0.5, 0.25 * 0.5 * 2.0]])
    assert_close(head.grad, expected)


@pytest.mark.parametrize("rows", [3, 700])  # within one chunk of logits, and over two
def test_weighted_loss_equals_autograd_of_the_definition(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    head = torch.randn(11, 8, generator=generator, requires_grad=True)
    targets = torch.randint(-1, 11, (rows,), generator=generator)
    weights = torch.randn(rows, generator=generator)
    next_token_loss_sum(hidden, head, targets, weights=weights).backward()  # type: ignore[no-untyped-call]
    got = hidden.grad, head.grad

    hidden.grad = head.grad = None
    log_probabilities = softcap(hidden @ head.t()).log_softmax(dim=-1)
    chosen = log_probabilities.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    (-(chosen * weights)[targets >= 0].sum()).backward()

    assert_close(got, (hidden.grad, head.grad), rtol=1e-4, atol=1e-5)  # fp32 sums, other order


def test_advantages_are_rewards_minus_their_mean() -> None:
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    assert advantages([0.1] * 3) == [0.0] * 3  # although 0.1 * 3 / 3 is not 0.1


# ---- the batch --------------------------------------------------------------------------------


def test_weights_are_the_mean_over_questions_of_the_mean_over_their_tokens() -> None:
    """Spec B.13: advantage / (tokens of the question x questions), times the trainer's divisor."""
    task = Questions()
    batch = make_loader(task).next_step()
    rows = rows_of(batch)
    assert len(rows) == SETTINGS.examples_per_step * SETTINGS.num_samples
    assert batch.num_targets == sum(target >= 0 for _, targets, _ in rows for target in targets)
    num_samples = SETTINGS.num_samples
    for question in range(SETTINGS.examples_per_step):
        group = rows[question * num_samples : (question + 1) * num_samples]
        chosen = [[target for target in targets if target >= 0] for _, targets, _ in group]
        texts = [byte_tokenizer().decode([i for i in ids if i < 256]) for ids in chosen]
        expected = advantages([task.reward(task[question], text) for text in texts])
        assert any(expected)
        num_tokens = sum(map(len, chosen))
        for (_, targets, weights), advantage in zip(group, expected, strict=True):
            worth = advantage * batch.num_targets / (num_tokens * SETTINGS.examples_per_step)
            wanted = [worth if target >= 0 else 0.0 for target in targets]
            assert_close(weights, wanted, rtol=1e-6, atol=1e-7)


def test_prompt_and_forced_tokens_are_no_targets_and_the_end_is_one() -> None:
    written = ("<|python_start|>", "1", "+", "2", "<|python_end|>")
    after = ("<|output_end|>", "x", "<|assistant_end|>")
    model = scripted_model(tokens_of("<|assistant_start|>", *written, *after))
    task = Counted()
    batch = make_loader(
        task, model=model, examples_per_step=1, num_samples=2, max_new_tokens=20
    ).next_step()

    prompt = byte_tokenizer().render_for_completion(task[0])
    forced = tokens_of("<|output_start|>", "3", "<|output_end|>")
    (inputs, targets, weights), (_, _, others) = rows_of(batch)
    answer = [*tokens_of(*written), *forced, *tokens_of("x", "<|assistant_end|>")]
    assert inputs == [*prompt, *answer[:-1]]
    nothing = [-1] * (len(prompt) - 1)
    assert targets == [*nothing, *tokens_of(*written), -1, -1, -1, *answer[-2:]]
    assert [weight > 0 for weight in weights] == [target >= 0 for target in targets]
    assert [weight < 0 for weight in others] == [target >= 0 for target in targets]
    assert task.seen[0] == "1+23x"


def test_answers_that_are_all_equally_good_give_no_rows() -> None:
    batch = make_loader(Counted(first=0.0)).next_step()
    assert (batch.num_targets, len(batch.inputs)) == (0, 0)
    assert batch.measures["reward"] == 0.0
    assert batch.measures["useful_questions"] == 0.0


def test_only_questions_with_different_answers_take_part() -> None:
    batch = make_loader(Counted(5)).next_step()
    assert len(batch.inputs) == SETTINGS.num_samples
    assert batch.measures["useful_questions"] == 1 / SETTINGS.examples_per_step
    assert batch.measures["reward"] == 1 / (SETTINGS.examples_per_step * SETTINGS.num_samples)


def test_rows_have_the_length_that_is_asked_for() -> None:
    loader = RolloutLoader(
        small_model(),
        byte_tokenizer(),
        Questions(),
        settings=SETTINGS,
        world=World(),
        row_length=64,
    )
    batch = loader.next_step()
    assert batch.weights is not None
    assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (8, 64)


def test_a_step_depends_on_its_number_and_the_weights_only() -> None:
    straight, resumed = make_loader(), make_loader()
    steps = [straight.next_step() for _ in range(4)]
    resumed.load_state_dict({"steps": 3})
    again = resumed.next_step()
    assert torch.equal(again.inputs, steps[3].inputs)
    assert torch.equal(again.weights, steps[3].weights)  # type: ignore[arg-type]
    assert not torch.equal(steps[0].inputs, steps[3].inputs)
    assert straight.state_dict() == resumed.state_dict() == {"steps": 4}
    assert straight.progress == 4 * SETTINGS.examples_per_step / 5


def test_answers_are_sampled_in_smaller_batches_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = make_loader().next_step()
    short_memory.allow_rows(monkeypatch, 3)
    loader = make_loader()
    found = loader.next_step()
    assert_rows_equal(rows_of(found), rows_of(expected))
    loader.next_step()  # does not try again what did not fit
    told = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert told == [
        f"out of memory with {rows} answers at once: going on with {fewer}; {short_memory.REASON}"
        for rows, fewer in ((8, 4), (4, 2))
    ]


def test_a_second_epoch_asks_the_same_questions_for_other_answers() -> None:
    loader = make_loader(Questions(2))
    first, second = loader.next_step(), loader.next_step()
    prompts = [[row[0][:8] for row in rows_of(batch)] for batch in (first, second)]
    assert prompts[0] == prompts[1]
    assert rows_of(first) != rows_of(second)


def rollouts_of_rank(runtime: Runtime, folder: Path) -> tuple[int, list[Any], dict[str, float]]:
    """What one rank gets of the first step."""
    batch = make_loader(world=runtime.world).next_step()
    return batch.num_targets, rows_of(batch), batch.measures


def test_two_ranks_share_the_questions_of_one(tmp_path: Path) -> None:
    whole = make_loader().next_step()
    first, second = run_ranks(rollouts_of_rank, 2, tmp_path)
    assert first[0] == second[0] == whole.num_targets
    assert first[2] == second[2] == whole.measures
    assert_rows_equal([*first[1], *second[1]], rows_of(whole))


def assert_rows_equal(got: Sequence[Any], expected: Sequence[Any]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one[:2] == other[:2]
        assert_close(one[2], other[2])


def counted_rollouts_of_rank(runtime: Runtime, folder: Path) -> tuple[int, int, float]:
    """Only rank 0 has answers of different worth."""
    first = 1.0 if runtime.world.is_main else 0.0
    batch = make_loader(Counted(5, first=first), world=runtime.world).next_step()
    assert batch.weights is not None
    return batch.num_targets, len(batch.inputs), float(batch.weights.abs().sum())


def test_a_rank_without_anything_to_learn_still_takes_part(tmp_path: Path) -> None:
    (targets, rows, weight), (same, other_rows, nothing) = run_ranks(
        counted_rollouts_of_rank, 2, tmp_path
    )
    assert targets == same > 0
    assert (rows, other_rows) == (SETTINGS.num_samples, 1)
    assert weight > 0
    assert nothing == 0


# ---- staying near the start -------------------------------------------------------------------


def test_a_model_pays_for_what_it_likes_more_than_the_reference() -> None:
    model, reference = small_model(1), small_model(2)
    settings = RolloutSettings(**{**vars(SETTINGS), "kl_weight": 0.5})
    same, other = (
        RolloutLoader(
            model,
            byte_tokenizer(),
            Questions(),
            settings=settings,
            world=World(),
            reference=against,
        ).next_step()
        for against in (model, reference)
    )
    free = make_loader().next_step()
    assert free.weights is not None
    assert same.weights is not None
    assert other.weights is not None
    assert torch.equal(same.weights, free.weights)
    assert same.measures["kl"] == 0.0

    def log_probabilities(of: GPT) -> torch.Tensor:
        logits = of(free.inputs).detach().log_softmax(dim=-1)
        return logits.gather(-1, free.targets.clamp_min(0)[..., None])[..., 0]

    is_target = free.targets >= 0
    excess = (log_probabilities(model) - log_probabilities(reference)) * is_target
    worth = free.weights.sign() * 0  # per question: tokens of its four answers
    for start in (0, 4):
        part = slice(start, start + 4)
        share = free.num_targets / (2 * is_target[part].sum())
        worth[part] = free.weights[part] - 0.5 * excess[part] * share
    assert_close(other.weights, worth, rtol=1e-4, atol=1e-5)
    assert_close(other.measures["kl"], float(excess.sum()) / free.num_targets)


def seconds_waited(runtime: Runtime) -> float:
    """Of a rank, where judging the answers takes rank 1 a second."""

    class SlowlyJudged(Questions):
        def reward(self, conversation: Conversation, completion: str) -> float:
            if runtime.world.rank == 1:
                time.sleep(0.25)
            return super().reward(conversation, completion)

    return make_loader(SlowlyJudged(), world=runtime.world).next_step().waited_seconds


def test_a_rank_that_waits_for_the_others_answers_says_how_long() -> None:
    fast, slow = run_ranks(seconds_waited, 2)
    assert slow < fast > 0.2


# ---- pass@k -----------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for num_right in range(5):
        verdicts = [True] * num_right + [False] * (4 - num_right)
        for k in range(1, 5):
            subsets = list(itertools.combinations(verdicts, k))
            expected = sum(map(any, subsets)) / len(subsets)
            assert_close(pass_at_k(4, num_right, k), expected)


# ---- mistakes ---------------------------------------------------------------------------------


class Letters(Questions):
    name = "Letters"
    eval_type = "categorical"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1}, "--num-samples is 1"),
        ({"examples_per_step": 0}, "--examples-per-step is 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"temperature": 0.0}, "--temperature is 0"),
        ({"temperature": -1.0}, "--temperature is -1.0; use a positive number such as 1"),
        ({"temperature": float("nan")}, "--temperature is nan; use a positive number such as 1"),
        ({"top_k": -1}, "top-k is -1"),
        ({"kl_weight": -0.1}, "--kl-weight is -0.1"),
        ({"kl_weight": float("nan")}, "--kl-weight is nan"),
        ({"kl_weight": float("inf")}, "--kl-weight is inf"),
    ],
)
def test_meaningless_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RolloutSettings(**{**vars(SETTINGS), **settings})


def test_tasks_without_written_answers_are_refused() -> None:
    with pytest.raises(UserError, match="Letters is categorical"):
        make_loader(Letters())
    with pytest.raises(UserError, match="Questions has no questions"):
        make_loader(Questions(0))


def test_questions_that_can_not_be_dealt_are_refused() -> None:
    with pytest.raises(UserError, match="2 can not be dealt to 4 ranks"):
        make_loader(world=World(0, 4))


def test_a_prompt_longer_than_the_context_is_named() -> None:
    loader = make_loader(Questions(20), examples_per_step=20)
    with pytest.raises(UserError, match=r"'whichwhich.*prompt of \d+ tokens.*context is 64"):
        loader.next_step()


def test_pass_at_more_than_the_samples_is_refused() -> None:
    with pytest.raises(UserError, match="pass@5 cannot be told from 4 samples"):
        pass_at_k(4, 1, 5)
