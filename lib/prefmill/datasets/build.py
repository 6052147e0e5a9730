"""SFT and preference datasets from a scored corpus in chat forms, in two streaming passes: survey, then write."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tqdm import tqdm

from prefmill.checklist.scored import ScoredPaper, ScoredReview, check_inputs, scored_papers
from prefmill.core.artifact import Artifact
from prefmill.core.errors import ArtifactError, InputError
from prefmill.core.files import copy_once, write_json
from prefmill.core.records import Modality, Paper, Standing
from prefmill.datasets.pairs import REMEDIES, Dropped, PairRules, ReviewPair, pairs_of
from prefmill.datasets.registry import SUMMARY, DatasetKey, DatasetSplit, dataset_keys, write_registry
from prefmill.datasets.survey import Rank, Survey, check_buildable, check_scored, leaving_out, rank, survey
from prefmill.reviews.join import REVIEWS
from prefmill.reviews.prompt import Message, review_completion, review_images, review_messages
from prefmill.reviews.scale import RatingUnit, Scale, VenueQuantiles, scale_of
from prefmill.store.jsonl import JsonlWriter, read_jsonl
from prefmill.store.missing import Progress

IMAGES = "images"
_MANY = {"pairs": 1000, "SFT reviews": 100}  # of one paper: venues give it ten reviews at most, so some forty pairs
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


class PaperPrompt(NamedTuple):
    """A paper's prompt, made once for all of its rows; `images` are relative to the artifact, None for text."""

    paper_id: str
    messages: list[Message]
    images: list[str] | None
    scale: Scale


def make_prompt(paper: Paper, modality: Modality) -> PaperPrompt | None:
    """The prompt of `paper`, or None when the modality needs images that it does not have."""
    images = review_images(paper, modality)
    if modality != "clean" and not images:
        return None
    paths = None if modality == "clean" else [f"{IMAGES}/{path}" for path in images]
    return PaperPrompt(paper["paper_id"], review_messages(paper, modality), paths, scale_of(paper))


def sft_row(prompt: PaperPrompt, scored: ScoredReview) -> dict[str, Any]:
    """A review to imitate: `messages` in the OpenAI form, the last one the assistant's."""
    answer = {"role": "assistant", "content": review_completion(scored.review, prompt.scale)}
    row = {"id": scored.review["review_id"], "paper_id": prompt.paper_id, "messages": [*prompt.messages, answer]}
    return _with_images(row, prompt)


def dpo_row(prompt: PaperPrompt, pair: ReviewPair) -> dict[str, Any]:
    """A preference in the ShareGPT form; `group` names the paper, so that its pairs can share one prompt."""
    row = {
        "id": pair.pair_id,
        "group": prompt.paper_id,
        "conversations": [{"from": _SPEAKERS[turn["role"]], "value": turn["content"]} for turn in prompt.messages],
        "chosen": {"from": "gpt", "value": review_completion(pair.chosen.review, prompt.scale)},
        "rejected": {"from": "gpt", "value": review_completion(pair.rejected.review, prompt.scale)},
        "chosen_id": pair.chosen.review["review_id"],
        "rejected_id": pair.rejected.review["review_id"],
        # Floats even where they are whole: `datasets` takes a column's type from the first rows.
        "rating_diff": float(pair.rating_diff),
        "checkmark_diff": float(pair.checkmark_diff),
    }
    return _with_images(row, prompt)


def _with_images(row: dict[str, Any], prompt: PaperPrompt) -> dict[str, Any]:
    return row if prompt.images is None else {**row, "images": prompt.images}


@dataclass(frozen=True)
class BuildRules:
    """What goes into the datasets; `sft_top_fraction` in (0, 1]."""

    modalities: tuple[Modality, ...]
    splits: tuple[DatasetSplit, ...]
    decisions: tuple[Standing, ...]
    sft_top_fraction: float
    pairs: PairRules
    allow_unscored: bool
    rating_unit: RatingUnit = "points"


def build_datasets(
    corpus: Artifact, scores: Sequence[Artifact], output: Path, rules: BuildRules, progress: Progress
) -> dict[str, Any]:
    """Write the datasets, their registry and summary.json below `output`; returns the summary.

    Raises ArtifactError when corpus and scores do not fit each other, InputError when a dataset would be empty.
    """
    warnings = check_inputs(corpus, scores)
    if rules.rating_unit == "quantiles":
        # A pass of its own: the place of a rating is known only when all ratings of its venue are.
        quantiles = VenueQuantiles(read_jsonl(corpus.file(REVIEWS)))
        rules = replace(rules, pairs=replace(rules.pairs, quantiles=quantiles))
    passes = _Passes(corpus, scores, progress)
    found = survey(passes.papers("surveying"), rules.modalities, rules.decisions)
    check_scored(found, scores, rules.allow_unscored)
    check_buildable(found, rules.splits, rules.modalities, rules.decisions)
    cut = found.ranking.cut(rules.sft_top_fraction)
    keys = dataset_keys(rules.modalities, rules.splits)
    with contextlib.ExitStack() as stack:
        writer = _Writer(corpus.path, output, rules, cut)
        writer.open(stack, keys)
        for scored in passes.papers("building"):
            writer.add(scored)
        # Inside the with: where one dataset is empty, no file of any of them appears.
        writer.check()
    warnings = [*warnings, *writer.doubts()]
    write_registry(output, keys)
    # No key where there is none to tell: datasets that were built before have the same bytes.
    summary = {**_summary(found, writer, rules, cut), **({"warnings": warnings} if warnings else {})}
    write_json(output / SUMMARY, summary)
    return summary


class _Passes:
    """The scored papers, twice, with progress over both passes."""

    def __init__(self, corpus: Artifact, scores: Sequence[Artifact], progress: Progress) -> None:
        self._corpus, self._scores, self._progress = corpus, scores, progress
        rows = next(entry.rows for entry in corpus.manifest.files if entry.path == REVIEWS)
        self._num_reviews, self._done = rows or 0, 0

    def papers(self, doing: str) -> Iterator[ScoredPaper]:
        with tqdm(total=self._num_reviews, desc=doing, unit="review", mininterval=1.0) as bar:
            for scored in scored_papers(self._corpus, self._scores):
                yield scored
                count = len(scored.reviews) + len(scored.unscored)
                self._done += count
                bar.update(count)
                self._progress(self._done, 2 * self._num_reviews, "reviews")


class _Writer:
    """Writes every dataset at once, paper by paper, and counts what it wrote and dropped."""

    def __init__(self, corpus: Path, output: Path, rules: BuildRules, cut: Rank) -> None:
        self._corpus, self._output, self._rules, self._cut = corpus, output, rules, cut
        self._files: dict[DatasetKey, JsonlWriter] = {}
        self.papers: Counter[DatasetKey] = Counter()
        self.sft_selected: Counter[str] = Counter()
        self.dropped: dict[DatasetSplit, Counter[Dropped]] = {split: Counter() for split in rules.splits}
        self.num_pairs: Counter[str] = Counter()
        self._most = dict.fromkeys(_MANY, (0, ""))  # of one paper, and its id

    def open(self, stack: contextlib.ExitStack, keys: Iterable[DatasetKey]) -> None:
        for key in keys:
            self._files[key] = stack.enter_context(JsonlWriter(self._output / key.file_name()))

    def num_rows(self) -> dict[DatasetKey, int]:
        return {key: file.num_rows for key, file in self._files.items()}

    def add(self, scored: ScoredPaper) -> None:
        split = next((split for split in self._rules.splits if split == scored.paper["split"]), None)
        if split is None:
            return  # dev and test never become training data
        good = [item for item in scored.reviews if rank(item.evaluation) <= self._cut]
        wanted = (scored.paper["decision"] or "unknown") in self._rules.decisions
        pairs = pairs_of(scored.reviews, self._rules.pairs, self.dropped[split]) if wanted else []
        self.sft_selected[split] += len(good)
        # Counted before modalities, so that a lack of images is told apart from filters that dropped all pairs.
        self.num_pairs[split] += len(pairs)
        for what, found in (("pairs", pairs), ("SFT reviews", good)):
            self._most[what] = max(self._most[what], (len(found), scored.paper["paper_id"]))
        for modality in self._rules.modalities if good or pairs else ():
            prompt = make_prompt(scored.paper, modality)
            if prompt is not None:
                self._write(DatasetKey("sft", modality, split), (sft_row(prompt, item) for item in good))
                self._write(DatasetKey("dpo", modality, split), (dpo_row(prompt, pair) for pair in pairs))
                self._link(prompt)

    def doubts(self) -> list[str]:
        """What is odd, in words: a paper with most of the rows, ids to exclude that exclude nothing."""
        totals = {"pairs": self.num_pairs.total(), "SFT reviews": self.sft_selected.total()}
        remedies = {"pairs": "max_pairs_per_paper keeps the clearest", "SFT reviews": "ingest fewer of them"}
        told = [
            f"{count:,} of {totals[what]:,} {what} are of paper {paper_id}: {remedies[what]}"
            for what, (count, paper_id) in self._most.items()
            if count >= _MANY[what] and 2 * count > totals[what]
        ]
        num_ids, num_excluded = len(self._rules.pairs.exclude), self._num_excluded()
        unread = f"{num_ids - num_excluded:,} of {num_ids:,} ids in the exclude file name no pair that would be kept"
        return [*told, unread] if num_excluded < num_ids else told

    def check(self) -> None:
        """Raise InputError when a dataset is empty, or the exclude file is not of these pairs."""
        exclude = self._rules.pairs.exclude
        if exclude and not self._num_excluded():
            raise InputError(
                "the exclude file names no pair of these datasets", got=f"{len(exclude)} ids, such as {min(exclude)!r}",
                expected="ids of rows in the dpo datasets: CHOSEN_ID:REJECTED_ID", fix="correct or leave out `exclude`",
            )  # fmt: skip
        for key, rows in self.num_rows().items():
            if not rows:
                raise self._empty_sft(key) if key.kind == "sft" else self._empty_dpo(key)

    def _num_excluded(self) -> int:
        return sum(dropped["excluded"] for dropped in self.dropped.values())

    def _write(self, key: DatasetKey, rows: Iterable[dict[str, Any]]) -> None:
        before = self._files[key].num_rows
        for row in rows:
            self._files[key].write(row)
        self.papers[key] += self._files[key].num_rows > before

    def _link(self, prompt: PaperPrompt) -> None:
        for name in prompt.images or ():
            link_or_copy(self._corpus / name.removeprefix(f"{IMAGES}/"), self._output / name)

    def _empty_sft(self, key: DatasetKey) -> InputError:
        return InputError(
            f"no review is left for {key.folder}", got=f"none of the split's reviews is above {self._cut}",
            fix=f"raise sft_top_fraction, or ingest more papers{leaving_out(key.split)}",
        )  # fmt: skip

    def _empty_dpo(self, key: DatasetKey) -> InputError:
        dropped = self.dropped[key.split]
        if self.num_pairs[key.split]:
            got, fix = f"{self.num_pairs[key.split]} pairs, all of papers without images", "ingest their images"
        elif dropped:
            got = "dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
            # Pairs that came furthest need the least: most fall to the first filter, whatever stops the rest.
            fix = "; or ".join(REMEDIES[reason] for reason in get_args(Dropped)[::-1] if dropped[reason])
        else:
            got, fix = f"no {' or '.join(self._rules.decisions)} paper with two scored reviews", "ingest more reviews"
        return InputError(f"no pair is left for {key.folder}", got=got, fix=f"{fix}{leaving_out(key.split)}")


def link_or_copy(source: Path, target: Path) -> None:
    """Put the image `source` at `target` without a second copy where the disk allows; done twice is fine."""
    try:
        # A hard link and not a symbolic one: the datasets stay whole when the corpus is deleted.
        copy_once(source, target, may_link=True)
    except FileNotFoundError:
        raise ArtifactError(
            "an image that papers.jsonl names is missing", where=source, fix="rerun ingest_reviews with --force"
        ) from None


def _summary(found: Survey, writer: _Writer, rules: BuildRules, cut: Rank) -> dict[str, Any]:
    rows = writer.num_rows()
    return {
        "papers": dict(sorted(found.papers.items())),
        "reviews": dict(sorted(found.reviews.items())),
        "unscored_reviews": found.num_unscored,
        "sft": {
            "top_fraction": rules.sft_top_fraction,
            "cut": {
                "checkmark_score": -cut.minus_checkmark_score, "mean_p_yes": -cut.minus_mean_p_yes,
                # Text, as many readers of JSON lose digits of numbers above 2**53.
                "id_hash": f"{cut.id_hash:016x}",
            },
            "train_reviews": len(found.ranking),
            "train_reviews_tied_at_the_cut": found.ranking.num_tied(cut),
            "selected": {split: writer.sft_selected[split] for split in rules.splits},
        },
        "dpo": {
            "decisions": list(rules.decisions), "min_rating_diff": rules.pairs.min_rating_diff,
            "rating_unit": rules.rating_unit, "min_checkmark_diff": rules.pairs.min_checkmark_diff,
            "papers_considered": {split: found.wanted_decision[split] for split in rules.splits},
            "pairs": {split: writer.num_pairs[split] for split in rules.splits},
            "dropped": {split: {r: writer.dropped[split][r] for r in REMEDIES} for split in rules.splits},
        },
        "datasets": {key.folder: {"rows": rows[key], "papers": writer.papers[key]} for key in rows},
    }  # fmt: skip
