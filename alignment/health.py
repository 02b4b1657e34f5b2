"""Judge health: does a judge favour a place or a length, contradict itself, or fit another judge?

Everything comes from the stored one-order logits, so it costs no judge call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparring.alignment.judge_figures import different_texts, logit_figures
from sparring.alignment.rows import Judged, Prompt, Response
from sparring.launch import artifacts
from sparring.launch.errors import SparringError
from sparring.launch.report import Chart, Section, Series, line_chart
from sparring.launch.statistics import FloatArray
from sparring.launch.tables import aligned, cell

# A figure is reported when its whole interval is on the wrong side of its healthy value, and the
# figure itself at least this far away: what is significant in 20 000 prompts may still be trifling.
FIRST_PLACE = 0.02
"""Advantage of the first place, as a probability."""
LONGER_WINS = 0.05
"""Distance of the longer response's win rate from ½."""
CONSISTENT = 0.8
"""Least swap consistency."""
CYCLIC_TRIPLES = 0.1
"""Largest share of cyclic triples; pure noise has ¼."""
UNDECIDED = 0.5
"""Largest share of ties, and of identical pairs."""
AGREES = 0.6
"""Least agreement with a second judge; coins have ½."""
TEMPERATURE = 1.5
"""Largest factor, either way, between the logits of two judges."""
CALIBRATION_ERROR = 0.1
"""Largest expected calibration error."""


def health(
    judged: Sequence[Judged],
    responses: Iterable[Response],
    *,
    prompts: Iterable[Prompt] = (),
    second: Sequence[Judged] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Figures of a judged set of responses.

    Args:
        judged: logits of each prompt's K responses.
        responses: those responses, in any order.
        prompts: give the groups that the bootstrap draws; a prompt not among them is its own.
        second: another judge's rows of the same responses, in any order.
        seed, level: of the bootstrap.

    Returns:
        JSON-ready: the figures of `logit_figures`, the counts `prompts`, `responses` (K), `pairs`
        and `groups`, `length_unit`, `level`, and the sentences of `verdicts`.

    Raises:
        SparringError: nothing was judged, or responses or the second judge's rows do not fit.
    """
    if not judged:
        raise SparringError("there are no judged prompts to examine")
    rows = _in_order(judged, responses)
    logits = np.array([row.logits for row in judged], dtype=np.float64)
    group_of = {prompt.prompt_id: prompt.group for prompt in prompts}
    groups = [group_of.get(row.prompt_id, row.prompt_id) for row in judged]
    tokens = all(r.response_ids for row in rows for r in row)
    lengths = [[len(r.response_ids) if tokens else len(r.text) for r in row] for row in rows]
    count = logits.shape[1]
    figures: dict[str, Any] = {
        "prompts": len(judged),
        "responses": count,
        "pairs": len(judged) * count * (count - 1) // 2,
        "groups": len(set(groups)),
        "length_unit": "tokens" if tokens else "characters",
        "level": level,
    }
    if count > 1:
        figures |= logit_figures(
            logits,
            lengths,
            different_texts([[r.text for r in row] for row in rows]),
            groups,
            second_NKK=None if second is None else _second(judged, second),
            seed=seed,
            level=level,
        )
    return {**figures, "verdicts": verdicts(figures)}


def _in_order(judged: Sequence[Judged], responses: Iterable[Response]) -> list[list[Response]]:
    """The responses of each judged prompt, by k."""
    found: dict[str, list[Response]] = {}
    for response in responses:
        found.setdefault(response.prompt_id, []).append(response)
    sizes = {len(row.logits) for row in judged}
    if len(sizes) > 1:
        raise SparringError(f"prompts with {sorted(sizes)} judged responses; judge them with one k")
    for row in judged:
        given = len(found.get(row.prompt_id, ()))
        if given != len(row.logits):
            raise SparringError(
                f"prompt {row.prompt_id}: {len(row.logits)} responses were judged, but there are "
                f"{given}; give the responses that were judged, or judge these"
            )
    return [sorted(found[row.prompt_id], key=lambda r: r.k) for row in judged]


def _second(judged: Sequence[Judged], second: Sequence[Judged]) -> FloatArray:
    """The second judge's logits in the order of the first's."""
    by_prompt = {row.prompt_id: row.logits for row in second}
    missing = [row.prompt_id for row in judged if row.prompt_id not in by_prompt]
    if missing or len(second) != len(judged):
        raise SparringError(
            f"the second judge has {len(second)} prompts, the first {len(judged)}; "
            f"{len(missing)} are missing{f', such as {missing[0]!r}' if missing else ''}. "
            "Both must have judged the same responses"
        )
    odd = [row for row in judged if len(by_prompt[row.prompt_id]) != len(row.logits)]
    if odd:
        raise SparringError(
            f"prompt {odd[0].prompt_id}: {len(odd[0].logits)} responses by the first judge, "
            f"{len(by_prompt[odd[0].prompt_id])} by the second; both must have judged the same ones"
        )
    return np.array([by_prompt[row.prompt_id] for row in judged], dtype=np.float64)


def _beyond(value: Sequence[float] | None, healthy: float, by: float) -> int:
    """+1 or −1 where figure and interval are above or below the healthy value, and far; else 0."""
    if value is None or abs(value[0] - healthy) < by:
        return 0
    return 1 if value[1] > healthy else -1 if value[2] < healthy else 0


def verdicts(figures: Mapping[str, Any]) -> list[str]:
    """What is significantly wrong, in sentences; empty for a healthy judge.

    The thresholds are this module's constants. Tests are not corrected for their number, and a
    preference for length is an association: longer responses may well be better.
    """
    found = []

    def says(name: str) -> str:
        return cell(figures[name])

    side = _beyond(figures.get("first_place_advantage"), 0.0, FIRST_PLACE)
    if side:
        found.append(
            f"favours the {'first' if side > 0 else 'second'} place: the first one's advantage is "
            f"{says('first_place_advantage')} in probability, where an indifferent judge has 0"
        )
    if _beyond(figures.get("swap_consistency"), CONSISTENT, 0.0) < 0:
        found.append(
            f"contradicts itself: only {says('swap_consistency')} of its verdicts stay when the "
            "order is swapped"
        )
    side = _beyond(figures.get("longer_wins"), 0.5, LONGER_WINS)
    if side:
        found.append(
            f"favours {'longer' if side > 0 else 'shorter'} responses: the longer one wins "
            f"{says('longer_wins')} of pairs (an association; length and quality may go together)"
        )
    if _beyond(figures.get("cyclic_triples"), CYCLIC_TRIPLES, 0.0) > 0:
        found.append(
            f"is cyclic: {says('cyclic_triples')} of triples have i over j over k over i (coins: "
            "0.25)"
        )
    for name, what in (("tie_rate", "ties"), ("identical_rate", "are the same text twice")):
        if _beyond(figures.get(name), UNDECIDED, 0.0) > 0:
            found.append(f"has little to decide: {says(name)} of pairs {what}")
    return found + _against_second(figures)


def _against_second(figures: Mapping[str, Any]) -> list[str]:
    found = []
    if _beyond(figures.get("agreement"), AGREES, 0.0) < 0:
        found.append(
            f"hardly agrees with the second judge: {cell(figures['agreement'])} of verdicts "
            "(coins: 0.5)"
        )
    scale: Any = figures.get("temperature")
    # Two judges that contradict each other have no common temperature.
    comparable = scale is not None and scale[0] > 0
    if comparable and max(scale[0], 1 / scale[0]) >= TEMPERATURE and _beyond(scale, 1.0, 0.0):
        found.append(
            f"is {'sharper' if scale[0] < 1 else 'flatter'} than the second judge: its logits "
            f"fit after multiplication by {cell(scale)}"
        )
    if _beyond(figures.get("calibration_error"), CALIBRATION_ERROR, 0.0) > 0:
        found.append(
            f"is not calibrated to the second judge: expected error "
            f"{cell(figures['calibration_error'])}"
        )
    return found


# Figures with what a reader calls them, and the value of a healthy or an indifferent judge.
_LABELS = {
    "swap_consistency": ("same verdict when swapped", "1"),
    "first_place_advantage": ("first place's advantage", "0"),
    "first_place_offset": ("first place's offset (logits)", "0"),
    "tie_rate": ("ties", ""),
    "identical_rate": ("identical pairs", ""),
    "longer_wins": ("longer one wins", "0.5"),
    "length_slope": ("slope on length", "0"),
    "cyclic_triples": ("cyclic triples", "0 (coins 0.25)"),
    "cyclicity": ("cyclic share of logits", "0 (noise {noise:.2f})"),
    "agreement": ("agreement with second judge", "1 (coins 0.5)"),
    "kendall": ("Kendall's tau with second judge", "1 (coins 0)"),
    "temperature": ("temperature to second judge", "1"),
    "calibration_error": ("calibration error", "0"),
}


def _reference(name: str, figures: Mapping[str, Any]) -> str:
    return _LABELS[name][1].format(noise=1 - 2 / figures["responses"])


def health_text(figures: Mapping[str, Any]) -> str:
    """The figures of `health` as a table for a terminal, and the verdicts below it."""
    lines = [["judge health", "value", "reference"]]
    lines += [
        [label, cell(figures[name]), _reference(name, figures)]
        for name, (label, _) in _LABELS.items()
        if name in figures
    ]
    found = [f"! {sentence}" for sentence in figures["verdicts"]]
    counts = (
        f"{figures['prompts']} prompts in {figures['groups']} groups, {figures['responses']} "
        f"responses each, {figures['pairs']} pairs; {round(100 * figures['level'])} % intervals; "
        f"length in {figures['length_unit']}"
    )
    return "\n".join([*aligned(lines), *(found or ["nothing significant is wrong"]), counts])


def judged_text(folder: Path) -> str:
    """What `sparring judge` shows of its result: the table of the figure `health`."""
    artifact = artifacts.read(folder)
    figures = artifact.figures.get("health") if artifact else None
    return health_text(figures) if figures else f"{folder} holds no judge health"


def health_sections(by_name: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Sections of a report: the figures side by side, what is wrong, and reliability.

    Args:
        by_name: figures of `health` by what the column is called, such as "iteration 1".

    Returns:
        Nothing when there are no figures.
    """
    if not by_name:
        return []
    some = next(iter(by_name.values()))
    shown = [name for name in _LABELS if any(name in f for f in by_name.values())]
    rows = [
        [_LABELS[name][0], *(cell(f.get(name)) for f in by_name.values()), _reference(name, some)]
        for name in shown
    ]
    table = Section(
        "Judge health",
        note="The judge of the training pairs on the responses it compared, from its logits in "
        f"both orders; {round(100 * some['level'])} % bootstrap intervals. A preference for length "
        "is an association, not proof of a bias.",
        columns=["figure", *by_name, "reference"],
        rows=rows,
        charts=[
            _reliability(f["reliability"], name)
            for name, f in by_name.items()
            if f.get("reliability")
        ],
    )
    wrong = [[name, sentence] for name, f in by_name.items() for sentence in f["verdicts"]]
    if not wrong:
        wrong = [["all", "nothing significant is wrong"]]
    verdict = Section(
        "Judge verdicts", columns=["responses of", "the judge"], rows=wrong, text=True
    )
    return [table, verdict]


def _reliability(bins: Sequence[Mapping[str, float]], name: str) -> Chart:
    first = [row["first"] for row in bins]
    series = [
        Series("second judge", first, [row["second"] for row in bins]),
        Series("calibrated", [0.0, 1.0], [0.0, 1.0]),
    ]
    return line_chart(
        series,
        x_label="P by the judge",
        y_label="mean P by the second judge",
        caption=f"reliability, {name}",
    )
