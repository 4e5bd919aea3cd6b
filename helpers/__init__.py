"""Merge and hidden-state code of the study; each module answers one question (see README)."""
