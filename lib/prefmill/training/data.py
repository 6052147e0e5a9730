"""What is learnt from, as families encode it: preference pairs gathered by prompt, and chats to fine-tune on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from prefmill.core.errors import InputError, PipelineError
from prefmill.core.stage import Task
from prefmill.distributed.devices import rank
from prefmill.store.jsonl import read_jsonl
from prefmill.training.bad_rows import BadRows, report_dropped
from prefmill.training.config import TrainingConfig

_log = logging.getLogger(__name__)
Answer = str | Mapping[str, Any]  # text alone, or a turn that also has `reasoning_content` or `tool_calls`
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two answers to it; pairs of one `group` share the prompt.

    `images` are paths, one for each `<image>` in the messages; `tools` are offered to the model.
    """

    pair_id: str
    group: str
    messages: list[dict[str, Any]]
    chosen: Answer
    rejected: Answer
    images: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()


# Prompt, answer and tools as the token ids of prompt and completion.
Encode = Callable[[Sequence[Mapping[str, Any]], Answer, Sequence[Any]], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Pair:
    """A preference between two responses of a group, by their places in it."""

    pair_id: str
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt, of every distinct response to it, and the pairs among them; `images` of the prompt."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: list[Pair]
    images: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompt with each response."""
        return [len(self.prompt) + len(response) for response in self.responses]

    def tokens_of(self, pair: Pair) -> int:
        """Tokens of the prompt with the longer side of `pair`."""
        return len(self.prompt) + max(len(self.responses[pair.chosen]), len(self.responses[pair.rejected]))

    def up_to(self, max_length: int) -> Group:
        """The pairs whose sides both fit into `max_length` with the prompt, and the responses that they compare."""
        pairs = [pair for pair in self.pairs if self.tokens_of(pair) <= max_length]
        places = sorted({place for pair in pairs for place in (pair.chosen, pair.rejected)})
        moved = {place: index for index, place in enumerate(places)}
        kept = [Pair(pair.pair_id, moved[pair.chosen], moved[pair.rejected]) for pair in pairs]
        return Group(self.prompt, [self.responses[place] for place in places], kept, self.images)


def read_pairs(path: Path) -> Iterator[PreferencePair]:
    """The pairs of a dataset that build_datasets wrote; raises InputError naming the row that is not one."""
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            messages = list(map(_turn, row["conversations"]))
            images = tuple(str(path.parent.parent / name) for name in row.get("images", ()))
            answers = (_answer(row["chosen"]), _answer(row["rejected"]))
            yield PreferencePair(row["id"], row["group"], messages, *answers, images, tuple(row.get("tools", ())))
        except (KeyError, TypeError) as error:
            raise InputError(
                "not a preference row", where=f"{path}:{number}", got=f"missing or malformed: {error}",
                expected="id, group, conversations, chosen, rejected", fix="run validate_datasets on this dataset",
            ) from None  # fmt: skip


def _turn(said: Mapping[str, Any]) -> dict[str, Any]:
    more = {key: value for key, value in said.items() if key not in ("from", "value")}
    return {"role": _ROLES[said["from"]], "content": said["value"], **more}


def _answer(said: Mapping[str, Any]) -> Answer:
    return str(said["value"]) if said.keys() == {"from", "value"} else _turn(said)


def rows_of_input(task: Task, names: str, has_own: bool, own_key: str) -> tuple[Path, Path | None] | None:
    """The rows to train on and to validate on, `names`_train and _val of the input `datasets`; None for own ones.

    Raises PipelineError where there are both, an input and the configuration's own dataset, or neither.
    """
    datasets = task.optional_input("datasets")
    if (datasets is None) != has_own:
        raise PipelineError(
            "no dataset to train on" if datasets is None else "two datasets to train on",
            where=task.key, fix=f"give either inputs.datasets=FOLDER or {own_key}",
        )  # fmt: skip
    if datasets is None:
        if not names.endswith("_clean"):
            _log.warning("modality: no effect, it is of the input `datasets`, and %s is given", own_key.split("=")[0])
        return None
    val = datasets.path / f"{names}_val" / "data.jsonl"
    return datasets.file(f"{names}_train/data.jsonl"), val if val.is_file() and val.stat().st_size else None


def swap_by_coin(pairs: Iterable[PreferencePair], seed: int) -> Iterator[PreferencePair]:
    """Pairs with chosen and rejected swapped by a fair coin keyed by (seed, id): a control that holds no preference."""
    for pair in pairs:
        # Not hash(): Python salts that anew in every process.
        heads = hashlib.sha256(f"{seed}:{pair.pair_id}".encode()).digest()[0] % 2
        chosen, rejected = (pair.rejected, pair.chosen) if heads else (pair.chosen, pair.rejected)
        yield replace(pair, chosen=chosen, rejected=rejected)


def group_by_prompt(pairs: Iterable[PreferencePair], encode: Encode, bad: BadRows | None = None) -> list[Group]:
    """Pairs as groups, in the order their groups first appear; a response that is in several pairs is kept once.

    Two pairs of one group with different prompts make two groups. Raises InputError for a pair whose sides are equal,
    or that cannot be encoded, unless such pairs are taken by `bad`.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    places: dict[tuple[Any, ...], dict[tuple[int, ...], int]] = {}
    for pair, prompt, chosen, rejected in _encoded(pairs, encode, bad or BadRows()):
        # Images too: the same words about another picture are another prompt.
        key = (pair.group, tuple(prompt), pair.images)
        group = groups.setdefault(key, Group(prompt, [], [], pair.images))
        known = places.setdefault(key, {})
        sides = [_place(group, known, response) for response in (chosen, rejected)]
        group.pairs.append(Pair(pair.pair_id, *sides))
    return list(groups.values())


def _encoded(
    pairs: Iterable[PreferencePair], encode: Encode, bad: BadRows
) -> Iterator[tuple[PreferencePair, list[int], list[int], list[int]]]:
    """Pairs with the token ids of their prompt and both sides."""
    for pair in pairs:
        with bad.row(f"pair {pair.pair_id}"):
            prompt, chosen = encode(pair.messages, pair.chosen, pair.tools)
            _, rejected = encode(pair.messages, pair.rejected, pair.tools)
            if chosen == rejected:  # a template that trims, or a tokenizer that composes letters, makes them so
                raise InputError("chosen and rejected are the same tokens", fix="leave the pair out")
            yield pair, prompt, chosen, rejected


def _place(group: Group, known: dict[tuple[int, ...], int], response: list[int]) -> int:
    key = tuple(response)
    if key not in known:
        known[key] = len(group.responses)
        group.responses.append(response)
    return known[key]


EncodedT = TypeVar("EncodedT")
RowT = TypeVar("RowT")


def tokenising(rows: Iterable[RowT], path: Path) -> Iterable[RowT]:
    """`rows` of `path` as they come, counted in the log of rank 0."""
    counted: Iterable[RowT] = tqdm(rows, desc=f"tokenising {path.parent.name}", unit=" rows", disable=rank() != 0)
    return counted


def encoded_chats(
    path: Path,
    encode: Callable[[Mapping[str, Any], list[str]], tuple[EncodedT, int]],
    config: TrainingConfig,
    task: Task,
    sees_images: bool,
) -> list[EncodedT]:
    """The rows of prefmill's own file at `path`; `encode` takes a row and its images' files and counts its tokens.

    Rows over max_length and rows at fault are listed in the logs and left out, or refused, as `config` says. Raises
    InputError for a row with images where the model is shown none.
    """
    kept, dropped, bad = [], [], BadRows.of(config, task)
    for row in tokenising(read_jsonl(path), path):
        images = [str(path.parent.parent / name) for name in row.get("images", ())]
        if images and not sees_images:
            raise no_images(f"{path}, row {row['id']}", images[0])
        with bad.row(f"{path.parent.name}, row {row['id']}"):
            encoded, num_tokens = encode(row, images)
            if num_tokens > config.max_length:
                dropped.append({"id": row["id"], "file": path.parent.name, "num_tokens": num_tokens})
            else:
                kept.append(encoded)
    bad.tell(len(kept) + len(dropped))
    report_dropped(task, dropped, len(kept), config)
    return kept


def no_images(where: str, image: str) -> InputError:
    """The refusal of a row with an image by a model that reads text alone."""
    return InputError(
        "this model cannot be shown images", where=where, got=image,
        fix="start from a vision-language model such as Qwen2.5-VL, or train on rows without images (modality=clean "
        "of build_datasets' datasets)",
    )  # fmt: skip
