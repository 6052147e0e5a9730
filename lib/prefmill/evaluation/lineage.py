"""From an artifact back to what it was made from, by the content digests in manifests on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefmill.core.artifact import Artifact
from prefmill.core.errors import ArtifactError, PipelineError
from prefmill.core.places import MANIFEST
from prefmill.store.artifacts import read_manifest
from prefmill.store.jsonl import read_jsonl

ROOTS = ("data", "checkpoints")


@dataclass(frozen=True)
class Origin:
    """An artifact behind another, and the inputs of its own that no manifest on disk accounts for."""

    artifact: Artifact
    missing: tuple[str, ...]


@dataclass(frozen=True)
class TrainingPapers:
    """The papers a checkpoint learned from, as far as manifests tell; `num_missing` inputs could not be found."""

    paper_ids: frozenset[str]
    num_datasets: int
    num_missing: int


class Lineage:
    """Finds artifacts by content digest below the workspaces of the artifacts given, and of other task folders."""

    def __init__(self, artifacts: Iterable[Artifact], folders: Iterable[Path] = ()) -> None:
        self._known = {item.manifest.content_digest: item for item in artifacts}
        paths = [item.path.absolute() for item in self._known.values()] + [folder.absolute() for folder in folders]
        # A task's folder is <workspace>/<root>/<run>/<stage>/<task>.
        for workspace in sorted({path.parents[3] for path in paths if len(path.parents) > 3}):
            self._known = {item.manifest.content_digest: item for item in _finished(workspace)} | self._known

    def find(self, digest: str) -> Artifact | None:
        """The artifact with this content, None where no manifest on disk has it."""
        return self._known.get(digest)

    def behind(self, artifact: Artifact) -> list[Origin]:
        """`artifact` and everything it was made from, each once, nearest first."""
        origins: dict[str, Origin] = {}
        waiting = [artifact]
        while waiting:
            item = waiting.pop(0)
            if item.manifest.content_digest in origins:
                continue
            found = {digest: self.find(digest) for digest in _input_digests(item)}
            missing = tuple(digest for digest, source in found.items() if source is None)
            origins[item.manifest.content_digest] = Origin(item, missing)
            waiting += [source for source in found.values() if source is not None]
        return list(origins.values())


def everything_behind(roots: Sequence[Artifact]) -> tuple[list[Artifact], list[str]]:
    """Every artifact that `roots` were made from, themselves included, and the digests no manifest accounts for."""
    lineage = Lineage(roots)
    found: dict[str, Artifact] = {}
    missing: set[str] = set()
    for root in roots:
        for origin in lineage.behind(root):
            found.setdefault(origin.artifact.manifest.content_digest, origin.artifact)
            missing |= set(origin.missing)
    return list(found.values()), sorted(missing)


def training_papers(checkpoint: Artifact, lineage: Lineage) -> TrainingPapers:
    """The papers in the datasets and corpora that `checkpoint` and the checkpoints before it were trained on.

    Of a corpus that a model was trained on directly, those outside its test split. Only what checkpoints read
    counts: the corpus behind a dataset also holds the papers kept out of it.
    """
    papers: set[str] = set()
    sources: dict[str, Artifact] = {}
    missing = 0
    for origin in lineage.behind(checkpoint):
        if origin.artifact.manifest.kind != "checkpoint":
            continue
        missing += len(origin.missing)
        read = [lineage.find(digest) for digest in _input_digests(origin.artifact)]
        # Checkpoints before this one come by themselves, with their own inputs.
        sources |= {item.manifest.content_digest: item for item in read if item and item.manifest.kind != "checkpoint"}
    for source in sources.values():
        papers |= set(_paper_ids(source))
    datasets = [item for item in sources.values() if item.manifest.kind in _READERS]
    return TrainingPapers(frozenset(papers), len(datasets), missing)


def check_training(checkpoint: Artifact | None, evaluated: Iterable[str], output: Path) -> dict[str, int] | None:
    """What is known of a checkpoint's training papers, in numbers; None without a checkpoint.

    Manifests are looked for in the workspaces of the checkpoint and of `output`. Raises PipelineError naming papers
    that the checkpoint was trained on: its score on them means nothing.
    """
    if checkpoint is None:
        return None
    trained = training_papers(checkpoint, Lineage([checkpoint], [output]))
    both = sorted(trained.paper_ids.intersection(evaluated))
    if both:
        raise PipelineError(
            f"{len(both)} of the papers to evaluate on were trained on", where=checkpoint.path,
            got=", ".join(both[:5]) + (" ..." if len(both) > 5 else ""),
            expected="test papers that no dataset behind the checkpoint holds",
            fix="evaluate on the corpus that the checkpoint's datasets were made from, or train again without them",
        )  # fmt: skip
    return {
        "num_papers": len(trained.paper_ids),
        "num_datasets": trained.num_datasets,
        "num_missing": trained.num_missing,
    }


def _input_digests(artifact: Artifact) -> list[str]:
    return [digest for digests in artifact.manifest.inputs.values() for digest in digests]


def _paper_ids(artifact: Artifact) -> Iterator[str]:
    read = _READERS.get(artifact.manifest.kind)
    yield from read(artifact) if read else ()


def _dataset_papers(artifact: Artifact) -> Iterator[str]:
    """Validation rows count as well: checkpoints are chosen by them."""
    for entry in artifact.manifest.files:
        if entry.path.endswith("data.jsonl"):
            for row in read_jsonl(artifact.path / entry.path):
                # build_datasets writes the paper of a pair as its group.
                yield row["group"] if "group" in row else row["paper_id"]


def _corpus_papers(artifact: Artifact) -> Iterator[str]:
    for paper in read_jsonl(artifact.file("papers.jsonl")):
        if paper["split"] != "test":
            yield paper["paper_id"]


_READERS = {"preference_datasets": _dataset_papers, "review_corpus": _corpus_papers}


def _finished(workspace: Path) -> Iterator[Artifact]:
    for root in ROOTS:
        for path in sorted((workspace / root).glob(f"*/*/*/{MANIFEST}")):
            try:
                manifest = read_manifest(path.parent)
            except (ArtifactError, PermissionError):  # another run's: if it matters here, its digest is told as missing
                continue
            if manifest is not None:
                yield Artifact(path.parent, manifest)
