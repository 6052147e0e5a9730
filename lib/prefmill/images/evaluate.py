"""Evaluating a tuned SDXL: its images beside the base's, on held-out prompts, under a scorer that had no part in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prefmill.core.artifact import Artifact
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.figures import with_interval
from prefmill.core.files import digest_path, write_json
from prefmill.core.image_rows import HEADS, GeneratedImage, ImagePrompt, ImageSplit
from prefmill.core.stage import Metrics, Task
from prefmill.core.statistics import Resampling, holm, means, within
from prefmill.families.reward.scoring import open_scorer
from prefmill.families.sdxl.folders import ADAPTER_FILE, PIPELINE_FILE
from prefmill.families.sdxl.generator import GeneratorSource, open_pipeline
from prefmill.images.generation import drawn_guidance, make_images, plan_jobs
from prefmill.images.grids import write_grids
from prefmill.images.pairs import same_words
from prefmill.images.prompts import read_prompts
from prefmill.images.sampling import ImageSampling
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.missing import in_batches, kept_rows

METRICS, SCORES, GRIDS = "metrics.json", "scores.jsonl", "grids"
SIDES = ("base", "tuned")
CompareWith = Literal["same_seed", "other_seeds"]
_DIGITS = 6
_BLOCK = 64  # images scored between two that are kept


@dataclass(frozen=True)
class ImageEvaluation:
    """What is asked for; see stages/evaluate_images.py."""

    base: GeneratorSource
    published_scorer: Path | None
    prompts: Path | None
    splits: Sequence[ImageSplit]
    num_prompts: int | None
    compare_with: CompareWith
    sampling: ImageSampling
    batch_size: int | None
    num_grid_prompts: int
    drift_draws: int
    resolution: int | None
    resampling: Resampling


def evaluate_images(wanted: ImageEvaluation, task: Task) -> Metrics:
    """Make the images of both models, score them, and write what `docs/stages/evaluate_images.md` lists.

    Interrupted, it makes the images that are missing. Raises ConfigError when the scorer has seen a prompt that it is
    to judge, or rewarded the tuning.
    """
    tuned, scorer = task.input("tuned"), one_scorer(wanted, task)
    prompts = held_out_prompts(wanted, task)
    # Before any image is made: that takes hours, and this depends on the inputs alone.
    if isinstance(scorer, Artifact):
        require_independent(scorer, tuned, prompts, by_words=wanted.prompts is not None)
    # All images before any score: the pipelines have left the device when the scorer comes.
    images = {side: _images(wanted, side, tuned, prompts, task) for side in SIDES}
    scores = {side: _scores(images[side], side, task, scorer) for side in SIDES}
    write_jsonl(task.output / SCORES, _score_rows(images, scores))
    trained = trained_prompts(prompts, task.optional_input("pairs"))
    shown = images["base"][: wanted.num_grid_prompts * len(wanted.sampling.seeds)]
    num_grids = write_grids(task.output, GRIDS, shown, SIDES, len(wanted.sampling.seeds))
    measured: dict[str, Any] = {
        **_of_scorer(scorer, tuned),
        "base": wanted.base.label,
        "tuned": tuned.manifest.content_digest,
        "shuffled_labels": bool(tuned.manifest.config.get("shuffle_labels")),
        "num_prompts": len(prompts),
        **({"num_trained_prompts": len(trained)} if trained else {}),
        "num_images": len(images["base"]),
        "seeds": sorted(wanted.sampling.seeds),
        "guidance_scale": drawn_guidance(task.output / images["base"][0]["file"]),
        "compare_with": wanted.compare_with,
        "confidence": wanted.resampling.confidence,
        "dimensions": compare(
            [row["prompt_id"] for row in images["base"]], scores, wanted.resampling, wanted.compare_with
        ),
        "drift": _drift(wanted, tuned, task),
        "num_grids": num_grids,
    }
    # allow_nan=False: Python would write NaN, which is no JSON and which other readers refuse.
    write_json(task.output / METRICS, measured, allow_nan=False)
    overall = measured["dimensions"]["mean"]
    return {
        "win_rate": overall["win_rate"]["value"],
        "win_rate_low": overall["win_rate"]["low"],
        "win_rate_high": overall["win_rate"]["high"],
        "num_prompts": len(prompts),
        "winner_drift": (measured["drift"] or {}).get("winner", {}).get("value"),
        "warnings": [f"{len(trained)} prompts are trained on in the pairs, such as {trained[0]}"] if trained else [],
        "conclusion": [conclusion(measured)],
    }


def held_out_prompts(wanted: ImageEvaluation, task: Task) -> list[ImagePrompt]:
    """The prompts of the configured file, else those of the pairs' held-out splits, sorted; at most `num_prompts`."""
    pairs = task.optional_input("pairs")
    rows: Iterable[Any]
    if wanted.prompts is not None:
        rows = read_prompts(wanted.prompts)
    elif pairs is not None:
        rows = (row for row in read_jsonl(pairs.file("pairs.jsonl")) if row["split"] in wanted.splits)
    else:
        raise ConfigError(
            "no prompts to evaluate on", where=task.key,
            fix="give prompts=FILE, or inputs.pairs=FOLDER whose held-out prompts are taken",
        )  # fmt: skip
    found = {row["prompt_id"]: ImagePrompt(prompt_id=row["prompt_id"], prompt=row["prompt"]) for row in rows}
    chosen = [found[name] for name in sorted(found)][: wanted.num_prompts]
    if len(chosen) < 2:
        raise InputError(
            "too few held-out prompts for an interval", where=wanted.prompts or (pairs.path if pairs else None),
            got=len(chosen), expected="at least 2", fix="rate more prompts, or give prompts=FILE",
        )  # fmt: skip
    return chosen


def trained_prompts(prompts: Sequence[ImagePrompt], pairs: Artifact | None) -> list[str]:
    """The ids of those whose words stand in the pairs' training split: the tuned model may have learnt them."""
    rows = read_jsonl(pairs.file("pairs.jsonl")) if pairs else ()
    known = {same_words(row["prompt"]) for row in rows if row["split"] == "train"}
    return [row["prompt_id"] for row in prompts if same_words(row["prompt"]) in known]


def one_scorer(wanted: ImageEvaluation, task: Task) -> Artifact | Path:
    """The reward model given as input, or the folder of a published one; raises ConfigError for both and for none."""
    given = task.optional_input("scorer")
    if (given is None) == (wanted.published_scorer is None):
        raise ConfigError(
            "no scorer to judge with" if given is None else "two scorers to judge with",
            where=task.key, fix="give inputs.scorer=FOLDER of train_reward, or published_scorer",
        )  # fmt: skip
    return given or wanted.published_scorer  # type: ignore[return-value]


def _of_scorer(scorer: Artifact | Path, tuned: Artifact) -> dict[str, Any]:
    if isinstance(scorer, Path):
        # What it learnt from is not recorded: nobody can say that it shares no prompt.
        return {
            "scorer": digest_path(scorer), "published_scorer": scorer.name, "scorer_shares_training_prompts": False
        }  # fmt: skip
    # Not where each had its half.
    judged_by = _prompt_half(scorer.json("trained_on.json"))
    shares = not (judged_by == "judge" and _prompt_half(tuned.manifest.config) == "policy")
    return {"scorer": scorer.manifest.content_digest, "scorer_shares_training_prompts": shares}


def require_independent(
    scorer: Artifact, tuned: Artifact, prompts: Sequence[ImagePrompt], by_words: bool = False
) -> None:
    """Raise ConfigError for a scorer that learnt from one of these prompts, or that the tuning was rewarded by.

    `by_words`: the prompts may have other ids here than there, as a table's.
    """
    trained_on = scorer.json("trained_on.json")
    known = {*trained_on["prompt_ids"], *(map(same_words, trained_on.get("prompts", ())) if by_words else ())}
    # By prompt, not by image: other images of a prompt that the scorer learnt would still flatter it.
    seen = sorted(row["prompt_id"] for row in prompts if known & {row["prompt_id"], same_words(row["prompt"])})
    if seen:
        raise ConfigError(
            "the scorer was trained on prompts that it is to judge", where=scorer.path,
            got=f"{len(seen)} of {len(prompts)}, such as {seen[0]}",
            fix="evaluate on splits: [val, test], or on other prompts",
        )  # fmt: skip
    if scorer.manifest.content_digest in tuned.manifest.inputs.get("reward", ()):
        raise ConfigError(
            "the scorer is the reward that the model was tuned by", where=scorer.path,
            got=scorer.manifest.content_digest,
            fix="train another with prompt_half=judge, and tune by the one of prompt_half=policy",
        )  # fmt: skip


def _prompt_half(recorded: Mapping[str, Any]) -> str | None:
    """The half of the prompts that a training learnt from; it was recorded as `half` once."""
    half: str | None = recorded.get("prompt_half", recorded.get("half"))
    return half


def source_of(base: GeneratorSource, side: str, tuned: Artifact) -> GeneratorSource:
    """What makes the images of a side: the base, the base with the tuned adapter, or the tuned pipeline itself."""
    label = f"{tuned.manifest.stage}@{tuned.manifest.content_digest[:12]}"
    if side == "base":
        return base
    if (tuned.path / ADAPTER_FILE).is_file():
        return replace(base, label=f"{base.label} + {label}", adapter=tuned.path)
    if (tuned.path / PIPELINE_FILE).is_file():
        return GeneratorSource(str(tuned.path), label, base.precision, variant=tuned.manifest.config.get("variant"))
    raise InputError(
        "neither an adapter nor a pipeline", where=tuned.path, expected=f"{ADAPTER_FILE} or {PIPELINE_FILE}",
        fix="give the output of sdxl_dpo as inputs.tuned",
    )  # fmt: skip


def compare(
    prompt_ids: Sequence[str],
    scores: Mapping[str, NDArray[np.float32]],
    resampling: Resampling,
    compare_with: CompareWith = "same_seed",
) -> dict[str, Any]:
    """Win rate and mean difference of tuned over base on each dimension and on their mean, from scores [N, K].

    An image is compared with the base's of the same prompt and seed, or of that prompt's other seeds; a tie is half a
    win. Intervals and p-values (of a win rate of 1/2, Holm's for the number of dimensions) are over prompts: images of
    one prompt are alike.
    """
    both = {side: np.column_stack([values, values.mean(axis=1)]).astype(np.float64) for side, values in scores.items()}
    # Each prompt counts once, however many seeds it has: its images are no independent draws.
    by_prompt = list(_differences(prompt_ids, both, compare_with))
    wins = np.stack([((found > 0) + (found == 0) / 2).mean(axis=0) for found in by_prompt])
    # Less 1/2, because the p-value is that of a mean of 0.
    found = means(wins - 0.5, resampling)
    # Where all prompts agree a bootstrap has no width: 9 wins of 9 would be 100 to 100 %.
    rates = [within(rate, resampling, -0.5, 0.5) for rate in found]
    gains = means(np.stack([found.mean(axis=0) for found in by_prompt]), resampling)
    # The mean over the dimensions is one question of its own: Holm corrects for the choice among the others.
    adjusted = [*holm([rate.p_value for rate in rates[:-1]]), rates[-1].p_value]
    names = [*HEADS, "mean"] if len(rates) > 2 else ["mean"]  # a published scorer has one score, and no dimensions
    adjusted, rates, gains = adjusted[-len(names) :], rates[-len(names) :], gains[-len(names) :]
    return {
        name: {
            "win_rate": {end: round(getattr(rate, end) + 0.5, _DIGITS) for end in ("value", "low", "high")},
            "p_value": round(rate.p_value, _DIGITS),
            "p_holm": round(p_holm, _DIGITS),
            "difference": {end: round(getattr(gain, end), _DIGITS) for end in ("value", "low", "high")},
        }
        for name, rate, gain, p_holm in zip(names, rates, gains, adjusted, strict=True)
    }


def conclusion(measured: Mapping[str, Any]) -> str:
    """What a reader is told first."""
    rate = measured["dimensions"]["mean"]["win_rate"]
    model = "control (tuned on shuffled labels)" if measured.get("shuffled_labels") else "tuned model"
    told = f"under the held-out scorer: win rate {with_interval(rate, '.0%')} on {measured['num_prompts']} prompts."
    if rate["low"] > 0.5:
        return f"The {model} is preferred to the base {told}"
    if rate["high"] < 0.5:
        return f"The {model} is WORSE than the base {told}"
    return f"No difference between the {model} and the base is shown {told}"


def _images(
    wanted: ImageEvaluation, side: str, tuned: Artifact, prompts: Sequence[ImagePrompt], task: Task
) -> list[GeneratedImage]:
    """A side's images, below a folder of its own; rows name files from the artifact on."""
    source = source_of(wanted.base, side, tuned)
    work = task.work / side
    work.mkdir(exist_ok=True)
    rows = make_images(
        lambda: open_pipeline(source), plan_jobs(prompts, wanted.sampling.seeds), wanted.sampling, source.label,
        task.output / side, work, wanted.batch_size, task.advance,
    )  # fmt: skip
    return [{**row, "file": f"{side}/{row['file']}"} for row in rows]


def _scores(rows: Sequence[GeneratedImage], side: str, task: Task, scorer: Artifact | Path) -> NDArray[np.float32]:
    """The scorer's rewards of a side's images, [N, K]; it is loaded only where some are missing."""
    opened = cache(lambda: open_scorer(scorer if isinstance(scorer, Path) else scorer.path))

    def rewards(block: Sequence[GeneratedImage]) -> list[list[float]]:
        found = opened()([row["prompt"] for row in block], [task.output / row["file"] for row in block])
        # json does not write numpy numbers.
        return [[float(value) for value in row] for row in found]

    kept = kept_rows(task.work / side, "rewards", in_batches(rows, _BLOCK), rewards, task.advance, "images scored")
    return np.array(kept, dtype=np.float32).reshape(len(rows), -1)


def _score_rows(
    images: Mapping[str, Sequence[GeneratedImage]], scores: Mapping[str, NDArray[np.float32]]
) -> list[dict[str, Any]]:
    return [
        {
            **{key: row[key] for key in ("prompt_id", "prompt", "seed")},
            "files": {side: images[side][index]["file"] for side in SIDES},
            **{side: _by_head(scores[side][index]) for side in SIDES},
        }
        for index, row in enumerate(images["base"])
    ]


def _by_head(rewards: NDArray[np.float32]) -> dict[str, float]:
    names = HEADS if len(rewards) > 1 else ["score"]
    return {name: round(float(value), _DIGITS) for name, value in zip(names, rewards, strict=True)}


def _differences(
    prompt_ids: Sequence[str], both: Mapping[str, NDArray[np.float64]], compare_with: CompareWith
) -> Iterator[NDArray[np.float64]]:
    """Of each prompt, in the order of their names, all that is compared: tuned less base, [D, K]."""
    for name in sorted(set(prompt_ids)):
        tuned, base = (both[side][[one == name for one in prompt_ids]] for side in ("tuned", "base"))
        # From the same noise a model that hardly moved wins or loses everywhere; other noise shows by how much.
        yield tuned - base if compare_with == "same_seed" else (tuned[:, None] - base)[~np.eye(len(base), dtype=bool)]


def _drift(wanted: ImageEvaluation, tuned: Artifact, task: Task) -> dict[str, Any] | None:
    """How far the error of denoising winners and losers has moved; None without held-out pairs."""
    pairs = task.optional_input("pairs")
    if pairs is None or wanted.drift_draws == 0:
        return None
    from prefmill.families.sdxl.denoising_error_shift import denoising_drift

    return denoising_drift(
        wanted.base, source_of(wanted.base, "tuned", tuned), pairs, wanted.splits, wanted.drift_draws,
        wanted.resolution, wanted.sampling.guidance_scale, task.work / "cache", wanted.resampling,
    )  # fmt: skip
