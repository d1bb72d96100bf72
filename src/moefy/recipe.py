"""One validated object says how a model is converted. YAML in and out; stored with every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moefy.construct import CONSTRUCTIONS
from moefy.construct.sharing import SHARING
from moefy.errors import MoefyError, RecipeError
from moefy.recipe_text import read_yaml, sentence
from moefy.routers import ROUTERS
from moefy.slim import slim_spec
from moefy.types import FFNWeights, LayerSpec

_COUNTS = {"shared": 3, "active": 3}  # CMoE's S3A3, of 8 experts
# The later word counts: what was in the recipe before and says the same, or would override it, gives way.
_LATER: dict[str, dict[str, Any]] = {"experts": {"expert_size": None}, "budget": _COUNTS}


class Recipe(BaseModel):
    """How every FFN of a model is cut and routed.

    An FFN of F neurons is cut into `experts` experts of F / experts neurons, `shared` of which always
    run and `active` of the others run for each token (CMoE's S{shared}A{active}E{experts}).
    With `expert_size` the count of experts follows from each FFN instead. A fraction for `shared` or
    `active` is a share of all the FFN's experts, rounded to the nearest count of at least one.
    With `budget` both follow: `shared_budget` of that share of the FFN's multiply-adds goes to shared experts,
    and what the router leaves of the rest to active ones; of several each FFN takes the one with the least
    held-out error after the refit, each tried in turn. With `allocation: sensitivity` the budget is that of
    the whole model, and each FFN gets what it needs of it. With `selection: threshold` the active experts are
    a mean over tokens, and no token runs more than `most_active` times as many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)  # true is no number

    name: str = "custom"
    construction: str = "activation"
    router: str = "representative"
    sharing: str = Field("rate", description="what decides which neurons are shared")
    refit: bool = Field(False, description="fit the down-projection to the dense output in closed form")
    repair: float = Field(0.0, ge=0, le=1, description="share of what earlier layers lost that the refit gives back")
    output_bias: bool = Field(True, description="a refit may add an output bias where the FFN has none")
    experts: int = Field(8, ge=1)
    expert_size: int | None = Field(None, ge=1, description="neurons of an expert; overrides experts")
    shared: int | float = Field(_COUNTS["shared"], ge=0)
    active: int | float = Field(_COUNTS["active"], ge=0)
    budget: float | None = Field(None, gt=0, le=1, description="share of the multiply-adds, the router's included")
    shared_budget: float | list[float] = Field(0.5, description="share of the budget for shared experts, or several")
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    selection: Literal["top_k", "threshold"] = "top_k"
    most_active: float = Field(3.0, ge=1, description="selection by threshold: most experts of a token over the mean")
    slim: bool = Field(False, description="save an ordinary model with only the shared neurons, whole blocks of 32")
    top_activated: int = Field(10, ge=1, description="CMoE's K_a: neurons marked per token")
    seed: int = Field(0, ge=0, le=2**62)  # torch takes 64 bits, and each layer adds its number
    chunk_tokens: int = Field(1024, ge=1, description="tokens worked on at a time")

    @field_validator("construction")
    @classmethod
    def _known_construction(cls, value: str) -> str:
        return _one_of("construction", value, CONSTRUCTIONS)

    @field_validator("router")
    @classmethod
    def _known_router(cls, value: str) -> str:
        return _one_of("router", value, ROUTERS)

    @field_validator("sharing")
    @classmethod
    def _known_sharing(cls, value: str) -> str:
        return _one_of("sharing", value, SHARING)

    @field_validator("shared", "active")
    @classmethod
    def _count_or_share(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value > 1:
            if not value.is_integer():
                raise ValueError(f"{value} is neither a whole number of experts nor a share below 1")
            return int(value)
        return value

    @field_validator("shared_budget")
    @classmethod
    def _shares(cls, value: float | list[float]) -> float | list[float]:
        found = value if isinstance(value, list) else [value]
        if not 0 < len(found) <= 64 or not all(0 <= share <= 1 for share in found):  # each costs a refit a layer
            raise ValueError("give one share from 0 to 1, or a list of at most 64")
        return value

    @model_validator(mode="after")
    def _counts_fit(self) -> Recipe:
        if self.allocation == "sensitivity" and self.budget is None:
            raise ValueError("allocation by sensitivity divides a budget; give one, such as budget: 0.5")
        if self.repair and not self.refit:
            raise ValueError("repair is a part of the refit; set refit: true as well")
        if isinstance(self.shared_budget, list) and not self.refit:
            raise ValueError("several shared budgets are compared by their refit; set refit: true as well")
        if self.budget is not None and (self.shared, self.active) != tuple(_COUNTS.values()):
            raise ValueError("a budget decides how many experts are shared and active; leave shared and active out")
        if self.selection == "top_k" and self.most_active != Recipe.model_fields["most_active"].default:
            raise ValueError("most_active bounds a selection by threshold; name the recipe reconstructed, or set that")
        if self.slim and self.routes:
            raise ValueError(f"a slim model routes nothing: use the construction shared_only, not {self.construction}")
        if self.slim and self.allocation != "uniform":
            raise ValueError("all layers of a slim model have one width: use the allocation uniform")
        if self.expert_size is None and self.budget is None:
            self.counts(self.experts)
        return self

    @property
    def routes(self) -> bool:
        """Whether any expert is chosen token by token."""
        return self.construction != "shared_only"

    @property
    def shared_budgets(self) -> list[float]:
        return self.shared_budget if isinstance(self.shared_budget, list) else [self.shared_budget]

    def _counts_within_budget(self, experts: int, ffn: FFNWeights, budget: float, share: float) -> tuple[int, int]:
        within = int(budget * experts + 1e-9)
        if within == 0 and experts == 1:
            raise ValueError(f"its {ffn.neurons} neurons are one expert; give smaller ones (--expert-size 1)")
        if within == 0 and not self.slim:
            raise ValueError(
                f"a budget of {budget} is less than one of {experts} experts; give more, or use smaller experts"
            )
        if not self.routes or within == experts:
            return within, 0
        shared = int(share * within + 1e-9)
        # The router in experts: a neuron costs 3·D multiply-adds with a gate and 2·D without.
        size = ffn.neurons // experts
        spec = LayerSpec(
            width=ffn.width,
            shared=shared * size,
            experts=experts - shared,
            expert_size=size,
            top_k=1,
            router=self.router,
            activation=ffn.activation,
            gated=ffn.gate is not None,
        )
        router = ROUTERS[self.router].planned_multiply_adds(spec) / (size * ffn.width * ffn.matrices)
        active = int(budget * experts - shared - router + 1e-9)
        if active < 1 and self.allocation == "sensitivity":
            return within, 0  # a layer that gets too little to route keeps what is shared
        if active < 1:
            raise ValueError(
                f"a budget of {budget} leaves nothing for experts of {size} neurons beside their router; "
                f"use larger experts or the construction shared_only"
            )
        return shared, active

    def counts(self, experts: int) -> tuple[int, int]:
        """How many of an FFN's experts are shared and how many of the others active; ValueError if they do not fit."""
        shared, active = (_count(value, experts) for value in (self.shared, self.active))
        if shared + active == 0:
            raise ValueError("no expert is shared and none active, so nothing would run; give more")
        if shared > experts:
            raise ValueError(f"{shared} shared experts of {experts} in all; share fewer")
        if active > experts - shared:
            raise ValueError(
                f"{active} active experts, but {experts} experts less {shared} shared leave "
                f"{experts - shared} to route; use fewer active or more experts"
            )
        return shared, active

    def least_share(self, neurons: int) -> float:
        """The smallest budget of an FFN of so many neurons: one expert."""
        return self.expert_size / neurons if self.expert_size else 1 / self.experts

    def layer_specs(self, ffn: FFNWeights, site: str, budget: float | None = None) -> list[LayerSpec]:
        """The shapes that this recipe may give one FFN: as many as differ by its shared budgets."""
        return list(dict.fromkeys(self.layer_spec(ffn, site, budget, share) for share in self.shared_budgets))

    def layer_spec(
        self, ffn: FFNWeights, site: str, budget: float | None = None, share: float | None = None
    ) -> LayerSpec:
        """The shape that this recipe gives one FFN; MoefyError if the experts do not divide its neurons.

        `budget` is this FFN's own, where the recipe allocates by sensitivity; `share` of it is for shared experts
        (the first of the recipe's, if not given).
        """
        parts, unit = (self.expert_size, "neurons an expert") if self.expert_size else (self.experts, "experts")
        if ffn.neurons % parts:
            way_out = _way_out(ffn.neurons, parts, "--expert-size" if self.expert_size else "--experts")
            raise RecipeError(f"{parts} {unit} do not divide the {ffn.neurons} neurons of {site}{way_out}.")
        size = self.expert_size or ffn.neurons // parts
        try:
            count, budget = ffn.neurons // size, self.budget if budget is None else budget
            share = self.shared_budgets[0] if share is None else share
            shared, active = (
                self.counts(count) if budget is None else self._counts_within_budget(count, ffn, budget, share)
            )
        except ValueError as error:
            raise RecipeError(f"The recipe does not fit {site}: {error}.") from None
        if not self.routes:
            shared, active = shared + active, 0
        experts = ffn.neurons // size - shared
        routed = self.routes and active > 0
        spec = LayerSpec(
            width=ffn.width,
            shared=shared * size,
            experts=experts,
            expert_size=size if experts else 0,
            top_k=active,
            router=self.router if routed and experts else None,
            most=math.ceil(min(experts, self.most_active * active)) if routed and self.selection == "threshold" else 0,
            activation=ffn.activation,
            gated=ffn.gate is not None,
            up_bias=ffn.up_bias is not None,
            gate_bias=ffn.gate_bias is not None,
            # A refit may add one, except in a layer that stays dense and where the architecture must hold it.
            down_bias=ffn.down_bias is not None or (self.refit and self.output_bias and experts > 0 and not self.slim),
            activate_up=ffn.activate_up,
        )
        return slim_spec(spec, site) if self.slim else spec

    def fitting(self, neurons: Iterable[int]) -> Recipe:
        """The recipe for FFNs of so many neurons: a named recipe's own expert size gives way to the nearest that fits.

        That is one from half to twice the size, or any smaller one if nothing is routed. A size that was chosen stays.
        """
        size, common = self.expert_size, math.gcd(*neurons)
        if size is None or common % size == 0 or size != _own_size(self.name):
            return self
        least = size / 2 if self.routes else 1
        near = [n for n in _divisors(common) if least <= n <= 2 * size]
        return self.model_copy(update={"expert_size": min(near, key=lambda n: abs(n - size))}) if near else self

    def control(self) -> Recipe:
        """At the same active fraction as many neurons, always the same ones, no router."""
        return self.model_copy(update={"construction": "shared_only", "name": f"{self.name}-shared-only"})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        return cls.of(read_yaml(text))

    @classmethod
    def of(cls, recipe: Recipe | str | Path | dict[str, Any], **changes: Any) -> Recipe:
        """A recipe from a name in RECIPES, a YAML file, a mapping or a recipe, with `changes` applied; else MoefyError.

        What a file or a mapping leaves out is as in the recipe that its `name` is of, or as in `cmoe`.
        """
        if isinstance(recipe, (str, Path)):
            recipe = cls._named_or_file(recipe)
        fields = recipe.model_dump() if isinstance(recipe, Recipe) else dict(recipe)
        base = RECIPES.get(name) if isinstance(name := fields.get("name"), str) else None
        if base is not None and not isinstance(recipe, Recipe):  # a mapping with no more than what differs
            fields, changes = base.model_dump(), {**fields, **changes}
        for field, overridden in _LATER.items():
            if changes.get(field) is not None:
                changes = {**overridden, **changes}
        try:
            return cls.model_validate({**fields, **changes})
        except ValidationError as error:
            raise RecipeError(f"The recipe is not valid: {sentence(error, cls.model_fields)}.") from None

    @classmethod
    def _named_or_file(cls, recipe: str | Path) -> Recipe:
        if str(recipe) in RECIPES:
            return RECIPES[str(recipe)]
        path = Path(recipe)
        if not path.is_file():
            raise MoefyError(f"There is no recipe {str(recipe)!r}; use a YAML file or one of {', '.join(RECIPES)}.")
        try:
            return cls.from_yaml(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise MoefyError(f"The recipe {path} is not a text file.") from None


#: The recipe where none is named.
DEFAULT = "reconstructed"
#: Neurons of an expert where nothing is routed: fine enough for any share.
FINE = 8


def _count(value: int | float, experts: int) -> int:
    return max(1, round(value * experts)) if isinstance(value, float) and value > 0 else int(value)


def _one_of(what: str, value: str, known: dict[str, Any]) -> str:
    if value not in known:
        raise ValueError(f"there is no {what} {value!r}, choose one of {', '.join(known)}")
    return value


def _own_size(name: str) -> int | None:
    """The expert size that the recipe of a name comes with, as "NAME", "NAME:ROUTER" or its control."""
    recipe = RECIPES.get(name.partition(":")[0].removesuffix("-shared-only"))
    if recipe is None:
        return None
    return recipe.expert_size or (None if recipe.routes else FINE)


def _divisors(neurons: int) -> list[int]:
    return [n for n in range(1, neurons + 1) if neurons % n == 0]


def _way_out(neurons: int, wanted: int, option: str) -> str:
    """What to do where `wanted` experts, or neurons an expert, do not divide an FFN."""
    divisors = _divisors(neurons)
    if len(divisors) <= 2:
        return ", a prime number; use --recipe slim, or --recipe shared-only with --active 0.5, which route nothing"
    below, above = [n for n in divisors if n < wanted][-2:], [n for n in divisors if n > wanted][:2]
    return f"; give {option} a count that does, such as {', '.join(map(str, below + above))}"


RECIPES: dict[str, Recipe] = {
    # arXiv 2502.04416, its S3A3E8: 75 % of the neurons run.
    "cmoe": Recipe(name="cmoe", construction="activation", router="representative"),
    # arXiv 2110.01786: experts of 32 neurons, a fifth of them active; for ReLU models. Its best pair in the paper.
    "moefication": Recipe(
        name="moefication", construction="weights", router="mlp", expert_size=32, shared=0, active=0.2
    ),
    # The best without training (docs/log.md): small experts, least squares, a threshold and a budget for each layer.
    "reconstructed": Recipe(
        name="reconstructed",
        construction="weights",
        router="logistic",
        sharing="reconstruction",
        refit=True,
        repair=0.5,
        expert_size=8,
        budget=0.75,
        allocation="sensitivity",
        selection="threshold",
    ),
    # What `moefy export` can write for other engines: the same count of experts for every token and layer, no output
    # bias. Experts of 32 neurons: those of 128 are no better than none (docs/engines.md).
    "engine": Recipe(
        name="engine",
        construction="weights",
        router="logistic",
        sharing="reconstruction",
        refit=True,
        repair=0.5,
        output_bias=False,
        expert_size=32,
        budget=0.75,
    ),
    "shared-only": Recipe(name="shared-only", construction="shared_only"),
    # No experts: the neurons that matter most, refitted, as an ordinary model with narrower FFNs.
    "slim": Recipe(
        name="slim",
        construction="shared_only",
        sharing="reconstruction",
        refit=True,
        repair=0.5,
        slim=True,
        expert_size=1,
        budget=0.5,
    ),
}
