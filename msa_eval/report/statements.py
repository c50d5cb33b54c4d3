"""What an evaluation says, in sentences that can be quoted: made from evidence alone."""

from __future__ import annotations

import tomllib

from msa_eval.evidence.results import Results
from msa_eval.report import frames
from msa_eval.report.style import NAMES

NOT_AUDITED = "not audited"
VERDICTS = {
    "sound": "no sign was found that these numbers should not be believed",
    "suspect": "there are signs that these numbers may be too high",
    "unreliable": "these numbers should not be believed",
    "incomplete": "something failed, so what was not broken is not known to be robust",
    NOT_AUDITED: "nothing says whether these numbers should be believed",
}


def statements(results: Results) -> list[str]:
    """The worst case, what it is compared with, what it rests on, and whether it can be believed.

    Args:
        results: of an evaluation.

    Returns:
        Four sentences or so; the one about the FC head is left out where there is none.
    """
    sentences = [_worst_case(results)]
    if "fc" in frames.targets_of(results):
        sentences.append(_compared(results))
    return [*sentences, _rests_on(results), _believed(results)]


def _worst_case(results: Results) -> str:
    run, threat = results.run, tomllib.loads(results.run["protocol"]["text"]).get("threat", {})
    protocol = f"{run['protocol']['name']} v{run['protocol']['version']}"
    changed = ", modified" if run["protocol"]["modified"] else ""
    ball = f"{threat.get('norm')}, \N{GREEK SMALL LETTER EPSILON} = {threat.get('eps')}"
    clean = frames.number(results, "defense", frames.contexts_of(results)[0], "clean")["value"]
    return (
        f"Under protocol {protocol}{changed} ({ball}), "
        f"the defence classifies in the worst case {_numbers(results, 'defense')} of {run['data']['n']} samples "
        f"correctly (95 % intervals in brackets); on clean batches it is {100 * clean:.1f} %."
    )


def _compared(results: Results) -> str:
    return f"The {NAMES['fc']} that it is built on keeps {_numbers(results, 'fc')}."


def _rests_on(results: Results) -> str:
    attacks = results.attacks[results.attacks["target"] == "defense"]
    context = frames.contexts_of(results)[0]
    made = attacks[attacks["context"] == context]
    passes = made["forwards"].sum() / results.run["data"]["n"]
    paper = frames.number(results, "defense", context, "paper")["value"]
    return (
        f"In {context} this rests on {len(made)} attack runs and {passes:.0f} forward passes per sample, with every "
        f"point judged in its batch by the real defence in float32; the final points of the strongest run alone would "
        f"have left {100 * paper:.1f} %."
    )


def _believed(results: Results) -> str:
    verdict = results.run.get("verdicts", {}).get("defense", {}).get("verdict", results.run.get("verdict", NOT_AUDITED))
    rows = results.audit.to_dict(orient="records")
    fired = {row["sign"]: row["severity"] for row in rows if row["target"] == "defense" and row["fired"]}
    signs = [sign for sign, severity in fired.items() if severity != "note" and verdict != "incomplete"]
    why = f" ({', '.join(signs)})" if signs else ""
    only = ", and they hold only for the evaluated batches" if "batch_dependence" in fired else ""
    return f"The verdict is {verdict}: {VERDICTS.get(verdict, VERDICTS[NOT_AUDITED])}{why}{only}."


def _numbers(results: Results, target: str) -> str:
    """The worst case in every context, each with its interval; once where all are one number."""
    found = {}
    for context in frames.contexts_of(results):
        row = frames.number(results, target, context, "worst_case")
        found[context] = f"{100 * row['value']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{number} in {context}" for context, number in found.items())
