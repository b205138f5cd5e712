"""The code of docs/how-to/add-a-task.md runs as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "add-a-task.md"


def test_the_code_of_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # the page is ours
    output = capsys.readouterr().out
    assert "Sort the letters of" in output
    assert "allenai/openbookqa:main:test" in output
    own = 2 * len(names["SortLetters"]())
    assert len(names["mixture"]) - own == sum(map(len, names["parts"]("sft").values()))
