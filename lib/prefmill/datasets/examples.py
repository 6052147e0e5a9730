"""Dataset rows read strictly: their forms, and the view of a row that the checks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from prefmill.core.unknown_keys import written
from prefmill.datasets.registry import DatasetKey
from prefmill.reviews.prompt import asked_scale, split_completion
from prefmill.reviews.scale import COMMON_SCALE, Scale, rescaled

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]  # min_length alone lets blanks pass
# Strict, as pydantic would read "2" as 2.0, and `datasets` fails on a column of two types.
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Answered(NamedTuple):
    """A completion as review text and rating, on the common scale whichever the prompt names."""

    completion: str
    text: str
    rating: float | None


class CheckedRow(NamedTuple):
    """What checks look at in a row: `answers` is the review to imitate, or chosen and rejected."""

    key: DatasetKey
    line: int
    row_id: str
    paper_id: str
    prompt: str
    answers: tuple[Answered, ...]
    review_ids: tuple[str, ...]
    images: tuple[str, ...]
    rating_diff: float | None
    checkmark_diff: float | None

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.key.file_name()}:{self.line}"


class _Turn(BaseModel):
    model_config = _STRICT
    role: Literal["system", "user", "assistant"]
    content: Text


class _SharegptTurn(BaseModel):
    model_config = _STRICT
    speaker: Literal["system", "human", "gpt"] = Field(alias="from")  # a keyword of Python
    value: Text


class _Answer(_SharegptTurn):
    speaker: Literal["gpt"] = Field(alias="from")


class SftRow(BaseModel):
    """A row to imitate."""

    model_config = _STRICT
    id: Text
    paper_id: Text
    messages: list[_Turn]

    @field_validator("messages")
    @classmethod
    def _alternates(cls, turns: list[_Turn]) -> list[_Turn]:
        _require_roles([turn.role for turn in turns], ["user", "assistant"])
        return turns


class SftImageRow(SftRow):
    """A row to imitate, with images."""

    images: list[Text] = Field(min_length=1)


class DpoRow(BaseModel):
    """A preference."""

    model_config = _STRICT
    id: Text
    group: Text
    conversations: list[_SharegptTurn]
    chosen: _Answer
    rejected: _Answer
    chosen_id: Text
    rejected_id: Text
    rating_diff: float
    checkmark_diff: float

    @field_validator("conversations")
    @classmethod
    def _alternates(cls, turns: list[_SharegptTurn]) -> list[_SharegptTurn]:
        _require_roles([turn.speaker for turn in turns], ["human"])
        return turns


class DpoImageRow(DpoRow):
    """A preference, with images."""

    images: list[Text] = Field(min_length=1)


_FORMS: dict[tuple[str, bool], type[BaseModel]] = {
    ("sft", False): SftRow,
    ("sft", True): SftImageRow,
    ("dpo", False): DpoRow,
    ("dpo", True): DpoImageRow,
}


def read_examples(folder: Path, key: DatasetKey) -> Iterator[tuple[int, CheckedRow | str]]:
    """Line number and example of every row of a dataset, or in the example's place what is wrong with its form."""
    form = _FORMS[key.kind, key.modality != "clean"]
    with (folder / key.file_name()).open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                # From the bytes in one step: a line that is no JSON is then the same error as a field at fault.
                row = form.model_validate_json(line)
            except ValidationError as error:
                yield number, "; ".join(_explain(detail) for detail in error.errors(include_url=False))
            else:
                yield number, _example(key, number, row)


def _example(key: DatasetKey, line: int, row: Any) -> CheckedRow:
    images = tuple(row.images) if key.modality != "clean" else ()
    if key.kind == "sft":
        *prompt, answer = [turn.content for turn in row.messages]
        asked = "\n".join(prompt)
        single = (_answered(answer, asked_scale(asked)),)
        return CheckedRow(key, line, row.id, row.paper_id, asked, single, (row.id,), images, None, None)
    text = "\n".join(turn.value for turn in row.conversations)
    scale = asked_scale(text)
    answers = (_answered(row.chosen.value, scale), _answered(row.rejected.value, scale))
    ids = (row.chosen_id, row.rejected_id)
    return CheckedRow(key, line, row.id, row.group, text, answers, ids, images, row.rating_diff, row.checkmark_diff)


def _answered(completion: str, scale: Scale) -> Answered:
    text, rating = split_completion(completion, scale)
    return Answered(completion, text, None if rating is None else rescaled(rating, scale, COMMON_SCALE))


def _require_roles(found: list[str], expected: list[str]) -> None:
    """One exchange, after at most one system turn; LLaMA-Factory skips a row with any other number of turns."""
    if found != expected and found != ["system", *expected]:
        raise ValueError(f"turns are {found}, expected {expected}")


def _explain(detail: Any) -> str:
    return f"{written(detail['loc']) or 'row'}: {detail['msg']}"
