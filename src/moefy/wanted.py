"""What a user's words mean as a recipe: a share of the FFNs, a count of experts, options that exclude each other."""

from __future__ import annotations

from numbers import Real
from typing import Any

from moefy.errors import MoefyError
from moefy.recipe import DEFAULT, FINE, Recipe

# Options of whoever wants to cut and route in a certain way: they count experts, as CMoE does.
_COUNTING = {"experts", "shared", "construction", "router"}


def chosen(recipe: str | None, **options: Any) -> Recipe:
    """The recipe that options of the command line mean: by default the best one, and CMoE for whoever counts experts.

    `active` is a share of the FFNs' multiply-adds if it is a float, else a count of routed experts; 1 is the whole
    where a recipe takes only shares or routes nothing. MoefyError for a share out of bounds and for options that
    would be ignored.
    """
    active = options.pop("active", None)
    if active is not None and not (0 < active <= 1 if isinstance(active, float) else active >= 1):
        raise MoefyError(
            f"--active {active} is neither a share of the FFNs' multiply-adds, above 0 and at most 1, such as 0.5, "
            f"nor a count of experts, such as 2."
        )
    counted = options.keys() & _COUNTING or (isinstance(active, int) and active > 1)
    base = Recipe.of(recipe if recipe is not None else "cmoe" if counted else DEFAULT)
    _check(base, options, active)
    if options.get("refit") is False:
        options["repair"] = 0.0  # it is a part of the refit
    if active is None:
        return Recipe.of(base, **options)
    if isinstance(active, float) or base.budget is not None or (active == 1 and _is_static(base, options)):
        return at_share(base, float(active), **options)
    return Recipe.of(base, active=active, **options)


def at_share(recipe: Recipe | str, share: float, **given: Any) -> Recipe:
    """The recipe at a share, above 0 and at most 1, of the FFNs' multiply-adds, with the fields that are `given`.

    `recipe` may be a name or a YAML file; the share is `--active` of the command line.

    A recipe with a budget, or with nothing routed, gets that budget; one with shared experts as many shared as
    active ones, as CMoE's S3A3E8; any other that share of active experts. The router comes on top where the recipe
    has no budget. Experts are counted in the coarsest steps that are within 1 % unless their count is given.
    """
    if not (isinstance(share, Real) and 0 < share <= 1):
        raise MoefyError(f"A share of the FFNs' multiply-adds is above 0 and at most 1: {share!r}.")
    share = float(share)  # numpy's numbers are not what a recipe holds
    recipe, experts = Recipe.of(recipe), given.get("experts")
    size = given.get("expert_size", None if experts else recipe.expert_size)
    if given.get("construction", recipe.construction) == "shared_only" and not experts:
        return Recipe.of(recipe, **{**given, "budget": share, "expert_size": size or FINE})
    if recipe.budget is not None or given.get("construction", recipe.construction) == "shared_only":
        return Recipe.of(recipe, **{**given, "budget": share})
    if "shared" in given:
        return Recipe.of(recipe, **{**given, "active": share - _shared_share(recipe, share, size, given)})
    if not recipe.shared:
        return Recipe.of(recipe, **{**given, "active": share})
    if "expert_size" in given:
        return Recipe.of(recipe, **{**given, "shared": share / 2, "active": share / 2})
    if experts:
        running = max(1, round(share * experts))
        return Recipe.of(recipe, **{**given, "shared": running // 2, "active": running - running // 2})
    half, experts = _halves(share)
    return Recipe.of(recipe, **{**given, "experts": experts, "shared": half, "active": half})


def _check(base: Recipe, options: dict[str, Any], active: int | float | None) -> None:
    """MoefyError if one of the options would be ignored."""
    static = _is_static(base, options)
    if "experts" in options and "expert_size" in options:
        raise MoefyError("--experts and --expert-size both say how large experts are; give one of them.")
    if base.budget is not None and "shared" in options:
        raise MoefyError(
            f"The recipe {base.name} decides itself how much of --active is shared; leave out --shared, or use "
            f"--recipe cmoe."
        )
    if static and "router" in options:
        raise MoefyError("Nothing is routed by this recipe; leave out --router, or use another recipe.")
    if base.budget is not None and isinstance(active, int) and active > 1:
        raise MoefyError(f"The recipe {base.name} takes a share such as --active 0.5, and not a count.")
    if static and (isinstance(active, float) or active == 1) and "shared" in options:
        raise MoefyError(f"Without routing --active {active} is all that runs; leave out --shared.")


def _is_static(base: Recipe, options: dict[str, Any]) -> bool:
    """Whether nothing is routed."""
    return bool(options.get("construction", base.construction) == "shared_only")


def _shared_share(recipe: Recipe, share: float, size: int | None, given: dict[str, Any]) -> float:
    """What the shared experts that are given are of all, 0 to 1; MoefyError if no less than `share`."""
    shared = given["shared"]
    if isinstance(shared, int) and shared:
        if size:
            raise MoefyError(f"How many experts of {size} neurons there are differs by model: give --shared a share.")
        shared = shared / given.get("experts", recipe.experts)
    if shared >= share:
        raise MoefyError(
            f"--shared {given['shared']} alone is {shared:.1%} of the FFN, which leaves nothing of --active {share} to "
            f"routed experts; share fewer, or give more."
        )
    return float(shared)


def _halves(share: float) -> tuple[int, int]:
    """(H, E): H shared and H active experts of the least E, of 8 to 64, at which 2·H / E is the share to 1 %."""
    for experts in (8, 16, 32, 64):
        half = round(share * experts / 2)
        if half > 1 and abs(2 * half / experts - share) <= 0.01:
            return half, experts
    return max(1, round(share * 32)), 64
