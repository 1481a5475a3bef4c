"""Is it worth it to federate: the runs, the curves, the rules and the report."""

from jaxfl.decision.curve import PowerLaw, fit_power_law
from jaxfl.decision.page import draw_growth, draw_nodes
from jaxfl.decision.report import Report, report_of, should_i_federate
from jaxfl.decision.study import Scores, Study
from jaxfl.decision.verdict import (
    Effect,
    NodeEffects,
    Verdict,
    effect,
    judge,
    node_effects,
)

__all__ = [
    "should_i_federate",
    "Report",
    "report_of",
    "draw_growth",
    "draw_nodes",
    "Study",
    "Scores",
    "effect",
    "Effect",
    "node_effects",
    "NodeEffects",
    "judge",
    "Verdict",
    "fit_power_law",
    "PowerLaw",
]
