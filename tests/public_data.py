"""Public data sets on this machine: small made ones, and the real ones where they are at hand."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.assets import Asset, Manifest, record_file, write_manifest
from tasks.arc import ARC
from tasks.customjson import IDENTITY
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.words import WORD_LIST

NUM_AUXILIARY_TRAIN = 99_842
SHARED = Path(__file__).parents[2] / "shared" / "data"
REASON = "the real data sets are not on this machine"

ARC_ROW = {
    "id": "q1",
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
MMLU_ROW = {
    "question": "What is 2 + 2?",
    "subject": "arithmetic",
    "choices": ["1", "2", "3", "4"],
    "answer": 3,
}
GSM8K_ROW = {
    "question": "Tom has 3 bags of 4 nuts and eats 2. How many are left?",
    "answer": "He has 3*4=<<3*4=12>>12 nuts.\nLeft are <<12-2=10>>10.\n#### 10",
}
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef double(x: int) -> int:\n    """Return 2 * x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}


def place(asset: Asset, rows: Iterable[dict[str, Any]]) -> None:
    """Put rows where a hub split is expected, with its manifest, as a fetch leaves them."""
    asset.path.mkdir(parents=True, exist_ok=True)
    path = asset.path / "00000.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    write_manifest(asset, Manifest((record_file(asset.path, path),), revision="a" * 40))


def place_file(asset: Asset, content: bytes) -> None:
    """Put a single file where it is expected, with its manifest."""
    asset.path.parent.mkdir(parents=True, exist_ok=True)
    asset.path.write_bytes(content)
    write_manifest(asset, Manifest((record_file(asset.folder, asset.path),)))


def read_shared(name: str) -> list[dict[str, Any]]:
    with gzip.open(SHARED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def unpack_shared(name: str, folder: Path) -> Path:
    """A file of conversations, unpacked into a folder."""
    target = folder / f"{Path(name).name}.jsonl"
    with gzip.open(SHARED / f"{name}.jsonl.gz") as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    return target


def place_shared() -> None:
    """Put the real data sets where the tasks expect them; the base folder is in the environment.

    MMLU's auxiliary_train is not at hand: the dev split is repeated until it has as many rows.
    """
    for subset in ("ARC-Easy", "ARC-Challenge"):
        for split in ("Train", "Test"):
            rows = read_shared(f"tasks/arc/{subset}-{split}")
            place(ARC(subset, split.lower()).rows.asset, rows)
    practice = itertools.cycle(read_shared("tasks/mmlu/dev"))
    place(MMLU("auxiliary_train").rows.asset, itertools.islice(practice, NUM_AUXILIARY_TRAIN))
    place(MMLU("test").rows.asset, read_shared("tasks/mmlu/test"))
    for split in ("train", "test"):
        place(GSM8K(split).rows.asset, read_shared(f"tasks/gsm8k/{split}"))
    place(HumanEval().rows.asset, read_shared("tasks/humaneval/HumanEval"))
    for asset, name in (
        (WORD_LIST, "tasks/spellingbee/words_alpha.txt.gz"),
        (IDENTITY, "chat/identity_conversations.jsonl.gz"),
    ):
        place_file(asset, gzip.decompress((SHARED / name).read_bytes()))
