"""Adapters in EleutherAI's lm-evaluation-harness, every request for its own task.

An optional extra: `pip install -r requirements-extra.txt`. Importing this module registers the model `more_ds`;
`eval/harness.py` is the command.

A request's prompt and answer become tokens as in training, and an answer ends with EOS, so that likelihoods equal those
of `eval/run.py` on the same text. The harness itself scores answers without EOS; `end_of_answer=False` does that too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from more_ds.errors import UserError, suggest
from more_ds.loading import choose_device, choose_dtype, find_subject, load_text_model
from more_ds.log import Progress
from more_ds.losses import IGNORED, label_nll
from more_ds.scoring.generation import generate

T = TypeVar("T")


@register_model("more_ds")
class MoreDsLM(LM):
    """A run, an adapter or a plain model of `more_ds` behind the harness's interface, in one process.

    Attributes:
        text_model: the model; its encoder counts the prompts that were cut.
    """

    def __init__(
        self,
        run: str,
        task_map: str | Mapping[str, str] = "",
        as_task: str | None = None,
        base_model: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 32,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        end_of_answer: bool = True,
        max_batch_size: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            run: a run directory, an adapter folder or a model (`more_ds.loading.find_subject`).
            task_map: the adapter's task for each task of the harness, `theirs:ours+theirs:ours` or a mapping; a task
                of the same name need not be in it.
            as_task: the adapter's task for all others.
            base_model: base model of an adapter, where the recorded one has moved.
            dtype: `fp32`, `bf16`, `fp16`, or `auto`: the run's, else bf16 on a GPU and fp32 on a CPU.
            device: as torch names it; None: a GPU if there is one.
            batch_size: requests per forward pass.
            max_source_length: most tokens of a prompt; None: the run's, else up to 384.
            max_target_length: most tokens of an answer; None: the run's, else 128.
            end_of_answer: whether EOS belongs to an answer.
            max_batch_size: not used; the harness passes it.

        Raises:
            UserError: a task that the adapter does not know, a batch size that is no number, and what
                `more_ds.loading` refuses.
        """
        super().__init__()
        subject = find_subject(run, base_model)
        self._known = subject.task_ids
        self._task_map = _read_map(task_map)
        self._as_task = as_task
        for name in {*self._task_map.values(), *([as_task] if as_task else [])}:
            if name not in self._known:
                raise UserError(f"the adapter knows no task '{name}'{suggest(name, self._known)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}; give a positive number")
        self._batch_size, self._end_of_answer = int(batch_size), end_of_answer
        device = choose_device(device)
        source_length, target_length = subject.lengths(max_source_length, max_target_length)
        self.text_model = load_text_model(
            subject,
            dtype=choose_dtype(subject, dtype, device),
            device=device,
            max_source_length=source_length,
            max_target_length=target_length,
        )
        self._device = self.text_model.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (prompt, answer): the answer's log-likelihood in nats, and whether greedy decoding writes it.

        Raises:
            UserError: a task that the adapter does not know, or an answer that does not follow its prompt as in
                training.
        """
        tasks = [self._task_id(request) for request in requests]
        pairs = [self._encode(request) for request in requests]

        def score(rows: Sequence[int]) -> list[tuple[float, bool]]:
            model = self.text_model
            prompts, answers = zip(*(pairs[i] for i in rows), strict=True)
            batch = model.to_device(model.collator.answers(prompts, answers, [tasks[i] for i in rows]))
            with model.evaluating():
                logits = model.label_logits(batch)
            nll, _ = label_nll(logits, batch["labels"])
            is_written = (logits.argmax(-1) == batch["labels"]) | (batch["labels"] == IGNORED)
            return list(zip((-nll).tolist(), is_written.all(1).tolist(), strict=True))

        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        return self._in_batches(dict(enumerate(lengths)), score, "likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: an adapter that was trained on prompts and answers has no likelihood of running text.

        Raises:
            UserError: always.
        """
        raise UserError(f"task '{requests[0].task_name}' asks for the perplexity of running text; leave it out")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each (prompt, settings): what the model writes, greedily or by beams, up to a stop string.

        Raises:
            UserError: a task that the adapter does not know, or settings that are not supported.
        """
        encoder = self.text_model.encoder
        tasks = [self._task_id(request) for request in requests]
        settings = [_settings(request, encoder.max_target_length) for request in requests]
        prompts = [encoder.prompt(str(request.args[0]).strip()) for request in requests]
        texts: dict[int, str] = {}
        for limit, beams in sorted({(own.max_new_tokens, own.num_beams) for own in settings}):

            def write(rows: Sequence[int], limit: int = limit, beams: int = beams) -> list[str]:
                chosen = [prompts[i] for i in rows], [tasks[i] for i in rows]
                return [encoder.decode(ids) for ids in generate(self.text_model, *chosen, limit, beams)]

            own = [i for i, s in enumerate(settings) if (s.max_new_tokens, s.num_beams) == (limit, beams)]
            written = self._in_batches({i: len(prompts[i]) for i in own}, write, "texts")
            texts.update(zip(own, written, strict=True))
        return [_before(texts[i], own.until) for i, own in enumerate(settings)]

    def _task_id(self, request: Instance) -> int:
        """The adapter's number of a request's task; 0 for a model that does not route by task."""
        if not self.text_model.routes_by_task:
            return 0
        theirs = str(request.task_name)
        name = self._task_map.get(theirs, theirs)
        if name not in self._known and self._as_task is not None:
            name = self._as_task
        if name not in self._known:
            raise UserError(
                f"the adapter does not know '{theirs}'; it knows: {', '.join(self._known)}; "
                f"name the one that is meant: task_map={theirs}:NAME, or as_task=NAME for all others"
            )
        return self._known[name]

    def _encode(self, request: Instance) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and its answer."""
        encoder = self.text_model.encoder
        context, continuation = (str(part) for part in request.args)
        # Prompts and answers of our templates carry no white space around them; one space parts them.
        prompt, answer = context.strip(), continuation.strip()
        between = context[len(context.rstrip()) :] + continuation[: len(continuation) - len(continuation.lstrip())]
        if not encoder.is_encoder_decoder and (not between or between.strip(" ")):
            raise UserError(
                f"task '{request.task_name}': an answer follows its prompt after a space, as in training; found "
                f"{(context[-10:] + continuation)[:20]!r}; set target_delimiter to ' '"
            )
        ids = encoder.prompt(prompt)
        if not ids:
            raise UserError(f"task '{request.task_name}' has an empty prompt, and the model no BOS to stand in for it")
        target = encoder.target(answer)
        return ids, target if self._end_of_answer else target[:-1]

    def _in_batches(self, lengths: Mapping[int, int], work: Callable[[Sequence[int]], list[T]], label: str) -> list[T]:
        """Do the work on requests of like length together, the longest first; the answers in the requests' order."""
        order = sorted(lengths, key=lambda i: -lengths[i])
        found: dict[int, T] = {}
        with Progress(len(order), label) as bar:
            for at in range(0, len(order), self._batch_size):
                rows = order[at : at + self._batch_size]
                found.update(zip(rows, work(rows), strict=True))
                bar.advance(len(rows))
        return [found[i] for i in lengths]


class _Settings(NamedTuple):
    """How a text is to be written."""

    max_new_tokens: int
    num_beams: int
    until: tuple[str, ...]


def _settings(request: Instance, default_length: int) -> _Settings:
    given = dict(request.args[1])
    until = given.pop("until", None) or ()
    length = int(given.pop("max_gen_toks", default_length))
    beams = int(given.pop("num_beams", 1))
    samples = bool(given.pop("do_sample", False))
    for key in ("temperature", "top_p", "top_k"):  # without sampling they say nothing
        given.pop(key, None)
    if samples or given:
        what = "samples" if samples else f"sets {', '.join(given)}"
        raise UserError(f"task '{request.task_name}' {what}; texts are written greedily, or by num_beams")
    return _Settings(length, beams, (until,) if isinstance(until, str) else tuple(until))


def _before(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]


def _read_map(task_map: str | Mapping[str, str]) -> dict[str, str]:
    if not isinstance(task_map, str):
        return dict(task_map)
    pairs = [pair.partition(":") for pair in task_map.split("+") if pair]
    if not all(theirs and ours for theirs, _, ours in pairs):
        raise UserError(f"task_map is '{task_map}'; write theirs:ours+theirs:ours")
    return {theirs: ours for theirs, _, ours in pairs}
