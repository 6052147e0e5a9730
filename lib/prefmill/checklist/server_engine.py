"""What engines behind a server share: many reviews in flight, trouble that comes last, numbers that are none."""

from __future__ import annotations

import asyncio
import logging
import math
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.checklist.completions import RefusedError, Server
from prefmill.checklist.engine import Outcome, ServerConfig
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompted import ConcurrentEngine, ReviewRequest
from prefmill.core.errors import ConfigError, InputError, PrefmillError
from prefmill.core.files import digest_json, write_atomic
from prefmill.core.records import Paper, Review

if TYPE_CHECKING:
    import httpx

# Below every float32 log-probability of a model: servers write -9999, -1e9 and the like for minus infinity.
_NO_LOGP = -1000.0
_ABOVE_ZERO = 1e-3  # of a log-probability, by rounding
_Task = asyncio.Task[tuple[int, Outcome]]
_log = logging.getLogger(__name__)


class ServerEngine(ConcurrentEngine):
    """An engine that asks a server about several reviews at a time."""

    def __init__(self, checklist: Checklist, config: ServerConfig, model: str) -> None:
        super().__init__(checklist)
        self._model, self._in_flight = model, config.reviews_in_flight
        self._server = Server.from_environment(config)
        self._answers_as: str | None = None  # the model's name in the server's answers
        self._note: Path | None = None
        self._providers: set[str] = set()

    @abstractmethod
    def requests(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[ReviewRequest]:
        """A request for every review, in the order given."""

    @abstractmethod
    async def outcome(self, client: httpx.AsyncClient, request: ReviewRequest) -> Outcome:
        """What the server answers about a review that can be asked about; raises RefusedError where it will not."""

    def served_model(self) -> dict[str, Any]:
        """What the server says of its model; ConfigError where it serves none of that name."""
        models = self._server.get("models").get("data")
        found = {model.get("id"): model for model in models or [] if isinstance(model, dict)}
        if self._model not in found:
            raise ConfigError(
                "the server does not serve this model", where=self._server.url, got=self._model,
                expected=", ".join(map(str, found)) or "the name of a model it serves",
                fix="set engine.served_model_name to the server's name for the model in engine.model_name_or_path",
            )  # fmt: skip
        return found[self._model]

    def check_model(self, content: dict[str, Any]) -> None:
        """Raise InputError where another model answers than before: its scores must not stand beside the first's.

        Another provider of the same model is told.
        """
        self._tell_provider(content.get("provider"))
        name = content.get("model")
        if not isinstance(name, str) or name == self._answers_as:
            return
        if self._answers_as is not None:
            raise InputError(
                "another model answers than before", where=self._server.url, got=name, expected=self._answers_as,
                fix="name one model, without fallbacks, and rerun with --force what the other one answered",
            )  # fmt: skip
        self._answers_as = name
        if self._note:
            write_atomic(self._note, name)
        if name != self._model:
            _log.warning("the server answers as %s, where %s was asked for", name, self._model)

    def _tell_provider(self, name: Any) -> None:
        """OpenRouter deals requests out among hosts, each with its own quantisation and template."""
        if not isinstance(name, str) or name in self._providers:
            return
        self._providers.add(name)
        if len(self._providers) == 2:
            _log.warning(
                "several providers answer (%s): their scores differ for one review; name one, as by "
                "engine.extra_body={provider: {only: [NAME]}}", ", ".join(sorted(self._providers)),
            )  # fmt: skip

    @property
    def label(self) -> str:
        """Its name, with the model that answers where it has another name than was asked for."""
        return self.name if self._answers_as in (None, self._model) else f"{self.name} ({self._answers_as})"

    def remember(self, folder: Path) -> None:
        """Keep the name of the model that answers in `folder`: an alias may mean another one at the next attempt."""
        self._note = folder / f"answers-as-{digest_json(self._model)[:8]}.txt"
        self._answers_as = self._note.read_text() if self._note.is_file() else self._answers_as

    def numbered(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Generator[tuple[int, Outcome], None, None]:
        """Outcomes as the server answers. What it still answers comes before the PrefmillError of its trouble."""
        rest = enumerate(self.requests(papers))
        waiting: set[_Task] = set()
        failure: PrefmillError | None = None
        with asyncio.Runner() as runner:  # its end cancels what a caller that stops early has left
            client = self._server.client()
            try:
                while True:
                    # After trouble nothing new is asked; what is under way is awaited, and kept.
                    while failure is None and len(waiting) < self._in_flight:
                        number, request = next(rest, (0, None))
                        if request is None:
                            break
                        waiting.add(runner.get_loop().create_task(self._numbered(client, number, request)))
                    if not waiting:
                        break
                    done, waiting = runner.run(_first_done(waiting))
                    for task in done:
                        try:
                            yield task.result()
                        except PrefmillError as error:
                            # The first error is told: later ones are mostly the same trouble again.
                            failure, self._server.giving_up = failure or error, True
                if failure is not None:
                    raise failure
            finally:
                # The next call has all of its retries again.
                self._server.giving_up = False
                runner.run(client.aclose())

    async def _numbered(self, client: httpx.AsyncClient, number: int, request: ReviewRequest) -> tuple[int, Outcome]:
        if request.failure is not None:
            return number, request.refused(request.failure)
        try:
            return number, await self.outcome(client, request)
        except RefusedError as refusal:
            return number, request.refused(str(refusal))


def as_logp(value: Any) -> float | None:
    """A log-probability; None for what stands for none: nothing, NaN, infinity, -9999 and its kin, a positive number.

    Taken for numbers, two such stand-ins would be P(yes) = 1/2, and one beside a real one P(yes) = 0 or 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return min(0.0, float(value)) if _NO_LOGP < value <= _ABOVE_ZERO else None


def is_nothing(value: Any) -> bool:
    """Whether a log-probability is minus infinity, or what servers write for it: a token that cannot be."""
    return type(value) in (int, float) and value <= _NO_LOGP


def count_in(content: Any, *path: str) -> int | None:
    """The whole number at `path` of an answer; None where there is none, as servers need not count."""
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content if type(content) is int else None


async def _first_done(tasks: set[_Task]) -> tuple[set[_Task], set[_Task]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
