# SPDX-License-Identifier: Apache-2.0
"""An evaluation as people and programs read it: the score, how sure it is, each task, the worst answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.report import human_bytes, peak_rss
from .likelihood_judge import LikelihoodJudge
from .metrics import Unit
from .runner import Judge, Score, Scored

_WORST = 10
_TEXT_CHARS = 120  # of an answer in a table
_PERFECT: Mapping[Unit, float] = {"fraction": 1.0, "points": 100.0, "perplexity": 1.0, "nats": 0.0}
_DIGITS = {"perplexity": 4, "nats": 6}  # behind the point
_FIGURES = {  # of a KL divergence, in its table
    "kld_median": "median", "kld_p99": "99 %", "kld_max": "maximum", "same_top": "same most likely token",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """What was found out."""

    judge: Judge | LikelihoodJudge
    job: Mapping[str, Any]  # what was asked for, all that the answers depend on
    rows: Sequence[Scored]  # in the order of the data

    def to_object(self) -> dict[str, Any]:
        """For JSON. All that differs between two runs of one job is under "timings"."""
        metric = self.judge.metric
        total = self.judge.score(self.rows)
        tasks = {task: self.judge.score(rows) for task, rows in self._by_task().items()}
        return {
            "metric": metric.name,
            "score": total.score,
            "ci95": list(total.ci95),
            "items": total.items,
            **self.judge.details(self.rows),
            metric.name.replace("-", "_"): total.score,
            "unit": metric.unit,
            "normalizer": self.judge.normalizer,
            "scorer": metric.signature(),
            "model": self.job["model"],
            "recipe": self.job["recipe"],
            "cut_short": sum(row.answer.finish_reason == "length" for row in self.rows),
            "tasks": [{"task": task, **_score(found)} for task, found in tasks.items()],
            "worst": [_worst(row) for row in self._worst()],
            "job": dict(self.job),
            "timings": self._timings(),
        }

    def _by_task(self) -> dict[str, list[Scored]]:
        """In the order of first appearance."""
        found: dict[str, list[Scored]] = {}
        for row in self.rows:
            found.setdefault(row.item.task, []).append(row)
        return found

    def _worst(self) -> list[Scored]:
        """Those that are not perfect, worst first."""
        low = self.judge.metric.best == "low"
        unit = self.judge.metric.unit
        perfect = 0.0 if low and unit == "fraction" else _PERFECT[unit]
        # A perfect BLEU is the exponential of a sum of logarithms: 100 within rounding.
        wrong = [row for row in self.rows if abs(row.score - perfect) > 1e-9]
        return sorted(wrong, key=lambda row: -row.score if low else row.score)[:_WORST]

    def _timings(self) -> dict[str, Any]:
        took = [row.answer.took for row in self.rows]
        written, written_ms = sum(t.predicted_n for t in took), sum(t.predicted_ms for t in took)
        read, read_ms = sum(t.prompt_n for t in took), sum(t.prompt_ms for t in took)
        encode_ms = sum(t.encode_ms for t in took)
        return {
            "seconds": round((encode_ms + read_ms + written_ms) / 1e3, 3),
            "encode_seconds": round(encode_ms / 1e3, 3),
            "prompt_tokens_per_second": round(1e3 * read / read_ms, 2) if read_ms else None,
            "tokens_per_second": round(1e3 * written / written_ms, 2) if written_ms else None,
            "peak_rss_bytes": peak_rss(),
        }


def _score(found: Score) -> dict[str, Any]:
    return {"score": found.score, "ci95": list(found.ci95), "items": found.items}


def _worst(row: Scored) -> dict[str, Any]:
    return {
        "id": row.item.id,
        "task": row.item.task,
        "score": row.score,
        "hypothesis": row.answer.hypothesis,
        "reference": row.item.reference,
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """The scores of a report as a Markdown table: all items, then each task if there are several."""
    lines = ["| metric | score | ci95 | items |", "|---|---|---|---|"]
    rows = [(found["metric"], found)]
    if len(found["tasks"]) > 1:
        rows += [(f"… {_cell(one['task'] or 'without a task')}", one) for one in found["tasks"]]
    for name, one in rows:
        low, high = (_amount(x, found["unit"]) for x in one["ci95"])
        lines.append(
            f"| {name} | {_amount(one['score'], found['unit'])} | {low} to {high} | {one['items']} |"
        )
    note: list[str] = []
    if found["ci95"][0] == found["ci95"][1]:
        note = ["", "All items alike: the bootstrap cannot tell how far off the score may be."]
    for key, name in _FIGURES.items():
        if key in found:
            unit, ci95 = ("fraction", found["same_top_ci95"]) if key == "same_top" else (found["unit"], [])
            interval = " to ".join(_amount(x, unit) for x in ci95)
            lines.append(f"| {name} | {_amount(found[key], unit)} | {interval} | |")
    return lines + note


def markdown(found: Mapping[str, Any]) -> str:
    """A report as a Markdown page."""
    job, timings = found["job"], found["timings"]
    facts = [
        ("model", found["model"]),
        ("recipe", found["recipe"]),
        ("data", f"{job['data']}, SHA-256 {job['data_sha256'][:16]}…"),
        ("normalizer", found["normalizer"]),
        ("scored by", found["scorer"] or "equality"),
        ("answers cut at the most tokens", found["cut_short"]),
        ("tokens per second", _or_dash(timings["tokens_per_second"])),
        ("seconds of work", timings["seconds"]),
        ("peak RSS", "–" if timings["peak_rss_bytes"] is None else human_bytes(timings["peak_rss_bytes"])),
    ]
    lines = [f"# {_cell(found['metric'])} of {_cell(found['model'])}", "", *table(found)]
    lines += [
        "",
        "The interval is the 95 % one of a percentile bootstrap over items.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts]
    if found["worst"]:
        lines += ["", "## Worst", "", "| item | task | score | said | expected |", "|---|---|---|---|---|"]
        lines += [_worst_line(one, found["unit"]) for one in found["worst"]]
    return "\n".join(lines) + "\n"


def _worst_line(one: Mapping[str, Any], unit: str) -> str:
    cells: Iterable[object] = (
        one["id"], one["task"], _amount(one["score"], unit), one["hypothesis"], one["reference"],
    )  # fmt: skip
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _amount(value: float, unit: str) -> str:
    if unit == "fraction":
        return f"{100 * value:.2f} %"
    return f"{value:.{_DIGITS.get(unit, 2)}f}"


def _or_dash(value: object) -> object:
    return "–" if value is None else value


def _cell(value: object) -> str:
    """Text that stays in its cell, and is no markup: what a model says is anything."""
    text = " ".join(str(value).split())
    text = text if len(text) <= _TEXT_CHARS else text[:_TEXT_CHARS] + "…"
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(f"\\{c}" if c in r"\`*_[]|#<>" else c for c in text)
