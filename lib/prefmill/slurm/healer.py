"""Inside the follow-up job: one look at the run, then this job is requeued, until the run is over.

python -m prefmill.slurm.healer RUN WORKSPACE

Exits with 0 when the run is over or the job requeued. However else this process ends, the job's shell requeues it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prefmill.slurm import jobs as slurm
from prefmill.slurm.advance import advance
from prefmill.slurm.follow_up import me, requeue, send_follow_up
from prefmill.slurm.submission import submissions
from prefmill.slurm.view import next_look


def main(argv: Sequence[str]) -> int:
    """Look, and see to the next look; returns 0."""
    run, workspace = argv[0], Path(argv[1])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue sends it: what follows must still be done
    wait = next_look(advance(workspace, run, partial(print, flush=True)))
    if wait is None:
        others = [job_id for one in submissions(workspace, run) for job_id in one.advance_ids() if job_id != me()]
        slurm.cancel([(job_id, -1) for job_id in others])  # one that Slurm held would stay for ever
        return 0
    if requeue(me(), wait):
        return 0  # at once: a process that is still there when the job starts again has its node drained
    send_follow_up(submissions(workspace, run)[-1], wait)  # a site that requeues nothing
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
