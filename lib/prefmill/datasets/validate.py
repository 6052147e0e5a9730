"""Every check over a set of datasets, in one streaming pass over the rows and one over their source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.datasets.cross_checks import Distribution, Leaks, Repeats, order_problems, rating_problems_of
from prefmill.datasets.examples import CheckedRow, read_examples
from prefmill.datasets.findings import Findings
from prefmill.datasets.length_bias import LengthBias
from prefmill.datasets.occurrences import Files, fingerprint
from prefmill.datasets.registry import KINDS, REGISTRY, SUMMARY, DatasetKey, read_registry
from prefmill.datasets.source_checks import Claims, check_against_source
from prefmill.datasets.structure_checks import (
    contrast_problems,
    count_problems,
    grid_problems,
    image_problems,
    keys_in,
    marker_problems,
    rating_problems,
    read_summary,
    registry_problems,
)
from prefmill.datasets.survey import Rank
from prefmill.datasets.token_lengths import TokenCounter, context_of, open_counter
from prefmill.store.missing import Progress

Part = Literal["all", "sft", "dpo"]


@dataclass(frozen=True)
class Limits:
    """Where a check begins to complain; `max_too_long_fraction` in [0, 1], `length_accuracy` in [0.5, 1]."""

    length_accuracy: float
    min_shared_characters: int
    max_length: int | None
    max_too_long_fraction: float
    max_listed: int


@dataclass
class Validation:
    """What was found, and what the datasets look like, by folder."""

    findings: Findings
    distributions: dict[str, Distribution]
    length_bias: dict[str, LengthBias]
    longest: dict[str, int]
    max_length: int | None = None


def validate_datasets(
    datasets: Artifact,
    corpus: Artifact | None,
    scores: Sequence[Artifact],
    part: Part,
    model_name_or_path: str | None,
    limits: Limits,
    progress: Progress,
) -> Validation:
    """Run every check that the inputs allow on the datasets of `part`; faults are collected, not raised."""
    validator = _Validator(datasets, part, limits, progress)
    if model_name_or_path:
        # First, so that a model that cannot be loaded is told before minutes of reading.
        validator.open_model(model_name_or_path)
    validator.check_rows()
    validator.check_structure()
    validator.check_source(corpus, scores)
    # Last, as leaks are told here, and check_source has noted the papers of dev and test.
    validator.check_whole()
    return validator.result


class _Validator:
    def __init__(self, datasets: Artifact, part: Part, limits: Limits, progress: Progress) -> None:
        self._datasets, self._folder, self._limits, self._progress = datasets, datasets.path, limits, progress
        self._kinds = KINDS if part == "all" else (part,)
        self._keys = [key for key in keys_in(datasets.path) if key.kind in self._kinds]
        self._summary = read_summary(datasets.path)
        self._findings = Findings(limits.max_listed)
        files = Files()
        self._leaks = Leaks(files, limits.min_shared_characters)
        self._repeats = {(key.kind, key.modality): Repeats(files) for key in self._keys}
        self._counter: TokenCounter | None = None
        self._num_rows: dict[str, int] = {}
        self._num_too_long: dict[str, int] = {}
        self.result = Validation(self._findings, {}, {}, {})

    def open_model(self, name_or_path: str) -> None:
        self._counter = open_counter(name_or_path, self._folder)
        self.result.max_length = self._limits.max_length or context_of(name_or_path)

    def check_rows(self) -> None:
        total = sum(e.rows or 0 for e in self._datasets.manifest.files if e.path in {k.file_name() for k in self._keys})
        done = 0
        with tqdm(total=total, desc="checking rows", unit="row", mininterval=1.0) as bar:
            for key in self._keys:
                for _ in self._check_dataset(key):
                    done += 1
                    bar.update()
                    self._progress(done, total, "rows")

    def check_structure(self) -> None:
        # All datasets, whatever `part` is, as the registry names them all.
        keys = keys_in(self._folder)
        for problem in registry_problems(read_registry(self._folder), keys):
            self._findings.error("registry", REGISTRY, problem)
        for problem in grid_problems(keys):
            self._findings.error("completeness", SUMMARY, problem)
        # A folder's name begins with its kind, sft or dpo.
        counted = {folder: rows for folder, rows in self._summary["datasets"].items() if folder[:3] in self._kinds}
        for problem in count_problems({"datasets": counted}, self._num_rows):
            self._findings.error("completeness", SUMMARY, problem)

    def check_source(self, corpus: Artifact | None, scores: Sequence[Artifact]) -> None:
        if corpus is None:
            self._findings.skip("source", "no corpus was given")
        # The comparison goes through both sides in order: after a row out of order every other would look unknown.
        elif self._findings.has_errors("format", "order"):
            self._findings.skip("source", "the errors of format and order come first")
        else:
            cut = self._summary["sft"]["cut"]
            claims = Claims(
                Rank(-cut["checkmark_score"], -cut["mean_p_yes"], int(cut["id_hash"], 16)),
                frozenset(self._summary["dpo"]["decisions"]),
            )
            check_against_source(self._folder, self._keys, corpus, scores, claims, self._findings, self._leaks)

    def check_whole(self) -> None:
        for repeats in self._repeats.values():
            repeats.report(self._findings)
        self._leaks.report(self._findings)
        self._check_ratings()
        self._check_length_bias()
        self._check_too_long()
        if not any(key.modality != "clean" for key in self._keys):
            self._findings.skip("images", "no dataset with images")

    def _check_dataset(self, key: DatasetKey) -> Iterator[None]:
        distribution = self.result.distributions.setdefault(key.folder, Distribution())
        previous: CheckedRow | None = None
        self._num_rows[key.folder] = 0
        for line, example in read_examples(self._folder, key):
            self._num_rows[key.folder] += 1
            if isinstance(example, str):
                self._findings.error("format", f"{key.file_name()}:{line}", example)
            else:
                self._check_example(previous, example, distribution)
                previous = example
            yield

    def _check_example(self, previous: CheckedRow | None, example: CheckedRow, distribution: Distribution) -> None:
        for check, problem in self._row_problems(previous, example):
            self._findings.error(check, example.where, problem)
        is_first = previous is None or previous.paper_id != example.paper_id
        texts = tuple(fingerprint(answer.text) for answer in example.answers)
        distribution.add(example, is_first)
        self._repeats[example.key.kind, example.key.modality].add(example, texts)
        self._leaks.add_example(example, texts, is_first)
        if example.key.kind == "dpo":
            bias = self.result.length_bias.setdefault(example.key.folder, LengthBias())
            bias.add(example.paper_id, *(len(answer.text) for answer in example.answers))
        if self._counter is not None:
            self._check_tokens(self._counter, example)

    def _row_problems(self, previous: CheckedRow | None, example: CheckedRow) -> Iterator[tuple[str, str]]:
        dpo = self._summary["dpo"]
        # Rows hold points; quantiles are of the whole corpus and cannot be seen in a row.
        least = dpo["min_rating_diff"] if dpo.get("rating_unit", "points") == "points" else 0.0
        for check, problems in (
            ("ratings", rating_problems(example)),
            ("order", order_problems(previous, example)),
            ("contrast", contrast_problems(example, least, dpo["min_checkmark_diff"])),
            ("images", marker_problems(example)),
            ("images", image_problems(example, self._folder)),
        ):
            for problem in problems:
                yield check, problem

    def _check_tokens(self, counter: TokenCounter, example: CheckedRow) -> None:
        # An image at fault has no size to count, and is told by the check of images.
        faults = (*marker_problems(example), *image_problems(example, self._folder))
        if example.images and (faults or not counter.counts_images):
            return
        limit, folder = self.result.max_length, example.key.folder
        assert limit is not None
        try:
            length = counter.count(example)
        except InputError as error:
            self._findings.error("tokens", example.where, f"{error.what}: {error.details['got']}")
            return
        self.result.longest[folder] = max(length, self.result.longest.get(folder, 0))
        if length > limit:
            self._num_too_long[folder] = self._num_too_long.get(folder, 0) + 1
            self._findings.warning("tokens", example.where, f"{length:,} tokens, over {limit:,}")

    def _check_ratings(self) -> None:
        for key in self._keys:
            train, val = (self.result.distributions.get(key._replace(split=split).folder) for split in ("train", "val"))
            if key.split == "train" and train is not None:
                for problem in rating_problems_of(train.ratings(), val.ratings() if val else {}):
                    self._findings.warning("ratings", f"{key.kind}_{key.modality}", problem)

    def _check_length_bias(self) -> None:
        if not self.result.length_bias:
            self._findings.skip("length_bias", "no preference pairs")
        limit = self._limits.length_accuracy
        for folder, bias in self.result.length_bias.items():
            found = bias.accuracy()
            # The whole interval must be beyond the limit: with few pairs such a share comes up by chance.
            word = "longer" if found.low > limit else "shorter" if found.high < 1 - limit else None
            if word is not None:
                share = found.value if word == "longer" else 1 - found.value
                text = f"the {word} review is the chosen one in {share:.1%} of {bias.num_pairs:,} pairs"
                self._findings.warning("length_bias", folder, f"{text}: a model may learn length instead of quality")

    def _check_too_long(self) -> None:
        if self._counter is None:
            self._findings.skip("tokens", "no model was given")
            return
        for key in self._keys:
            if key.modality != "clean" and not self._counter.counts_images:
                self._findings.warning("tokens", key.folder, "not counted: sft and dpo cannot show this model images")
        for folder, count in self._num_too_long.items():
            share = count / self._num_rows[folder]
            if share > self._limits.max_too_long_fraction:
                self._findings.error("tokens", folder, f"{share:.1%} of the rows are too long for the model's context")
