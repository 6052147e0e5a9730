"""The five steps of optimize_checklist: what each is made from, and what it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prefmill.checklist.engine import Engine
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import Checklist, Item, load_checklist, save_checklist
from prefmill.checklist.optimize import export_step, refit_step, select_step
from prefmill.checklist.optimize.config import (
    ExportConfig,
    ProposeConfig,
    RefitConfig,
    ScoreConfig,
    SelectConfig,
    StepName,
)
from prefmill.checklist.optimize.dev_scores import dev_papers, score_dev
from prefmill.checklist.optimize.proposals import collect_candidates, propose, with_paraphrases
from prefmill.checklist.score import OPTIMAL_CHECKLIST
from prefmill.core.artifact import Artifact
from prefmill.core.config import identity
from prefmill.core.files import digest_json, digest_path, read_record, write_atomic, write_json
from prefmill.core.stage import Metrics, Task
from prefmill.store.artifacts import superseded
from prefmill.store.jsonl import read_jsonl

RECORD = "step.json"
_VERSION = 2  # raise it when the same settings would give other content


@dataclass(frozen=True)
class Step:
    """One step: its settings decide its content; `run` writes files into the empty folder it is given."""

    name: str
    settings: Mapping[str, Any]
    run: Callable[[Path], None]


def run_steps(steps: Sequence[Step], output: Path, earlier: Path, redo: str | None) -> list[str]:
    """Bring every step below `output` to completion, in order; returns the names of those that were run.

    A finished step is taken from `output` (an interrupted attempt), or from `earlier`, the finished output this one
    replaces, where its settings, those of the steps before it and the content of these are the same. Where all is
    the same, someone wants the work done again: the step `redo` and what follows from it, or with None everything.
    """
    keys = _keys(steps)
    whole = redo is None and read_record(earlier / steps[-1].name / RECORD).get("key") == keys[-1]
    done: dict[str, str] = {}
    ran = []
    for step, key in zip(steps, keys, strict=True):
        # A copy, as `done` grows with every step.
        wanted = {"key": key, "reads": dict(done)}
        folder = output / step.name
        if not _is_made_from(folder, wanted):
            shutil.rmtree(folder, ignore_errors=True)
            source = earlier / step.name
            if not whole and step.name != redo and _is_made_from(source, wanted):
                # Without the record, which is written last: a copy that is cut short is no finished step.
                shutil.copytree(source, folder, ignore=shutil.ignore_patterns(RECORD))
            else:
                folder.mkdir(parents=True)
                step.run(folder)
                ran.append(step.name)
            record = {"step": step.name, **wanted, "digest": _digest(folder)}
            write_json(folder / RECORD, record)
        done[step.name] = read_record(folder / RECORD)["digest"]
    return ran


def _keys(steps: Sequence[Step]) -> list[str]:
    """What decides each step: its own settings and those of all steps before it."""
    keys: list[str] = []
    for step in steps:
        keys.append(digest_json([_VERSION, step.name, dict(step.settings), keys[-1:]]))
    return keys


def _is_made_from(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the finished, undamaged step."""
    record = read_record(folder / RECORD)
    same = all(record.get(name) == value for name, value in wanted.items())
    return bool(record) and same and record["digest"] == _digest(folder)


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.name != RECORD)
    return digest_json([[path.name, digest_path(path)] for path in files])


CANDIDATES, ANSWER, PARAPHRASES = "candidates.json", "proposals.txt", "paraphrases.json"
_JOURNAL = "score.journal"


@dataclass(frozen=True)
class Optimisation:
    """The configuration of every step."""

    propose: ProposeConfig
    score: ScoreConfig
    select: SelectConfig
    refit: RefitConfig
    export: ExportConfig
    seed: int


def optimize(plan: Optimisation, task: Task, redo: StepName | None) -> Metrics:
    """Run the steps that are due, and put the checklist and the summary where other stages look for them."""
    steps = _Steps(plan, task.input("corpus"), task)
    # The worker keeps the output that is being replaced, so that its steps can be taken over.
    ran = run_steps(steps.all(), task.output, superseded(task.output), redo)
    exported = task.output / "export"
    for name in (OPTIMAL_CHECKLIST, export_step.SUMMARY):
        shutil.copyfile(exported / name, task.output / name)
    summary = _read(exported / export_step.SUMMARY)
    print("\n".join([f"steps run: {', '.join(ran) or 'none, all were up to date'}", summary["conclusion"]]))
    return {
        **{key: summary[key] for key in ("signal", "p_value", "correlation", "num_candidates")},
        "num_kept": len(summary["weights"]), "conclusion": [summary["conclusion"]],
    }  # fmt: skip


class _Steps:
    def __init__(self, plan: Optimisation, corpus: Artifact, task: Task) -> None:
        self.plan, self.corpus, self.task = plan, corpus, task

    def all(self) -> list[Step]:
        """In order. A step's settings decide its content together with the steps before it."""
        plan, seed = self.plan, {"seed": self.plan.seed}
        corpus = {"corpus": self.corpus.manifest.content_digest}
        # Without a model the candidates depend on neither seed nor corpus, and stay when these change.
        proposing = {**seed, **corpus} if plan.propose.engine is not None else {}
        return [
            Step("propose", {**identity(plan.propose), **proposing}, self.propose),
            Step("score", {**identity(plan.score), **corpus}, self.score),
            # The number of outer folds decides here whether there are enough papers.
            Step("select", {**identity(plan.select), **seed, "outer_folds": plan.refit.outer_folds}, self.select),
            Step("refit", {**identity(plan.refit), **seed}, self.refit),
            Step("export", identity(plan.export), self.export),
        ]

    def propose(self, folder: Path) -> None:
        config = self.plan.propose
        proposed: list[Item] = []
        if config.engine is not None:
            texts = [review["text"] for _, reviews in dev_papers(self.corpus, None) for review in reviews]
            work = self.task.work / "propose"
            proposed, answer = propose(config, texts, self.plan.seed, work, self.task.progress)
            write_atomic(folder / ANSWER, answer + "\n")
        save_checklist(collect_candidates(config.candidates, config.shipped, proposed), folder / CANDIDATES)

    def score(self, folder: Path) -> None:
        config = self.plan.score
        # Rules do not read the wording, so that a paraphrase could only give the same answer again.
        num_paraphrases = 0 if config.engine.engine == "lexical" else config.max_paraphrases
        asked, restated = with_paraphrases(self.candidates, num_paraphrases)

        def opened() -> Engine:
            return open_engine(config.engine, asked)

        score_dev(
            dev_papers(self.corpus, config.max_reviews),
            opened,
            config.max_failed_share,
            self.task.work / _JOURNAL,
            folder,
            self.task.advance,
            None if config.engine.engine == "lexical" else config.judge,
        )
        write_json(folder / PARAPHRASES, restated)

    def select(self, folder: Path) -> None:
        select_step.write_selection(
            self.plan.select,
            self.candidates,
            _read(self.task.output / "score" / PARAPHRASES),
            self.scored(),
            self.plan.refit.outer_folds,
            self.plan.seed,
            folder,
        )

    def refit(self, folder: Path) -> None:
        from tqdm import tqdm

        with tqdm(desc="permute", unit="target") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                # The test says how many are done; tqdm wants how many more.
                bar.update(done - bar.n)
                self.task.progress(done, total, "permutations")

            refit_step.write_refit(
                self.plan.refit,
                self.plan.select,
                self.candidates,
                self.items(),
                _read(self.task.output / "select" / select_step.SUMMARY)["model"],
                self.scored(),
                self.plan.seed,
                folder,
                progress,
            )

    def export(self, folder: Path) -> None:
        refit = self.task.output / "refit"
        weights, held_out = _read(refit / refit_step.WEIGHTS), _read(refit / refit_step.HELD_OUT)
        export_step.write_export(self.plan.export, self.candidates, self.items(), weights, held_out, folder)

    @cached_property
    def candidates(self) -> Checklist:
        return load_checklist(self.task.output / "propose" / CANDIDATES)

    def scored(self) -> list[Mapping[str, Any]]:
        return list(read_jsonl(self.task.output / "score" / "reviews.jsonl"))

    def items(self) -> Sequence[Mapping[str, Any]]:
        return list(read_jsonl(self.task.output / "select" / select_step.ITEMS))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
