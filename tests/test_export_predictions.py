"""Real rows, a real model: what stock PEFT answers with an exported LoRA where this package is not (20 s)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from eval import run as evaluation
from more_ds import MoreConfig
from more_ds.config import RunConfig
from more_ds.data.encoding import Encoder
from more_ds.export.job import Request, export
from more_ds.loading import find_subject
from more_ds.model import load_base, load_tokenizer, read_model_config

TASKS = ["rte", "sst2", "cola"]
ROWS = 24
STOCK = """
import json, sys, torch
sys.modules["more_ds"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder, questions = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
found = {}
for task, own in json.load(open(questions)).items():
    adapted = PeftModel.from_pretrained(model, f"{folder}/{task}").eval()
    found[task] = []
    for prompt, answers in own:
        scores = []
        for answer in answers:
            with torch.no_grad():
                logits = adapted(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores.append(float(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum()))
        found[task].append(scores)
    model = adapted.unload()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(models_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder whose adapter answers otherwise than the base, and every task in its own way."""
    folder, base = tmp_path_factory.mktemp("run"), str(models_dir / "llama-6m")
    torch.manual_seed(1)
    config = MoreConfig(
        r=8, num_tasks=3, task_names=TASKS, init_weights=False, lora_alpha=8, task_type="CAUSAL_LM",
        target_modules="all-linear",
    )  # fmt: skip
    model = get_peft_model(load_base(base, read_model_config(base), dtype="fp32"), config)
    model.save_pretrained(str(folder / "best"))
    settings = RunConfig(model=base, suite=["glue"], tasks=TASKS, data_dir=str(data_dir))
    (folder / "config.json").write_text(json.dumps(asdict(settings)))
    return folder


@pytest.mark.slow
def test_stock_peft_answers_as_the_run_does(run: Path, models_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    base = str(models_dir / "llama-6m")
    assert evaluation.main([str(run), "--limit", str(ROWS), "--output_dir", str(tmp_path / "eval")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    export(Request(find_subject(str(run)), "lora", (), tmp_path / "lora", check=False))
    for task in TASKS:  # RTE's prompts are cut
        given = [str(tmp_path / "lora" / task), "--suite", "glue", "--tasks", task, "--data_dir", str(data_dir)]
        assert evaluation.main([*given, "--limit", str(ROWS), "--output_dir", str(tmp_path / task)]) == 0
        again = [json.loads(line) for line in (tmp_path / task / "predictions.jsonl").read_text().splitlines()]
        before = [row for row in rows if row["task"] == task]
        assert [row["prediction"] for row in again] == [row["prediction"] for row in before]
        assert [row["scores"] for row in again] == [pytest.approx(row["scores"], abs=1e-4) for row in before]
    encoder = Encoder(load_tokenizer(base), is_encoder_decoder=False, max_source_length=128, max_target_length=64)
    own = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    questions = {
        task: [[encoder.prompt(row["prompt"]), encoder.targets(row["options"])] for row in part]
        for task, part in own.items()
    }
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    words = [sys.executable, "-c", STOCK, base, str(tmp_path / "lora"), str(tmp_path / "questions.json")]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
    found, answered = json.loads(done.stdout), set()
    for task in TASKS:
        assert len(own[task]) == ROWS
        for row, scores in zip(own[task], found[task], strict=True):
            assert scores == pytest.approx(row["scores"], abs=1e-3)
            assert max(range(len(scores)), key=scores.__getitem__) == row["prediction"]
            answered.add((task, row["prediction"]))
    assert len(answered) > len(TASKS), "every task has one answer only: nothing was compared"
