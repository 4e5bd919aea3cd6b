"""What models compute: reading hidden states, comparing models, and what no merge avoids.

Names are loaded when they are asked for: what needs no model (bound, rate, measures, compare)
imports no torch.
"""

from importlib import import_module

_ROOMS = {
    "batch": [
        "IGNORED",
        "encode_answer",
        "encode_examples",
        "encode_input",
        "encode_prompt",
        "length_buckets",
        "pad",
    ],
    "read": ["blocks_of", "layer_names", "pool", "prompt_states"],
    "measures": [
        "MEASURES",
        "change_cosine",
        "cosine",
        "debiased_cka",
        "hidden_sim",
        "logit_kl",
        "logit_kls",
        "mutual_knn",
        "probe_distances",
        "procrustes",
        "rsa",
    ],
    "compare": ["MDS_READINGS", "half_samples", "mds", "pair_table"],
    "conflict": ["METRICS", "PRIMARY", "group_variance", "metrics", "pair_metrics", "pair_sums"],
    "gradients": ["answer_loss", "gradient_table", "grams"],
    "rivals": ["RIVALS", "barrier", "jaccard", "shared_mass"],
    "geometry": [
        "checked",
        "coordinates",
        "dispersion",
        "distortion_x",
        "gram",
        "halves",
        "resampled",
        "squared_distances",
        "to_centre",
    ],
    "bound": [
        "Ball",
        "bounds",
        "flips_bound",
        "kept",
        "margin_radius",
        "minimax",
        "offset2",
        "radii",
        "radius_se",
        "readings",
        "with_merge",
    ],
    "rate": [
        "EXACT_TASKS",
        "heuristic_steps",
        "models_needed",
        "rate_at",
        "rate_distortion",
        "staircase",
    ],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
__all__ = sorted([*_ROOMS, *_HOME])


def __getattr__(name: str):
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"helpers.states has no {name!r}")
