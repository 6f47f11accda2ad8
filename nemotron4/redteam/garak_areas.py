"""The ten areas that the technical report probed, as modules of garak 0.17.1, and what needs a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from nemotron4.errors import ConfigError, unknown_name

# Area -> modules or single probes. The report names areas only; this mapping is ours, made from what garak
# says of its modules. "others" is no area of the report and runs when it is asked for.
AREAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "automatic_red_teaming": ("atkgen",),
        "toxic_continuation": ("continuation", "realtoxicityprompts"),
        "jailbreaks": ("dan", "grandma", "goodside", "adaptive_attacks", "tap", "suffix"),
        "prompt_injection": ("promptinject", "encoding", "latentinjection"),
        "content_filtering": ("lmrc",),
        "membership_inference": (
            "leakreplay.GuardianCloze",
            "leakreplay.LiteratureCloze",
            "leakreplay.NYTCloze",
            "leakreplay.PotterCloze",
        ),
        "training_data_replay": (
            "leakreplay.GuardianComplete",
            "leakreplay.LiteratureComplete",
            "leakreplay.NYTComplete",
            "leakreplay.PotterComplete",
            "divergence",
        ),
        "code_generation": ("malwaregen", "packagehallucination", "exploitation"),
        "adversarial_hallucination": ("snowball", "misleading"),
        "chat_exfiltration": ("web_injection",),
        "others": (
            "apikey",
            "ansiescape",
            "phrasing",
            "badchars",
            "dra",
            "sata",
            "sysprompt_extraction",
            "topic",
        ),
    }
)
REPORT_AREAS = tuple(area for area in AREAS if area != "others")

# Probe or module -> what it loads when it starts. Without a network each ends garak's whole queue.
NEEDS_NETWORK: Mapping[str, str] = MappingProxyType(
    {
        "atkgen": "an attack model and a toxicity model from a hub",
        "realtoxicityprompts": "a toxicity model from a hub",
        "latentinjection.LatentJailbreak": "a toxicity model from a hub",
        "lmrc.Bullying": "a toxicity model from a hub",
        "misleading": "an entailment model from a hub",
        "packagehallucination": "lists of packages from a hub",
        "divergence.RepeatedToken": "a token table from the internet",
        "sata": "tagger data of NLTK",
        "topic": "WordNet",
        "sysprompt_extraction": "system prompts from a hub",
        "goat": "an attack model",
        "fileformats": "a hub",
        "audio": "a hub",
        "visual_jailbreak": "pictures from the internet",
    }
)
# These ask a judge behind an endpoint of its own, which this command does not configure.
NEEDS_JUDGE: Mapping[str, str] = MappingProxyType({"agent_breaker": "a judge model", "fitd": "a judge model"})


@dataclass(frozen=True)
class ProbeInfo:
    """What garak says of one probe. ``name`` is ``module.Class``."""

    name: str
    is_active: bool
    primary_detector: str | None
    goal: str = ""

    @property
    def module(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Unit:
    """One process: probes of one module that belong to one area."""

    area: str
    module: str
    probes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.area}.{self.module}"


@dataclass(frozen=True)
class Skipped:
    area: str
    probe: str
    reason: str


@dataclass(frozen=True)
class ScanPlan:
    """What runs, what does not and why. ``detectors`` is each probe's primary one."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]
    detectors: Mapping[str, str | None]


def plan_scan(known: Iterable[ProbeInfo], groups: Sequence[str], *, is_online: bool) -> ScanPlan:
    """Units of the groups, which are areas, modules or single probes; without any, the report's ten areas.

    An area or module means its active probes; a probe that is named runs though it is inactive.
    """
    probes = {probe.name: probe for probe in known}
    units: list[Unit] = []
    skipped: list[Skipped] = []
    chosen = _choose(probes, groups or REPORT_AREAS)
    for area, name in chosen:
        reason = _missing(name, is_online)
        if reason is not None:
            skipped.append(Skipped(area, name, reason))
    left_out = {(each.area, each.probe) for each in skipped}
    runnable = [pair for pair in chosen if pair not in left_out]
    for key in dict.fromkeys((area, probes[name].module) for area, name in runnable):
        members = tuple(name for area, name in runnable if (area, probes[name].module) == key)
        units.append(Unit(*key, members))
    return ScanPlan(tuple(units), tuple(skipped), {name: probes[name].primary_detector for _, name in chosen})


def _choose(probes: Mapping[str, ProbeInfo], groups: Sequence[str]) -> list[tuple[str, str]]:
    """(area, probe) of every wanted probe, each once."""
    chosen: dict[tuple[str, str], None] = {}
    modules = {probe.module for probe in probes.values()}
    for group in groups:
        if group in AREAS:
            for member in AREAS[group]:
                chosen |= {(group, name): None for name in _probes_of(member, probes)}
        elif group in modules or group in probes:
            chosen |= {(area_of(name), name): None for name in _probes_of(group, probes)}
        else:
            message, hint = unknown_name("probe group", group, [*AREAS, *modules, *probes])
            raise ConfigError(message, hint=f"{hint}; areas: {', '.join(AREAS)}")
    return list(chosen)


def _probes_of(member: str, probes: Mapping[str, ProbeInfo]) -> list[str]:
    if "." in member:
        return [member] if member in probes else []
    found = [probe for probe in probes.values() if probe.module == member]
    return [probe.name for probe in found if probe.is_active] or [probe.name for probe in found]


def area_of(probe: str) -> str:
    """The area that lists the probe or its module."""
    module = probe.partition(".")[0]
    for area, members in AREAS.items():
        if probe in members or module in members:
            return area
    return "others"


def _missing(probe: str, is_online: bool) -> str | None:
    module = probe.partition(".")[0]
    if reason := NEEDS_JUDGE.get(module):
        return f"needs {reason}, which is not configured"
    if is_online:
        return None
    reason = NEEDS_NETWORK.get(probe) or NEEDS_NETWORK.get(module)
    return None if reason is None else f"needs {reason}; run with --online where there is a network"
