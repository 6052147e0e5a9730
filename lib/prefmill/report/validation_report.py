"""What validation found, as JSON, as a Markdown page and as the table of an error message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prefmill.core.figures import bounds, columns
from prefmill.datasets.findings import CHECKS, Finding, Findings
from prefmill.datasets.length_bias import LengthBias
from prefmill.datasets.validate import Validation
from prefmill.reviews.scale import moments

_QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


def describe(validation: Validation) -> dict[str, Any]:
    """Everything found, as JSON with rounded numbers."""
    findings = validation.findings
    return {
        "errors": findings.total("error"),
        "warnings": findings.total("warning"),
        "checks": {check: _check(findings, check) for check in CHECKS},
        "findings": [finding._asdict() for finding in findings.listed],
        "datasets": {
            folder: {
                "rows": found.num_rows,
                "papers": found.num_papers,
                "columns": {name: summarise(values) for name, values in sorted(found.columns.items())},
                "ratings": {f"{rating:g}": count for rating, count in sorted(found.ratings().items())},
            }
            for folder, found in validation.distributions.items()
        },
        "length_bias": {folder: _bias(bias) for folder, bias in validation.length_bias.items()},
        "tokens": {"max_length": validation.max_length, "longest": validation.longest},
    }


def summarise(values: Counter[float]) -> dict[str, float]:
    """Mean, standard deviation and quantiles of values given as value to count."""
    mean, deviation, total = moments(values)
    ordered, seen = sorted(values), 0
    quantiles: dict[str, float] = {}
    for value in ordered:
        # Quantiles from counts: a list of all values would grow with the corpus.
        seen += values[value]
        for name, share in _QUANTILES.items():
            if name not in quantiles and seen >= share * total:
                quantiles[name] = value
    return {"mean": round(mean, 4), "sd": round(deviation, 4), **quantiles}


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page to read."""
    parts = [
        "# Validation of the preference datasets",
        f"{report['errors']:,} errors, {report['warnings']:,} warnings.",
        "## Checks",
        _table(["check", "result", "what it makes sure of"], _check_rows(report["checks"])),
    ]
    if report["findings"]:
        rows = [[f["severity"], f["check"], f["where"], f["what"]] for f in report["findings"]]
        parts += ["## Findings (the first of each check)", _table(["severity", "check", "where", "what"], rows)]
    parts += ["## Datasets", _table(["dataset", "rows", "papers", "ratings"], _dataset_rows(report["datasets"]))]
    for folder, dataset in report["datasets"].items():
        columns = [[name, *values.values()] for name, values in dataset["columns"].items()]
        parts += [f"### {folder}", _table(["value", "mean", "sd", *_QUANTILES], columns)]
    if report["length_bias"]:
        heads = ["dataset", "pairs", "longer is chosen", "95% interval", "AUC"]
        parts += ["## Length bias", _table(heads, _bias_rows(report["length_bias"]))]
    if report["tokens"]["longest"]:
        longest = [[folder, f"{tokens:,}"] for folder, tokens in report["tokens"]["longest"].items()]
        parts += [
            f"## Tokens (context {report['tokens']['max_length']:,})",
            _table(["dataset", "longest row"], longest),
        ]
    return "\n\n".join(parts) + "\n"


def error_table(findings: Findings) -> str:
    """The errors as an aligned text table, with how many more there are of each check."""
    errors = [finding for finding in findings.listed if finding.severity == "error"]
    errors.sort(key=lambda finding: list(CHECKS).index(finding.check))
    lines = columns([["check", "where", "what"], *([found.check, found.where, found.what] for found in errors)])
    return "\n".join([*(f"    {line}" for line in lines), *_left_out(findings, errors)])


def _left_out(findings: Findings, listed: Sequence[Finding]) -> Iterator[str]:
    # Only the first findings of each check are listed; the counts are of all.
    shown = Counter(finding.check for finding in listed)
    for check in CHECKS:
        rest = findings.counts[check, "error"] - shown[check]
        if rest:
            yield f"... and {rest:,} more of {check}"


def _check(findings: Findings, check: str) -> dict[str, Any]:
    errors, warnings = findings.counts[check, "error"], findings.counts[check, "warning"]
    note = findings.not_run.get(check)
    result = "failed" if errors else "warned" if warnings else "not run" if note else "passed"
    return {"what": CHECKS[check], "result": result, "errors": errors, "warnings": warnings, "note": note}


def _check_rows(checks: dict[str, Any]) -> Iterator[list[str]]:
    for name, check in checks.items():
        counts = [f"{check[key]:,} {key}" for key in ("errors", "warnings") if check[key]]
        yield [name, ", ".join([check["result"], *counts, *([check["note"]] if check["note"] else [])]), check["what"]]


def _dataset_rows(datasets: dict[str, Any]) -> Iterator[list[str]]:
    for folder, dataset in datasets.items():
        ratings = ", ".join(f"{rating}: {count:,}" for rating, count in dataset["ratings"].items())
        yield [folder, f"{dataset['rows']:,}", f"{dataset['papers']:,}", ratings]


def _bias(bias: LengthBias) -> dict[str, Any]:
    found = bias.accuracy()
    return {
        "pairs": bias.num_pairs,
        "longer_is_chosen": round(found.value, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "auc": round(bias.auc(), 4),
    }


def _bias_rows(length_bias: dict[str, Any]) -> Iterator[list[str]]:
    for folder, found in length_bias.items():
        share = f"{found['longer_is_chosen']:.1%}"
        yield [folder, f"{found['pairs']:,}", share, bounds(found, ".1%"), f"{found['auc']:.3f}"]


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # A bar or a line break would end the cell.
    return text.replace("|", "\\|").replace("\n", " ")
