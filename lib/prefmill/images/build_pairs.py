"""What the stage build_image_pairs does: collect, check, count, fit, choose, split, write."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.files import copy_once, write_json
from prefmill.core.image_rows import DIMENSIONS, Dimension, ImagePair
from prefmill.core.stage import Metrics, Task
from prefmill.images.collection import Collection, GoodImage, check_images
from prefmill.images.pair_sources import PairSource, collect
from prefmill.images.pairs import ImageSplitConfig, Labels, choose_pairs, fit_strengths, split_pairs
from prefmill.images.prompts import foreign_marks
from prefmill.images.votes import Votes, count_votes, figures
from prefmill.store.jsonl import write_jsonl

if TYPE_CHECKING:
    from prefmill.images.davidson import Strengths

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairBuilding:
    """How ratings become pairs."""

    sources: Sequence[PairSource]
    labels: Labels
    min_agreement: float
    splits: ImageSplitConfig
    max_quarantined_share: float
    low_yield: float


def build_pairs(building: PairBuilding, artifacts: Sequence[Artifact], task: Task) -> Metrics:
    """Write `pairs.jsonl`, `images/`, `strengths.jsonl`, `quarantine.jsonl`, `summary.json`; the metrics are counts.

    Raises InputError where more ratings are bad than allowed, or where no pair is left.
    """
    collection = collect(building.sources, artifacts, task.work)
    quarantine, num_ratings = collection.quarantine, len(collection.ratings)
    if not num_ratings and not quarantine.rows:
        given = bool(building.sources or artifacts)
        raise InputError(
            "no ratings", where=task.key, got="files without a row" if given else None,
            fix="write a line for each rating below the names of the columns" if given
            else "give inputs.ratings or sources",
        )  # fmt: skip
    # Only images that a rating names are decoded: public data sets come with many more, and decoding is slow.
    wanted = {name for _, rating in collection.ratings for name in (rating["left"], rating["right"])}
    images = check_images([image for name, image in sorted(collection.images.items()) if name in wanted], quarantine)
    num_unread = sum(row["what"] in ("rating", "ranking", "row") for row in quarantine.rows)
    votes = count_votes(collection.ratings, images, quarantine)
    # After the votes are counted: counting sets ratings aside too, and all of them are held against the limit.
    _require_quality(collection, num_ratings + num_unread, building.max_quarantined_share, task.logs)
    fits = fit_strengths(votes, images)
    found, num_ties = choose_pairs(votes, images, fits, building.labels, building.min_agreement, quarantine)
    pairs = split_pairs(found, images, building.splits)
    if not pairs:
        raise _no_pair(num_ties, collection, task.logs)
    summary = _summary(pairs, num_ties, num_ratings, votes, fits, collection, building)
    _write(task, pairs, images, fits, collection, summary)
    for warning in summary["warnings"]:
        _log.warning("%s", warning)
    return {key: summary[key] for key in ("num_prompts", "num_pairs", "num_ties", "splits", "warnings")}


def _require_quality(collection: Collection, num_ratings: int, allowed: float, logs: Path) -> None:
    bad = [row for row in collection.quarantine.rows if row["what"] in ("rating", "ranking", "row")]
    if len(bad) > allowed * num_ratings:
        write_jsonl(logs / "quarantine.jsonl", collection.quarantine.rows)
        first = {key: value for key, value in bad[0].items() if key not in ("what", "where", "reason")}
        raise InputError(
            f"{len(bad)} of {num_ratings} ratings cannot be used", where=bad[0]["where"],
            got=f"{collection.quarantine.reasons()}; the first: {str(first)[:200]}",
            expected=f"at most {allowed:.0%} (max_quarantined_share)",
            fix="correct the sources (docs/stages/build_image_pairs.md lists each format's columns), every row is in "
            f"{logs / 'quarantine.jsonl'}; or raise max_quarantined_share",
        )  # fmt: skip


def _no_pair(num_ties: int, collection: Collection, logs: Path) -> InputError:
    reasons, num_ratings = collection.quarantine.reasons(), len(collection.ratings)
    num_skips = sum(rating["choice"] == "skip" for _, rating in collection.ratings)
    what = "every comparison is a tie" if num_ties and not (num_skips or reasons) else "no pair is left"
    got = f"{num_ratings} ratings, " + (f"{num_skips} skips, " if num_skips else "") + f"{num_ties} ties"
    fix = "rate more, or images that differ more: more seeds, more prompts"
    if reasons:
        write_jsonl(logs / "quarantine.jsonl", collection.quarantine.rows)
        got, fix = f"{got}; {reasons}", f"correct what {logs / 'quarantine.jsonl'} lists, or {fix}"
    return InputError(what, got=got, fix=fix)


def _summary(
    pairs: Sequence[ImagePair], num_ties: int, num_ratings: int, votes: Votes, fits: Mapping[Dimension, Strengths],
    collection: Collection, building: PairBuilding,
) -> dict[str, Any]:  # fmt: skip
    prompts = {image.prompt_id for image in collection.images.values()}
    labelled = {name: sum(pair["labels"][name] is not None for pair in pairs) for name in DIMENSIONS}
    told = figures(votes)
    # eta is how readily raters called a tie: a high one explains why many ratings gave few pairs.
    for name in DIMENSIONS:
        told["dimensions"][name] |= {"num_pairs": labelled[name], "tie_eta": round(fits[name].eta, 4)}
    counts = Counter(pair["split"] for pair in pairs)
    summary = {
        "num_prompts": len(prompts),
        "num_prompts_with_pairs": len({pair["prompt_id"] for pair in pairs}),
        "num_ratings": num_ratings,
        "num_pairs": len(pairs),
        "num_ties": num_ties,
        "splits": {split: counts[split] for split in ("train", "val", "test")},
        "labels": building.labels,
        **told,
        "quarantine": collection.quarantine.counts(),
    }
    warnings = collection.quarantine.warnings() + _warnings(summary, votes, building)
    return {**summary, "warnings": warnings + foreign_marks({pair["prompt"] for pair in pairs})}


def _warnings(summary: Mapping[str, Any], votes: Votes, building: PairBuilding) -> list[str]:
    """What a user should know before training on the pairs."""
    found = []
    if (covered := summary["num_prompts_with_pairs"]) < building.low_yield * summary["num_prompts"]:
        found.append(
            f"only {covered} of {summary['num_prompts']} prompts gave a pair: rate more, or make more images per prompt"
        )
    for split, share in (("val", building.splits.val), ("test", building.splits.test)):
        if share and not summary["splits"][split]:
            found.append(f"split {split} is empty: add prompts, or raise splits.{split}")
    for name, told in summary["dimensions"].items():
        if told["num_votes"] and told["num_pairs"] < building.low_yield * summary["num_pairs"]:
            found.append(f"{name}: only {told['num_pairs']} of {summary['num_pairs']} pairs have a label")
        # Below one half: with left, right and tie as choices, raters who guess agree on about a third.
        if told["agreement"] is not None and told["agreement"] < 0.5:
            found.append(f"{name}: two raters agree on {told['agreement']:.0%} of what both answered")
    for rater, told in votes.raters.items():
        if told.prefers_a_side:
            sides = f"{told.choices['left']} left, {told.choices['right']} right"
            found.append(f"rater {rater} answers by the side, not by the image: {sides}")
    spelt = defaultdict(list)
    for rater in sorted(votes.raters):
        spelt[" ".join(rater.casefold().split())].append(rater)
    same = [" and ".join(names) for names in spelt.values() if len(names) > 1]
    return found + [f"raters {names} count as two: if that is one person, spell the name alike" for names in same]


def _write(
    task: Task, pairs: Sequence[ImagePair], images: Mapping[str, GoodImage], fits: Mapping[Dimension, Strengths],
    collection: Collection, summary: Mapping[str, Any],
) -> None:  # fmt: skip
    used = {name for pair in pairs for name in (pair["preferred"], pair["rejected"])}
    for number, image in enumerate(images.values(), 1):
        if image.file in used:
            path = image.source.path
            # What came as bytes was written below `work` by this stage, so a hard link is safe and saves the copy.
            copy_once(path, task.output / image.file, may_link=image.source.is_ours or task.work in path.parents)
        task.progress(number, len(images), "images")
    write_jsonl(task.output / "pairs.jsonl", pairs)
    write_jsonl(task.output / "strengths.jsonl", _strength_rows(images, fits))
    write_jsonl(task.output / "quarantine.jsonl", collection.quarantine.rows)
    write_json(task.output / "summary.json", summary, ensure_ascii=False)


def _strength_rows(images: Mapping[str, GoodImage], fits: Mapping[Dimension, Strengths]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": name,
            "prompt_id": images[name].source.prompt_id,
            "strengths": {
                dimension: round(fits[dimension].of[name], 4) if name in fits[dimension].of else None
                for dimension in DIMENSIONS
            },
        }
        for name in sorted(images)
    ]
