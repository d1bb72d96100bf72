"""How often a pass of the model comes by each FFN: found by running it once, not from its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import nn

from moefy.errors import MoefyError
from moefy.sites import ExpertSite, Site


@torch.no_grad()
def count_runs(model: nn.Module, sites: Mapping[str, Site], run: Callable[[], object]) -> dict[str, int]:
    """How often `run()`, a pass of the model, comes by each site: as often as layers share it (ALBERT, Funnel).

    MoefyError if layers share a mixture of experts, or share an FFN by holding the same module, which a checkpoint of
    their own FFNs would not bring back.
    """
    entries = {name: site.layer_name if isinstance(site, ExpertSite) else name for name, site in sites.items()}
    calls: Counter[str] = Counter()
    hooks = [
        model.get_submodule(entry).register_forward_pre_hook(lambda module, args, entry=entry: calls.update([entry]))
        for entry in set(entries.values())
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, entry in entries.items():
        if calls[entry] > 1 and (isinstance(sites[name], ExpertSite) or places[id(model.get_submodule(entry))] > 1):
            what = "the experts of " if isinstance(sites[name], ExpertSite) else ""
            raise MoefyError(
                f"moefy cannot convert this model: {what}{entry} run{'' if what else 's'} {calls[entry]} times in a "
                f"pass, for layers that hold the same module; give each a copy of its own."
            )
    return {name: calls[entry] for name, entry in entries.items()}
