"""Every figure of the book: one function each, from a record to an axes, and the one style sheet.

A figure function computes nothing that a claim rests on, opens no file and shows nothing. It takes
values and the axes `ax` (or, with several panels, the empty figure `fig`) to draw on, and returns
it. There are no titles: the caption claims. The modules are told apart by subject; call a figure by
its name in the package, `figures.kl_crossing`.
"""

import importlib
from typing import Any

_ON_FIRST_USE = {  # so that a chapter depends on the figures that it draws, and on no other
    "COLOURS": ".style",
    "FILL": ".style",
    "INK": ".style",
    "LINES": ".style",
    "PATH_COLOURS": ".gaussians",
    "STYLE": ".style",
    "WIDTH": ".style",
    "acceptance_bounds": ".sampling",
    "acceptances": ".pairs",
    "adversaries": ".meaning",
    "alpha_acceptance": ".sampling",
    "alpha_by_kind": ".models",
    "alpha_error": ".solver",
    "answer_divergences": ".sequences",
    "arrivals": ".speed",
    "away_by_range": ".learning",
    "balanced": ".front",
    "coin_acceptance": ".coin",
    "coin_costs": ".coin",
    "collapse": ".dimension",
    "concentration": ".pairs",
    "convergence": ".solver",
    "count_to_clock": ".speed",
    "covariance_rules": ".gaussians",
    "decode_trace": ".models",
    "densities": ".gaussians",
    "density_path": ".gaussians",
    "divergence_by_question": ".pairs",
    "draft_acceptances": ".drafters",
    "draft_overlaps": ".coin",
    "draft_payoff": ".drafters",
    "effective_share": ".beyond",
    "enclosing_balls": ".beyond",
    "ends_and_middle": ".meaning",
    "error_exponent": ".meaning",
    "forward_times": ".speed",
    "forwards_by_acceptance": ".decoding",
    "gap_growth": ".sequences",
    "gaussian_cases": ".gaussians",
    "kl_crossing": ".path",
    "kl_order": ".gaussians",
    "target_scores": ".drafters",
    "learning_curves": ".learning",
    "length_costs": ".drafters",
    "log_partition_panels": ".solver",
    "loop_bias": ".sampling",
    "messages": ".page",
    "minimax": ".path",
    "mirrored_variance": ".beyond",
    "modes_along_path": ".beyond",
    "one_round": ".decoding",
    "one_scale_law": ".beyond",
    "overlap_law": ".dimension",
    "passes_histogram": ".solver",
    "path_evolution": ".gaussians",
    "precision_ellipses": ".gaussians",
    "precision_shares": ".dimension",
    "proposed_text": ".decoding",
    "range_bound": ".meaning",
    "redraw_panels": ".sampling",
    "related_map": ".related",
    "rivals": ".meaning",
    "round_shares": ".speed",
    "sampler_power": ".drafters",
    "scale_law": ".gaussians",
    "shells": ".dimension",
    "simplex": ".geometry",
    "solver_cost": ".solver",
    "solver_times": ".speed",
    "solving_gain": ".models",
    "speed_by_acceptance": ".speed",
    "speed_ratios": ".decoding",
    "spoken": ".models",
    "in_style": ".style",
    "table": ".drafters",
    "tail_weight": ".beyond",
    "texts": ".page",
    "token_bars": ".meaning",
    "training": ".meaning",
    "trajectories": ".learning",
    "two_means": ".sequences",
    "useful_share": ".sequences",
    "width_costs": ".decoding",
}

__all__ = list(_ON_FIRST_USE)


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
