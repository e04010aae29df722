"""The model card of an export: what it is, what it was trained on, how it scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from more_ds.run_folder import versions

USES = {
    "lora": (
        "from peft import PeftModel\n"
        "from transformers import {auto}\n\n"
        'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{folder}")'
    ),
    "merged": 'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{folder}")',
    "adapter": (
        "import more_ds\n"
        "from peft import PeftModel\n"
        "from transformers import {auto}\n\n"
        'model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{folder}")\n'
        "model(**batch, task_ids=...)  # (batch,), the numbers of the tasks below"
    ),
}


def write_card(
    folder: Path,
    *,
    form: str,
    base: str,
    auto: str,
    method: str,
    ranks: Mapping[str, Mapping[str, int]],
    scores: Mapping[str, str],
    data: Sequence[str],
) -> None:
    """Write `README.md` with the front matter that the hub reads.

    Args:
        folder: of the export.
        form: `lora`, `merged` or `adapter`.
        base: name of the base model.
        auto: transformers' class for it.
        method: that trained the adapter.
        ranks: rank of every map, by task; all tasks in the order of their numbers, or one.
        scores: by task, from `run_scores`.
        data: where the examples came from, a line each.
    """
    rows = []
    for i, task in enumerate(ranks):
        chosen = list(ranks[task].values())
        mean = f"{min(chosen)} / {fmean(chosen):.2f} / {max(chosen)}"
        rows.append(f"| {i} | {task} | {mean} | {scores.get(task, '-')} |")
    library = "transformers" if form == "merged" else "peft"
    use = USES[form].format(auto=auto, base=base, folder=folder.name)
    what = {"lora": "A LoRA", "merged": "A merged model", "adapter": "An adapter"}[form]
    lines = [
        "---", f"base_model: {json.dumps(base)}", f"library_name: {library}", "tags: [more_ds, lora, multi-task]",
        "---",
        "", f"# {', '.join(ranks)}", "", f"{what}, trained on many tasks at once by {method} with more_ds.", "",
        "| number | task | rank (least / mean / highest) | validation |", "|---|---|---|---|", *rows, "",
        "```python", use, "```", "", "Data: " + "; ".join(data), "",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in versions().items() if value),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_scores(run: Path | None) -> dict[str, str]:
    """Validation scores of a run's best adapter, in percent, as text by task; empty where there are none."""
    path = run / "metrics.jsonl" if run is not None else None
    if path is None or not path.is_file():
        return {}
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scored = [row for row in rows if "mean_score" in row]
    best = max(scored, key=lambda row: row["mean_score"]) if scored else {"evaluation": {}}
    return {
        task: ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        for task, metrics in best["evaluation"].items()
    }
