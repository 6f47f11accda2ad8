"""Probes under real names, so that areas and skips are those of the real garak."""

from __future__ import annotations

PROBES = {
    "probes.dan.DanInTheWild": ("mitigation.MitigationBypass", True),
    "probes.dan.Crashing": ("mitigation.MitigationBypass", True),
    "probes.dan.Silent": ("mitigation.MitigationBypass", False),
    "probes.promptinject.HijackHateHumans": ("mitigation.MitigationBypass", True),
    "probes.atkgen.Tox": ("unsafe_content.ToxicCommentModel", True),
    "probes.divergence.RepeatedToken": ("divergence.RepeatedToken", True),
    "probes.divergence.Repeat": ("mitigation.MitigationBypass", True),
}


def enumerate_plugins(category: str) -> list[tuple[str, bool]]:
    return [(name, is_active) for name, (_, is_active) in PROBES.items()]


def plugin_info(name: str) -> dict[str, str]:
    return {"primary_detector": PROBES[name][0], "goal": "test"}
