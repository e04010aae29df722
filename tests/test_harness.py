"""The bridge to lm-evaluation-harness, offline, against the standalone runner on the same rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY
from toy_suite import IDS, write_toy

from more_ds.errors import UserError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install -r requirements-extra.txt")

from lm_eval.api.instance import Instance

from more_ds.lm_eval_bridge import MoreDsLM
from more_ds.scoring.likelihood import rank_options

ROOT = Path(__file__).resolve().parents[1]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{task}: {{{{text}}}}"
doc_to_target: label
doc_to_choice: {choices}
metric_list: [{{metric: acc}}]
"""
TEXT = """
task: tell
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "tell: {{{{text}}}}"
doc_to_target: "no"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"eval_{name}", ROOT / "eval" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[f"eval_{name}"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy suite, and the same tasks in the harness's form: `accept` under the name `judge`."""
    path = write_toy(tmp_path_factory.mktemp("toy"))
    (path / "theirs").mkdir()
    forms = {
        "judge": CHOICE.format(name="judge", task="accept", file=path / "toy/accept/test.jsonl", choices="[bad, good]"),
        "choose": CHOICE.format(
            name="choose", task="choose", file=path / "toy/choose/test.jsonl", choices="\"{{[a, b, 'it is ' ~ b]}}\""
        ),
        "tell": TEXT.format(file=path / "toy/tell/test.jsonl"),
    }
    for name, form in forms.items():
        (path / "theirs" / f"{name}.yaml").write_text(form)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_harness_gives_the_numbers_of_the_runner(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(folder / "adapter"), "--device", "cpu", "--max_source_length", "64", "--max_target_length", "32"]
    ours = [*common, "--tasks_file", str(folder / "toy.yaml"), "--data_dir", str(folder)]
    assert script("run").main([*ours, "--output_dir", str(tmp_path / "ours")]) == 0
    theirs = [*common, "--tasks", "judge,choose,tell", "--include_path", str(folder / "theirs"), "--only_included"]
    theirs += ["--task_map", "judge:accept", "--output", str(tmp_path / "theirs.json"), "--batch_size", "4"]
    assert script("harness").main(theirs) == 0
    assert "|judge |" in capsys.readouterr().out
    records: dict[str, list[Any]] = {"accept": [], "choose": [], "tell": []}
    for line in (tmp_path / "ours" / "predictions.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["split"] == "test" and record["task"] in records:
            records[record["task"]].append(record)
    document = json.loads((tmp_path / "theirs.json").read_text())
    for name, own in (("judge", "accept"), ("choose", "choose")):
        samples = sorted(document["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == 11
        for sample, record in zip(samples, records[own], strict=True):
            found = [float(response[0][0]) for response in sample["resps"]]
            assert found == pytest.approx(record["scores"], abs=1e-4)
        hits = [record["prediction"] == record["gold"] for record in records[own]]
        assert document["results"][name]["acc,none"] == pytest.approx(sum(hits) / 11)
    samples = sorted(document["samples"]["tell"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == [record["text"] for record in records["tell"]]


def bridge(folder: Path, **options: Any) -> MoreDsLM:
    return MoreDsLM(str(folder / "adapter"), device="cpu", max_source_length=64, max_target_length=32, **options)


def ask(kind: Any, task: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, (task, 0, 1))


def test_the_task_of_a_request_routes_it(folder: Path) -> None:
    model = bridge(folder, task_map="judge:grade", as_task="choose")
    names = ("accept", "grade", "judge", "choose", "whatever")
    scores = [score for score, _ in model.loglikelihood([ask("loglikelihood", n, "is it", " so") for n in names])]
    accept, grade, judge, choose, other = scores
    assert judge == pytest.approx(grade, abs=1e-5)
    assert other == pytest.approx(choose, abs=1e-5)
    assert len({round(score, 3) for score in (accept, grade, choose)}) == 3


def test_an_answer_is_greedy_where_every_token_is_the_likeliest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridge(folder)

    def planted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Every label the likeliest, but for the last token of the answer of three."""
        logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), VOCABULARY).float()
        logits[(batch["labels"] != -100).sum(1) == 3, -1, 7] = 2.0
        return logits

    monkeypatch.setattr(model.text_model, "label_logits", planted)
    requests = [ask("loglikelihood", "tell", "say it", answer) for answer in (" abc", " a", " ab")]
    assert [written for _, written in model.loglikelihood(requests)] == [True, False, True]


def test_white_space_is_as_in_training(folder: Path) -> None:
    """The data of some tasks end in blanks, which the templates of ours take away."""
    pairs = [("say it", " no"), ("say it ", "no"), (" say it ", " no\n")]
    model = bridge(folder)
    scores = [score for score, _ in model.loglikelihood([ask("loglikelihood", "tell", *pair) for pair in pairs])]
    prompt, answer = model.text_model.encoder.prompt("say it"), model.text_model.encoder.target("no")
    expected = rank_options(model.text_model, [prompt], [IDS["tell"]], [[answer]])[0]
    assert scores == pytest.approx(expected * 3, abs=1e-5)
    texts = model.generate_until([ask("generate_until", "tell", t, {"max_gen_toks": 4}) for t in ("say it", "say it ")])
    assert texts[0] == texts[1]


def test_the_end_of_an_answer_may_be_left_out(folder: Path) -> None:
    request = [ask("loglikelihood", "tell", "say it", " no")]
    whole, open_ended = (bridge(folder, end_of_answer=end).loglikelihood(request)[0][0] for end in (True, False))
    assert whole < open_ended < 0


def test_texts_end_at_a_stop_string_and_keep_their_limits(folder: Path) -> None:
    model = bridge(folder, batch_size=2)
    limits: list[dict[str, Any]] = [{"max_gen_toks": n} for n in (5, 2, 5)]
    requests = [ask("generate_until", "tell", word, own) for word, own in zip("abc", limits, strict=True)]
    texts = model.generate_until(requests)
    assert [len(text) <= own["max_gen_toks"] for text, own in zip(texts, limits, strict=True)] == [True] * 3
    assert len(texts[0]) > 2
    stop = {"max_gen_toks": 5, "until": [texts[0][2], "unseen"], "temperature": 0.0}
    assert model.generate_until([ask("generate_until", "tell", "a", stop)]) == [texts[0][: texts[0].index(texts[0][2])]]


def test_what_the_bridge_refuses(folder: Path) -> None:
    model = bridge(folder)
    with pytest.raises(UserError, match=r"does not know 'judge'; it knows: accept, .*task_map=judge:NAME"):
        model.loglikelihood([ask("loglikelihood", "judge", "a", " b")])
    with pytest.raises(UserError, match=r"follows its prompt after a space.*found 'a\\nb'"):
        model.loglikelihood([ask("loglikelihood", "tell", "a", "\nb")])
    with pytest.raises(UserError, match="asks for the perplexity of running text"):
        model.loglikelihood_rolling([ask("loglikelihood_rolling", "tell", "a")])
    with pytest.raises(UserError, match="samples; texts are written greedily"):
        model.generate_until([ask("generate_until", "tell", "a", {"do_sample": True})])
    with pytest.raises(UserError, match="sets penalty"):
        model.generate_until([ask("generate_until", "tell", "a", {"penalty": 2})])
    with pytest.raises(UserError, match="knows no task 'acept'; did you mean 'accept'"):
        bridge(folder, task_map="judge:acept")
    with pytest.raises(UserError, match="write theirs:ours"):
        bridge(folder, task_map="judge")
    with pytest.raises(UserError, match="batch_size is 'auto'"):
        bridge(folder, batch_size="auto")
    assert list(IDS) == list(model._known)


def test_an_unknown_task_of_the_harness(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "adapter"), "--tasks", "nothing", "--include_path", str(folder / "theirs")]
    assert script("harness").main([*arguments, "--only_included"]) == 2
    assert "the harness knows no task 'nothing'" in capsys.readouterr().err
