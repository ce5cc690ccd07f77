"""The options, checked on the spot. This is the only module that reads the environment."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin

from graphopt.codecs import MASK, Codec, named, within
from graphopt.errors import OptionsError
from graphopt.lowering.codes import SCHEMES
from graphopt.plan import Plan
from graphopt.plan.choose import Goal
from graphopt.plan.make import Settings

ENVIRONMENT = "GRAPHOPT_OPTIONS"
RECOMPUTE = ("stock", "pointwise", "any")
ROUNDING = ("nearest", "stochastic")
GROUP_SIZE, GROUP_SIZES = 64, (16, 32, 64, 128, 256, 512, 1024)
# what a preset sets where the option itself is not given
PRESETS: dict[str, dict[str, Any]] = {
    "compressed": {"tolerance": 0.01, "time_slack": 0.2, "rounding": "nearest", "recompute": "pointwise",
                   "approx_activation": "off"},
    "smallest": {"tolerance": 0.15, "time_slack": 0.165, "rounding": "stochastic", "recompute": "any",
                 "approx_activation": "unbiased"},
    "exact": {"tolerance": 0.0, "time_slack": 0.0, "rounding": "nearest", "recompute": "pointwise",
              "approx_activation": "off"},
    "paper": {"tolerance": 0.0, "time_slack": 0.0, "rounding": "nearest", "recompute": "stock",
              "approx_activation": "relu3"},
}  # fmt: skip
# what a memory budget sets over the preset
UNDER_BUDGET = {"tolerance": math.inf, "time_slack": math.inf, "rounding": "stochastic", "recompute": "any"}


@dataclass(frozen=True)
class Options:
    """What can be set in `torch.compile(options=...)`, or as JSON in GRAPHOPT_OPTIONS where no options are given.

    preset             "compressed": saved tensors in 8 bits; the gradient's error is of the order of bf16 rounding.
                       "smallest": 4 bits, two-bit codes of activations where they pay; unbiased, an error of a few
                       percent.
                       "exact": gradients equal stock Inductor's up to rounding. Beside its order, one rounding is
                       new: a norm's gradient reads z in the dtype in which the next linears read it.
                       "paper": LowMemoryBP as published (arXiv 2406.16282): shared norms, relu3 codes of activations.
    memory_budget      what each graph may save: a fraction of what stock Inductor saves (0 < f <= 1), or bytes (a whole
                       number above 1). The plan then spends the least time and error; tolerance, time_slack and
                       recompute are unlimited where they are not given, and rounding is stochastic. Beside preset
                       "exact" it stays exact.
    tolerance          the relative error that a saved tensor may have, which decides the codecs allowed; 0: none.
    time_slack         the fraction of a step's time that a plan may cost, as estimated.
    codecs             names of the codecs that a plan may use, such as ("int8", "fp8", "int4-asymmetric-32-unbiased"),
                       see graphopt.codecs; tolerance, where it is given, still applies. None: the integer codecs of
                       group_size and rounding within the tolerance.
    group_size         values that share one scale in a codec, a power of two from 16 to 1024.
    rounding           of codecs: "nearest", or "stochastic", which is unbiased and draws random numbers. Those of
                       probabilities in 8 bits are hashed where others are to nearest (graphopt.codecs).
    plan               a plan, or the path of one (see graphopt.plan.Plan); graphs that it is not for are planned anew.
    approx_activation  the code by which backward knows an activation's slope where that saves bytes: "relu3",
                       "unbiased" or "lloyd" (see graphopt.lowering.codes), or "off". Those gradients are approximate.
    recompute          what backward recomputes: "stock", what Inductor does by itself; "pointwise", all that is cheap;
                       "any", attention and matrix products too where the plan finds that they cost less than their
                       bytes.
    disable            names of passes to leave out, such as ("share_norm",).

    None stands for what the preset has. Raises OptionsError for a value that is not allowed, naming those that are, and
    PlanError for a plan that cannot be read.
    """

    preset: str = "compressed"
    memory_budget: float | None = None
    tolerance: float | None = None
    time_slack: float | None = None
    codecs: tuple[str, ...] | None = None
    group_size: int | None = None
    rounding: str | None = None
    plan: Plan | None = None
    approx_activation: str | None = None
    recompute: str | None = None
    disable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from graphopt.passes import NAMES

        _one_of("preset", self.preset, tuple(PRESETS))
        for option, allowed in (
            ("approx_activation", (*SCHEMES, "off")), ("recompute", RECOMPUTE), ("rounding", ROUNDING)
        ):  # fmt: skip
            if getattr(self, option) is not None:
                _one_of(option, getattr(self, option), allowed)
        _number("tolerance", self.tolerance, "a relative error of at least 0", lambda value: value >= 0)
        _number("time_slack", self.time_slack, "a fraction of at least 0", lambda value: value >= 0)
        _number(
            "memory_budget", self.memory_budget, "a fraction above 0 and up to 1, or a whole number of bytes",
            lambda value: 0 < value <= 1 or (1 < value < math.inf and value == int(value)),
        )  # fmt: skip
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size not in GROUP_SIZES):
            raise OptionsError(
                f"option 'group_size' is one of {', '.join(map(str, GROUP_SIZES))}, not {self.group_size!r}"
            )
        if self.codecs is not None:
            object.__setattr__(self, "codecs", _codecs(self.codecs))
            if self.group_size is not None or self.rounding is not None:
                raise OptionsError("options 'codecs', 'group_size' and 'rounding': the names of codecs say both")
            if self.codecs and not self._within_tolerance:
                raise OptionsError(f"options 'codecs' and 'tolerance': all of them err by more than {self.tolerance!r}")
        if isinstance(self.plan, (str, Path)):
            object.__setattr__(self, "plan", Plan.load(self.plan))
        elif isinstance(self.plan, Mapping):
            object.__setattr__(self, "plan", Plan.parse(dict(self.plan)))
        elif not isinstance(self.plan, Plan | None):
            raise OptionsError(f"option 'plan' is a graphopt.Plan or the path of one, not {self.plan!r}")
        if self.preset == "paper" and (self.memory_budget is not None or self.plan is not None):
            raise OptionsError("preset 'paper' is LowMemoryBP as published, which has no memory_budget and no plan")
        planned = {choice.decision for choice in self.plan.choices} if self.plan else set()
        if self.preset == "exact" and (self.codecs or self.tolerance or planned - {"keep", "recompute", "bits"}):
            raise OptionsError("preset 'exact' has no codecs and no tolerance, and takes no plan that has codecs")
        names = self.disable
        if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
            raise OptionsError(f"option 'disable' is a list of pass names, not {self.disable!r}")
        for name in self.disable:
            _one_of("disable", name, NAMES)
        object.__setattr__(self, "disable", tuple(sorted(set(self.disable))))
        for option in ("memory_budget", "plan", "codecs", "tolerance"):
            if getattr(self, option) and (off := self._no_plans):
                raise OptionsError(f"options {option!r} and {off}: the first is of plans, which the second leaves out")

    def value(self, option: str) -> Any:
        """What applies: what was given, or what the budget, or else the preset, has."""
        given = getattr(self, option)
        if given is not None:
            return given
        if (
            self.memory_budget is not None
            and option in UNDER_BUDGET
            and (self.preset, option) != ("exact", "tolerance")
        ):
            return UNDER_BUDGET[option]
        return PRESETS[self.preset][option]

    @property
    def code(self) -> str | None:
        """The code of activations that applies, None for none."""
        code = self.value("approx_activation")
        return None if code == "off" else code

    @property
    def planned(self) -> bool:
        """Whether a plan decides what is saved; otherwise the cut does, exactly."""
        if self._no_plans:
            return False
        return (
            self.plan is not None
            or self.codecs is not None
            or self.memory_budget is not None
            or self.value("tolerance") > 0
            or (self.value("recompute") == "any")
        )

    @property
    def _no_plans(self) -> str:
        """The option by which nothing is planned, empty if there is none."""
        if "encode" in self.disable:
            return "'disable' of 'encode'"
        if self.value("recompute") == "stock":
            return "'recompute' of 'stock'" if self.recompute else f"'preset' of {self.preset!r}"
        return ""

    @property
    def _within_tolerance(self) -> tuple[Codec, ...]:
        """The codecs that are given, less those that err more than a tolerance that is given."""
        allowed = math.inf if self.tolerance is None else self.tolerance
        return tuple(each for each in map(named, self.codecs or ()) if each.error <= allowed)

    def settings(self, stock: int) -> Settings:
        """What a plan may use and is for, where stock Inductor saves `stock` bytes."""
        budget = self.memory_budget
        limit = math.inf if budget is None else min(budget * stock if budget <= 1 else budget, stock)
        goal = Goal(self.value("time_slack"), limit)
        tolerance = self.value("tolerance")
        codecs = within(tolerance, self.group_size or GROUP_SIZE, self.value("rounding"))
        if self.codecs is not None:
            codecs = self._within_tolerance
        return Settings(codecs, self.value("recompute") == "any", goal)

    def __str__(self) -> str:
        """The preset, and what was set beside it."""
        given = [
            f"{field.name} {value}"
            for field in fields(self)
            if field.name not in ("preset", "disable", "plan") and (value := getattr(self, field.name)) is not None
        ]
        plan = [f"plan {self.plan.graph}"] if self.plan else []
        without = [f"without {', '.join(self.disable)}"] if self.disable else []
        return ", ".join([f"preset {self.preset}", *given, *plan, *without])


OWN = tuple(field.name for field in fields(Options))


def with_preset(preset: str | None, options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`options` and the preset as one; None where neither is given, for which `parse` takes the environment's."""
    if not isinstance(options, Mapping | None):
        raise OptionsError(f"options are a dict such as {{'preset': 'exact'}}, not {options!r}")
    return {**({"preset": preset} if preset else {}), **(options or {})} or None


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
    except (json.JSONDecodeError, RecursionError) as error:
        raise OptionsError(f"{ENVIRONMENT} is not JSON ({error}): {text!r}") from None
    if not isinstance(found, dict):
        raise OptionsError(f'{ENVIRONMENT} must be a JSON object such as {{"preset": "exact"}}, not {text!r}')
    return found


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise OptionsError(f"option {option!r}: {_nearest(str(value), allowed)}; allowed: {', '.join(allowed)}")


def _codecs(names: object) -> tuple[str, ...]:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise OptionsError(f"option 'codecs' is a list of names of codecs, not {names!r}")
    try:
        if MASK.name in names:
            raise OptionsError(f"{MASK.name!r} is for masks, which are packed in any case")
        return tuple(sorted({named(name).name for name in names}, key=lambda name: (named(name).error, name)))
    except OptionsError as error:
        raise OptionsError(f"option 'codecs': {error}") from None


def _number(option: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> None:
    if value is None:
        return
    no_number = isinstance(value, bool) or not isinstance(value, (int, float))
    if no_number or (value != math.inf and value > sys.float_info.max) or not holds(value):
        raise OptionsError(f"option {option!r} is {allowed}, not {value!r}")


def _unknown(key: str, known: list[str]) -> str:
    return (
        f"unknown option: {_nearest(key, [*OWN, *known])}\n"
        f"graphopt's own: {', '.join(OWN)}; every key of torch._inductor.config is passed on to Inductor"
    )


def _nearest(value: str, allowed: Any) -> str:
    close = difflib.get_close_matches(value, allowed, n=2, cutoff=0.5)
    return f"{value!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else " is not known")
