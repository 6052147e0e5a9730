"""One sbatch call, of which no answer loses a job or makes two: its intent is on disk before Slurm is asked.

Every call's job has a name that no other has. Where sbatch gives no clear answer, Slurm is asked for that name.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from prefmill.core.errors import PipelineError
from prefmill.slurm import jobs as slurm
from prefmill.slurm.script import SbatchAnswer, array_spec, sbatch
from prefmill.slurm.submission import Intent, JobRecord, Kind, Submission

_PAUSES = (0.5, 2.0, 6.0, 15.0)  # seconds after each doubtful answer: a controller that restarts answers again soon
# 22.05 names the limit in a line of its own; some sites show the general line alone.
_FULL = re.compile(r"Submit\w*Limit|Resource temporarily unavailable|^(?!.*Limit\b).*accounting/QOS policy", re.S)
_TRANSIENT = re.compile(
    r"timed? ?out|Unable to contact|connect|Connection|Zero Bytes|Transport endpoint|Socket|temporarily|not responding|"
    r"standby|Unexpected message|Communication|Protocol authentication|no answer", re.I,
)  # fmt: skip
_REFUSED = re.compile(r"Batch job submission failed|unrecognized option|[Ii]nvalid|not permitted|fatal:|Try .sbatch")


class SbatchRefusedError(PipelineError):
    """Slurm refuses a job for good: asking again would end the same way."""


class FullError(PipelineError):
    """A limit on submitted jobs is reached: the same job may be accepted when others have ended."""


@dataclass(frozen=True)
class Order:
    """An sbatch call to make; `indices` are of the array in `script`, empty for a job that is none."""

    submission: Submission
    kind: Kind
    stage: str
    chunk: int
    script: Path
    indices: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    dependency: str = ""
    max_concurrent: int | None = None

    def arguments(self, name: str) -> list[str]:
        """Options beside the script's own."""
        array = [f"--array={array_spec(self.indices, self.max_concurrent)}"] if self.indices else []
        waits = [f"--dependency={self.dependency}"] if self.dependency else []
        return [f"--job-name={name}", *array, *self.options, *waits]


def send(order: Order) -> JobRecord:
    """Submit `order`, once, whatever Slurm's answers are; on disk before this returns.

    Raises SbatchRefusedError and FullError in Slurm's own words, PipelineError where it gives no clear answer for long.
    """
    name = f"{order.submission.run}.{order.stage}.{uuid4().hex[:8]}"
    intent = Intent(order.kind, order.stage, order.chunk, order.indices, order.dependency, time.time(), name)
    order.submission.record_intent(intent)
    answer = SbatchAnswer()
    known: str | None = ""
    for pause in _PAUSES:
        if known is not None:  # nothing is sent again before Slurm has said that it has no such job
            answer = sbatch(order.script, order.arguments(name))
        known = answer.job_id or find(intent)
        if known:
            return order.submission.record_job(intent, known)
        if error := _verdict(order, answer):
            order.submission.drop_intent(intent)
            raise error
        time.sleep(pause * random.uniform(0.5, 1.5))  # jitter: all of a site's clients come back at once
        if known := find(intent):  # the controller may have been at work on it
            return order.submission.record_job(intent, known)
    raise PipelineError(
        "Slurm takes no job now", where=order.script, got=answer.error,
        fix=f"`prefmill advance {order.submission.run}` when it answers again: what is queued stays, the rest follows",
    )  # fmt: skip


def send_fitting(order: Order) -> JobRecord | None:
    """Submit as many of an array's elements, the first ones, as limits on submitted jobs allow; None for none."""
    count = len(order.indices)
    while count:
        try:
            return send(replace(order, indices=order.indices[:count]))
        except FullError:
            # Slurm refuses an array as a whole and does not say how many elements it would take.
            count //= 2
    return None


def find(intent: Intent) -> str | None:
    """The id of the job with this intent's name, "" where Slurm says that there is none, None where it says nothing."""
    named = slurm.named([intent.name], intent.time)
    return None if named is None else _oldest(named.get(intent.name, []))


def _oldest(job_ids: Sequence[str]) -> str:
    """The one that is kept of the jobs of one call, "" for none; it has waited longest. The others are cancelled."""
    first, *others = sorted(job_ids, key=int) or [""]
    if others:  # sbatch itself asks again when the controller is slow
        slurm.cancel([(job_id, -1) for job_id in others])
    return first


def settle(found: Sequence[Submission]) -> Iterator[str]:
    """Record the jobs of calls that were cut off before their answer was; a line for each.

    A call of which Slurm shows no job is dropped: its tasks count as not submitted. Without an answer all is kept.
    """
    for submission in found:
        intents = submission.open_intents()
        if not intents:
            continue
        named = slurm.named([one.name for one in intents], min(one.time for one in intents))
        if named is None:
            continue
        for intent in intents:
            if job_id := _oldest(named.get(intent.name, [])):
                submission.record_job(intent, job_id)
                yield f"job {job_id} is {intent.stage}'s: its submission was cut off before that was noted"
            else:
                submission.drop_intent(intent)


def _verdict(order: Order, answer: SbatchAnswer) -> PipelineError | None:
    """What a failed call means: a limit, a refusal, or None where the answer leaves doubt."""
    # First: Slurm's "Resource temporarily unavailable" is a limit, though it reads like a passing trouble.
    if _FULL.search(answer.error):
        return FullError(
            "a limit on submitted jobs is reached", where=order.script, got=answer.error,
            fix="wait until some have ended: the job that looks after the run, or `prefmill advance`, submits the rest",
        )  # fmt: skip
    # Before a refusal: an unreachable controller is told as "Batch job submission failed" too.
    if _TRANSIENT.search(answer.error) or not _REFUSED.search(answer.error):
        return None
    return SbatchRefusedError(
        "Slurm refuses the job", where=order.script, got=answer.error,
        fix="change what Slurm names in the cluster file or the pipeline's `resources`, and submit again: what is "
        "queued stays",
    )  # fmt: skip
