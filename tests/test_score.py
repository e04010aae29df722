"""The file scorer: forms of references, closed tasks, the paired test, bad input; torch stays out (12 s)."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toy_suite import SUITE, toy_row

from more_ds.metrics import METRICS
from more_ds.results import read_results

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["the red shop sells good bread .", "it is near the old bridge", "a pub"]
REFERENCES = [("the red shop sells bread .", "good bread at the shop ."), ("it is near a bridge",), ("a pub", "a bar")]


@pytest.fixture(scope="module")
def scorer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eval_score", ROOT / "eval" / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["eval_score"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Outputs, and the same references in every form."""
    write(tmp_path / "out.txt", TEXTS)
    write(tmp_path / "blocks.txt", "\n\n".join("\n".join(refs) for refs in REFERENCES).split("\n"))
    write(tmp_path / "ref0", [refs[0] for refs in REFERENCES])
    write(tmp_path / "ref1", [refs[1] if len(refs) > 1 else "" for refs in REFERENCES])
    write(tmp_path / "rows.jsonl", [json.dumps({"references": refs}) for refs in REFERENCES])
    return tmp_path


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def run(scorer: ModuleType, files: Path, *flags: str, task: str = "e2e_nlg") -> dict[str, Any]:
    output = files / "scores.json"
    common = ["--task", task, "--hypotheses", str(files / "out.txt"), "--resamples", "40", "--output", str(output)]
    assert scorer.main([*common, *flags]) == 0
    document: dict[str, Any] = json.loads(output.read_text())
    return document


def refusal(scorer: ModuleType, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert scorer.main([*flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_every_form_of_references_scores_the_same(scorer: ModuleType, files: Path) -> None:
    (files / "blocks.txt.gz").write_bytes(gzip.compress((files / "blocks.txt").read_bytes()))
    forms = [["blocks.txt"], ["blocks.txt.gz"], ["ref0", "ref1"], ["rows.jsonl"]]
    found = [run(scorer, files, "--references", *(str(files / name) for name in form)) for form in forms]
    assert [document["results"] for document in found[1:]] == [found[0]["results"]] * 3
    (result,) = found[0]["results"]
    assert list(result["metrics"]) == ["bleu", "nist_mteval", "rouge_l", "cider"]
    for name, value in result["metrics"].items():
        assert value == pytest.approx(METRICS[name].fn(TEXTS, REFERENCES))
        assert result["standard_errors"][name] > 0.0
        assert result["signatures"][name] == METRICS[name].signature
    assert result["n"] == 3
    about, (read,) = read_results(files / "scores.json")
    assert about["empty"] == 0
    assert read.score == result["metrics"]["bleu"]


def test_one_reference_a_line(scorer: ModuleType, files: Path) -> None:
    (result,) = run(scorer, files, "--references", str(files / "ref0"), "--metrics", "chrf,exact_match")["results"]
    singles = [refs[:1] for refs in REFERENCES]
    assert result["metrics"] == {
        "chrf": pytest.approx(METRICS["chrf"].fn(TEXTS, singles)),
        "exact_match": pytest.approx(100 / 3),
    }
    assert result["primary"] == "chrf"


def test_the_tasks_own_data(scorer: ModuleType, files: Path) -> None:
    folder = files / "nlg" / "e2e_nlg"
    folder.mkdir(parents=True)
    rows = [
        {"meaning_representation": f"name[{i}]", "human_reference": ref}
        for i, refs in enumerate(REFERENCES)
        for ref in refs
    ]
    write(folder / "dev.jsonl", [json.dumps(row) for row in rows])
    own = run(scorer, files, "--data_dir", str(files), "--split", "dev")["results"][0]
    given = run(scorer, files, "--references", str(files / "blocks.txt"))["results"][0]
    assert own["split"] == "dev"
    assert own["metrics"] == given["metrics"]
    assert own["data"] == given["data"]


def test_two_systems(scorer: ModuleType, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [f"word{i} is here now today" for i in range(60)]
    write(files / "refs", many)
    write(files / "out.txt", [text if i % 2 else "nothing of this" for i, text in enumerate(many)])
    worse = write(files / "worse.txt", [text if i % 5 == 0 else "nothing of this" for i, text in enumerate(many)])
    flags = ["--references", str(files / "refs"), "--metrics", "bleu,exact_match", "--compare"]
    document = run(scorer, files, *flags, worse)
    found = document["comparison"]["exact_match"]
    assert (found["difference"], found["other"]) == (pytest.approx(30.0), pytest.approx(20.0))
    assert found["p"] < 0.05
    assert found["interval"][0] < 30.0 < found["interval"][1]
    same = run(scorer, files, *flags, str(files / "out.txt"))["comparison"]["bleu"]
    assert (same["difference"], same["p"]) == (0.0, 1.0)
    assert "difference" in capsys.readouterr().out


def test_empty_outputs_are_counted(scorer: ModuleType, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(files / "out.txt", [TEXTS[0], "", " "])
    document = run(scorer, files, "--references", str(files / "blocks.txt"))
    assert document["empty"] == 2
    assert "warning: 2 of 3 lines" in capsys.readouterr().out
    assert document["results"][0]["metrics"]["bleu"] < METRICS["bleu"].fn(TEXTS, REFERENCES)


def closed(files: Path, task: str, outputs: list[str], count: int = 4) -> list[str]:
    (files / "toy.yaml").write_text(SUITE)
    folder = files / "toy" / task
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "test.jsonl", [json.dumps(toy_row(task, i)) for i in range(count)])
    write(files / "out.txt", outputs)
    return ["--tasks_file", str(files / "toy.yaml")]


def test_closed_tasks(scorer: ModuleType, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = closed(files, "accept", ["bad", "good", "1", "maybe"])  # gold: 0 1 0 1
    (result,) = run(scorer, files, *flags, "--data_dir", str(files), task="accept")["results"]
    assert result["metrics"]["accuracy"] == 50.0
    assert result["unparsable"] == 1
    assert "1 of 4 lines" in capsys.readouterr().out
    gold = write(files / "gold", ["bad", "good", "0", "1"])
    (given,) = run(scorer, files, *flags, "--references", gold, task="accept")["results"]
    assert given["metrics"] == result["metrics"]
    flags = closed(files, "grade", ["0.1", "0.4", "1.2", "nan"])  # gold: 0.0 0.5 1.0 1.5
    (result,) = run(scorer, files, *flags, "--data_dir", str(files), task="grade")["results"]
    pearson = METRICS["pearson"].fn([0.1, 0.4, 1.2, None], [0.0, 0.5, 1.0, 1.5])
    assert result["metrics"]["pearson"] == pytest.approx(pearson)
    options = [f"{toy_row('choose', i)['b']}" for i in range(4)]  # gold: 0 1 2 0
    flags = closed(files, "choose", options)
    (result,) = run(scorer, files, *flags, "--data_dir", str(files), task="choose")["results"]
    assert result["metrics"]["accuracy"] == 25.0


def test_bad_input(scorer: ModuleType, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks, out = str(files / "blocks.txt"), str(files / "out.txt")
    base = ["--task", "e2e_nlg", "--references", blocks, "--hypotheses"]
    short = write(files / "short", TEXTS[:2])
    assert f"{short} has 2 lines for 3 examples ({blocks})" in refusal(scorer, capsys, *base, short)
    assert "has 2 lines" in refusal(scorer, capsys, *base, out, "--compare", short)
    assert "no file" in refusal(scorer, capsys, *base, str(files / "gone"))
    assert "holds no text" in refusal(scorer, capsys, *base, write(files / "void", ["", ""]))
    (files / "latin").write_bytes("Café\n".encode("latin-1"))
    assert "UTF-8" in refusal(scorer, capsys, *base, str(files / "latin"))
    pair = ["--task", "e2e_nlg", "--hypotheses", out, "--references"]
    assert "files of different length: " in refusal(scorer, capsys, *pair, out, short)
    gap = write(files / "gap", ["a", "", "c"])
    assert "example 2 has no reference" in refusal(scorer, capsys, *pair, gap, gap)
    rows = write(files / "bad.jsonl", ['{"references": ["a"]}', '{"references": 3}'])
    assert "row 2: a text or a list of texts expected, found 3" in refusal(scorer, capsys, *pair, rows)
    assert "row 1: no column 'human_reference'" in refusal(
        scorer, capsys, *pair, write(files / "c.jsonl", ['{"a": 1}'])
    )
    assert "'blue' is no metric" in refusal(scorer, capsys, *base, out, "--metrics", "blue")
    assert "did you mean 'bleu'" in refusal(scorer, capsys, *base, out, "--metrics", "bleuu")
    assert "'accuracy' is no metric for e2e_nlg" in refusal(scorer, capsys, *base, out, "--metrics", "accuracy")
    assert "--resamples is 1" in refusal(scorer, capsys, *base, out, "--resamples", "1")
    assert "unknown task 'e2e'" in refusal(scorer, capsys, "--task", "e2e", "--hypotheses", out)
    assert "--hypotheses" in refusal(scorer, capsys, "--task", "e2e_nlg")


def test_bad_labels(scorer: ModuleType, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "accept", *closed(files, "accept", ["bad"] * 3), "--hypotheses", str(files / "out.txt")]
    gold = write(files / "gold", ["good", "", "bad"])
    assert "line 2: no label of 'accept'; allowed: bad, good" in refusal(scorer, capsys, *flags, "--references", gold)
    assert "give one file of labels" in refusal(scorer, capsys, *flags, "--references", gold, gold)
    flags[1] = "choose"
    assert "give one file of labels or scores, or --data_dir" in refusal(scorer, capsys, *flags, "--references", gold)


def test_torch_is_not_loaded(files: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))\n"
    )
    flags = ["--task", "e2e_nlg", "--hypotheses", "out.txt", "--references", "ref0", "ref1", "--resamples", "9"]
    code = f"import sys; sys.argv = {[str(ROOT / 'eval' / 'score.py'), *flags]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=files, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert "bleu" in done.stdout
