"""lm-evaluation-harness over prefmill's models: two local tasks, and a causal control beside its own adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.families.causal.generation import GenerationRequest, Sampling, generate_batch
from prefmill.families.causal.scorer import encode_sequences, patch_forward, score_batch
from prefmill.families.mdlm.evaluate_config import DiffusionEvaluationConfig, HarnessConfig
from prefmill.families.mdlm.evaluated_model import load
from tests.tiny import save_tiny_qwen2, sentence

pytest.importorskip("lm_eval", reason="needs lm-eval: make install")
pytestmark = pytest.mark.slow
Sample = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of multiple choice and one of generation, with their data, in local files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": sentence(n, 6), "choices": [sentence(50 + 3 * n + c, 2 + c) for c in range(3)], "answer": n % 3}
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}",
    }  # fmt: skip
    choice = {
        **data, "task": "local_choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    written = {
        **data, "task": "local_written", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": [" "], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    for task in (choice, written):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


class CausalTaskModel:
    """A causal model by prefmill's likelihood and generation, to be held against the harness's own adapter."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.plain = model, tokenizer, model.forward

    def scored(self, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
        self.greedy = [self._is_greedy(*sample) for sample in samples]
        patch_forward(self.model)
        with torch.no_grad():
            scores = score_batch(self.model, encode_sequences(list(samples), pad=0)).tolist()
        self.model.forward = self.plain
        return list(zip(scores, self.greedy, strict=True))

    def written(self, prompts: Sequence[list[int]], num_tokens: int | None, temperature: float) -> list[str]:
        asked = [GenerationRequest(str(n), 0, tuple(ids)) for n, ids in enumerate(prompts)]
        found = generate_batch(self.model, self.tokenizer, asked, Sampling(num_tokens or 8, temperature, 1.0, 0))
        return [completion["text"] for completion in found]

    def _is_greedy(self, prompt: list[int], answer: list[int]) -> bool:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return bool(logits.argmax(-1).tolist() == answer)


def test_a_causal_model_has_the_numbers_of_the_harness_own_adapter(tmp_path: Path, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefmill.integrations.lm_harness import HarnessModel

    folder = save_tiny_qwen2(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    both = []
    for adapter in (HFLM(model, tokenizer=tokenizer, batch_size=1), HarnessModel(CausalTaskModel(model, tokenizer))):
        names = ["local_choice", "local_written"]
        both.append(simple_evaluate(adapter, tasks=names, task_manager=manager, bootstrap_iters=0))
    theirs, ours = both
    for task in ("local_choice", "local_written"):
        assert ours["results"][task] == theirs["results"][task]
        for one, two in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for mine, own in zip(one["filtered_resps"], two["filtered_resps"], strict=True):
                if task == "local_written":
                    assert mine == own
                else:
                    assert (mine[0], mine[1]) == (pytest.approx(own[0], abs=1e-4), own[1])


def test_an_answer_that_a_task_begins_is_left_open_in_a_chat(tmp_path: Path, tasks: Path) -> None:
    """A task's `gen_prefix`: the turn was ended behind it, and the model asked for what follows its own end."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefmill.integrations.lm_harness import HarnessModel

    folder = save_tiny_qwen2(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    begun = yaml.safe_load((tasks / "local_written.yaml").read_text()) | {"task": "begun", "gen_prefix": "The answer:"}
    (tmp_path / "begun.yaml").write_text(yaml.safe_dump(begun))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    asked = []
    for adapter in (HFLM(model, tokenizer=tokenizer, batch_size=1), HarnessModel(CausalTaskModel(model, tokenizer))):
        found = simple_evaluate(
            adapter, tasks=["begun"], task_manager=manager, bootstrap_iters=0, apply_chat_template=True, num_fewshot=1
        )
        asked.append([sample["arguments"] for sample in found["samples"]["begun"]])
    assert asked[0] == asked[1]


def test_a_harness_chat_is_written_on_the_day_that_is_set(tmp_path: Path) -> None:
    """A template with a clock had the day of the run, whatever `template_date` said; a refusal was a traceback."""
    from prefmill.families.causal.loading import load_tokenizer
    from prefmill.families.causal.templates import ChatTemplate
    from prefmill.integrations.lm_harness import HarnessModel

    text = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = ChatTemplate(chat_template=refusing + text, template_date="2024-07-26")
    tokenizer = load_tokenizer(str(save_tiny_qwen2(tmp_path)), template=template)
    harness = HarnessModel(CausalTaskModel(SimpleNamespace(forward=None), tokenizer))
    assert harness.apply_chat_template([{"role": "user", "content": "a"}]) == "26 Jul 2024a<|im_end|>"
    with pytest.raises(InputError, match="no system"):
        harness.apply_chat_template([{"role": "system", "content": "a"}])


def test_a_masked_diffusion_model_runs_both_tasks_by_its_bounds(
    tiny_diffusion: Path, tasks: Path, tmp_path: Path
) -> None:
    from prefmill.integrations.lm_harness import task_rows

    keys = {"precision": "fp32", "diffusion_steps": 8, "num_tokens": 8, "block_tokens": 4,
            "harness": {"tasks": ["local_choice", "local_written"], "path": str(tasks)}}  # fmt: skip
    config = validate(DiffusionEvaluationConfig, keys)
    loaded = load("m", str(tiny_diffusion), config, tmp_path)
    rows = list(task_rows(config, loaded))
    measures = {row["measure"]: row["value"] for row in rows if row["kind"] == "task"}
    assert {"local_choice_acc", "local_choice_acc_norm", "local_written_exact_match"} <= measures.keys()
    samples = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    wins = []
    for row in samples:
        encoded = [
            (prompt, loaded.tokenizer.encode(f"{row['question']} {choice}")[len(prompt) :])
            for choice in row["choices"]
            for prompt in [loaded.tokenizer.encode(row["question"])]
        ]
        bounds = [item.bound for item in loaded.likelihoods(encoded)]
        wins.append(bounds.index(max(bounds)) == row["answer"])
    assert measures["local_choice_acc"] == pytest.approx(sum(wins) / len(wins))
    assert sum(row["kind"] == "task_sample" for row in rows) == 2 * len(samples)


def test_what_the_harness_cannot_have_is_refused(tasks: Path, tmp_path: Path) -> None:
    from prefmill.integrations.lm_harness import HarnessModel, run_tasks

    model: Any = SimpleNamespace(tokenizer=None)
    with pytest.raises(ConfigError, match="unknown tasks") as caught:
        list(run_tasks(model, validate(HarnessConfig, {"tasks": ["nothing"], "path": str(tasks)})))
    assert "local_choice" in str(caught.value)
    (tmp_path / "local_choice.yaml").write_text((tasks / "local_choice.yaml").read_text().replace("rows.js", "gone.js"))
    with pytest.raises(InputError, match=r"data of these tasks(.|\n)*harness\.path"):
        list(run_tasks(model, validate(HarnessConfig, {"tasks": ["local_choice"], "path": str(tmp_path)})))
    request = SimpleNamespace(args=("a", {"until": [], "num_beams": 3}), task_name="t")
    with pytest.raises(InputError, match="num_beams"):
        HarnessModel(model).generate_until([request])
    with pytest.raises(ConfigError, match="rolling"):
        HarnessModel(model).loglikelihood_rolling([request])


@pytest.fixture(scope="module")
def tiny_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prefmill.demo.text import build_masked_diffusion

    folder = tmp_path_factory.mktemp("tiny_mdlm")
    build_masked_diffusion(folder, [sentence(n, 8) for n in range(40)], seed=0)
    return folder
