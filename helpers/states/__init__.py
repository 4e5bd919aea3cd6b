"""What models compute: reading hidden states, comparing models, and what no merge avoids.

Names are loaded when they are asked for: what needs no model (bound, rate, measures, compare)
imports no torch.
"""

from helpers.lazy import door

_NAMES = {
    "batch": [
        "IGNORED",
        "encode_answer",
        "encode_examples",
        "encode_input",
        "encode_prompt",
        "length_buckets",
        "pad",
    ],
    "read": ["blocks_of", "layer_names", "logits", "pool", "pooling", "prompt_states"],
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
    "compare": ["half_samples", "mds", "pair_table"],
    "conflict": [
        "METRICS",
        "PRIMARY",
        "group_variance",
        "metrics",
        "pair_metrics",
        "pair_sums",
    ],
    "loss": ["answer_loss"],
    "gradients": ["gradient_table", "grams"],
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
__getattr__, __all__ = door(__name__, _NAMES)
