"""The ways to put one kind of fact into words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasing:
    """The templates of one relation; their slots are explained in `relations`.

    `questions` and `follow_ups` may appear in training, the `held_out_` ones only in evaluation (a
    test compares the sets and searches the training text for them). The first statement is also
    the answer a chat gives, so it restates the question: recalling is then the same act in a
    document and in a conversation. `about` holds statements that begin with a pronoun.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    about: tuple[str, ...] = ()
    follow_ups: tuple[str, ...] = ()
    held_out_follow_ups: tuple[str, ...] = ()
