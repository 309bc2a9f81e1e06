"""The shape of a mixture-of-experts network, and what the configs of such families have in common."""

from dataclasses import dataclass
from typing import Any

from blockinfer.checks import shown
from blockinfer.kernels.router import RouterRule
from blockinfer.model_config import ConfigReader, ModelConfig

# The kernels process all experts of a row at once.
_MAX_EXPERTS = 1024


@dataclass(frozen=True, kw_only=True)
class MoEConfig(ModelConfig):
    """dense_layers: how many leading layers have a dense MLP, of mlp_hidden_size. The others have num_experts experts
    of expert_hidden_size each, followed by the shared ones; rule is the router's, with biases if router_bias is set.
    rotary_size: `rotary_dim`."""

    dense_layers: int
    num_experts: int
    expert_hidden_size: int
    rule: RouterRule
    router_bias: bool
    rotary_size: int

    @property
    def rotary_dim(self) -> int:
        return self.rotary_size

    @property
    def all_experts(self) -> int:
        """Including the shared ones."""
        return self.num_experts + self.rule.shared

    @property
    def step_width(self) -> int:
        """The larger of a dense network's and what a row's experts take before and after the second product."""
        pairs = self.rule.top_k + self.rule.shared
        return max(super().step_width, pairs * (self.expert_hidden_size + self.d_model) + 10 * self.d_model)

    @property
    def mlp_elements(self) -> float:
        experts = self.rule.top_k + self.rule.shared
        of_experts = 3 * experts * self.d_model * self.expert_hidden_size + self.num_experts * self.d_model
        share = self.dense_layers / self.n_layers
        return share * super().mlp_elements + (1 - share) * of_experts


def read_rotary_size(read: ConfigReader, head_dim: int, usual_factor: float) -> int:
    """Computed from partial_rotary_factor, by default the family's usual one; a rotary_dim must agree."""
    factor = read.positive("partial_rotary_factor", default=usual_factor)
    size = int(head_dim * factor)
    if factor > 1 or size < 2 or size % 2:
        raise ValueError(
            f"{read.source}: partial_rotary_factor={factor:g} of {head_dim} dimensions must be an even number of them"
        )
    if read.raw.get("rotary_dim") not in (None, size):
        raise ValueError(
            f"{read.source}: rotary_dim={shown(read.raw['rotary_dim'])} is not what partial_rotary_factor={factor:g} "
            f"makes of {head_dim} dimensions, {size}"
        )
    return size


def read_experts(read: ConfigReader, size_name: str) -> dict[str, Any]:
    """num_experts and expert_hidden_size. size_name: the config's name for the latter."""
    return dict(num_experts=read.integer("num_experts", _MAX_EXPERTS), expert_hidden_size=read.integer(size_name))


def check_router(source: str, experts: int, rule: RouterRule, names: tuple[str, str]) -> None:
    """names: the config's names for the number of groups and of the groups kept."""
    groups, kept = names
    if experts % rule.groups:
        raise ValueError(f"{source}: num_experts={experts} does not split into {groups}={rule.groups} groups")
    per = experts // rule.groups
    if rule.groups > 1 and per < 2:
        raise ValueError(
            f"{source}: {groups}={rule.groups} of num_experts={experts} are groups of one, where two count"
        )
    if rule.groups_kept > rule.groups:
        raise ValueError(f"{source}: {kept}={rule.groups_kept} is more than {groups}={rule.groups}")
    if rule.top_k > rule.groups_kept * per:
        there = f"the {rule.groups_kept * per} experts of {kept}={rule.groups_kept} groups"
        there = there if rule.groups > 1 else f"num_experts={experts}"
        raise ValueError(f"{source}: num_experts_per_tok={rule.top_k} is more than {there}")
