"""The options, checked on the spot. This is the only module that reads the environment."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_origin

from graphopt.errors import OptionsError
from graphopt.lowering.codes import SCHEMES

ENVIRONMENT = "GRAPHOPT_OPTIONS"
# what a preset sets where the option itself is not given
PRESETS: dict[str, dict[str, str]] = {
    "exact": {"approx_activation": "off", "recompute": "pointwise"},
    "paper": {"approx_activation": "relu3", "recompute": "stock"},
}
RECOMPUTE = ("pointwise", "stock")


@dataclass(frozen=True)
class Options:
    """What can be set in `torch.compile(options=...)`, or as JSON in GRAPHOPT_OPTIONS where no options are given.

    preset             "exact": gradients equal stock Inductor's up to rounding. Beside its order, one rounding is
                       new: a norm's gradient reads z in the dtype in which the next linears read it.
                       "paper": LowMemoryBP as published (arXiv 2406.16282): shared norms, relu3 codes of activations.
    approx_activation  the code by which backward knows an activation's slope where that saves bytes: "relu3",
                       "unbiased" or "lloyd" (see graphopt.lowering.codes), or "off". Those gradients are
                       approximate. None: as the preset has it.
    recompute          what backward makes anew: "pointwise", all that is cheap, or "stock", what Inductor does by
                       itself. None: as the preset has it.
    disable            names of passes to leave out, such as ("share_norm",).

    Raises OptionsError for a value that is not allowed, naming those that are.
    """

    preset: str = "exact"
    approx_activation: str | None = None
    recompute: str | None = None
    disable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from graphopt.passes import NAMES

        _one_of("preset", self.preset, tuple(PRESETS))
        for option, allowed in (("approx_activation", (*SCHEMES, "off")), ("recompute", RECOMPUTE)):
            if getattr(self, option) is not None:
                _one_of(option, getattr(self, option), allowed)
        names = self.disable
        if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
            raise OptionsError(f"option 'disable' is a list of pass names, not {self.disable!r}")
        for name in self.disable:
            _one_of("disable", name, NAMES)
        object.__setattr__(self, "disable", tuple(sorted(set(self.disable))))

    @property
    def code(self) -> str | None:
        """The code of activations that applies, None for none."""
        code = self.approx_activation or PRESETS[self.preset]["approx_activation"]
        return None if code == "off" else code

    @property
    def recomputed(self) -> str:
        """What backward makes anew."""
        return self.recompute or PRESETS[self.preset]["recompute"]

    def __str__(self) -> str:
        """The preset, and what was set beside it."""
        given = [f"{key} {value}" for key in PRESETS[self.preset] if (value := getattr(self, key)) is not None]
        without = [f"without {', '.join(self.disable)}"] if self.disable else []
        return ", ".join([f"preset {self.preset}", *given, *without])


OWN = tuple(field.name for field in fields(Options))


def parse(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Split `options` into graphopt's own and Inductor's; without any, those of the environment are taken.

    Raises OptionsError for a key that is neither, with the nearest ones that are.
    """
    import torch._inductor.config as inductor_config

    given = dict(options) if options is not None else _environment()
    given = {key.replace("-", "_") if isinstance(key, str) else key: value for key, value in given.items()}
    own = {key: given.pop(key) for key in OWN if key in given}
    known = inductor_config.get_config_copy() if given else {}
    patches: dict[str, Any] = {}
    for key, value in given.items():
        name = str(key)
        if name not in known:
            raise OptionsError(_unknown(str(key), list(known)))
        expected = inductor_config.get_type(name)  # type: ignore[attr-defined]
        if get_origin(expected) is None and not isinstance(value, expected):
            raise OptionsError(f"option {key!r}: Inductor wants {expected.__name__}, not {value!r}")
        patches[name] = value
    if "custom_partitioner_fn" in patches:
        raise OptionsError("option 'custom_partitioner_fn': lowmem is a partitioner itself and takes no other")
    return Options(**own), patches


def _environment() -> dict[str, Any]:
    text = os.environ.get(ENVIRONMENT, "")
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise OptionsError(f"{ENVIRONMENT} is not JSON ({error}): {text!r}") from None
    if not isinstance(found, dict):
        raise OptionsError(f'{ENVIRONMENT} must be a JSON object such as {{"preset": "exact"}}, not {text!r}')
    return found


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionsError(f"option {option!r}: {_nearest(str(value), allowed)}; allowed: {', '.join(allowed)}")


def _unknown(key: str, known: list[str]) -> str:
    return (
        f"unknown option: {_nearest(key, [*OWN, *known])}\n"
        f"graphopt's own: {', '.join(OWN)}; every key of torch._inductor.config is passed on to Inductor"
    )


def _nearest(value: str, allowed: Any) -> str:
    close = difflib.get_close_matches(value, allowed, n=2, cutoff=0.5)
    return f"{value!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else " is not known")
