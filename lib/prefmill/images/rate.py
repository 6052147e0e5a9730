"""What the stage rate_images does: read the images, have them compared by people or a program, write the ratings."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from prefmill.core.config import ExternalPath, StrictConfig, later, runtime
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import copy_once, write_atomic, write_json
from prefmill.core.image_rows import HEADS, Dimension, Rating
from prefmill.core.places import STAGES
from prefmill.core.stage import Metrics, Task
from prefmill.images.collection import Collection, GoodImage, Quarantine, check_images
from prefmill.images.custom_images import image_of_row, read_own_images
from prefmill.images.rating import Matchup, brightness, in_order, plan_matchups, rate_by_scores, score_all, sharpness
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.missing import Progress

PAGE_FILE = "page.url"  # in the task's logs: the address with its token, for the owner's eyes only
_COLUMNS = ("prompt_id", "left", "right", "rater", "dimension", "choice")
_LAST_REPLY_SECONDS = 0.5
_LOOK_SECONDS = 0.5  # between two looks whether the page is to close
_OWNER_ONLY = 0o600  # of files that hold the page's token
_log = logging.getLogger(__name__)


class PeopleConfig(StrictConfig):
    """People, on a web page; a pair is rated when `raters_per_pair` of them have answered all of its questions."""

    by: Literal["people"]
    raters_per_pair: int = Field(1, ge=1)
    port: int = runtime(0, ge=0, le=65535)


class RewardConfig(StrictConfig):
    """The reward model given as input `reward`, or a published one in `folder`; rewards within `tie_margin` are a tie.

    A published one has one score, which counts on every dimension.
    """

    by: Literal["reward"]
    folder: ExternalPath | None = later(None, description="of PickScore, HPSv2, ImageReward or LAION's aesthetics")
    tie_margin: float = Field(0.0, ge=0)


class MeasureConfig(StrictConfig):
    """The sharper or the brighter image, whatever the prompt: a stand-in for demos."""

    by: Literal["sharpness", "brightness"]
    tie_margin: float = Field(0.0, ge=0)


RaterConfig = Annotated[PeopleConfig | RewardConfig | MeasureConfig, Field(discriminator="by")]


@dataclass(frozen=True)
class RateImages:
    """What is compared, on which dimensions, by whom."""

    rater: PeopleConfig | RewardConfig | MeasureConfig
    images: Path | None
    dimensions: Sequence[Dimension]
    max_pairs_per_prompt: int | None
    seed: int


def rate_images(wanted: RateImages, task: Task) -> Metrics:
    """Write `ratings.csv`, `images/`, `images.jsonl`, `quarantine.jsonl` and `summary.json`; the metrics are counts."""
    if task.optional_input("reward") is not None and not isinstance(wanted.rater, RewardConfig):
        raise ConfigError(
            "a reward model that nothing asks for", where=task.key,
            got=f"rater.by={wanted.rater.by}", fix="set rater.by=reward, or leave out inputs.reward",
        )  # fmt: skip
    collection = _read_images(wanted, task)
    quarantine = collection.quarantine
    good = check_images([image for _, image in sorted(collection.images.items())], quarantine)
    matchups = plan_matchups(good.values(), wanted.max_pairs_per_prompt, wanted.seed, quarantine)
    # Before people are asked: afterwards it is too late to put a picture there.
    write_jsonl(task.output / "quarantine.jsonl", quarantine.rows)
    warnings = quarantine.warnings() + _alone(collection, matchups)
    for warning in warnings:
        _log.warning("%s", warning)
    compared = {image.source.image_id: image for pair in matchups for image in (pair.first, pair.second)}
    if isinstance(wanted.rater, PeopleConfig):
        ratings = _ask_people(wanted, wanted.rater, matchups, compared, task)
    else:
        ratings = _ask_program(wanted, wanted.rater, matchups, compared, task)
    summary = _summary(wanted, matchups, compared, ratings, quarantine, warnings)
    for image in compared.values():
        # Files of finished artifacts are linked: nobody edits them.
        copy_once(image.source.path, task.output / image.file, may_link=image.source.is_ours)
    write_jsonl(task.output / "images.jsonl", [image.row for _, image in sorted(compared.items())])
    write_json(task.output / "summary.json", summary, ensure_ascii=False)
    write_atomic(task.output / "ratings.csv", ratings_csv(ratings))
    return {key: summary[key] for key in ("num_pairs", "num_rated_pairs", "num_ratings", "raters", "warnings")}


def ratings_csv(ratings: Sequence[Rating]) -> str:
    """The table of all ratings, in order."""
    stream = io.StringIO()
    # csv ends lines with \r\n unless told otherwise.
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(in_order(ratings))
    return stream.getvalue()


def answers_file(task: Task) -> Path:
    """Where people's answers are kept: outside the output, so that no rerun and no --force throws them away."""
    return task.output.parents[1] / ".answers" / task.stage / f"{task.name}.jsonl"


def open_pages(logs: Path) -> list[str]:
    """Address, and tunnel to it, of every page that waits for people in a run; raises InputError where none does."""
    pages = [path.read_text() for path in sorted(logs.glob(f"*/*/{PAGE_FILE}"))]
    found = [lines for lines in pages if not _was_killed(lines)]
    if not found:
        raise InputError(
            "no page is open in this run", where=logs, fix=f"start it: python -m {STAGES}.rate_images CONFIG run=NAME"
        )
    return found


def _was_killed(lines: str) -> bool:
    """Whether nobody serves a page of this machine any more; of another machine's nothing can be told from here."""
    url, tunnel = lines.splitlines()
    if tunnel.split()[-1] != socket.gethostname():
        return False
    with socket.socket() as door:
        return door.connect_ex((urlsplit(url).hostname, urlsplit(url).port)) != 0


def _read_images(wanted: RateImages, task: Task) -> Collection:
    artifacts = task.inputs.get("images", ())
    if bool(artifacts) == (wanted.images is not None):
        raise ConfigError(
            "no images to rate" if not artifacts else "images from two places", where=task.key,
            fix="give either inputs.images=FOLDER of generate_images, or images=FOLDER of your own",
        )  # fmt: skip
    collection = Collection()
    for artifact in artifacts:
        for row in read_jsonl(artifact.file("images.jsonl")):
            collection.add_image(image_of_row(artifact.path, row, f"{artifact.manifest.task}/images.jsonl"))
    for image in read_own_images(wanted.images) if wanted.images is not None else ():
        collection.add_image(image)
    return collection


def _ask_program(
    wanted: RateImages, rater: RewardConfig | MeasureConfig, matchups: Sequence[Matchup], images: dict[str, GoodImage],
    task: Task,
) -> list[Rating]:  # fmt: skip
    if isinstance(rater, MeasureConfig):
        scorer = {"sharpness": sharpness, "brightness": brightness}[rater.by]
    else:
        model = task.optional_input("reward")
        if (model is None) == (rater.folder is None):
            raise ConfigError(
                "no reward model to rate with" if model is None else "two reward models to rate with",
                where=task.key,
                fix="give inputs.reward=FOLDER of train_reward, or rater.folder, or another rater.by",
            )  # fmt: skip
        from prefmill.families.reward.scoring import score_images

        folder = model.path if model is not None else rater.folder

        def scorer(prompts: Sequence[str], paths: Sequence[Path]) -> Any:
            found = score_images(folder, prompts, paths)  # type: ignore[arg-type]
            return found.repeat(len(HEADS), axis=1) if found.shape[1] == 1 else found

    scores = score_all([image for _, image in sorted(images.items())], scorer, task.work, task.advance)
    return rate_by_scores(matchups, scores, rater.by, wanted.dimensions, rater.tie_margin, wanted.seed)


def _ask_people(
    wanted: RateImages, rater: PeopleConfig, matchups: Sequence[Matchup], images: dict[str, GoodImage], task: Task
) -> list[Rating]:
    """Serve the page until it is finished; a killed server's successor goes on behind the last answer."""
    from prefmill.images.answers import AnswerBook, Session
    from prefmill.images.rating_server import RatingServer

    # Somebody may press finish before all is rated: a rerun of the task must not open the page again.
    done = task.work / "finished"
    with contextlib.closing(AnswerBook(answers_file(task))) as book:
        session = Session(book, matchups, wanted.dimensions, rater.raters_per_pair, wanted.seed)
        if session.num_left_out:
            _log.warning(
                "%d answers in %s are about other images or questions: they stay there and do not count",
                session.num_left_out, answers_file(task),
            )  # fmt: skip
        if not done.is_file() and not session.is_complete:
            token, port = _address(task.work / "server.json", rater.port)

            def report(tell: Progress = task.progress) -> None:
                # A disk that is full for a while ends no page: who answers meanwhile is told.
                with contextlib.suppress(OSError):
                    tell(session.num_rated(), len(matchups), "pairs rated")

            try:
                server = RatingServer(session, images, token, port, report)
            except OSError as error:
                if rater.port:
                    raise ConfigError(
                        "cannot open the page's port", where=f"rater.port={rater.port}", got=error.strerror,
                        fix="choose another, or leave it out",
                    ) from None  # fmt: skip
                server = RatingServer(session, images, token, 0, report)  # that of the attempt before is taken by now
            # After the server has bound: port 0 is whatever the system chose, and the next attempt asks for it again.
            kept = json.dumps({"token": server.token, "port": server.port})
            write_atomic(task.work / "server.json", kept, _OWNER_ONLY)
            with _announced(server.url, server.port, task), server:
                # A daemon, so that an error here ends the process: serve_forever would keep it alive.
                threading.Thread(target=server.serve_forever, daemon=True).start()
                report()
                while not server.finished.wait(_LOOK_SECONDS):
                    report(task.advance)  # ends here, and not in a page's thread, when asked to stop
                time.sleep(_LAST_REPLY_SECONDS)  # the page that finished is told so
                server.shutdown()
            write_atomic(done, "")
        return session.ratings()


def _address(path: Path, port: int) -> tuple[str, int]:
    """Token and port of the attempt before, so that open pages go on; new ones at first."""
    if path.is_file():
        kept = json.loads(path.read_text())
        return kept["token"], port or kept["port"]
    return secrets.token_urlsafe(24), port


@contextlib.contextmanager
def _announced(url: str, port: int, task: Task) -> Iterator[None]:
    """Tell the owner where the page is: on their terminal, and in a file that only they can read."""
    tunnel = f"ssh -N -L {port}:127.0.0.1:{port} {socket.gethostname()}"
    path = task.logs / PAGE_FILE
    write_atomic(path, f"{url}\n{tunnel}\n", _OWNER_ONLY)
    lines = f"Rate at  {url}\nfrom another machine first:  {tunnel}\n"
    # The terminal and not stdout: that goes to a log, and the address holds the token.
    with contextlib.suppress(OSError), Path("/dev/tty").open("w") as terminal:
        terminal.write(lines)
    _log.warning("waiting for ratings: `prefmill rate %s` shows the page's address", task.run)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _summary(
    wanted: RateImages, matchups: Sequence[Matchup], images: dict[str, GoodImage], ratings: Sequence[Rating],
    quarantine: Quarantine, warnings: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    if not ratings:
        raise InputError("nothing was rated", fix="rate at least one pair before finishing")
    choices = Counter(f"{row['dimension']}: {row['choice']}" for row in ratings)
    return {
        "by": wanted.rater.by,
        "num_images": len(images),
        "num_pairs": len(matchups),
        "num_rated_pairs": len({tuple(sorted((row["left"], row["right"]))) for row in ratings}),
        "num_ratings": len(ratings),
        "raters": len({row["rater"] for row in ratings}),
        "choices": dict(sorted(choices.items())),
        "quarantine": quarantine.counts(),
        "warnings": warnings,
    }


def _alone(collection: Collection, matchups: Sequence[Matchup]) -> list[str]:
    prompts = {image.prompt_id for image in collection.images.values()}
    num_alone = len(prompts - {matchup.prompt_id for matchup in matchups})
    return [f"{num_alone} of {len(prompts)} prompts have no two different pictures to compare"] if num_alone else []
