"""Merging, the core of the package: task vectors, rules, the engine, the folder it writes.

Imports none of the other rooms. Read in this order: blocks, weights, adapters, vectors (what is
merged); selection, rules, spherical, spectral, plans (how); engine, report (the merge); recipe,
folder, cost, copying, card, command (from a stated merge to a model on disk).
"""

from helpers.merge.blocks import Factors, Lazy, gram_matrix, row_blocks, zero
from helpers.merge.command import main
from helpers.merge.engine import (
    MATCHES,
    check_device,
    dose,
    matched,
    merge,
    merge_tensors,
    rounded,
)
from helpers.merge.folder import merge_to_folder
from helpers.merge.mergekit import MERGEKIT, read_mergekit
from helpers.merge.plans import RULES, MergePlan, check_rule, options_of, plan
from helpers.merge.recipe import DTYPES, Recipe
from helpers.merge.report import Report, delta_digest, same, summary
from helpers.merge.rounding import Grid
from helpers.merge.sources import Source, open_base, open_specialist
from helpers.merge.spectral import singular_triplets
from helpers.merge.surroundings import objections
from helpers.merge.vectors import Row, applied, check, stream, views
from helpers.merge.weights import read_folder
