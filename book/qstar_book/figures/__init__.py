"""Every figure of the book: one function each, from a record to an axes, and the one style sheet.

A figure function computes nothing that a claim rests on, opens no file and shows nothing. It takes
values and the axes (or, with several panels, the figure) to draw on, and returns it. There are no
titles: the caption claims. The modules are told apart by subject; call a figure by its name in the
package, `figures.kl_crossing`.
"""

from .beyond import (
    effective_share,
    enclosing_balls,
    mirrored_variance,
    modes_along_path,
    one_scale_law,
    tail_weight,
)
from .coin import coin_acceptance, draft_overlaps
from .decoding import forwards_by_acceptance, one_round, proposed_text, speed_ratios, width_costs
from .dimension import collapse, overlap_law, precision_shares, shells
from .drafters import (
    draft_acceptances,
    draft_payoff,
    law_scores,
    length_costs,
    sampler_power,
    table,
)
from .front import balanced
from .gaussians import (
    PATH_COLOURS,
    covariance_rules,
    densities,
    density_path,
    gaussian_cases,
    kl_order,
    path_evolution,
    precision_ellipses,
    scale_law,
)
from .geometry import simplex
from .learning import away_by_range, learning_curves, trajectories
from .meaning import (
    adversaries,
    ends_and_middle,
    error_exponent,
    range_bound,
    rivals,
    token_bars,
    training,
)
from .models import alpha_by_kind, decode_trace, solving_gain, spoken
from .page import messages, texts
from .pairs import concentration, divergence_by_question
from .path import kl_crossing, minimax
from .related import related_map
from .sampling import acceptance_bounds, alpha_acceptance, loop_bias, redraw_panels
from .sequences import answer_divergences, gap_growth, two_means, useful_share
from .solver import alpha_error, convergence, log_partition_panels, passes_histogram, solver_cost
from .speed import forward_times, round_shares, solver_times, speed_by_acceptance
from .style import COLOURS, FILL, INK, LINES, STYLE, WIDTH, style

__all__ = [
    "COLOURS",
    "FILL",
    "INK",
    "LINES",
    "PATH_COLOURS",
    "STYLE",
    "WIDTH",
    "acceptance_bounds",
    "adversaries",
    "alpha_acceptance",
    "alpha_by_kind",
    "alpha_error",
    "answer_divergences",
    "away_by_range",
    "balanced",
    "coin_acceptance",
    "collapse",
    "concentration",
    "convergence",
    "covariance_rules",
    "decode_trace",
    "densities",
    "density_path",
    "divergence_by_question",
    "draft_acceptances",
    "draft_overlaps",
    "draft_payoff",
    "effective_share",
    "enclosing_balls",
    "ends_and_middle",
    "error_exponent",
    "forward_times",
    "forwards_by_acceptance",
    "gap_growth",
    "gaussian_cases",
    "kl_crossing",
    "kl_order",
    "law_scores",
    "learning_curves",
    "length_costs",
    "log_partition_panels",
    "loop_bias",
    "messages",
    "minimax",
    "mirrored_variance",
    "modes_along_path",
    "one_round",
    "one_scale_law",
    "overlap_law",
    "passes_histogram",
    "path_evolution",
    "precision_ellipses",
    "precision_shares",
    "proposed_text",
    "range_bound",
    "redraw_panels",
    "related_map",
    "rivals",
    "round_shares",
    "sampler_power",
    "scale_law",
    "shells",
    "simplex",
    "solver_cost",
    "solver_times",
    "solving_gain",
    "speed_by_acceptance",
    "speed_ratios",
    "spoken",
    "style",
    "table",
    "tail_weight",
    "texts",
    "token_bars",
    "training",
    "trajectories",
    "two_means",
    "useful_share",
    "width_costs",
]
