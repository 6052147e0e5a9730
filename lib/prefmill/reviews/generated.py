"""The demo's corpus: papers and reviews made by rule, with quality factors that are known and can be re-measured.

A small language on purpose: a word-level transformer of a million parameters learns it in seconds on two cores.
Reviewers differ in care, so reviews hold from none to all of the quality factors; ratings follow the paper's merit
and, with noise, the care taken; vague sentences make length an imperfect sign of quality.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefmill.core.errors import ConfigError
from prefmill.reviews import synthetic_text as phrases

# Chosen so that about 40 % of the papers are accepted and, on those, the two halves of a pair mostly agree.
ACCEPTANCE_MEAN_RATING = 5.6
_RATING_AT_AVERAGE = 5.3
_RATING_PER_MERIT = 1.2
_RATING_PER_FACTOR = 0.28
_RATING_NOISE = 1.2
_MEAN_FACTORS = 5.5
_CARE_SHAPE = (1.0, 1.15)  # a wide Beta: careless, ordinary and thorough reviewers are all common
_MIN_SENTENCES, _MAX_SENTENCES = 4, 12  # between the opening and the verdict, unless there are more factors

NUM_TITLES = (
    len(phrases.ADJECTIVES) * len(phrases.METHODS) * len(phrases.TOPICS) * len(phrases.DATA) * len(phrases.PARTS)
)
# Odd and near the golden section of the (power of two) number of titles: neighbours get unrelated titles, none twice.
_TITLE_STEP = int(NUM_TITLES * 0.6180339887) | 1


@dataclass(frozen=True)
class GeneratedPaper:
    """A paper before it is reviewed; `merit` is standard normal, `words` fills the templates."""

    paper_id: str
    title: str
    abstract: str
    text: str
    merit: float
    words: dict[str, str]


def generate(seed: int, num_papers: int) -> Iterator[dict[str, Any]]:
    """The reviews of papers 0 to `num_papers` - 1, as rows of the canonical JSONL form, a paper's rows together.

    Deterministic, and a longer corpus begins with the shorter one. Raises ConfigError above `NUM_TITLES` papers.
    """
    if not 0 < num_papers <= NUM_TITLES:
        raise ConfigError(
            "the generator cannot make that many papers", got=num_papers, expected=f"1 to {NUM_TITLES}",
            fix="lower num_papers",
        )  # fmt: skip
    for index in range(num_papers):
        yield from generate_paper(seed, index)


def generate_paper(seed: int, index: int) -> list[dict[str, Any]]:
    """The review rows of paper `index` (3 to 5), from (seed, index) alone: any slice can be made by itself."""
    # Python seeds from text by sha512 and not by hash(), so every process draws the same papers.
    rng = random.Random(f"{seed}/{index}")
    paper = _write_paper(rng, seed, index)
    reviews = [_review(rng, paper, number) for number in range(rng.choice((3, 4, 4, 5)))]
    decision = _decide(rng, [review["rating"] for review in reviews])
    shared = {
        "paper_id": paper.paper_id, "title": paper.title, "abstract": paper.abstract, "text": paper.text,
        "decision": decision, "venue": "Generated",
    }  # fmt: skip
    return [{**shared, **review} for review in reviews]


def quality_factors(text: str) -> dict[str, bool]:
    """Which quality factors `text` holds: a whole sentence of the factor's phrase bank, with any words in its gaps.

    Case and spaces before punctuation do not count, so that a word-level model's output is measured as it is.
    """
    plain = re.sub(r"\s+([.,?])", r"\1", " ".join(text.lower().split()))
    return {name: pattern.search(plain) is not None for name, pattern in _PATTERNS.items()}


def compose(rng: random.Random, words: dict[str, str], factors: Sequence[str], num_vague: int, rating: int) -> str:
    """A review's text: opening, one sentence for each of `factors` in the bank's order, vague ones between, verdict."""
    sentences = [rng.choice(phrases.FACTORS[name]) for name in phrases.FACTORS if name in factors]
    for sentence in rng.sample(phrases.VAGUE, num_vague):
        sentences.insert(rng.randint(0, len(sentences)), sentence)
    verdict = next(sentence for lowest, sentence in phrases.VERDICTS if rating >= lowest)
    template = " ".join([rng.choice(phrases.OPENINGS), *sentences, verdict])
    numbered = {**words, "number": str(rng.randint(1, 5))}
    return template % numbered


def _write_paper(rng: random.Random, seed: int, index: int) -> GeneratedPaper:
    merit = rng.gauss(0, 1)
    # Both factors are odd: no title comes twice, and every seed begins at another one.
    words = _title_words((index * _TITLE_STEP + seed * 7919) % NUM_TITLES)
    words["bench"] = rng.choice(phrases.BENCHMARKS)
    words["base"], words["other"] = rng.sample(phrases.BASELINES, 2)
    words["gain"] = phrases.GAINS[_level(merit + rng.gauss(0, 0.5), len(phrases.GAINS))]
    words["seeds"] = phrases.SEEDS[_level(merit + rng.gauss(0, 1), len(phrases.SEEDS))]
    words["code"] = phrases.CODE_STATES[_level(merit + rng.gauss(0, 1), len(phrases.CODE_STATES))]
    title = phrases.TITLE % words
    return GeneratedPaper(
        paper_id=f"g{seed}-{index:07d}",
        title=title[0].upper() + title[1:],
        abstract=rng.choice(phrases.ABSTRACTS) % words,
        text=rng.choice(phrases.TEXTS) % words,
        merit=merit,
        words=words,
    )


def _title_words(rank: int) -> dict[str, str]:
    """The words of title number `rank`: its digits in the mixed radix of the word lists."""
    words = {}
    for slot, choices in phrases.TITLE_SLOTS.items():
        rank, digit = divmod(rank, len(choices))
        words[slot] = choices[digit]
    return words


def _review(rng: random.Random, paper: GeneratedPaper, number: int) -> dict[str, Any]:
    factors = _draw_factors(rng)
    count = len(factors)
    num_vague = rng.randint(max(0, _MIN_SENTENCES - count), max(0, _MAX_SENTENCES - count))
    rating = _rate(rng, paper.merit, count)
    return {
        "review_id": f"{paper.paper_id}-r{number}",
        "review_text": compose(rng, paper.words, factors, num_vague, rating),
        "rating": rating,
        "confidence": 2 + _level((count - _MEAN_FACTORS) / 3 + rng.gauss(0, 1), 4),
        "sub_scores": {"soundness": 1 + _level(paper.merit + rng.gauss(0, 1), 4)},
    }


def _draw_factors(rng: random.Random) -> list[str]:
    care = rng.betavariate(*_CARE_SHAPE)
    return [name for name, rarity in phrases.RARITY.items() if rng.random() < care**rarity]


def _rate(rng: random.Random, merit: float, count: int) -> int:
    mean = _RATING_AT_AVERAGE + _RATING_PER_MERIT * merit + _RATING_PER_FACTOR * (count - _MEAN_FACTORS)
    return min(10, max(1, round(rng.gauss(mean, _RATING_NOISE))))


def _decide(rng: random.Random, ratings: Sequence[int]) -> str:
    if sum(ratings) / len(ratings) + rng.gauss(0, 0.3) >= ACCEPTANCE_MEAN_RATING:
        return "accepted"
    return "withdrawn" if rng.random() < 0.05 else "rejected"


def _level(value: float, num_levels: int) -> int:
    """`value`, about standard normal, as one of 0 .. `num_levels` - 1 of similar frequency."""
    return min(num_levels - 1, max(0, int((value + 1.5) / 3 * num_levels)))


def _pattern(templates: Sequence[str]) -> re.Pattern[str]:
    """What any of `templates` looks like with its gaps filled by any word."""
    # The gap `seeds` is filled with two words, such as "one seed".
    gaps = dict.fromkeys(phrases.SLOTS, r"\w+") | {"seeds": r"\w+ seeds?"}
    # re.escape has put a backslash before both brackets of a gap.
    filled = [re.sub(r"%\\?\((\w+)\\?\)s", lambda gap: gaps[gap[1]], re.escape(text.lower())) for text in templates]
    return re.compile("|".join(rf"(?<!\w){text}" for text in filled))


_PATTERNS = {name: _pattern(templates) for name, templates in phrases.FACTORS.items()}
