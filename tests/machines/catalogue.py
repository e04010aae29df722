"""The 25 ways in which such tools lose work or train wrongly without a word, and the tests that plant each of them.

make test-catalogue     runs them and prints how many of the 25 are guarded
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).resolve().parents[1]


class Failure(NamedTuple):
    """A failure, what guards against it, and the tests in which it happens."""

    what: str
    guard: str
    tests: tuple[str, ...]


CATALOGUE = (
    Failure("NaN or 0 loss of T5 in fp16", "fp16 refused for T5; what is not finite ends the run",
            ("test_catalogue.py::test_fp16_is_refused_for_t5",
             "test_stopping.py::test_what_is_not_finite_is_named_and_the_last_good_state_kept")),
    Failure("an adapter saved empty under ZeRO-3", "read back and compared before it counts",
            ("test_catalogue.py::test_an_empty_tensor_is_found_before_a_checkpoint_counts",
             "test_checkpoint.py::test_peft_loads_the_adapter_and_computes_the_same")),
    Failure("modules_to_save empty under ZeRO-3", "gathered by name as the adapter is",
            ("test_catalogue.py::test_modules_to_save_are_whole_under_zero_3",)),
    Failure("frozen weights lost on a ZeRO-3 resume", "never in a checkpoint; another base is refused",
            ("test_catalogue.py::test_frozen_weights_are_what_they_were_after_a_resume_under_zero_3",
             "test_catalogue.py::test_another_base_model_is_refused_on_resume")),
    Failure("a resume that fails on what is not saved", "names and shapes compared at load, every stage",
            ("test_checkpoint.py::test_a_resumed_run_equals_an_unbroken_one_to_the_bit",
             "test_checkpoint.py::test_what_cannot_be_saved_or_loaded_is_refused_on_every_rank")),
    Failure("a resume that throws the adapter away", "the next losses are those of the unbroken run",
            ("test_training.py::test_a_resumed_run_ends_with_the_same_bytes",)),
    Failure("adapter keys that do not match", "missing and left-over tensors are an error",
            ("test_eval_run.py::test_a_damaged_adapter_is_refused",
             "test_eval_run.py::test_an_adapter_that_changes_nothing_is_named")),
    Failure("a resume that reads other data", "the plan is a function of the step",
            ("test_sampler.py::test_resume_at_every_step", "test_sampler.py::test_planted_fault_is_caught",
             "test_sampler_refusals.py::test_foreign_state_is_refused")),
    Failure("accumulation normalised wrongly", "the loss is a mean over the step's label tokens",
            ("test_training.py::test_accumulation_changes_nothing",)),
    Failure("a mean of the ranks' means", "the same, over all ranks",
            ("test_training.py::test_two_ranks_on_different_tasks_equal_one_process",)),
    Failure("DeepSpeed's own clipping at 1.0", "gradient_clipping is always written",
            ("test_config.py::test_clipping_is_always_written",)),
    Failure("an answer that never ends", "each row of labels ends in EOS",
            ("test_encoding.py::test_special_tokens_stand_where_they_should",
             "test_encoding.py::test_a_causal_batch_is_padded_on_the_left_and_its_answers_end_together")),
    Failure("labels cut off", "the prompt is cut, a long answer refused at the start",
            ("test_encoding.py::test_a_long_answer_is_an_error",
             "test_encoding.py::test_a_long_prompt_is_cut_at_its_end_and_counted",
             "test_catalogue.py::test_an_answer_that_is_too_long_is_found_before_the_model")),
    Failure("BOS twice or never", "the special tokens of each tokeniser are found out, and set once",
            ("test_encoding.py::test_a_prompt_that_begins_with_bos_gets_no_second_one",
             "test_encoding.py::test_special_tokens_stand_where_they_should")),
    Failure("another template when scored", "one encoder for both",
            ("test_encoding.py::test_golden_tokens",
             "test_training.py::test_the_standalone_evaluation_repeats_the_runs_scores")),
    Failure("padding rows counted in a score", "every example is answered once; ranks compared",
            ("test_evaluate.py::test_two_and_three_ranks_give_the_numbers_of_one",)),
    Failure("ZeRO-3 that hangs on unequal paths", "all ranks run the same modules, as often",
            ("test_evaluate.py::test_partitioned_ranks_take_the_same_number_of_passes",
             "test_evaluate.py::test_partitioned_ranks_wait_for_the_one_with_most_options",
             "test_training.py::test_two_ranks_on_different_tasks_equal_one_process")),
    Failure("a rotation that deletes the best or the last", "both are protected",
            ("test_catalogue.py::test_the_best_and_the_last_checkpoint_outlive_any_rotation",
             "test_training.py::test_early_stopping_keeps_the_best")),
    Failure("a truncated checkpoint that is resumed", "flushed, renamed, hashed; damaged ones are passed over",
            ("test_checkpoint_files.py::test_an_io_error_at_any_point_leaves_what_was_there",
             "test_checkpoint_files.py::test_a_kill_at_any_point_leaves_a_complete_checkpoint",
             "test_faults.py::test_a_damaged_checkpoint_is_passed_over")),
    Failure("no gradient under checkpointing", "non-reentrant, inputs require gradients",
            ("test_more_training.py::test_gradient_checkpointing",
             "test_catalogue.py::test_a_gradient_reaches_every_tensor_of_the_adapter_with_checkpointing")),
    Failure("a merge that changes the answers", "merged and unmerged compared; what is not finite refused",
            ("test_more_peft.py::test_merged_equals_unmerged",
             "test_more_peft.py::test_safe_merge_refuses_what_is_not_finite")),
    Failure("a vocabulary that was resized", "a tokeniser larger than the model is refused",
            ("test_catalogue.py::test_a_tokeniser_with_more_tokens_than_the_model_is_refused",)),
    Failure("every step left out, the rate moving on", "a run of them ends the run",
            ("test_catalogue.py::test_steps_that_fp16_leaves_out_in_a_row_end_the_run",)),
    Failure("a time-out while one rank tokenises", "all data are read before the ranks connect",
            ("test_catalogue.py::test_data_is_read_before_the_ranks_wait_for_each_other",)),
    Failure("a file that runs code or leads elsewhere", "no pickle, no code of a model, no paths in names",
            ("test_security.py",)),
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


def main() -> int:
    """Run every test of the catalogue once; returns 0 if all failures are guarded."""
    outcomes = Outcomes()
    names = sorted({test for failure in CATALOGUE for test in failure.tests})
    pytest.main(["-q", "-m", "not slow", *(str(TESTS / name) for name in names)], plugins=[outcomes])
    guarded = 0
    for number, failure in enumerate(CATALOGUE, 1):
        missing = [test for test in failure.tests if test not in outcomes.passed - outcomes.failed]
        guarded += not missing
        print(f"{number:2}  {'ok' if not missing else 'NOT':3}  {failure.what}: {failure.guard}")
        for test in missing:
            print(f"         failed, skipped or not there: {test}")
    print(f"{guarded} of {len(CATALOGUE)}")
    return 0 if guarded == len(CATALOGUE) else 1


if __name__ == "__main__":
    sys.exit(main())
