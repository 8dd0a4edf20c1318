"""Tasks of lm-eval (the `lm-eval` extra) as parts of the card: base beside adapter, document by document."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lm_eval.api import metrics as theirs
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from postil.adapter import AdaptedModel
from postil.data import Sample
from postil.engine import Answer, Engine, Request, unbroken
from postil.engine.engine import eos_ids
from postil.engine.memory import Keep, Memory, asked_of
from postil.errors import AnswerError, JudgeError, PostilError, listed, nearest
from postil.judging.asking.likelihoods import Done, token_scores
from postil.judging.card.build import Draw, measured, part_of
from postil.judging.card.model import DataUsed, Part
from postil.judging.metrics.metric import Metric, Statistics, mean_of
from postil.judging.options import HarnessOptions

_YAML = (".yaml", ".yml")
_CONTEXT = 2048  # tokens, of a base that names no context


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model, with one of its residents or bare, as lm-eval asks it.

    batch: rows that decode together. counting: given a number of requests, returns what is told of each more done.
    memory: of what it said before.
    """

    def __init__(
        self, model: AdaptedModel, adapter: str | None, batch: int = 32,
        counting: Callable[[int], Done] = lambda _: lambda _: None, memory: Memory | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._memory = memory or Memory(None)
        self._model, self._adapter, self._batch, self._counting = model, adapter, batch, counting
        self.tokenizer: Any = model.base.tokenizer
        self.max_length = model.base.context or _CONTEXT

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on: BOS, or the end of a text before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names its cache of requests by."""
        return str(self._model.base.source)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens as the tokenizer makes them; a text that has its BOS already gets no second one."""
        bos = self.tokenizer.bos_token
        special = add_special_tokens if add_special_tokens is not None else not (bos and string.startswith(bos))
        found = self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
        return [int(token) for token in found]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the base's chat template writes it."""
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ends))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Per (context, continuation) its log-likelihood in nats and whether greedy decoding would give it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._scored([(context, text) for _, context, text in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Per text its log-likelihood in nats, a long one in windows that each see only themselves."""
        windows, owners = list[tuple[list[int], list[int]]](), list[int]()
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
            found = [make_disjoint_window(window) for window in cut]
            windows += found
            owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scored(windows), strict=True):
            totals[owner] += score
        return totals

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        samples = []
        for number, (context, text) in enumerate(pairs, 1):
            ids = np.array([*context, *text][-self.max_length :], dtype=np.int32)
            weights = np.zeros(len(ids), dtype=np.float32)
            weights[max(len(ids) - len(text), 1) :] = 1
            samples.append(Sample(ids, weights, number))
        return self._memory(
            "lm-eval scores", [one.ids.tobytes() + one.weights.tobytes() for one in samples],
            lambda: token_scores(self._model, samples, self._adapter, self._counting(len(samples))),
            lambda kept: [(-float(total), bool(greedy)) for total, greedy in kept],
        )  # fmt: skip

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers up to the strings that each request names."""
        asked = []
        for number, request in enumerate(requests):
            context, given = request.args
            options = normalize_gen_kwargs(given, 256)
            most = int(options["max_gen_toks"])
            room = self.max_length - most
            if room < 1:
                raise JudgeError(
                    f"a task wants answers of {most} tokens, and the base's context is {self.max_length}"
                )
            asked.append(
                Request(
                    ids=self.tok_encode(context)[-room:] or [self.prefix_token_id], adapter=self._adapter,
                    max_new_tokens=most, stop=tuple(mark for mark in options.get("until") or () if mark),
                    temperature=float(options.get("temperature") or 0.0), top_p=float(options.get("top_p") or 1.0),
                    top_k=int(options.get("top_k") or 0), seed=number,
                )
            )  # fmt: skip
        common = repr((self._batch, sorted(eos_ids(self._model)))).encode()

        def make(places: Sequence[int], keep: Keep) -> None:
            done = self._counting(len(places))

            def add(place: int, answer: Answer) -> None:
                if answer.error is None:
                    keep(places[place], answer.text)
                done(1)

            with Engine(self._model, max_batch=self._batch) as engine:
                answers = engine.run([asked[place] for place in places], finished=add)
            try:
                unbroken(answers)
            except AnswerError as problem:
                raise JudgeError(f"lm-eval: {problem}") from None

        told = [common + asked_of(one, number, self._model) for number, one in enumerate(asked, 1)]
        return self._memory.each("lm-eval answers", told, make, str)


@dataclass(frozen=True, slots=True)
class Tasks:
    """Opened tasks, ready to be asked. names: of each that was opened, groups taken apart."""

    loaded: dict[str, Any]
    options: HarnessOptions
    seed: int

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return list(self.loaded["tasks"])


def open_tasks(options: HarnessOptions, seed: int, taken: Iterable[str] = ()) -> Tasks:
    """lm-eval's tasks and groups by name, and a user's own as YAML files. taken: the names of the card's other
    parts. Raises JudgeError naming the task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = all(Path(name).suffix in _YAML for name in options.tasks)
    manager = TaskManager(include_defaults=not files)  # reading what is known of thousands of tasks takes seconds
    specs: list[Any] = []
    for name in options.tasks:
        file = Path(name)
        if file.suffix in _YAML:
            if not file.is_file():
                raise JudgeError(f"lm_eval.tasks: there is no file {name}")
            specs.append(_told(name, partial(load_yaml, str(file), resolve_func=True)))
        elif name in manager.all_tasks:
            specs.append(name)
        else:
            raise JudgeError(f"lm_eval.tasks: lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}")
    loaded: dict[str, Any] = _told(listed(list(options.tasks)), lambda: manager.load(specs))
    _check_names(loaded["tasks"], taken)
    for task in loaded["tasks"].values():
        if options.shots is not None:
            task.set_config(key="num_fewshot", value=options.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Tasks(loaded, options, seed)


def shown_as(task: str) -> str:
    """A task's name as a part of the card's: a dot divides a gate's paths."""
    return task.replace(".", "_")


def _check_names(tasks: Iterable[str], taken: Iterable[str]) -> None:
    """Raise JudgeError for a task that would take the place of another part of the card."""
    known = dict.fromkeys(taken, "a general part")
    for name in tasks:
        if (shown := shown_as(name)) in known:
            raise JudgeError(
                f"lm_eval.tasks: the task {name!r} would stand in the card as general.{shown}, which is "
                f"{known[shown]} already; give it another name in its YAML"
            )
        known[shown] = f"the task {name!r}"


def _told(what: str, run: Callable[[], Any]) -> Any:
    """What lm-eval, the libraries under it or a task's own code raise, as one sentence."""
    try:
        return run()
    except PostilError:
        raise
    except Exception as problem:
        lines = str(problem).strip().splitlines()
        raise JudgeError(
            f"lm-eval could not run {what}: {lines[0] if lines else type(problem).__name__} "
            "(most tasks fetch their data from the hub; a task's YAML may name local files)"
        ) from problem


def harness_parts(
    tasks: Tasks,
    base: HarnessModel,
    judged: HarnessModel,
    draw: Draw,
    notes: list[str],
    defined: Mapping[str, Any] | None = None,
) -> dict[str, Part]:
    """A part for each task: its measures, base beside what is judged; documents are the bootstrap's units.

    A measure whose value is neither a mean nor a perplexity has no interval: it is left out, and a note says so.
    Raises JudgeError where a task has no other measure.
    """
    sides = [_asked(tasks, model) for model in (base, judged)]
    parts = {}
    for name, task in tasks.loaded["tasks"].items():
        shown = shown_as(name)
        bare, mine = (_by_measure(side["samples"][name]) for side in sides)
        metrics: dict[str, Metric] = {}
        base_found, judged_found = dict[str, Statistics](), dict[str, Statistics]()
        for (measure, kept_by), values in bare.items():
            key = measure if kept_by == "none" else f"{measure}@{kept_by}"
            kind = _KINDS.get(task.aggregation().get(measure))
            if kind is None:
                notes.append(f"{shown}: {key} is neither a mean nor a perplexity, so it has no interval: left out")
                continue
            others = mine.get((measure, kept_by), [])
            if len(others) != len(values):
                raise JudgeError(
                    f"the task {name} gives {key} for other documents of the base than of what is judged"
                )
            share = measure in _SHARES
            better: Literal["higher", "lower"] = (
                "lower" if task.higher_is_better().get(measure) is False else "higher"
            )
            unit = "%" if share else kind.unit
            metrics[key] = replace(measured(key, better, unit), value=kind.value)
            base_found[key], judged_found[key] = (
                kind.statistics(one) * ((100, 1) if share else 1) for one in (values, others)
            )
        if not metrics:
            raise JudgeError(f"the task {name} has no measure that is a mean or a perplexity over its documents")
        asked = [[one[key] for key in ("filter", "doc_hash", "prompt_hash", "target_hash")]
                 for one in sides[0]["samples"][name]]  # fmt: skip
        told = [asked, tasks.options.shots, tasks.options.chat, task.config.generation_kwargs]
        digest = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()
        data = DataUsed(name=f"lm-eval {name}", sha256=digest, rows=len(next(iter(base_found.values()))))
        parts[shown] = part_of(
            data, next(iter(metrics)), metrics, base_found, judged_found, draw, defined=defined
        )  # fmt: skip
    return parts


def _asked(tasks: Tasks, model: HarnessModel) -> Mapping[str, Any]:
    options = tasks.options
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=tasks.seed)  # both sides see the same examples
    found: Mapping[str, Any] = _told(
        listed(tasks.names),
        lambda: evaluate(
            model, tasks.loaded, limit=options.limit, bootstrap_iters=0, log_samples=True,
            apply_chat_template=options.chat, fewshot_as_multiturn=options.chat,
        ),
    )  # fmt: skip
    return found


def _by_measure(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """(measure, filter) → its value of each document, in order."""
    out: dict[tuple[str, str], list[Any]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            out.setdefault((name, sample["filter"]), []).append(sample[name])
    return out


@dataclass(frozen=True, slots=True)
class _Kind:
    """How lm-eval makes one value of many: as sums of (a, b) statistics, one row a document."""

    unit: str
    statistics: Callable[[Sequence[Any]], Statistics]
    value: Callable[[Statistics], NDArray[np.float64]]


def _counted(values: Sequence[Any]) -> Statistics:
    return np.array([(float(one), 1.0) for one in values]).reshape(-1, 2)


def _counted_numbers(values: Sequence[Any]) -> Statistics:
    """Nothing where it is no number."""
    return np.array([(0.0, 0.0) if math.isnan(one) else (float(one), 1.0) for one in values]).reshape(-1, 2)


def _weighed(values: Sequence[Any]) -> Statistics:
    return np.array([(float(total), float(weight)) for total, weight in values]).reshape(-1, 2)


def _exp_of_minus_mean(sums: Statistics) -> NDArray[np.float64]:
    return np.exp(-mean_of(sums))


def _bits(sums: Statistics) -> NDArray[np.float64]:
    return -mean_of(sums) / math.log(2)


_SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})  # shown as percentages
_KINDS: dict[Any, _Kind] = {
    theirs.mean: _Kind("score", _counted, mean_of),
    theirs.nanmean: _Kind("score", _counted_numbers, mean_of),
    theirs.perplexity: _Kind("perplexity", _counted, _exp_of_minus_mean),
    theirs.weighted_perplexity: _Kind("perplexity", _weighed, _exp_of_minus_mean),
    theirs.bits_per_byte: _Kind("bits/byte", _weighed, _bits),
}
