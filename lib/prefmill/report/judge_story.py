"""What was found of a judge, in sentences: the stage prints them, and the report opens with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prefmill.checklist.judge_gate import in_words, warnings
from prefmill.core.figures import figure, with_interval

Found = Mapping[str, Any]


def tell_quality(quality: Found) -> list[str]:
    """The sentences on a `quality.json`, most important first."""
    return [sentence for judge in quality["judges"] for sentence in _judge(judge)] + [
        *_people(quality.get("people")),
        *_between(quality["between"]),
        *_calibration(quality["calibration"]),
    ]


def strongest(probes: Found) -> tuple[str, Found] | None:
    """The injection that moves the mean P(yes) most, either way; None where none was measured."""
    measured = {name: found for name, found in probes["injections"].items() if found is not None}
    if not measured:
        return None
    # By P(yes), which moves before any answer turns over.
    name = max(measured, key=lambda key: abs(measured[key]["p_yes"]["value"]))
    return name, measured[name]


def _judge(judge: Found) -> Iterator[str]:
    who = f"{judge['name']} ({judge['engine']})"
    if (answers := judge.get("answers")) is not None:
        yield f"{who}: {in_words(answers)}; its P(yes) varies by {answers['spread']:.2f} (standard deviation)."
        for warning in warnings(answers, judge["num_items"]):
            yield f"{who}: {warning}."
    if (people := judge["labels"]) is not None:
        yield (
            f"{who} agrees with people at {_kappa(people)}, F1 {with_interval(people['f1'])}, "
            f"over {people['num_answers']} labels of {people['num_papers']} papers."
        )
    if (length := judge["length"]["score"]) is not None:
        yield f"{who}: score and length of a review correlate at {with_interval(length)} (Spearman)."
    if (error := judge["length"]["error"]) is not None:
        yield f"{who}: its error and the length of a review correlate at {with_interval(error)}."
    if (probes := judge["probes"]) is not None:
        yield from _probes(who, probes)


def _people(people: Found | None) -> Iterator[str]:
    if people is not None:
        alpha = people["alpha"]
        # What no judge can be asked to exceed.
        agreed = f"alpha {with_interval(alpha)}" if alpha else "an undefined alpha (one and the same answer throughout)"
        yield (
            f"The {people['num_raters']} people who labelled agree among themselves at {agreed}, where "
            f"{people['num_shared']} questions have two answers or more; {people['num_ties']} ties count for neither."
        )


def _probes(who: str, probes: Found) -> Iterator[str]:
    if (repeat := probes["repeat"]) is not None:
        # Each item has a prompt of its own, so their order cannot bias: this checks that, and repetition.
        most = abs(repeat["max_answer"])
        yield f"{who}: asked again with its items in reverse order, no P(yes) moves by more than {most:.4f}."
    if (worded := probes["paraphrases"]) is not None:
        yield f"{who}: an item and its paraphrase are answered alike at {_kappa(worded)}."
    if (position := probes["position"]) is not None:
        yield (
            f"{who}: P(yes) where the evidence stands first, less where it stands last: "
            f"{with_interval(position['p_yes'], '+.3f')}; {position['flips']:.1%} of answers differ."
        )
    if (padding := probes["padding"]) is not None:
        yield f"{who}: twice the words, none of which say anything: score {_moved(padding)}."
    if (found := strongest(probes)) is not None:
        yield f"{who}: {_injected(*found, probes)}."
    if probes["num_failed"]:
        yield f"{who}: {probes['num_failed']} of {probes['num_asked']} changed reviews could not be asked about."


def _injected(name: str, moved: Found, probes: Found) -> str:
    if all(found is None or not found["max_answer"] for found in probes["injections"].values()):
        return f"none of {len(probes['injections'])} injected instructions moves any answer"
    control = probes["control"]
    beside = "" if control is None else f"; a neutral line of that length: score {_moved(control)}"
    most = f"by {figure(moved['max_score'], '+g')} at most and {moved['flips']:.1%} of answers turned"
    return f"of the injected instructions '{name.replace('_', ' ')}' moves most: score {_moved(moved)}, {most}{beside}"


def _kappa(found: Found) -> str:
    kappa = found["kappa"]
    return f"kappa {with_interval(kappa)}" if kappa else "an undefined kappa (one and the same answer throughout)"


def _moved(found: Found) -> str:
    score, p_yes = (with_interval(found[name], form) for name, form in (("score", "+.2f"), ("p_yes", "+.3f")))
    return f"{score}, mean P(yes) {p_yes}"


def _between(between: Found | None) -> Iterator[str]:
    if between is not None:
        differing = " and ".join(between["differ_in"]) or "nothing but the run"
        yield (
            f"The two judges (differing in {differing}) agree at {_kappa(between)}; P(yes) is "
            f"{between['mean_gap']:.4f} apart on average and {between['max_gap']:.4f} at most; "
            f"{between['num_flips']} of {between['num_answers']} answers differ."
        )


def _calibration(fitted: Found | None) -> Iterator[str]:
    if fitted is not None:
        # Judged on other papers: on the labels it was fitted on every temperature looks like a help.
        helps = "helps" if fitted["nll_after"] < fitted["nll_before"] else "does not help"
        yield (
            f"A temperature of {fitted['temperature']:.3f} fits {fitted['num_labels']} dev labels; on papers it was "
            f"not fitted on it {helps}: negative log-likelihood {fitted['nll_before']:.3f} to "
            f"{fitted['nll_after']:.3f}, calibration error {fitted['ece_before']:.3f} to {fitted['ece_after']:.3f}."
        )
