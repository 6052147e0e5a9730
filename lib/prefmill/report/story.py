"""The comparison in sentences: whether training helped, by how much, how sure that is, and what to doubt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefmill.core.figures import figure, with_interval
from prefmill.evaluation.metrics import MEASURES, Measure
from prefmill.evaluation.rows import HUMAN

Verdict = Literal["helped", "mixed", "hurt", "unclear", "single"]
Compared = Mapping[str, Any]  # one modality of comparison.json
SCORE, FACTORS, WORDS = "checkmark_score", "num_factors", "num_words"
FEW_PAPERS = 30
LENGTH_GIVES_AWAY = 0.65  # share of pairs from which on length alone tells the preferred review too well
LENGTH_CHANGE, SHARE_OF_CONCERN = 0.1, 0.05
TOLERATED = {"distinct_2": 0.05, "repeated_4grams": 0.05}  # wording varies with what is written: less is no harm
NAMED_ITEMS = 4  # of those that never fire; the section on the checklist has all


_PARENTHESES = "Parentheses hold {:.0%} intervals"
_FINDING = (
    "{}: on held-out papers, the {{candidate}} model's reviews satisfy {} checklist items than the {{baseline}} model's"
)


@dataclass(frozen=True)
class Story:
    """One modality in sentences; `doubts` runs from the most to the least serious and is never empty.

    `harms` are the measures that got worse beyond chance, each with its value before and after, and its meaning.
    """

    modality: str
    verdict: Verdict
    helped: str
    how_much: str
    how_sure: str
    doubts: tuple[str, ...]
    harms: tuple[str, ...] = ()


def tell(
    compared: Compared, evaluations: Sequence[Mapping[str, Any]], confidence: float, of_data: Sequence[str] = ()
) -> Story:
    """The story of one modality; `evaluations` are its metrics.json, `of_data` what is to doubt about the data."""
    pair = main_pair(compared)
    if pair is None:
        return _story_of_one(compared, evaluations, confidence)
    worse = worsened(pair, confidence)
    verdict = judge(pair["measures"][SCORE], confidence)
    # Harm first: a higher score alone is no yes.
    verdict = "mixed" if verdict == "helped" and worse else verdict
    names = {"candidate": pair["candidate"], "baseline": pair["baseline"], "worse": _listed(worse)}
    helped = {
        "helped": _FINDING.format("Yes", "more") + ".",
        "mixed": _FINDING.format("In part", "more") + ", but are worse in {worse}.",
        "hurt": _FINDING.format("No", "fewer") + ".",
        "unclear": "Not shown: reviews by {candidate} and by {baseline} do not differ beyond chance.",
    }[verdict]  # fmt: skip
    return Story(
        modality=compared["modality"],
        verdict=verdict,
        helped=helped.format(**names),
        how_much=_how_much(compared),
        how_sure=_how_sure(pair, confidence),
        doubts=(*_doubts(compared, pair, confidence), *of_data, *_general_doubts(compared, evaluations)),
        harms=tuple(_harm(compared, pair, measure) for measure in worse),
    )


def worsened(pair: Mapping[str, Any], confidence: float) -> list[Measure]:
    """The measures in which the candidate is worse than the baseline beyond chance, the checklist score aside.

    Their p-values are not corrected for the number of measures: a harm is told rather too often than too seldom.
    """
    tested = [(measure, pair["measures"].get(measure.name)) for measure in MEASURES if measure.name != SCORE]
    return [measure for measure, found in tested if found and _is_worse(measure, found, confidence)]


def _is_worse(measure: Measure, found: Mapping[str, Any], confidence: float) -> bool:
    towards_worse = -found["value"] if measure.better == "higher" else found["value"]
    beyond_chance = found["p_value"] < 1 - confidence and towards_worse > TOLERATED.get(measure.name, 0)
    return measure.better is not None and beyond_chance


def _harm(compared: Compared, pair: Mapping[str, Any], measure: Measure) -> str:
    values = [_measure(compared, pair[side], measure.name) for side in ("baseline", "candidate")]
    before, after = ("none" if value is None else measure.show(value) for value in values)
    return f"{measure.label}: {before} → {after} ({measure.definition.partition(';')[0]})"


def _listed(measures: Sequence[Measure]) -> str:
    """`rating error, words and repeats`, as a sentence has it."""
    *others, last = [measure.label.lower() for measure in measures] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def main_pair(compared: Compared) -> Mapping[str, Any] | None:
    """The comparison that answers the question: the last trained model against the first; None with one model."""
    models = trained_models(compared)
    wanted = (models[0], models[-1]) if models else ("", "")
    return next((pair for pair in compared["pairs"] if (pair["baseline"], pair["candidate"]) == wanted), None)


def trained_models(compared: Compared) -> list[str]:
    """The models that are compared with each other, in their order: all but the human reviews."""
    return [item["model"] for item in compared["models"] if item["model"] != HUMAN]


def judge(difference: Mapping[str, Any], confidence: float) -> Verdict:
    """What a corrected difference in a measure where higher is better says."""
    if difference["p_holm"] >= 1 - confidence:
        return "unclear"
    return "helped" if difference["value"] > 0 else "hurt"


def p_text(p_value: float) -> str:
    """A p-value as one writes it."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _story_of_one(compared: Compared, evaluations: Sequence[Mapping[str, Any]], confidence: float) -> Story:
    shown = compared["models"][-1]
    score = shown["measures"][SCORE]
    return Story(
        modality=compared["modality"],
        verdict="single",
        helped=f"Nothing to compare: only {shown['model']} was evaluated.",
        how_much=f"Its mean checklist score is {with_interval(score)} of at most {compared['max_score']:g}.",
        how_sure=f"{_PARENTHESES.format(confidence)}, on {compared['num_papers']} papers.",
        doubts=tuple(_general_doubts(compared, evaluations)),
    )


def _how_much(compared: Compared) -> str:
    scores = [(item["model"], item["measures"][SCORE]["value"]) for item in compared["models"]]
    path = ", ".join(f"{value:.2f} ({model})" for model, value in scores if model != HUMAN)
    human = next((f" Reviews by people score {value:.2f}." for model, value in scores if model == HUMAN), "")
    return f"The mean checklist score goes {path}, of at most {compared['max_score']:g}.{human}"


def _how_sure(pair: Mapping[str, Any], confidence: float) -> str:
    score, wins = pair["measures"][SCORE], pair["win_rate"]
    parts = [
        f"{pair['candidate']} − {pair['baseline']} = {with_interval(score, '+.2f')}, "
        f"{p_text(score['p_holm'])} after Holm's correction, over "
        f"{score['num_papers']} papers; on the same paper its review scores higher {wins['value']:.0%} of the time."
    ]
    if (factors := pair["measures"].get(FACTORS)) is not None:
        verdict = judge(factors, confidence)
        # Training aims at the checklist; the factors, which it does not know, tell learning from pleasing it.
        agrees = "agree" if verdict == judge(score, confidence) else "do not confirm it"
        parts.append(
            f"The generator's own quality factors, which the checklist does not know, {agrees}: "
            f"{with_interval(factors, '+.2f')}."
        )
    return " ".join([*parts, f"{_PARENTHESES.format(confidence)}."])


def data_doubts(validation: Mapping[str, Any] | None, is_control: bool, other_checklist: bool) -> list[str]:
    """What the training data give reason to doubt; `validation` is the report.json of validate_datasets."""
    doubts = ["The preference labels of this run were shuffled: it is a control."] if is_control else []
    if other_checklist:
        doubts.append("The training data were scored with another checklist than these reviews.")
    for folder, bias in (validation or {}).get("length_bias", {}).items():
        if bias["low"] > LENGTH_GIVES_AWAY:
            share = f"{bias['longer_is_chosen']:.0%}"
            doubts.append(f"In {share} of the pairs of {folder} the preferred review is the longer one.")
    return doubts


def agreement_doubts(compared: Compared, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a second engine gives reason to doubt: that the models' order is the first one's opinion."""
    pair = main_pair(compared)
    second = {metrics["model"]: metrics["agreement"] for metrics in evaluations if metrics.get("agreement")}
    if pair is None or pair["baseline"] not in second or pair["candidate"] not in second:
        return []
    before, after = second[pair["baseline"]], second[pair["candidate"]]
    # The direction alone is asked for: the table shows how far the engines agree.
    if (after["mean_score"] - before["mean_score"]) * pair["measures"][SCORE]["value"] > 0:
        return []
    return [
        f"The second engine, {after['engine']}, does not see this difference: its mean score goes from "
        f"{before['mean_score']:.2f} ({pair['baseline']}) to {after['mean_score']:.2f} ({pair['candidate']})."
    ]


def _doubts(compared: Compared, pair: Mapping[str, Any], confidence: float) -> Iterator[str]:
    yield from _length_doubt(compared, pair, confidence)
    yield from _step_doubts(compared, confidence)
    yield from _people_doubt(compared, pair["candidate"])
    yield from _side_effects(compared, pair["candidate"])
    yield from _silent_items(compared)


def _length_doubt(compared: Compared, pair: Mapping[str, Any], confidence: float) -> Iterator[str]:
    words, equal = pair["measures"][WORDS], pair["at_equal_length"]
    before = _measure(compared, pair["baseline"], WORDS)
    if before and abs(words["value"]) / before >= LENGTH_CHANGE and words["p_value"] < 1 - confidence and equal:
        more = "longer" if words["value"] > 0 else "shorter"
        yield (
            f"{pair['candidate']} writes {abs(words['value']) / before:.0%} {more} reviews than {pair['baseline']}; at "
            f"equal length the difference in score would be {with_interval(equal, '+.2f')}."
        )


def _step_doubts(compared: Compared, confidence: float) -> Iterator[str]:
    models = trained_models(compared)
    steps = {(pair["baseline"], pair["candidate"]): pair for pair in compared["pairs"]}
    # With two models the only step is the question itself.
    if len(models) < 3:
        return
    for before, after in itertools.pairwise(models):
        score = steps[before, after]["measures"][SCORE]
        if judge(score, confidence) != "helped":
            finding = "lowers the score" if judge(score, confidence) == "hurt" else "shows no effect of its own"
            gain = figure(score["value"], "+.2f")
            yield f"The step from {before} to {after} {finding}: {gain}, {p_text(score['p_holm'])}."


def _side_effects(compared: Compared, name: str) -> Iterator[str]:
    model = next(item for item in compared["models"] if item["model"] == name)
    concerns = (
        ("truncated", "{share:.0%} of {name}'s reviews were cut off at the token limit."),
        ("empty", "{share:.0%} of {name}'s outputs are empty; they count with a score of 0."),
    )
    for measure, sentence in concerns:
        share = _measure(compared, name, measure)
        if share and share >= (SHARE_OF_CONCERN if measure == "truncated" else 0):
            yield sentence.format(share=share, name=name)
    unrated = 1 - (_measure(compared, name, "has_rating") or 0.0)
    if unrated >= SHARE_OF_CONCERN:
        yield f"{unrated:.0%} of {name}'s reviews give no rating; they count as wrong recommendations."
    if model["repeated_reviews"] >= SHARE_OF_CONCERN:
        yield f"{model['repeated_reviews']:.0%} of {name}'s reviews repeat another one word for word."


def _people_doubt(compared: Compared, name: str) -> Iterator[str]:
    """A model far above people: their reviews are what it was to learn, so the checklist may be what it games."""
    scores = {item["model"]: item["measures"][SCORE] for item in compared["models"]}
    human, model = scores.get(HUMAN), scores[name]
    # Intervals that do not touch, as people's reviews are no side of a tested pair.
    if human and model["low"] > human["high"]:
        yield (
            f"{name}'s reviews score {model['value']:.2f} where people's score {human['value']:.2f}: above people, a "
            "higher score may be the checklist learnt by heart. Read the examples."
        )


def _silent_items(compared: Compared) -> Iterator[str]:
    """Items that tell nothing apart, as no review has them."""
    shares: dict[str, float] = {}
    for model in compared["models"]:
        for item in model["items"]:
            shares[item["id"]] = max(item["value"], shares.get(item["id"], 0.0))
    silent = [name for name, share in shares.items() if share == 0]
    if silent:
        more = f" and {len(silent) - NAMED_ITEMS} more" if len(silent) > NAMED_ITEMS else ""
        named = ", ".join(silent[:NAMED_ITEMS])
        yield f"{len(silent)} of {len(shares)} items are met by no review: {named}{more}."


def _general_doubts(compared: Compared, evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if compared["num_papers"] < FEW_PAPERS:
        yield f"There are only {compared['num_papers']} papers: intervals are wide and their tails rough."
    left_out = max(item["num_papers"] for item in evaluations) - compared["num_papers"]
    if left_out:
        yield f"{left_out} papers were not reviewed by every model and are left out of the comparison."
    untraced = [item["model"] for item in evaluations if item["training"] and item["training"]["num_missing"]]
    if untraced:
        yield f"What {', '.join(untraced)} learned from could not be traced in full: some inputs have no manifest here."
    if compared["engine"].startswith("lexical"):
        yield "The lexical engine looks for words, not for meaning: text written to please it would score well."
    yield "A checklist score is a proxy: it says that a review has the parts of a good one, not that they are right."


def _measure(compared: Compared, model: str, name: str) -> float | None:
    found = next(item for item in compared["models"] if item["model"] == model)
    value = found["measures"].get(name)
    return float(value["value"]) if value else None
