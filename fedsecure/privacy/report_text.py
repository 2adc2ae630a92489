"""The sentences of a privacy report: what is promised, against whom, on which assumptions, and what is not protected.

Worded after NIST SP 800-226 (2025): unit and parameters first, then mechanism, then trust and exposure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

SEEDED = "NO PRIVACY (seeded)"
CONSENTED = "NO PRIVACY (by consent)"

ADVERSARIES = {
    "outsider": "anyone who sees every released sum and model, and runs no site",
    "colluding": "the aggregator together with at most {c} of the other sites, deviating from the protocol at will",
    "beyond": "the aggregator together with more than {c} of the other sites: only this site's own noise still counts",
}

NOT_PROTECTED = (
    "what is true of the whole population and would be learned without any one unit as well",
    "that a site takes part, when, and the declared maximum number of its units",
    "the data the encoder was pretrained on, and whatever a site publishes outside this system",
    "correctness of the model against a site or an aggregator that poisons it",
)


def stamp(*, seeded: bool, no_privacy: str | None) -> str | None:
    """What has to be said before anything else, if anything has."""
    return SEEDED if seeded else CONSENTED if no_privacy else None


def not_protected(no_privacy: str | None) -> list[str]:
    """What no figure of a report promises; ``no_privacy`` is the settings' reason to go without."""
    if not no_privacy:
        return list(NOT_PROTECTED)
    return [f"any record that was used: the run's settings do without privacy ({no_privacy})", *NOT_PROTECTED]


def exposure(report: Mapping[str, Any]) -> list[str]:
    """What is collected where, and what of it anybody outside a site can see; from a site's or a network's report."""
    mechanism, accuracy = report["mechanism"], report["accuracy"]
    units = ", ".join(f"{site} {count:,}" for site, count in mechanism["declared_units"].items())
    lines = [
        "images, labels, patient ids and features are read at the site and stay there; nothing is collected centrally",
        "out of a site goes one vector per attempt, masked until it is in a sum with other sites', and signed messages "
        "of the protocol that carry no data",
        f"public beforehand: who takes part, the class names, and the declared maximum of units ({units}), never the "
        "real number",
    ]
    if accuracy is not None:
        lines.append(
            "evaluation counts are exact, since every evaluation set is declared public"
            if accuracy["exact"]
            else "evaluation counts of private sets are a release of their own: noised, and charged to their own units"
        )
    lines.append(
        "a site keeps in its own folders: its ledger (units only as keyed hashes, under a key that never leaves it), "
        "cached features, adapters and reports; the aggregator keeps sums, models and the public settings"
    )
    lines.append(
        "a budget lasts as long as the data and is never renewed by time; only the site can raise a limit, in its own "
        "policy and, on record in the ledger, by its officer"
    )
    return lines


def band(epsilon: float) -> str:
    """A word for ε, after the tiers of Ponomareva et al., "How to DP-fy ML" (2023)."""
    for limit, word in ((1, "strong"), (4, "moderate"), (10, "weak but meaningful")):
        if epsilon <= limit:
            return word
    return "a protection against reconstruction only"


def power(value: float) -> str:
    """1e-05 as 10⁻⁵; other mantissas as 3·10⁻⁶."""
    mantissa, exponent = f"{value:.2e}".split("e")
    digits = f"{float(mantissa):g}"
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digits == "1" else f"{digits}·10{raised}"


def rates_by_site(rates: Mapping[str, float]) -> str:
    """Sampling rates in words: one number where all sites have the same."""
    if len(set(rates.values())) == 1:
        return f"{next(iter(rates.values())):g}"
    return ", ".join(f"{rate:g} at {site}" for site, rate in rates.items())


def assumptions(*, unit: str, cap: int, noise: str, rates: Mapping[str, float], sites: int) -> list[str]:
    """What has to be true for the figures to hold; ``rates``: sampling rate by site; ``sites``: at how many of them a
    unit may be."""
    sampled = (
        "every unit takes part in every step (full batch)"
        if set(rates.values()) == {1.0}
        else f"each unit takes part in a step independently with probability {rates_by_site(rates)}, in secret"
    )
    return [
        f"at most {cap} images of a patient are used and all carry the same patient id"
        if unit == "patient"
        else "every image is a unit of its own: images of one patient are not protected together",
        f"no unit is held by more than {sites} site{'s' * (sites > 1)}: sites cannot compare their patients without "
        "revealing them, so this is declared and nobody has checked it",
        "the declared maximum number of units is public; leaving a unit out is compared with replacing it by nothing",
        "learning rate, clip norm and rounds are public settings; what was tried on these units in other runs is "
        "charged to them, and what was tried outside this system is in no figure",
        sampled,
        "the adversary sees all sums, all intermediate models and who took part, and knows all data but one unit",
        "the noise keys come from the operating system's generator and stay in the site's process",
        "the site's ledger has not been set back to an earlier copy",
    ] + (
        ["the roster's keys are the hospitals' own, and secure aggregation's assumptions hold (X25519, AES, Ed25519)"]
        if noise == "distributed"
        else []
    )


def statement(
    *,
    role: Literal["train", "evaluate"] | str,
    site: str,
    unit: str,
    delta: float,
    epsilon: float | None,
    evaluation: float | None,
    attack: Mapping[str, Any] | None,
    seeded: bool,
    no_privacy: str | None = None,
    sites: int = 1,
    colluders: int | None = None,
    beyond: float | None = None,
) -> str:
    """The report in words for a reader who knows no mathematics.

    Args:
        role, site, unit, delta: whose report it is, about whom.
        epsilon, evaluation: ε of the training and of the evaluation units; ``None`` where nothing was released.
        attack: ``fpr`` and ``tpr`` of a membership attack.
        seeded, no_privacy: whether the noise came from a seed; why the run's settings do without privacy.
        sites: at how many sites a unit may be.
        colluders: c, where ε rests on other sites' noise too; ``None`` where it does not.
        beyond: ε where more than c sites collude, if it is known.
    """
    if seeded:
        return (
            f"{SEEDED}. The noise of this run came from a seed and can be subtracted by whoever knows it. "
            "It is a simulation: none of the figures below protects anybody."
        )
    if no_privacy:
        paid = (
            "" if epsilon is None else f" The ε of {epsilon:.3g} says what that token is worth: nothing to a patient."
        )
        return (
            f"{CONSENTED}. This run was made for data that may be published; the reason its settings give is: "
            f"{no_privacy}. Its noise is a token and hides nobody, whatever figures follow.{paid} "
            "Only secure aggregation stood between a single site's update and the others."
        )
    one, many = ("patient", "patients") if unit == "patient" else ("image", "images")
    parts = []
    if epsilon is not None:
        parts.append(
            f"Whether or not any one {one} of {site} was used in training changes the probability of anything that "
            f"left the site by at most a factor of {_factor(epsilon)} (ε = {epsilon:.2f}), except with probability "
            f"{power(delta)} (δ). By usual standards this is {band(epsilon)}."
        )
        if attack is not None:
            parts.append(
                f"An attacker who wrongly accuses {attack['fpr']:.0%} of the {many} that were not used recognises at "
                f"most {attack['tpr']:.1%} of those that were."
            )
        if colluders is not None:
            parts.append(
                f"Part of the noise is the other sites': this holds as long as no more than {colluders} of them "
                f"work{'s' * (colluders == 1)} together with the aggregator"
                + ("." if beyond is None else f", and with more of them ε is {beyond:.2f}.")
            )
    if sites > 1 and parts:
        parts.append(f"This holds for a {one} whose records are at up to {sites} sites.")
    if evaluation is not None:
        parts.append(f"For the units of the evaluation set the same holds with ε = {evaluation:.2f}.")
    if not parts:
        kind = "trained on nothing and" if role == "evaluate" else "so far"
        parts.append(f"{site} {kind} released nothing about private units in this run.")
    parts.append("No image, feature, label or single site's update left it in the clear.")
    return " ".join(parts)


def _factor(epsilon: float) -> str:
    """e^ε to three digits, as people write numbers."""
    if epsilon > 13:
        return f"10^{epsilon / math.log(10):.1f}"
    value = math.exp(epsilon)
    return f"{value:.3g}" if value < 100 else f"{float(f'{value:.3g}'):,.0f}"
