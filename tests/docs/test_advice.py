"""Every setting that a message advises is one that is accepted: the key is there, and takes the value."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from prefmill.core.config import StrictConfig
from prefmill.core.stage import load_stage, stage_names
from prefmill.pipeline.plan import PipelineFile, StageEntry
from prefmill.slurm.cluster import ClusterFile, Resources
from tests.docs import messages

_KEY, _VALUE = r"([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*)", r"(\{[^}]*\}|\[[^\]]*\]|[^\s,;|)`'\"]+)"
_SETTING = re.compile(rf"(?<![\w.$/-]){_KEY}(=|: ){_VALUE}")
_NAME = re.compile(r"(?<![\w./$-])([a-z][a-z0-9]*(?:_[a-z0-9]+)+(?:\.[a-z]\w*)*|[a-z]+(?:\.[a-z]\w*)+)(?![\w/(])")
_OPEN = re.compile(r"…|\.\.\.|[A-Z]{2,}|^/")  # known at run time, or for the reader to fill in
# Names in remedies that are no setting of ours, by whose they are.
FOREIGN = {
    "of a model's folder": "config.json tokenizer_config.json scheduler_config.json preprocessor_config.json is_causal "
    "eos_token pad_token to_q to_k to_v to_out adapter_config.json base_model_name_or_path",
    "of a dataset": "images.csv prompt_id",
    "LLaMA-Factory's": "dataset_dir file_name hf_hub_url pissa_convert quantization_bit val_size",
    "PEFT's": "init_lora_weights path_initial_model_for_weight_conversion",
    "DeepSpeed's, accelerate's": "zero_optimization full_shard auto_wrap shard_grad_op",
    "the harness's": "generation_kwargs",
    "a server's": "allowed_token_ids processed_logprobs",
    "of Python": "save_file safetensors.torch stages.rate_images data_files",
    "of a value": "adamw_torch adamw_torch_fused decision_agreement dspo_rm any_of all_of other_seeds val_loss",
    "a pipeline's": "needs.checkpoint",
    "of the command line, or another name": "preference_data_path",
}
ELSEWHERE = {
    "is_causal",  # of a model's own config.json
    "task",  # of a stage's command line, beside run and workspace
    "preference_data_path",  # another name of dataset, read before the configuration is checked
}


# Keys that are also words, before a colon in a sentence.
PROSE = {
    "names",
    "seeds",
    "weights",
    "alpha",
    "columns",
    "logging_steps",
    "train",
    "engine",
    "mapo_snr",
    "num_attention_heads",
}


@cache
def models() -> tuple[type[BaseModel], ...]:
    """Every configuration class that a user's file or command line can reach."""
    roots = [load_stage(name).config for name in stage_names()] + [PipelineFile, StageEntry, ClusterFile, Resources]
    found: dict[type[BaseModel], None] = {}
    while roots:
        model = roots.pop()
        if model not in found:
            found[model] = None
            roots += [inner for field in model.model_fields.values() for inner in _inside(field.annotation)]
    return tuple(found)


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _inside(argument)


def fields_of(dotted: str) -> list[Any]:
    """The fields that a dotted key can name."""
    *path, last = dotted.split(".")
    if path == ["array"]:
        return [StageEntry.model_fields["array"]]
    if path == ["inputs"]:  # of a pipeline's entry, or of a stage's command line
        known = any(last in load_stage(name).reads for name in stage_names())
        return [StageEntry.model_fields["inputs"]] if known else []
    owners = set(models())
    for part in path:
        owners = {inner for owner in owners if part in owner.model_fields
                  for inner in _inside(owner.model_fields[part].annotation)}  # fmt: skip
    return [owner.model_fields[last] for owner in owners if last in owner.model_fields]


def accepts(field: Any, text: str) -> bool:
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(kind, config=StrictConfig.model_config if not list(_inside(kind)) else None).validate_json(
            json.dumps(yaml.safe_load(text))
        )
    except (ValidationError, yaml.YAMLError, TypeError):
        return False
    return True


@cache
def remedies() -> tuple[str, ...]:
    """The second column of the page, and what configurations say of values that do not go together."""
    columns = [line.split(" | ")[-1] for line in messages.page().splitlines() if line.startswith("| `")]
    return (*columns, *(text for path in messages.sources() for text in _refusals(ast.parse(path.read_text()))))


def _refusals(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(raised, ast.Call) and raised.args and getattr(raised.func, "id", None) == "ValueError":
            yield from messages.texts(raised.args[0], {})


@cache
def advised() -> list[tuple[str, str]]:
    """Key and value of every setting in a remedy; a word with a colon in prose is none."""
    found = set()
    for remedy in remedies():
        for key, sign, value in _SETTING.findall(remedy):
            if key not in ELSEWHERE and (sign == "=" or (fields_of(key) and key not in PROSE)):
                found.add((key, value.rstrip(".")))
    return sorted(found)


def test_every_advised_setting_is_accepted() -> None:
    assert [problem for key, value in advised() if (problem := _problem(key, value))] == []


def _problem(key: str, value: str) -> str | None:
    fields = fields_of(key)
    if not fields:
        return f"no configuration has the key {key}"
    is_open = key.startswith(("inputs.", "array.")) or _OPEN.search(value)
    return None if is_open or any(accepts(field, value) for field in fields) else f"{key} does not take {value}"


def named() -> list[str]:
    """Every name in a remedy that looks like a key: with an underscore or a point in it."""
    foreign = {name for names in FOREIGN.values() for name in names.split()}
    return sorted({name for remedy in remedies() for name in _NAME.findall(remedy)} - foreign)


def test_a_key_that_is_named_without_a_value_is_one() -> None:
    others = {*stage_names(), *(name for stage in stage_names() for name in load_stage(stage).reads)}
    assert [name for name in named() if name not in others and not fields_of(name)] == []
    assert len(named()) > 100
    assert not fields_of("score.max_failures")


def test_settings_are_found_and_a_wrong_one_is_seen() -> None:
    assert len(advised()) > 40
    assert _problem("on_bad_rows", "stop") == "no configuration has the key on_bad_rows"
    assert _problem("on_bad_row", "quarantined") == "on_bad_row does not take quarantined"
    assert any(accepts(field, "{min_answer_mass: 0}") for field in fields_of("judge"))
