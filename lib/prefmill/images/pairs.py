"""From votes to pairs.jsonl: which image of a pair is preferred, how surely on each dimension, and in which split."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from prefmill.core.config import StrictConfig
from prefmill.core.image_rows import DIMENSIONS, HEADS, Dimension, ImagePair, ImageSplit
from prefmill.images.collection import GoodImage, Quarantine
from prefmill.images.votes import PairKey, Votes

if TYPE_CHECKING:
    from prefmill.images.davidson import Comparison, Strengths

Labels = Literal["votes", "bradley_terry"]
_DIGITS = 6  # of a probability: what lies behind depends on the machine's arithmetic


class ImageSplitConfig(StrictConfig):
    """Shares of the prompts, summing to 1; which split a prompt is in follows from its text and `seed`."""

    train: float = Field(0.8, gt=0, le=1)
    val: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    seed: int = 0

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + val + test is {total:g}; make it 1")
        return self


def fit_strengths(votes: Votes, images: Mapping[str, GoodImage]) -> dict[Dimension, Strengths]:
    """Bradley-Terry strengths with ties, for each dimension by itself."""
    from prefmill.images.davidson import Comparison, fit

    fits: dict[Dimension, Strengths] = {}
    for dimension in DIMENSIONS:
        groups: dict[str, list[Comparison]] = defaultdict(list)
        # Sorted, so that sums of floats are taken in one order and the fit has the same bytes each time.
        for (first, second), answers in sorted(votes.of[dimension].items()):
            counts = Counter(answers.values())
            item = Comparison(first, second, counts[1.0], counts[0.0], counts[0.5])
            groups[images[first].source.prompt_id].append(item)
        fits[dimension] = fit([groups[name] for name in sorted(groups)])
    return fits


def choose_pairs(
    votes: Votes, images: Mapping[str, GoodImage], fits: Mapping[Dimension, Strengths], labels: Labels,
    min_agreement: float, quarantine: Quarantine,
) -> tuple[list[ImagePair], int]:  # fmt: skip
    """A pair for every two images of which voters prefer one overall, weighted 1 / pairs of its prompt; and the ties.

    Overall is the vote on `overall`, or the mean over the other dimensions where nobody was asked. Pairs of equal
    pictures, and those whose voters agree less than `min_agreement`, are set aside. All are in split `train` still.
    """
    found: list[ImagePair] = []
    num_ties = 0
    for pair in votes.pairs():
        shares = {name: votes.share(pair, name) for name in DIMENSIONS}
        overall = _overall(shares)
        # Pixels, not files: a preference between two equal pictures is noise, whatever format each has.
        if images[pair[0]].pixels_sha256 == images[pair[1]].pixels_sha256:
            quarantine.add("pair", _pair_id(pair), "the same image twice")
        elif overall is None or (overall == 0.5 and not _disputed(votes, pair)):
            num_ties += 1
        elif max(overall, 1 - overall) < min_agreement:
            quarantine.add("pair", _pair_id(pair), "raters contradict each other", share=round(overall, _DIGITS))
        else:
            winner, loser = pair if overall > 0.5 else pair[::-1]
            if labels == "bradley_terry":
                shares = {name: fits[name].preference(*pair) if shares[name] is not None else None for name in shares}
            sides = {name: _oriented(share, winner == pair[0]) for name, share in shares.items()}
            if labels == "bradley_terry" and (_overall(dict(sides)) or 0.0) <= 0.5:
                quarantine.add("pair", _pair_id(pair), "the prompt's other votes say otherwise")
            else:
                found.append(_row(_pair_id(pair), images[winner], images[loser], sides))
    # A prompt with n images has up to n (n - 1) / 2 pairs: without weights it would count for more than others.
    per_prompt = Counter(row["prompt_id"] for row in found)
    return [{**row, "weight": round(1 / per_prompt[row["prompt_id"]], _DIGITS)} for row in found], num_ties


def split_pairs(
    pairs: Sequence[ImagePair], images: Mapping[str, GoodImage], config: ImageSplitConfig
) -> list[ImagePair]:
    """The pairs with their splits: prompts of the same words, or with an image in common, are in the same one."""
    digests = {image.file: image.pixels_sha256 for image in images.values()}
    owners = _Owners()
    for pair in pairs:
        for name in (pair["preferred"], pair["rejected"]):
            owners.join(same_words(pair["prompt"]), f"image {digests[name]}")
    return [{**pair, "split": _split_of(owners.find(same_words(pair["prompt"])), config)} for pair in pairs]


class _Owners:
    """Groups of names that belong together; a group goes by its first name in the alphabet's order, prompts last."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def find(self, name: str) -> str:
        while (parent := self._parents.get(name, name)) != name:
            # Path halving: chains stay short, however many prompts share an image.
            self._parents[name] = self._parents.get(parent, parent)
            name = parent
        return name

    def join(self, first: str, second: str) -> None:
        # The larger stays: a prompt, not an image, so that a split follows from the prompt's text where it can.
        kept, given = sorted((self.find(first), self.find(second)), reverse=True)
        self._parents[given] = kept


def same_words(prompt: str) -> str:
    """What two spellings of a prompt have in common, as a name in `_Owners`."""
    return f"prompt {' '.join(prompt.casefold().split())}"


def _split_of(name: str, config: ImageSplitConfig) -> ImageSplit:
    # By hash, not by shuffling: more prompts rated later leave those they share no image with where they are.
    digest = hashlib.sha256(f"{config.seed}/{name}".encode()).digest()
    position = int.from_bytes(digest[:8]) / 2**64
    # test comes first: changing the share of val or train moves no prompt into it or out of it.
    if position < config.test:
        return "test"
    return "val" if position < config.test + config.val else "train"


def _overall(shares: Mapping[Dimension, float | None]) -> float | None:
    asked = [share for name in HEADS if (share := shares[name]) is not None]
    stated = shares["overall"]
    return stated if stated is not None else sum(asked) / len(asked) if asked else None


def _disputed(votes: Votes, pair: PairKey) -> bool:
    """Whether one half of the voters prefers each side, which is more than a tie."""
    answers: Iterable[float] = votes.of["overall"].get(pair, {}).values()
    return any(answer != 0.5 for answer in answers)


def _oriented(share: float | None, winner_is_first: bool) -> float | None:
    return None if share is None else round(share if winner_is_first else 1 - share, _DIGITS)


def _pair_id(pair: PairKey) -> str:
    """`<prompt_id>:<image>:<image>`."""
    prompt_id, first = pair[0].split("/")
    return f"{prompt_id}:{first}:{pair[1].split('/')[1]}"


def _row(pair_id: str, winner: GoodImage, loser: GoodImage, labels: Mapping[Dimension, float | None]) -> ImagePair:
    source = winner.source
    return ImagePair(
        pair_id=pair_id, prompt_id=source.prompt_id, prompt=source.prompt, preferred=winner.file, rejected=loser.file,
        labels={str(name): share for name, share in labels.items()}, weight=1.0, split="train",
    )  # fmt: skip
