"""How far two forms may be apart, and what a difference means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from retnet_tools.dtypes import FloatName

Cause = Literal["rounding", "normalisation-epsilon", "logic"]

# Largest difference in logits of order 10, a factor 2 to 3 above the worst of 26 configurations, of a trained model of
# 4 layers and of a random one of 16 layers and 8 heads (float32 3.6e-5, float16 3.8e-2, bfloat16 2.3e-1).
ROUNDING_BUDGETS: dict[FloatName, float] = {"float64": 1e-9, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}
# torchscale checkpoints at their usual 1e-6 show 1e-4 to 7e-4; an epsilon of 1e-3 shows 0.1.
EPSILON_BUDGET = 1e-3
# Correct forms stay below 1e-13 here; the smallest wrong factor seen in a real implementation gives 1e-5.
LOGIC_BUDGET = 1e-9
BUDGET_SCALE = 10.0
# Rounding and epsilon budgets grow with the logits up to logits of 100, and no further: e^0.01 changes a probability
# by 1 %, whatever the size of the logits, so that a budget which kept growing would pass other distributions as the
# same (at logits of 1e6 an epsilon budget of 100).
MAX_FACTOR = 10.0

CAUSES: dict[Cause, str] = {
    "rounding": "the forms add up in different orders; the difference shrinks in float64",
    "normalisation-epsilon": "the parallel form clamps scores by the data, and the head norm cancels that up to its "
    "epsilon; the difference stays in float64 and vanishes with epsilon 0: it belongs to the checkpoint",
    "logic": "the forms compute different functions; the difference stays in float64 with epsilon 0",
}
ACTIONS: dict[Cause, str] = {
    "rounding": "verify in a wider --dtype, or allow it with --tolerance",
    "normalisation-epsilon": "the checkpoint itself differs between forms: decoding follows the recurrent one; allow "
    "it with --tolerance",
    "logic": "do not use this form for this checkpoint; see the layer where the difference begins",
}


@dataclass(frozen=True)
class Budget:
    """What is allowed of each cause, in logits.

    With `tolerance`, one limit for the whole difference in place of those of rounding and epsilon; what is `logic` has
    to keep its own all the same.
    """

    rounding: float
    epsilon: float
    logic: float
    tolerance: float | None

    @classmethod
    def of(cls, dtype: FloatName, logits_scale: float, tolerance: float | None) -> Budget:
        """The defaults of a dtype, growing with max |logits| beyond 10.

        Up to a factor of 10; without bound for `logic`, which float64 rounding of correct forms must never pass for.
        """
        factor = max(1.0, logits_scale / BUDGET_SCALE) if math.isfinite(logits_scale) else 1.0
        capped = min(factor, MAX_FACTOR)
        return cls(ROUNDING_BUDGETS[dtype] * capped, EPSILON_BUDGET * capped, LOGIC_BUDGET * factor, tolerance)

    def exceeded(self, d: float, d64: float, d0: float) -> Cause | None:
        """The cause whose part of a difference is over its limit, or None; a part that is not finite is over."""
        if not d0 <= self.logic:
            return "logic"
        if self.tolerance is not None:
            return None if d <= self.tolerance else cause_of(d, d64, d0, self)
        if not d64 - d0 <= self.epsilon:
            return "normalisation-epsilon"
        return None if d - d64 <= self.rounding else "rounding"

    def limit(self, cause: Cause) -> str:
        """The limit that a difference of this cause has to keep, in words."""
        if self.tolerance is not None and cause != "logic":
            return f"at most {self.tolerance:g}"
        value = {"rounding": self.rounding, "normalisation-epsilon": self.epsilon, "logic": self.logic}[cause]
        return f"at most {value:.1e} of this cause"


def cause_of(d: float, d64: float, d0: float, budget: Budget) -> Cause:
    """What explains most of a difference d, given its float64 part d64 and what is left of that at epsilon 0, d0."""
    if not d0 <= budget.logic:
        return "logic"
    if d64 > budget.logic and d64 >= d / 2:
        return "normalisation-epsilon"
    return "rounding"
