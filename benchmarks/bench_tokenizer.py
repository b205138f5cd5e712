"""Speed and memory of tokenizer training and encoding, against the fastest peers of PyPI.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install rustbpe tokenizers tiktoken gigabpe fastokens gigatoken numpy
    python benchmarks/bench_tokenizer.py --peers=/tmp/peers/bin/python --text=FOLDER_OF_SHARDS

Every measurement is a process of its own, tied to as many processors as the row says; the peers
run in their own environment, because PyPI's rustbpe has our import name. The contestants of a row
take turns, and the row's figure is the median. One JSON line per contestant and row; `same` says
whether its merges or ids were those of ours.

Training reads documents of about 5 kB from a file as a stream (gigabpe: the file itself).
Encoding gets a list of strings and has to deliver ids, as an array where the peer can. `cold` is
the first pass of a fresh process over the text, `warm` the second pass over the same strings.
Peak memory is that of the process, `base_mb` what it had before the work.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS, DOCUMENT_BYTES, VOCAB_SIZE = "ours", 5000, 65_536

# Contestants of each row, by kind of work; `ours` is always first.
ROWS = {
    "train-nanochat": ("pypi-rustbpe", "tokenizers"),
    "train-gpt2": ("gigabpe",),
    "encode-nanochat": ("tiktoken", "fastokens"),
    "encode-cl100k": ("gigatoken",),
}
# Too slow to repeat: measured in the first round only.
ONCE = {("train-nanochat", "tokenizers")}


# ---- in the child: one measurement ------------------------------------------------------------


def documents(path: Path) -> Iterator[str]:
    """Yield the file in pieces of whole lines."""
    with path.open(encoding="utf-8") as file:
        while text := file.read(DOCUMENT_BYTES):
            yield text + file.readline()


def peak_mb() -> float:
    """Highest resident memory so far; not getrusage, which begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def digest(ids: Any) -> str:
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(ids, dtype=np.int32).tobytes()).hexdigest()[:16]


def train(peer: str, pattern: str, path: Path, threads: int) -> dict[str, Any]:
    """Train once; returns seconds, memory and a digest of the merges where ids compare."""
    from patterns import EXPORTED, PUBLISHED  # written by the parent

    if peer == OURS or peer == "pypi-rustbpe":
        import rustbpe

        base, begin = peak_mb(), time.perf_counter()
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(documents(path), VOCAB_SIZE, pattern=PUBLISHED[pattern])
        seconds = time.perf_counter() - begin
        tokens = [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()]
        checked = hashlib.sha256(b"\xff\xfe".join(tokens)).hexdigest()[:16]
    elif peer == "tokenizers":
        import tokenizers

        base, begin = peak_mb(), time.perf_counter()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        parts = tokenizers.pre_tokenizers
        regex = tokenizers.Regex(EXPORTED[pattern])
        model.pre_tokenizer = parts.Sequence(
            [parts.Split(regex, "isolated"), parts.ByteLevel(False, use_regex=False)]
        )
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, show_progress=False, initial_alphabet=parts.ByteLevel.alphabet()
        )
        model.train_from_iterator(documents(path), trainer)
        seconds, checked = time.perf_counter() - begin, ""
    else:
        import gigabpe

        base, begin = peak_mb(), time.perf_counter()
        gigabpe.train_bpe(
            [str(path)], vocab_size=VOCAB_SIZE, pretokenizer="bytelevel", threads=threads
        )
        seconds, checked = time.perf_counter() - begin, ""
    return {"seconds": seconds, "base_mb": base, "peak_mb": peak_mb(), "checked": checked}


def encoder_of(peer: str, pattern: str, folder: Path, threads: int) -> Callable[[list[str]], Any]:
    """Return a function from texts to ids, as fast as the peer offers it."""
    import numpy as np
    from patterns import PUBLISHED

    exported = str(folder / f"tokenizer_{pattern}.json")
    if peer == OURS:
        import rustbpe
        from rustbpe import formats

        tokens = formats.load_tiktoken(folder / "ranks.tiktoken")
        ours = rustbpe.Tokenizer.from_tokens(tokens, pattern)
        ours.encode("")  # builds the tables
        return lambda texts: ours.encode_to_array(texts, num_threads=threads)[0]
    if peer == "tiktoken":
        import tiktoken

        lines = (line.split() for line in (folder / "ranks.tiktoken").read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        theirs = tiktoken.Encoding(
            "t", pat_str=PUBLISHED[pattern], mergeable_ranks=ranks, special_tokens={}
        )
        if threads == 1:
            return lambda texts: [theirs.encode_ordinary(text) for text in texts]
        return lambda texts: theirs.encode_ordinary_batch(texts, num_threads=threads)
    if peer == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_file(exported)
        return lambda texts: np.frombuffer(fast.encode_batch_flat(texts)[0], np.uint32)
    import gigatoken

    giga = gigatoken.Tokenizer(exported)
    return lambda texts: giga.encode_batch(texts, parallel=threads > 1)


def flat(encoded: Any) -> Any:
    import numpy as np

    if isinstance(encoded, np.ndarray):
        return encoded
    if isinstance(encoded, list):
        return np.concatenate([np.asarray(row, dtype=np.int64) for row in encoded])
    return np.asarray(encoded.layout.content.data)  # gigatoken's awkward array


def encode(peer: str, pattern: str, path: Path, threads: int) -> dict[str, Any]:
    """Encode twice; returns seconds of both passes."""
    texts = list(documents(path))
    run = encoder_of(peer, pattern, path.parent, threads)
    base, times = peak_mb(), []
    for _ in range(2):
        begin = time.perf_counter()
        encoded = run(texts)
        times.append(time.perf_counter() - begin)
    peak = peak_mb()
    checked = digest(flat(encoded))
    return {
        "cold": times[0],
        "warm": times[1],
        "base_mb": base,
        "peak_mb": peak,
        "checked": checked,
    }


def child(row: str, peer: str, path: Path, threads: int) -> None:
    """Measure on `threads` processors and print the result."""
    sys.path[:0] = [str(path.parent), *([str(ROOT)] if peer == OURS else [])]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    work, name = row.split("-")
    pattern = "gpt4-2023" if name == "cl100k" else name
    measured = (train if work == "train" else encode)(peer, pattern, path, threads)
    print(json.dumps(measured))


# ---- in the parent: rounds and medians --------------------------------------------------------


def write_corpus(shards: Path, target: Path, num_bytes: int) -> int:
    """Write the texts of all shards, then again in lower case until there are enough bytes."""
    import pyarrow.parquet as pq

    size = 0
    with target.open("w", encoding="utf-8") as file:
        for change in (str, str.lower, str.upper):
            for shard in sorted(shards.glob("*.parquet")):
                for text in pq.read_table(shard, columns=["text"])["text"].to_pylist():
                    if size >= num_bytes:
                        return size
                    size += len(text.encode()) + 1
                    file.write(change(text) + "\n")
    raise SystemExit(f"{shards} has less than a third of {num_bytes} bytes; lower --megabytes")


def write_vocabulary(folder: Path, corpus: Path) -> None:
    """Train the vocabulary of the encoding rows and write it in everybody's format."""
    import rustbpe
    from rustbpe import formats, reference

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(documents(corpus), VOCAB_SIZE - 9, pattern="nanochat")
    formats.dump_tiktoken(tokenizer.tokens, folder / "ranks.tiktoken")
    for pattern in ("nanochat", "gpt4-2023"):
        content = formats.to_huggingface(tokenizer.tokens, pattern, {}, tokenizer.merges)
        (folder / f"tokenizer_{pattern}.json").write_text(json.dumps(content))
    exported = {name: formats.to_huggingface([], name, {}, []) for name in reference.PATTERNS}
    regexes = {
        name: content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        for name, content in exported.items()
    }
    patterns = f"PUBLISHED = {reference.PATTERNS!r}\nEXPORTED = {regexes!r}\n"
    (folder / "patterns.py").write_text(patterns)


def measure(python: str, row: str, peer: str, path: Path, threads: int) -> dict[str, Any]:
    arguments = [__file__, "--child", row, peer, str(path), str(threads)]
    done = subprocess.run([python, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{row} by {peer} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(row: str, peer: str, threads: int, num_bytes: int, runs: list[dict[str, Any]]) -> Any:
    """Return one line: medians of all numbers, and speeds of the times."""
    line: dict[str, Any] = {"row": row, "peer": peer, "threads": threads, "runs": len(runs)}
    for key in runs[0]:
        if key != "checked":
            line[key] = round(statistics.median(run[key] for run in runs), 3)
    for key in ("seconds", "cold", "warm"):
        if key in line:
            line[f"{key}_mb_per_second"] = round(num_bytes / 1e6 / line[key], 1)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers", default=sys.executable, help="python of the peers' environment")
    parser.add_argument("--text", type=Path, help="folder of parquet shards with a column text")
    parser.add_argument("--megabytes", type=int, default=200, help="text to train on")
    parser.add_argument("--encode-megabytes", type=int, default=60, help="text to encode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_tokenizer"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        row, peer, path, threads = options.child
        child(row, peer, Path(path), int(threads))
        return
    sys.path.insert(0, str(ROOT))
    options.folder.mkdir(parents=True, exist_ok=True)
    corpora = {"train": options.folder / "train.txt", "encode": options.folder / "encode.txt"}
    sizes = {
        "train": write_corpus(options.text, corpora["train"], options.megabytes * 1_000_000),
        "encode": write_corpus(
            options.text, corpora["encode"], options.encode_megabytes * 1_000_000
        ),
    }
    write_vocabulary(options.folder, corpora["train"])
    for row in options.rows:
        work = row.split("-")[0]
        for threads in options.threads:
            runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in (OURS, *ROWS[row])}
            for turn in range(options.rounds):
                for peer, results in runs.items():
                    if turn and (row, peer) in ONCE:
                        continue
                    python = sys.executable if peer == OURS else options.peers
                    results.append(measure(python, row, peer, corpora[work], threads))
            for peer, results in runs.items():
                line = summary(row, peer, threads, sizes[work], results)
                if results[0]["checked"]:
                    line["same"] = results[0]["checked"] == runs[OURS][0]["checked"]
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
