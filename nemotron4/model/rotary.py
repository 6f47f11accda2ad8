"""Rotary frequencies of a configuration. NumPy alone: an engine that computes natively loads no torch.

Shape suffix: R = rotated dims / 2.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nemotron4.model.config import ModelConfig, RopeScaling

Array = np.ndarray[Any, np.dtype[Any]]


def rotary_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied with: not 1 in YaRN alone."""
    scaling = config.rope_scaling
    return scaling.attention_factor if scaling is not None and scaling.kind == "yarn" else 1.0


def rotary_frequencies(config: ModelConfig) -> Array:
    """Angle per position of each rotated pair, (R,), float32: ``theta^(-2i / rotary_dim)``, then scaled."""
    exponent_R = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    # The power is rounded to float32 once, as torch's is; NumPy's own in float32 is less exact.
    power_R = np.power(config.rope_theta, exponent_R.astype(np.float64)).astype(np.float32)
    inv_freq_R: Array = np.float32(1) / power_R
    if config.rope_scaling is None:
        return inv_freq_R
    if config.rope_scaling.kind == "yarn":
        return _yarn(inv_freq_R, config, config.rope_scaling)
    return _scaled(inv_freq_R, config.rope_scaling)


def _yarn(inv_freq_R: Array, config: ModelConfig, scaling: RopeScaling) -> Array:
    """Pairs that turn often within the original context keep their frequency, slow ones are divided."""

    def pair_that_turns(times: float) -> float:
        length = scaling.original_context_length / (times * 2 * math.pi)
        return config.rotary_dim * math.log(length) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    pair_R = np.arange(len(inv_freq_R), dtype=np.float32)
    ramp_R = ((pair_R - np.float32(low)) / np.float32(high - low or 0.001)).clip(0, 1)
    slow_R: Array = inv_freq_R / np.float32(scaling.factor)
    blended_R: Array = slow_R * ramp_R + inv_freq_R * (1 - ramp_R)
    return blended_R


def _scaled(inv_freq_R: Array, scaling: RopeScaling) -> Array:
    divided_R: Array = inv_freq_R / np.float32(scaling.factor)
    if scaling.kind == "dynamic":
        return inv_freq_R
    if scaling.kind == "linear":
        return divided_R
    if scaling.kind == "factors":
        return inv_freq_R / np.array(scaling.factors, dtype=np.float32)
    # Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated.
    wavelength_R = np.float32(2 * math.pi) / inv_freq_R
    length, kept, bend = scaling.original_context_length, scaling.high_freq_factor, scaling.low_freq_factor
    blend_R = (np.float32(length) / wavelength_R - np.float32(bend)) / np.float32(kept - bend)
    blended_R = (1 - blend_R) * divided_R + blend_R * inv_freq_R
    scaled_R = np.where(wavelength_R > length / bend, divided_R, blended_R)
    return np.where(wavelength_R < length / kept, inv_freq_R, scaled_R)
