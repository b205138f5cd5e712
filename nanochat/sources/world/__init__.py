"""A small closed world of true facts, people and stories, written out as tables and phrasings.

The tables are `geography`, `nature`, `everyday` and `words`; `relations` says how each fact is
stated and asked; `people`, `stories`, `dialogues`, `numbers`, `quizzes`, `problems` and
`spelling` turn them into text. `split` decides what training may never see. No torch, no I/O.
"""
