"""lm-evaluation-harness over prefmill's likelihoods and generation: its tasks, its prompts, its metrics.

Importing this needs the package lm-eval (`pip install prefmill[harness]`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.chat import apply_template
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig, HarnessConfig
from prefmill.families.mdlm.evaluated_model import Loaded

_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature"}
Sample = tuple[list[int], list[int]]


class TaskModel(Protocol):
    """A model as the harness asks it, in token ids."""

    tokenizer: Any

    def scored(self, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
        """For (prompt, continuation): log p in nats, and whether greedy generation writes this continuation."""
        ...

    def written(self, prompts: Sequence[list[int]], num_tokens: int | None, temperature: float) -> list[str]:
        """What is written after prompts, in at most so many tokens."""
        ...


class HarnessModel(TemplateLM):
    """The harness's view of a `TaskModel`; text is split into tokens as its own adapter of transformers does."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which stands before a continuation that has no context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of chats."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text as it is."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, its last turn left open where a task begins the answer itself (its `gen_prefix`)."""
        open_ended = not add_generation_prompt
        return apply_template(self.tokenizer, chat_history, add_generation_prompt, continue_final_message=open_ended)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Raises ConfigError: windows over a text are a causal model's."""
        raise ConfigError("a task of rolling likelihoods", got=requests[0].task_name, fix="leave this task out")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of each request's stop strings."""
        found: dict[int, str] = {}
        # A batch has one temperature and one length, so each kind of request is run by itself.
        for settings in _distinct([request.args[1] for request in requests]):
            _require_known(settings)
            places = [place for place, request in enumerate(requests) if request.args[1] == settings]
            prompts = [self.tok_encode(requests[place].args[0]) for place in places]
            # Tasks are written for transformers, which passes over a temperature without do_sample.
            temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
            texts = self.model.written(prompts, settings.get("max_gen_toks"), temperature)
            found |= {place: _until(text, settings.get("until")) for place, text in zip(places, texts, strict=True)}
        return [found[place] for place in range(len(requests))]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return self.model.scored([(context, continuation) for _, context, continuation in requests])


class DiffusionTaskModel:
    """A masked-diffusion model: log p is its bound by the configured draws, greedy generation one token a step."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.tokenizer = loaded, loaded.tokenizer

    def scored(self, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
        """As `TaskModel.scored`."""
        bounds = [item.bound for item in self.loaded.likelihoods(samples)]
        return list(zip(bounds, self._greedy(samples), strict=True))

    def written(self, prompts: Sequence[list[int]], num_tokens: int | None, temperature: float) -> list[str]:
        """As `TaskModel.written`; the tokens are rounded up to whole blocks."""
        how = self.loaded.config.unmasking_of(num_tokens, temperature)
        return [answer.text for answer in self.loaded.continuations(prompts, how)]

    def _greedy(self, samples: Sequence[Sample]) -> list[bool]:
        found: dict[int, bool] = {}
        # The number of masked tokens is part of what the model is asked: answers of one length go together.
        for length in {len(continuation) for _, continuation in samples}:
            places = [place for place, (_, one) in enumerate(samples) if len(one) == length]
            ids = self.loaded.unmasked([samples[place][0] for place in places], self.loaded.config.one_by_one(length))
            found |= {place: said == samples[place][1] for place, said in zip(places, ids, strict=True)}
        return [found[place] for place in range(len(samples))]


def run_tasks(model: TaskModel, config: HarnessConfig) -> Iterator[dict[str, Any]]:
    """A row for every metric of every task, then one for every question; raises ConfigError for an unknown task."""
    manager = TaskManager(include_path=config.path and str(config.path), include_defaults=config.path is None)
    unknown = sorted(set(config.tasks) - set(manager.all_tasks))
    if unknown:
        raise ConfigError(
            "unknown tasks of the harness", got=", ".join(unknown), expected=", ".join(manager.all_tasks[:20]),
            fix="name tasks of harness.path, or leave it out for lm-eval's own",
        )  # fmt: skip
    # Standard errors are left out below, so none are drawn.
    try:
        found = simple_evaluate(
            HarnessModel(model), tasks=list(config.tasks), num_fewshot=config.num_fewshot, limit=config.num_rows,
            task_manager=manager, apply_chat_template=config.chat, bootstrap_iters=0,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:  # a name that the hub lacks is of the second kind
        raise InputError(
            "cannot load the data of these tasks", where=", ".join(config.tasks), got=str(error).splitlines()[0],
            fix="check your network or HF_HOME cache, or name tasks of local files with harness.path",
        ) from error  # fmt: skip
    assert found is not None
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            # The harness writes `acc,none`: the measure, and the filter that its answers went through.
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and kind and "stderr" not in metric:
                label = f"{task}_{metric}" if kind == "none" else f"{task}_{metric}_{kind}"
                yield {"kind": "task", "measure": label.replace("-", "_"), "value": float(value)}
    for task, samples in found["samples"].items():
        for sample in samples:
            row = {"kind": "task_sample", "task": task, "doc_id": sample["doc_id"], "target": str(sample["target"])}
            yield {**row, "answers": str(sample["filtered_resps"])}


def task_rows(config: DiffusionEvaluationConfig, loaded: Loaded) -> Iterator[dict[str, Any]]:
    """The rows of the configured tasks for a masked-diffusion model."""
    assert config.harness is not None
    yield from run_tasks(DiffusionTaskModel(loaded), config.harness)


def _distinct(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


def _require_known(settings: dict[str, Any]) -> None:
    unknown = set(settings) - _KNOWN
    if unknown:
        raise InputError(
            "a task asks for generation that is not known here", got=", ".join(sorted(unknown)),
            expected=", ".join(sorted(_KNOWN)), fix="take it out of the task's generation_kwargs",
        )  # fmt: skip


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text
