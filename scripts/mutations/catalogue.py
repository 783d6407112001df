"""All known bugs, by topic."""

from __future__ import annotations

from scripts.mutations import (
    aborts,
    continuing,
    drops,
    engine,
    pauses,
    results,
    resumes,
    stages,
    weights,
)
from scripts.mutations.mutation import Mutation

BY_TOPIC: dict[str, tuple[Mutation, ...]] = {
    "aborts": aborts.MUTATIONS,
    "drops": drops.MUTATIONS,
    "stages": stages.MUTATIONS,
    "engine": engine.MUTATIONS,
    "results": results.MUTATIONS,
    "pauses": pauses.MUTATIONS,
    "resumes": resumes.MUTATIONS,
    "weights": weights.MUTATIONS,
    "continuing": continuing.MUTATIONS,
}
ALL = tuple(mutation for mutations in BY_TOPIC.values() for mutation in mutations)
