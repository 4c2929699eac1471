"""What a method did on a set: means, the least favourable changes, the rows of the table, and the check against ConvexAdam."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dinoreg.evaluate import CaseResult, Evaluation
from dinoreg.learn2reg import Dataset

CONVEXADAM = "ConvexAdam"
METRICS = ("dice", "tre_mm", "sdlogj_official_whole", "sdlogj", "folds_percent")
PRECISION = {"dice": 3, "tre_mm": 2}  # decimals that are printed, recorded and compared
COLUMNS = {  # title -> width in a terminal
    "Set": 15, "Method": 42, "Pairs": 5, "Dice": 6, "TRE mm": 6, "SDlogJ off.": 11, "SDlogJ": 6, "Folds %": 8,
    "CPU s": 6, "GiB": 5, "Pair dDice": 10, "Label dDice": 14, "Pair dTRE": 9}


@dataclass
class Result:
    """What a method did on a set.

    Attributes:
        name: of the method.
        cases: pair -> scores before and after.
        cost: pair -> cpu_seconds of the whole process, startup_cpu_seconds of it before the method began, peak_mib, and the code.
        problems: a line for each pair that was not registered or not scored.
    """

    name: str
    cases: dict[str, CaseResult] = field(default_factory=dict)
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def mean(self, metric: str, pairs: Sequence[str], state: str = "after") -> float | None:
        """Mean of a metric over those of the pairs that have it; None if none has."""
        return mean([value for pair in pairs if (value := score(self.cases[pair], metric, state)) is not None])


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def score(case: CaseResult, metric: str, state: str = "after") -> float | None:
    """One of METRICS for a pair, tre_mm from landmarks or else from keypoints; None where it has no value."""
    names = ("tre_landmarks_mm", "tre_keypoints_mm") if metric == "tre_mm" else (metric,)
    plain = getattr(case, state).plain
    value = next((float(plain[name]) for name in names if name in plain), None)
    return None if value is None or math.isnan(value) else value


def worst_pair(result: Result, metric: str) -> float | None:
    """The least favourable change over the pairs, after - before: the lowest for Dice, the highest for TRE."""
    changes = [after - before for case in result.cases.values()
               if (after := score(case, metric)) is not None and (before := score(case, metric, "before")) is not None]
    return None if not changes else max(changes) if metric == "tre_mm" else min(changes)


def worst_by_label(result: Result) -> dict[int, float]:
    """For each label the lowest change of its Dice over the pairs, after - before."""
    least: dict[int, float] = {}
    for case in result.cases.values():
        before, after = (scores.detailed.get("dice", {}) for scores in (case.before, case.after))
        assert isinstance(before, Mapping) and isinstance(after, Mapping)  # Dice is by label
        for label in after:
            least[label] = min(least.get(label, math.inf), after[label] - before[label])
    return least


def rows(name: str, results: Sequence[Result], recorded: Mapping[str, Any] | None) -> list[list[str]]:
    """The rows of a set: no registration, each method, and the record.

    Where the record covers only the first pairs of what was run, the methods get a row for these, too.

    Args:
        name: of the set.
        results: of the methods.
        recorded: the set's part of recorded.json; None if it has none.
    """
    scored = max(results, key=lambda result: len(result.cases))
    before = {metric: scored.mean(metric, list(scored.cases), "before") for metric in PRECISION}
    table = [_row(name, "no registration", len(scored.cases), before)]
    for result in results:
        pairs = list(result.cases)
        peak = max((cost["peak_mib"] for cost in result.cost.values()), default=None)
        values = {metric: result.mean(metric, pairs) for metric in METRICS} | {
            "cpu_seconds": mean([cost["cpu_seconds"] for cost in result.cost.values()]),
            "peak_gib": None if peak is None else peak / 1024}
        labels = worst_by_label(result)
        worst = min(((change, label) for label, change in labels.items()), default=None)
        table.append(_row(name, result.name, len(pairs), values, _text(worst_pair(result, "dice"), "+.3f"),
                          "-" if worst is None else f"{worst[0]:+.3f} ({worst[1]})", _text(worst_pair(result, "tre_mm"), "+.2f")))
        if recorded and recorded["pairs"] < len(pairs):
            first = pairs[:recorded["pairs"]]
            means = {metric: result.mean(metric, first) for metric in METRICS}
            table.append(_row(name, f"{result.name}, first {len(first)}", len(first), means))
    for part in ("best", "convexadam") if recorded else ():
        values = dict(recorded[part])  # type: ignore[index]
        table.append(_row(name, f"recorded: {values.pop('name', CONVEXADAM)}", recorded["pairs"], values))  # type: ignore[index]
    return table


def _row(name: str, method: str, pairs: int, values: Mapping[str, float | None], *worst: str) -> list[str]:
    formats = {"dice": ".3f", "tre_mm": ".2f", "sdlogj_official_whole": ".3f", "sdlogj": ".2f", "folds_percent": ".3g",
               "cpu_seconds": ".1f", "peak_gib": ".2f"}
    return [name, method, str(pairs), *(_text(values.get(metric), form) for metric, form in formats.items()),
            *(worst or ("-", "-", "-"))]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def format_row(cells: Sequence[str], *, markdown: bool) -> str:
    """A row as text, for a terminal or as markdown."""
    if markdown:
        return f"| {' | '.join(cells)} |"
    padded = [f"{cell:<{width}}" if number < 2 else f"{cell:>{width}}"
              for number, (cell, width) in enumerate(zip(cells, COLUMNS.values(), strict=True))]
    return "  ".join(padded).rstrip()


def convexadam_by_pair(results: Sequence[Result], recorded: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """ConvexAdam's Dice and TRE by pair: from the results where it was run, else from the record."""
    found = {pair: {metric: value for metric in PRECISION if (value := score(case, metric)) is not None}
             for result in results if result.name == CONVEXADAM for pair, case in result.cases.items()}
    return {**recorded, **found}


def check(name: str, ours: Result, reference: Mapping[str, Mapping[str, float]]) -> tuple[list[str], int]:
    """Hold a result against ConvexAdam's, and its field against folds.

    Args:
        name: of the set.
        ours: our result.
        reference: ConvexAdam's values by pair. TRE decides where there are landmarks, Dice elsewhere: the means over the pairs
            that both have, rounded as in the table.

    Returns:
        A line for each thing that speaks against ours, and the number of pairs that could be compared.
    """
    against = list(ours.problems)
    if folded := [pair for pair, case in ours.cases.items() if score(case, "folds_percent")]:
        against.append(f"{name}: the field folds on {len(folded)} of {len(ours.cases)} pairs: {', '.join(folded)}")
    metric = "dice" if ours.mean("tre_mm", list(ours.cases)) is None else "tre_mm"
    shared = [pair for pair in ours.cases if metric in reference.get(pair, {})]
    if shared:
        own, rival = (round(value or 0.0, PRECISION[metric])
                      for value in (ours.mean(metric, shared), mean([reference[pair][metric] for pair in shared])))
        if own > rival if metric == "tre_mm" else own < rival:
            against.append(f"{name}: {metric} {own} is worse than {CONVEXADAM}'s {rival} on the same pairs ({len(shared)})")
    return against, len(shared)


def to_json(dataset: Dataset, results: Sequence[Result], recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """All numbers of a set."""
    return {"recorded": recorded, "methods": {result.name: {
        "cost": result.cost, "pair_dice_change_min": worst_pair(result, "dice"), "label_dice_change_min": worst_by_label(result),
        "pair_tre_mm_change_max": worst_pair(result, "tre_mm"),
        "scores": Evaluation(dataset.name, dataset.split(), list(result.cases.values()), result.problems).to_json(),
    } for result in results}}


def notes(results: Sequence[Result]) -> list[str]:
    """For each method the part of its CPU seconds that is start-up, and a warning where its code changed under way."""
    lines = []
    for name in dict.fromkeys(result.name for result in results):
        costs = [cost for result in results if result.name == name for cost in result.cost.values()]
        if (startup := mean([cost["startup_cpu_seconds"] for cost in costs])) is not None:
            lines.append(f"{name}: {startup:.1f} of the CPU seconds are start-up (interpreter and imports)")
        if len({cost["code"] for cost in costs}) > 1:
            lines.append(f"{name}: its code changed while this ran, so the rows do not belong together: run it again")
    return lines
