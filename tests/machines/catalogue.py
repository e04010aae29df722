"""The 25 ways in which such tools lose work or train wrongly without a word, and the tests that guard against each.

make test-catalogue     prints how many of the 25 are guarded: all their tests pass, and fail once the fault is planted

A fault is planted by a change of one line in a copy of the sources.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("more_ds", "launch", "eval", "tests", "ds_configs", "pyproject.toml")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
PRELOADED = (
    "datasets", "deepspeed", "peft", "scipy.stats", "sklearn.metrics", "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
)  # fmt: skip
PLANTED_SECONDS = 900
"""How long the tests of a planted fault may take; those that hang have not found it."""


class Plant(NamedTuple):
    """A fault: a text that is once in a file of the sources, and what stands there instead."""

    file: str
    sound: str
    faulty: str


class Failure(NamedTuple):
    """A failure, what guards against it, the tests in which it would happen, and the guard taken away."""

    what: str
    guard: str
    tests: tuple[str, ...]
    plant: Plant


CATALOGUE = (
    Failure("NaN or 0 loss of T5 in fp16", "fp16 refused for T5; what is not finite ends the run",
            ("test_catalogue.py::test_fp16_is_refused_for_t5",
             "test_stopping.py::test_what_is_not_finite_is_named_and_the_last_good_state_kept"),
            Plant("more_ds/model.py", 'if dtype == "fp16" and "t5" in config.model_type:',
                  'if dtype == "fp16" and "t5" in config.name_or_path:')),
    Failure("an adapter saved empty under ZeRO-3", "read back and compared before it counts",
            ("test_catalogue.py::test_an_empty_tensor_is_found_before_a_checkpoint_counts",
             "test_checkpoint.py::test_peft_loads_the_adapter_and_computes_the_same"),
            Plant("more_ds/snapshot.py", "write_folder(path, contents, self._check)",
                  "write_folder(path, contents)")),
    Failure("modules_to_save empty under ZeRO-3", "gathered by name as the adapter is",
            ("test_catalogue.py::test_modules_to_save_are_whole_under_zero_3",),
            Plant("more_ds/optimizer_state.py", 'tuple(getattr(p, "ds_shape", p.shape))',
                  "tuple(p.shape)")),
    Failure("frozen weights lost on a ZeRO-3 resume", "never in a checkpoint; another base is refused",
            ("test_catalogue.py::test_frozen_weights_are_what_they_were_after_a_resume_under_zero_3",
             "test_catalogue.py::test_another_base_model_is_refused_on_resume"),
            Plant("more_ds/run_folder.py", 'if saved["sha256"] != now["sha256"]:',
                  'if saved["name_or_path"] != now["name_or_path"]:')),
    Failure("a resume that fails on what is not saved", "names and shapes compared at load, every stage",
            ("test_checkpoint.py::test_a_resumed_run_equals_an_unbroken_one_to_the_bit",
             "test_checkpoint.py::test_what_cannot_be_saved_or_loaded_is_refused_on_every_rank"),
            Plant("more_ds/checkpoint.py", "        if names:\n",
                  '        if names and what == "lacks":\n')),
    Failure("a resume that throws the adapter away", "the next losses are those of the unbroken run",
            ("test_training.py::test_a_resumed_run_ends_with_the_same_bytes",),
            Plant("more_ds/checkpoint.py", "    for kind in (MASTER, *numbers.moments):\n        numbers.set(",
                  "    for kind in numbers.moments:\n        numbers.set(")),
    Failure("adapter keys that do not match", "missing and left-over tensors are an error",
            ("test_eval_run.py::test_a_damaged_adapter_is_refused",
             "test_eval_run.py::test_an_adapter_that_changes_nothing_is_named"),
            Plant("more_ds/loading.py", "missing = sorted(set(expected) - set(saved))",
                  "missing: list[str] = []")),
    Failure("a resume that reads other data", "the plan is a function of the step",
            ("test_sampler.py::test_resume_at_every_step", "test_sampler.py::test_planted_fault_is_caught",
             "test_sampler_refusals.py::test_foreign_state_is_refused"),
            Plant("more_ds/data/sampler.py", "        self.next_step = step\n",
                  "        self.next_step = 0\n")),
    Failure("accumulation normalised wrongly", "the loss is a mean over the step's label tokens",
            ("test_training.py::test_accumulation_changes_nothing",),
            Plant("launch/train.py", "weight = sizes.world * sizes.accumulation / tokens",
                  "weight = torch.tensor(1 / batch.label_tokens)")),
    Failure("a mean of the ranks' means", "the same, over all ranks",
            ("test_training.py::test_two_ranks_on_different_tasks_equal_one_process",),
            Plant("launch/train.py", "weight = sizes.world * sizes.accumulation / tokens",
                  "weight = torch.tensor(sizes.accumulation / counted[0])")),
    Failure("DeepSpeed's own clipping at 1.0", "gradient_clipping is always written",
            ("test_config.py::test_clipping_is_always_written",),
            Plant("more_ds/ds_config.py", '        "gradient_clipping": config.max_grad_norm,\n',
                  "")),
    Failure("an answer that never ends", "each row of labels ends in EOS",
            ("test_encoding.py::test_special_tokens_stand_where_they_should",
             "test_encoding.py::test_a_causal_batch_is_padded_on_the_left_and_its_answers_end_together"),
            Plant("more_ds/data/encoding.py", "[[*ids, self.eos_id] for ids in rows]",
                  "[[*ids] for ids in rows]")),
    Failure("labels cut off", "the prompt is cut, a long answer refused at the start",
            ("test_encoding.py::test_a_long_answer_is_an_error",
             "test_encoding.py::test_a_long_prompt_is_cut_at_its_end_and_counted",
             "test_catalogue.py::test_an_answer_that_is_too_long_is_found_before_the_model"),
            Plant("more_ds/data/encoding.py", "if len(ids) + 1 > self.max_target_length:",
                  "if not ids:")),
    Failure("BOS twice or never", "the special tokens of each tokeniser are found out, and set once",
            ("test_encoding.py::test_a_prompt_that_begins_with_bos_gets_no_second_one",
             "test_encoding.py::test_special_tokens_stand_where_they_should"),
            Plant("more_ds/data/encoding.py", "if self._prefix and ids[: len(self._prefix)] == self._prefix:",
                  "if not self._prefix:")),
    Failure("another template when scored", "one encoder for both",
            ("test_encoding.py::test_golden_tokens",
             "test_catalogue.py::test_prompts_and_answers_are_scored_as_they_are_trained",
             "test_training.py::test_the_standalone_evaluation_repeats_the_runs_scores"),
            Plant("more_ds/scoring/answering.py", "encoder.prompt(e.prompt)",
                  'encoder.prompt(f"Input: {e.prompt}")')),
    Failure("padding rows counted in a score", "every example is answered once; ranks compared",
            ("test_evaluate.py::test_two_and_three_ranks_give_the_numbers_of_one",
             "test_evaluate.py::test_partitioned_ranks_take_the_same_number_of_passes"),
            Plant("more_ds/scoring/answering.py", "strict=True)) if is_real else {}",
                  "strict=True))")),
    Failure("ZeRO-3 that hangs on unequal paths", "all ranks run the same modules, as often",
            ("test_evaluate.py::test_partitioned_ranks_take_the_same_number_of_passes",
             "test_evaluate.py::test_partitioned_ranks_wait_for_the_one_with_most_options",
             "test_training.py::test_two_ranks_on_different_tasks_equal_one_process"),
            Plant("more_ds/scoring/answering.py", "if is_real or self.text_model.in_step:",
                  "if is_real:")),
    Failure("a rotation that deletes the best or the last", "both are protected",
            ("test_catalogue.py::test_the_best_and_the_last_checkpoint_outlive_any_rotation",
             "test_training.py::test_early_stopping_keeps_the_best"),
            Plant("more_ds/checkpoint_files.py", "if path.name in protected:",
                  "if path in protected:")),
    Failure("a truncated checkpoint that is resumed", "flushed, renamed, hashed; damaged ones are passed over",
            ("test_checkpoint_files.py::test_an_io_error_at_any_point_leaves_what_was_there",
             "test_checkpoint_files.py::test_a_kill_at_any_point_leaves_a_complete_checkpoint",
             "test_faults.py::test_a_damaged_checkpoint_is_passed_over"),
            Plant("more_ds/checkpoint_files.py", 'if _sha256(contents[name]) != expected["sha256"]:',
                  'if _sha256(contents[name]) == "":')),
    Failure("no gradient under checkpointing", "non-reentrant, inputs require gradients",
            ("test_more_training.py::test_gradient_checkpointing",
             "test_catalogue.py::test_a_gradient_reaches_every_tensor_of_the_adapter_with_checkpointing",
             "test_catalogue.py::test_a_run_with_checkpointing_ends_where_one_without_does"),
            Plant("launch/train.py", '{"use_reentrant": False}',
                  '{"use_reentrant": True}')),
    Failure("a merge that changes the answers", "merged and unmerged compared; what is not finite refused",
            ("test_more_peft.py::test_merged_equals_unmerged",
             "test_more_peft.py::test_safe_merge_refuses_what_is_not_finite"),
            Plant("more_ds/tuners/base.py", "    if safe and not torch.isfinite(merged).all():",
                  "    if safe and merged.isnan().all():")),
    Failure("a vocabulary that was resized", "a tokeniser larger than the model is refused",
            ("test_catalogue.py::test_a_tokeniser_with_more_tokens_than_the_model_is_refused",),
            Plant("more_ds/plan_checks.py", "if room is not None and tokens > room:",
                  "if room is None:")),
    Failure("every step left out, the rate moving on", "a run of them ends the run",
            ("test_catalogue.py::test_steps_that_fp16_leaves_out_in_a_row_end_the_run",),
            Plant("more_ds/ledger.py", "self._skipped_in_a_row + 1 if skipped > self._skipped else 0",
                  "0")),
    Failure("a time-out while one rank tokenises", "all data are read before the ranks connect",
            ("test_catalogue.py::test_data_is_read_before_the_ranks_wait_for_each_other",),
            Plant("launch/train.py", "    ranks = Ranks()\n    folder",
                  "    ranks = Ranks()\n    ranks.connect()\n    folder")),
    Failure("a file that runs code or leads elsewhere", "no pickle, no code of a model, no paths in names",
            ("test_security.py",),
            Plant("more_ds/config.py", "content = yaml.safe_load(",
                  "content = yaml.unsafe_load(")),
)  # fmt: skip


class Outcomes:
    """Collects what became of each test, its parameters left out."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase of a test; one that is skipped counts as neither."""
        name = report.nodeid.split("[")[0].rsplit("/", 1)[-1]
        for found in (name, name.split("::")[0]):
            if report.failed:
                self.failed.add(found)
            elif report.passed and report.when == "call":
                self.passed.add(found)


def run(root: Path, names: Sequence[str], *options: str, log: Path | None = None) -> tuple[set[str], set[str]]:
    """Run tests in a fork, which imports what lies under `root`; returns those that passed, and those that failed."""
    with tempfile.NamedTemporaryFile() as report:
        child = os.fork()
        if child == 0:
            try:
                if log is not None:
                    signal.alarm(PLANTED_SECONDS)
                    stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                    os.dup2(stream, 1)
                    os.dup2(stream, 2)
                os.chdir(root)
                outcomes = Outcomes()
                found = [str(root / "tests" / name) for name in names]
                pytest.main(["-m", "not slow", "--rootdir", str(root), *options, *found], plugins=[outcomes])
                content = json.dumps([sorted(outcomes.passed), sorted(outcomes.failed)])
                Path(report.name).write_text(content, encoding="utf-8")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        passed, failed = json.loads(Path(report.name).read_text(encoding="utf-8") or "[[], []]")
    return set(passed), set(failed)


def planted(failure: Failure, copy: Path) -> set[str]:
    """The tests that fail in a copy of the sources in which the fault is planted."""
    path = copy / failure.plant.file
    sound = path.read_text(encoding="utf-8")
    if sound.count(failure.plant.sound) != 1:
        return set()
    path.write_text(sound.replace(failure.plant.sound, failure.plant.faulty), encoding="utf-8")
    try:
        return run(copy, failure.tests, "-x", log=copy / "planted.log")[1]
    finally:
        path.write_text(sound, encoding="utf-8")


def preload() -> None:
    """Import once what the forks need and what no fault is planted in."""
    os.environ.update(ENVIRONMENT)
    sys.dont_write_bytecode = True  # a source that is changed within a second is not compiled again
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["deepspeed"].ops.__compatible_ops__  # noqa: B018  # found with runs of a compiler


def main() -> int:
    """Run every test of the catalogue, then those of every planted fault; returns 0 if all failures are guarded."""
    preload()
    passed, failed = run(ROOT, sorted({test for failure in CATALOGUE for test in failure.tests}))
    guarded = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy2(source, copy)
        for number, failure in enumerate(CATALOGUE, 1):
            missing = [test for test in failure.tests if test not in passed - failed]
            caught = planted(failure, copy)
            guarded += not missing and bool(caught)
            print(
                f"{number:2}  {'NOT' if missing or not caught else 'ok':3}  {failure.what}: {failure.guard}", flush=True
            )
            for test in missing:
                print(f"         failed, skipped or not there: {test}")
            for test in sorted(test for test in caught if "::" in test):
                print(f"         fails on the planted fault: {test}")
            if not caught:
                print(f"         planted, and no test fails: {failure.plant.faulty.strip()} in {failure.plant.file}")
    print(f"{guarded} of {len(CATALOGUE)}")
    return 0 if guarded == len(CATALOGUE) else 1


if __name__ == "__main__":
    sys.exit(main())
