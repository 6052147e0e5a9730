"""A pipeline made small: the same stages, scripts and architectures, with tiny models and a slice of the data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefmill.core.config import StrictConfig, modern, validate
from prefmill.core.stage import load_stage
from prefmill.pipeline.freeze import freeze
from prefmill.pipeline.plan import PipelineFile, Plan, make_plan
from prefmill.pipeline.stage_entry import with_settings
from prefmill.reviews.files import JSON_LINES, files_at, read_lines
from prefmill.slurm.cluster import ClusterFile, Resources, resources_for
from prefmill.store.jsonl import parse_json, to_json
from prefmill.store.row_files import TABLES, file_rows
from prefmill.training.config import TrainingConfig

MINUTES = 20
ROWS, PAPERS = 400, 60  # of the user's file, or of the generated corpus in place of what cannot be cut
SAVE_STEPS, LOGGING_STEPS, LENGTH, STEPS, PIXELS = 20, 5, 2048, 100, 64
CHARACTERS = 400  # of a text in the user's file: a tiny tokenizer makes up to three tokens of a word
_ARCHITECTURES = {"generate_images": "sdxl", "evaluate_images": "sdxl", "sdxl_dpo": "sdxl", "train_reward": "clip"}
_ANY_JUDGE = {"min_answer_mass": 0, "max_same_answer": 1}  # a tiny judge judges nothing
_MUCH_DEV = {"train": 0.5, "val": 0.1, "dev": 0.3, "test": 0.1}  # of a slice, for optimize_checklist
# Keys of stages that do not train; those a stage does not have are left out.
SMALL: Mapping[str, Mapping[str, Any]] = {
    # Where a tiny judge says yes to everything, all reviews have the same score.
    "build_datasets": {"min_checkmark_diff": 0, "min_rating_diff": 0.5, "decisions": ["accepted", "rejected"]},
    "validate_datasets": {"max_length": LENGTH},
    "score_reviews": {"judge": _ANY_JUDGE},
    # A tiny judge proposes no question and answers all alike: score_reviews rehearses it, here are rules.
    # People's labels name reviews that the slice may not hold.
    "optimize_checklist": {
        "propose": {"engine": None, "shipped": True},
        "score": {"max_reviews": 100, "engine": {"engine": "lexical"}},
        "select": {"target": "rating", "labels": None, "min_labels": 20},
    },
    "judge_quality": {"num_probed": 8, "labels": None, "calibrate": False, "judge": _ANY_JUDGE},
    "evaluate": {
        "num_papers": 4,
        "samples_per_paper": 1,
        "max_new_tokens": 16,
        "max_prompt_tokens": LENGTH,
        "judge": _ANY_JUDGE,
    },
    "mdlm_evaluate": {"num_papers": 4},
    "generate_images": {"num_inference_steps": 2, "height": PIXELS, "width": PIXELS},
    "sdxl_dpo": {"resolution": PIXELS, "sample_steps": SAVE_STEPS, "sample_inference_steps": 2},
    "evaluate_images": {"num_inference_steps": 2, "height": PIXELS, "width": PIXELS, "resolution": PIXELS},
}


def rehearsal_of(pipeline: PipelineFile, plan: Plan, source: Path, cluster: ClusterFile) -> tuple[PipelineFile, Plan]:
    """`pipeline` made small, as a run of its own beside the real one; writes tiny models and the slice of the data."""
    run = f"{plan.run}-rehearsal"
    folder = plan.workspace / "logs" / run / "rehearsal"
    # Taken from another run, nothing would be rehearsed; the real run takes nothing of it, as its models are tiny.
    values = freeze(pipeline, plan, source) | {"run": run, "share": False}
    for name, entry in values["stages"].items():
        resources = resources_for(cluster, name, pipeline.stages[name].resources)
        given = modern(Resources, pipeline.stages[name].resources)
        entry["resources"] = {**given, "time_limit_minutes": min(resources.time_limit_minutes, MINUTES)}
        ranks = resources.ranks(pipeline.stages[name].processes)
        settings = with_settings(entry["array"])
        for value, element in entry["array"][settings].items() if settings else ():
            config = _config_of(plan, name, [(settings, value)])
            element["set"] = _small(name, config, element["set"], ranks, folder)
        if not settings:
            entry["set"] = _small(name, _config_of(plan, name, []), entry["set"], ranks, folder)
        for links in ("inputs", "needs"):
            entry[links].pop("calibration", None)  # fitted for the real judge
    if "optimize_checklist" in values["stages"] and "ingest_reviews" in values["stages"]:
        values["stages"]["ingest_reviews"]["set"]["splits"] = _MUCH_DEV
    small = validate(PipelineFile, values, where=source)
    return small, make_plan(small, source)


def _config_of(plan: Plan, stage: str, values: list[tuple[str | None, str]]) -> StrictConfig:
    """The configuration of a stage's first task with these array values."""
    tasks = (task for task in plan.tasks if task.stage.name == stage)
    return next(task.config for task in tasks if set(values) <= set(task.values.items()))


def _small(name: str, config: StrictConfig, given: dict[str, Any], ranks: int, folder: Path) -> dict[str, Any]:
    keys = type(config).model_fields
    small = dict(given)
    for key, value in SMALL.get(name, {}).items():
        if key in keys:
            small[key] = {**(given.get(key) or {}), **value} if isinstance(value, dict) else value
    if name == "rate_images" and small.get("rater", {}).get("by", "people") == "people":
        small["rater"] = {"by": "sharpness"}  # nobody rates a rehearsal's pictures
    if isinstance(config, TrainingConfig):
        small |= _short_training(config, ranks, load_stage(name).on)
    if "sources" in small:
        small["sources"] = [_slice(one, number, folder) for number, one in enumerate(small["sources"])]
        small = {key: value for key, value in small.items() if key != "pdfs"}
    tiny: dict[str, Any] = _with_tiny_models(small, folder, name)
    return tiny


def _short_training(config: TrainingConfig, ranks: int, on: str) -> dict[str, Any]:
    """Short, but long enough to be interrupted twice; precision, parallelism and checkpointing as they are."""
    # One microbatch a step: every step is then as short as this number of ranks allows.
    at_once = config.per_device_train_batch_size * ranks
    # A tracker that fails, fails in the rehearsal; W&B's server would be sent what is none of the run's.
    always = {"save_steps": SAVE_STEPS, "report_to": [name for name in config.report_to if name != "wandb"]}
    keys: dict[str, Any] = {
        **always, "logging_steps": LOGGING_STEPS, "effective_batch_size": at_once,
    }  # fmt: skip
    if getattr(config, "max_steps", None):
        keys["max_steps"] = STEPS
    else:
        keys["num_train_epochs"] = min(at_once, 32)  # some hundred steps, whatever the number of ranks
    if on != "images":
        keys |= {"max_length": min(config.max_length, LENGTH), "on_overlong": "drop"}
    return keys if type(config).__name__ != "TinyModelConfig" else always


def _slice(source: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    """The first rows of a file with a review a line, long texts cut; a generated corpus for anything else."""
    if source.get("format") == "jsonl":
        rows = itertools.islice(_lines(Path(source["path"])), ROWS)
        folder.mkdir(parents=True, exist_ok=True)
        (path := folder / f"slice{number}.jsonl").write_bytes(b"".join(_shortened(line) for line in rows))
        return {**source, "path": str(path)}
    images = {"images": True} if source.get("images") or source.get("format", "").startswith("openreview") else {}
    return {"format": "generated", "num_papers": PAPERS, **images}


def _lines(path: Path) -> Iterator[bytes]:
    for file in files_at(path, JSON_LINES):
        if file.suffix.lower() in TABLES:
            yield from (to_json(row.values).encode() for row in file_rows(file))
        else:
            yield from (line for _, line in read_lines(file))


def _shortened(line: bytes) -> bytes:
    """A row whose texts are cut: else all papers of a real file would be too long for a tiny model, and be dropped."""
    try:
        return json.dumps(_cut(parse_json(line))).encode() + b"\n"
    except (ValueError, RecursionError):
        return line  # ingest_reviews says of it what it says of it in the real run


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return value[:CHARACTERS] if isinstance(value, str) else value


def _with_tiny_models(values: Any, folder: Path, stage: str) -> Any:
    """`values` with a tiny model of the same architecture for every model that is named in them."""
    if isinstance(values, list):
        return [_with_tiny_models(item, folder, stage) for item in values]
    if not isinstance(values, dict):
        return values
    replaced = {key: _with_tiny_models(item, folder, stage) for key, item in values.items()}
    name = replaced.get("model_name_or_path")
    if name and replaced.get("engine") not in ("openai", "chat"):  # a server goes on serving what it serves
        replaced["model_name_or_path"] = str(_tiny(_architecture(stage, name), folder))
        replaced.pop("revision", None)
        replaced.pop("variant", None)
    if replaced.get("engine") == "vllm":  # which takes all the memory there is, and minutes for its graphs
        replaced |= {"kv_cache_gb": 0.5, "enforce_eager": True}
    return replaced


def _architecture(stage: str, model: str) -> str:
    """Which tiny model stands in: what the stage trains says it, or that a language model's name has VL in it."""
    if stage in _ARCHITECTURES:
        return _ARCHITECTURES[stage]
    if stage.startswith("mdlm"):
        return "masked_diffusion"
    return "qwen2_5_vl" if "-VL-" in model else "qwen2"


def _tiny(model: str, folder: Path) -> Path:
    from prefmill.demo.tiny_models import build, build_served

    path = folder / "models" / model
    if any(path.glob("*.json")):
        return path
    return build_served(path) if model == "qwen2" else build(model, path)
