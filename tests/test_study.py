"""Studies: what they define, the queue, what is taken from the runs, and each one from end to end at demo scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_jobs
import numpy as np
import pytest
from test_compare import scored
from test_study_queue import Fake, simple

from launch import study
from more_ds.compare.bootstrap import RepeatedPair, TaskPair, paired_mean_test, repeated_mean_test
from more_ds.compare.published import load_published
from more_ds.errors import UserError
from more_ds.metrics import METRICS
from more_ds.results import write_results
from more_ds.study.definition import Study, read_scale, read_study, study_names
from more_ds.study.jobs import Job, make_jobs
from more_ds.study.rates import best_rates, rates_table
from more_ds.study.scores import score_tables

FAST = ("table4", "table6", "figure5")
PAPER = [f"table{n}" for n in range(1, 8)] + [f"figure{n}" for n in range(2, 6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def flags(place: Path) -> list[str]:
    return ["--", "--max_target_length", "160", *forked_jobs.tiny(place)]


def run(name: str, place: Path, flags: list[str], *extra: str) -> int:
    return study.main([name, "--seeds", "1", "--output", str(place / "out"), *extra, *flags], forked_jobs.start)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PAPER])
def test_every_study_runs_from_end_to_end(name: str, place: Path, flags: list[str]) -> None:
    assert run(name, place, flags) == 0
    folder = place / "out" / name
    tables = json.loads((folder / "table.json").read_text())
    assert tables
    assert all(table["rows"] for table in tables)
    assert (folder / "table.md").read_text().startswith(f"**{name}")
    assert "\\toprule" in (folder / "table.tex").read_text()
    page = (folder / "index.html").read_text()
    assert "<table>" in page
    assert ("<svg" in page) == name.startswith(("figure2", "figure4", "figure5"))


@pytest.mark.slow
def test_a_study_starts_processes_of_its_own(place: Path, flags: list[str]) -> None:
    output = place / "processes"
    assert study.main(["figure5", "--seeds", "1", "--output", str(output), *flags]) == 0
    [log] = (output / "logs").iterdir()
    assert "score it again: python eval/run.py" in log.read_text()


def test_the_paper_has_no_other_studies() -> None:
    assert study_names() == sorted(PAPER)


def test_a_finished_run_is_not_run_again(place: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("figure5", place, flags) == 0

    def refuse(job: Job, output: Path, slot: int) -> Any:
        raise AssertionError(f"{job.id} was started again")

    assert study.main(["figure5", "--seeds", "1", "--output", str(place / "out"), *flags], refuse) == 0
    capsys.readouterr()
    assert run("figure5", place, flags, "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 3
    assert "  done   " in listed[2]


@pytest.fixture
def scale() -> dict[str, Any]:
    return read_scale("demo")


def jobs_of(name: str, scale: Mapping[str, Any], seeds: int = 2, **flags: Any) -> list[Job]:
    return make_jobs(read_study(name, scale), scale, seeds, flags, Path("out"), None)


def test_studies_share_their_runs(scale: dict[str, Any]) -> None:
    first, second = ({job.id for job in jobs_of(name, scale)} for name in ("table2", "table5"))
    assert len(first & second) == 4, "two of MoRE, two seeds"
    assert all(job.folder == Path("out/runs") / job.id for job in jobs_of("table5", scale))


def test_all_methods_get_the_same_data_in_the_same_order(scale: dict[str, Any]) -> None:
    jobs = [job for job in jobs_of("table2", scale) if "each task" not in job.arm]
    decides = [key for key in jobs[0].recipe or {} if key not in ("method", "adapter")]
    for seed in (0, 1):
        alike = [{key: (job.recipe or {})[key] for key in decides} for job in jobs if job.seed == seed]
        assert len(alike) == 13
        assert all(one == alike[0] for one in alike)


def test_a_run_for_each_task_alone(scale: dict[str, Any]) -> None:
    jobs = [job for job in jobs_of("table1", scale, seeds=1) if job.arm == "r = 8"]
    assert [(job.recipe or {})["tasks"] for job in jobs] == [["acceptability"], ["similarity"]]


def test_options_of_a_backbone_go_to_the_methods_that_have_them() -> None:
    paper = read_scale("paper")
    by_arm = {
        job.arm: (job.recipe or {})["adapter"] for job in jobs_of("table2", paper, 1) if job.backbone == "T5-base"
    }
    maps = ["q", "k", "v", "o", "wi", "wo"]
    common = {"lora_alpha": 32, "lora_dropout": 0.1, "target_modules": maps}
    assert by_arm["MoRE"] == {"r": 8, "task_dim": 768, **common}
    assert by_arm["LoRA r = 16"] == {"r": 16, **common}
    assert by_arm["MOELoRA"] == {"r": 8, **common}, "its task_dim is another"
    assert by_arm["MixLoRA"] == {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    assert by_arm["HyperFormer"] == by_arm["prompt tuning"] == {}


def test_what_starts_from_a_run_comes_after_it(scale: dict[str, Any]) -> None:
    jobs = jobs_of("figure2", scale)
    assert [job.script for job in jobs] == ["launch/train.py", *["eval/run.py"] * 9]
    assert [job.component for job in jobs[1:]] == list(range(9))
    transfers = jobs_of("table4", scale, seeds=5)
    assert [job.script for job in transfers] == ["launch/train.py"] * 2 + ["launch/transfer.py"] * 3
    assert transfers[2].arguments[transfers[2].arguments.index("--seeds") + 1] == "5"


def test_an_interrupted_study_goes_on(place: Path, flags: list[str]) -> None:
    """The first of the two jobs is done; the second was never started."""
    output = place / "cut"

    def stop(job: Job, log: Path, slot: int) -> Any:
        return forked_jobs.start(job, log, slot) if not list(output.glob("runs/*/eval")) else Fake(75)

    arguments = ["table7", "--seeds", "1", "--output", str(output)]
    assert study.main([*arguments, *flags], stop) == 75
    done = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/eval/test/results.json")}
    assert len(done) == 1
    assert study.main([*arguments, *flags], forked_jobs.start) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    assert len(list(output.glob("runs/*/eval/test/results.json"))) == 2


def searched(folder: Path, scores: Mapping[str, Mapping[float, list[float]]]) -> list[Job]:
    """Jobs whose runs were evaluated: validation scores in the order of steps, by system and rate."""
    jobs = []
    for arm, rates in scores.items():
        for rate, means in rates.items():
            job = replace(simple(f"{arm}-{rate}", folder), arm=arm, recipe={"learning_rate": rate})
            job.folder.mkdir(parents=True)
            rows = [{"step": step, "mean_score": mean, "evaluation": {}} for step, mean in enumerate(means)]
            for name, content in (("config", {"method": "lora"}), ("plan", {"tasks": {}}), ("versions", {})):
                (job.folder / f"{name}.json").write_text(json.dumps(content))
            (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            jobs.append(job)
    return jobs


def test_the_best_rate_of_every_system_is_taken_from_validation(tmp_path: Path) -> None:
    scores = {
        "inside": {1e-4: [50.0, 51.0], 1e-3: [50.0, 70.0, 60.0], 1e-2: [50.0, 65.0]},
        "edge": {1e-4: [50.0, 40.0], 1e-3: [60.0], 1e-2: [61.0, 62.0]},
        "level": {1e-4: [20.0], 1e-3: [50.0], 1e-2: [50.0]},
    }
    jobs = searched(tmp_path, scores)
    assert best_rates(jobs) == {("b", "inside"): 1e-3, ("b", "edge"): 1e-2, ("b", "level"): 1e-3}
    table = rates_table(Study("mine", "about", "glue", []), jobs[::-1])
    assert list(table.header) == ["system", "0.0001", "0.001", "0.01"]
    rows = {row[0].value: row[1:] for row in table.rows}
    assert [cell.value for cell in rows["b, inside"]] == [51.0, 70.0, 65.0]
    assert [cell.is_best for cell in rows["b, inside"]] == [False, True, False]
    assert [cell.marks for cell in rows["b, edge"]] == ["", "", "a"]
    assert "beyond" in table.notes["a"]
    assert rates_table(Study("mine", "about", "glue", []), jobs[:3]).notes == {}


def test_systems_train_their_other_seeds_at_their_best_rate(
    place: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    script = tmp_path / "job.sbatch"
    arguments = ["table7", "--seeds", "2", "--output", str(output), "--systems", "MoRE", "--rates", "1e-9,3e-3"]
    assert study.main([*arguments, "--slurm", str(script), *flags]) == 0
    assert "#SBATCH --array=0-1%1" in script.read_text(), "seed 0 at both rates; the best is not known yet"
    assert "without --slurm or with it, to go on" in capsys.readouterr().out
    assert study.main([*arguments, *flags], forked_jobs.start) == 0
    found = {}
    for path in output.glob("runs/*/config.json"):
        config = json.loads(path.read_text())
        found.setdefault(config["seed"], set()).add(config["learning_rate"])
    scores, rates = json.loads((output / "table7" / "table.json").read_text())[-2:]
    assert found[0] == {1e-9, 3e-3}
    assert found[1] < found[0]
    assert len(found[1]) == 1
    [row] = rates["rows"]
    assert "learning rate" in rates["title"]
    assert len(row) == 3
    assert "2 seeds" in scores["title"]


def fake_runs(folder: Path, hits: Mapping[str, list[dict[str, int]]]) -> list[Job]:
    """Jobs whose runs are scored: right answers of a hundred, by system, seed and task."""
    jobs = []
    for arm, seeds in hits.items():
        for seed, tasks in enumerate(seeds):
            job = replace(simple(f"{arm}-{seed}", folder), arm=arm, seed=seed, recipe={})
            write_results(job.results, [scored(task, n, suite="glue") for task, n in tasks.items()], {})
            jobs.append(job)
    return jobs


def test_means_deviations_and_tests_over_seeds(tmp_path: Path) -> None:
    hits = {"base": [{"rte": 60, "cola": 50}, {"rte": 64, "cola": 50}], "ours": [{"rte": 80, "cola": 52},
            {"rte": 80, "cola": 56}]}  # fmt: skip
    arms = [read_study("table2", {}).arms[0]]
    one = Study("table2", "about", "glue", arms, baseline="base", published="results")
    scores, tests = score_tables(one, fake_runs(tmp_path, hits))
    rows = {row[0].value: row[1:] for row in scores.rows}
    assert [cell.value for cell in rows["base"]] == [62.0, 50.0, 56.0]
    assert [cell.value for cell in rows["ours"]] == [80.0, 54.0, 67.0]
    # Deviations of 60, 64; of none; and of the means 55 and 57.
    assert [cell.error for cell in rows["base"]] == pytest.approx([8**0.5, 0.0, 2**0.5])
    assert [cell.error for cell in rows["ours"]] == pytest.approx([0.0, 8**0.5, 2**0.5])
    more = next(column for column in load_published("results") if column.system == "MoRE")
    assert rows["MoRE (published)"][-1].value == more.mean
    [test] = tests.rows
    assert [test[0].value, test[1].value] == ["ours", pytest.approx(11.0)]
    assert 0 < test[2].value < 11 < test[3].value


def test_one_seed_has_the_errors_of_its_examples(tmp_path: Path) -> None:
    one = Study("table2", "about", "glue", [], baseline=None)
    [table] = score_tables(one, fake_runs(tmp_path, {"a": [{"rte": 60}], "b": [{"rte": 70}]}))
    assert [row[1].error for row in table.rows] == [1.5, 1.5]


def test_repeated_runs_share_their_resamples() -> None:
    draw = np.random.default_rng(1)
    golds = draw.integers(0, 2, 60).tolist()
    a, b = (draw.integers(0, 2, 60).tolist() for _ in range(2))
    fn = METRICS["accuracy"].resampled
    once = paired_mean_test([TaskPair(fn, a, b, golds)], 200)
    # The same run three times says no more than once; drawn apart, the interval would shrink.
    thrice = repeated_mean_test([RepeatedPair(fn, [a] * 3, [b] * 3, golds)], 200)
    assert once.difference != 0
    assert [thrice.difference, thrice.p, *thrice.interval] == pytest.approx([once.difference, once.p, *once.interval])
    two = repeated_mean_test([RepeatedPair(fn, [a, b], [b], golds)], 200)
    assert two.difference == pytest.approx(once.difference / 2)


def test_a_slurm_array(place: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "job.sbatch"
    extra = ["--slurm", str(script), "--jobs", "3", "--gpus", "2", "--output", str(tmp_path / "out")]
    assert run("table5", place, flags, *extra) == 0
    text = script.read_text()
    assert "#SBATCH --array=0-10%3\n" in text
    assert "#SBATCH --ntasks-per-node=2\n" in text
    recipes = sorted((tmp_path / "out" / "recipes").glob("*.yaml"))
    assert len(recipes) == 11
    assert all(f"--recipe {path} --output_dir {tmp_path}/out/runs/{path.stem}" in text for path in recipes)
    assert "runs/$SLURM_JOB_NAME" not in text
    capsys.readouterr()
    extra[-1] = str(tmp_path / "two words")
    assert run("table5", place, flags, *extra) == 2
    assert "more than one word" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table8"], "no study 'table8'; did you mean"),
        (["table5", "--scale", "big"], "no scale 'big'; known: demo, generated, paper, small"),
        (
            ["table4", "--scale", "generated"],
            "study 'table4' needs 'transfer', and this scale has: glue, commonsense",
        ),
        (["table5", "--scale", "small"], "this scale names no model; give yours behind --"),
        (["table5", "--", "--method", "lora"], "--method after --: the study sets it"),
        (["table5", "--", "--learning_rat", "1"], "unknown argument '--learning_rat'"),
        (["table5", "--seeds", "0"], "'0' is not a positive number"),
        (["table5", "--systems", "MoRe"], "study 'table5' has no system 'MoRe'; did you mean 'MoRE'?"),
        (["table5", "--rates", "1e-3,fast"], "'1e-3,fast': could not convert"),
        (["table5", "--rates", "1e-3,-1"], "a learning rate is a finite number above zero"),
        (["table5", "--rates", "1e-3,0.001"], "a rate is named twice"),
        (["table6", "--rates", "1e-3"], "study 'table6' compares no scores of trained systems"),
        (["table5", "--rates", "1e-3", "--", "--learning_rate", "1"], "--learning_rate after --, beside --rates"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_study_that_is_written_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("more_ds.study.definition.FOLDER", tmp_path)

    def refusal(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            read_study("mine", {})
        return str(error.value)

    good = "about: x\ndata: glue\nsystems: {A: {method: lora, adapter: {r: 1}}}\n"
    assert "kind is 'trian'; did you mean 'train'?" in refusal(good + "kind: trian\n")
    assert "baseline is 'B'; known: A" in refusal(good + "baseline: B\n")
    assert "unknown key 'bsaeline'; did you mean 'baseline'?" in refusal(good + "bsaeline: A\n")
    assert "system 'A': adapter.rank: unknown option" in refusal(good.replace("{r: 1}", "{rank: 1}"))
    assert "system 'A': unknown key 'adaptr'" in refusal(good.replace("adapter:", "adaptr:"))
    scale = {"glue": {"b": {"model": "demo", "suite": ["demo"]}}}
    (tmp_path / "mine.yaml").write_text(good.replace("}}\n", "}, B: {method: lora, adapter: {r: 1}}}\n", 1))
    with pytest.raises(UserError, match="systems 'A' and 'B' are one run"):
        make_jobs(read_study("mine", scale), scale, 1, {}, tmp_path, None)
