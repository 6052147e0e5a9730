"""Why a job ended before its task began: Slurm's code in words, and what its log or the shell said last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prefmill.slurm.jobs import JobState

# As sacct writes them, exit code and signal.
_CODES: Mapping[tuple[int, int], str] = {
    (0, 53): "Slurm could not open its log on that node: the folder is missing there, or not writable",
    (126, 0): "a program cannot be run on that node",
    (127, 0): "a program is missing on that node, such as the interpreter in the cluster file's `python`",
    (1, 0): "its shell or python broke off",
}


def why_no_task(job: JobState, log: str) -> str:
    """The words for the code of a job whose task did not begin, its node, and the last line of `log`."""
    code = _CODES.get((job.exit_code, job.signal), "")
    where = f" on {job.node}" * bool(job.node)
    # squeue alone knows no code; sacct may be some seconds late.
    how = f" with {job.exit_code}:{job.signal}" * bool(job.exit_code or job.signal)
    ended = f"its job ended{where}{how} before the task began"
    return ": ".join(part for part in (ended, code, last_words(log)) if part)


def last_words(log: str) -> str:
    """The last line that says something; an error of prefmill's own by its first."""
    lines = list(_lines(log))
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:200]


def _lines(log: str) -> Iterator[str]:
    for line in log.splitlines():
        # What the job itself prints at its start: where its log is, and where it runs.
        if line.strip() and not line.startswith("--- ") and ": see /" not in line:
            yield line.strip()
