"""FedHyper (Wang, Wang and Li 2024, arXiv:2310.03156): learning rates by hypergradient descent.

    client m   w ← w − β_m g_m(w), K steps            Δ_m = Wᵗ − w,   Δᵗ = mean_m Δ_m
    G          αᵗ ← clip(αᵗ⁻¹ + κ ⟨Δᵗ, Δᵗ⁻¹⟩, 1/γ_α, γ_α)                                      used in this round
    SL         βᵗ⁺¹ ← clip(βᵗ + κ ⟨Δᵗ, Δᵗ⁻¹⟩, β₀/γ_β, γ_β β₀)                      one rate, sent with the next round
    CL         β_k ← clip(β_{k−1} + κ (⟨g_k, g_{k−1}⟩ + ⟨g_k, Δᵗ⁻¹⟩/K), β₀/γ_β, γ_β β₀)     each client, each step
    server     Wᵗ⁺¹ ← Wᵗ − αᵗ Δᵗ                      GM: G with server momentum, m ← 0.9 m + αᵗ Δᵗ, W ← W − m

κ = 1 is the paper's; κ = 0 is FedAvg. Δᵗ⁻¹ is kept as it was, not times α; it is 0 before the second round, and CL's
clients get it as channel "previous" (with sign −, as all updates here), zeros in round 1. CL's β starts at β₀ in every
visit. A ``base`` other than FedAvg is scheduled in the same way: it sees αᵗ Δᵗ as its mean update.

``mode = "cosine"`` takes the cosine of the angle in place of the inner product, and κ in parts of β₀ for local rates:
raw products depend on the size of the model and of its steps. ``form = "released"`` has the constants of the authors'
code: α in [0.2, 5] ([0.8, 5] for GM), SL's κ in parts of β₀, CL as in ``clients.hyper``. Not its errors: its SL forgets
the new rate, and its momentum sees only what α is above 1.
"""

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator

from clients import hyper as client
from clients.sgd import SgdConfig
from fedsim import Mean, Payload, Phase, Strategy, Task, Tree, registry, tree
from fedsim.config import check
from fedsim.errors import ConfigError
from server.hyper import Rule, adapt
from server.reduce import ranged

BOUNDS = {"paper": (1 / 3, 3.0), "released": (0.2, 5.0), "released gm": (0.8, 5.0)}


class Config(SgdConfig):
    name: str = "fedhyper"
    variant: Literal["g", "gm", "sl", "cl", "g+sl", "g+cl", "gm+cl"] = "g+cl"
    base: dict[str, Any] = Field({"name": "fedavg"}, description="what is scheduled: its name, and settings of its own")
    alpha0: float = Field(1.0, gt=0, description="α⁰")
    hyper_rate: float = Field(1.0, ge=0, description="κ")
    mode: Literal["raw", "cosine"] = "raw"
    form: Literal["paper", "released"] = "paper"
    bounds: tuple[float, float] | None = Field(None, strict=False, description="of α; by default those of the form")
    gamma_beta: float = Field(10.0, ge=1, description="γ_β: local rates stay in [β₀/γ_β, γ_β β₀]")
    max_lr: float | None = Field(None, gt=0, description="and below this")
    weighting: Literal["examples", "uniform"] = "uniform"

    @field_validator("base", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        low, high = self.alpha_bounds()
        if not 0 < low <= self.alpha0 <= high:
            raise ValueError(f"alpha0: must be within its bounds, {low:g} to {high:g} (got {self.alpha0:g})")
        if self.max_lr is not None and self.max_lr < self.lr:
            raise ValueError(f"max_lr: must be at least lr, {self.lr:g} (got {self.max_lr:g})")
        if "sl" in self.variant and self.lr_schedule:
            raise ValueError(f"lr_schedule: the server's rule moves the local rate in variant '{self.variant}'")
        if "gm" in self.variant and self.base.get("name") != "fedavg":
            raise ValueError(f"variant: '{self.variant}' brings a base of its own (got {self.base.get('name')!r})")
        try:
            self.scheduled()
        except ConfigError as e:
            raise ValueError("; ".join(e.problems).removeprefix("strategy.")) from None
        return self

    def alpha_bounds(self) -> tuple[float, float]:
        return self.bounds or BOUNDS["released gm" if self.form == "released" and "gm" in self.variant else self.form]

    def scheduled(self) -> tuple[Any, SgdConfig]:
        """The base's plugin and its config: our common settings, and its own."""
        own = {"name": "fedavgm"} if "gm" in self.variant else self.base
        plugin = registry.load("strategies", str(own.get("name")))
        if not issubclass(plugin.Config, SgdConfig) or issubclass(plugin.Config, Config):
            raise ConfigError(f"strategy.base.name: '{own['name']}' has no local rate to schedule")
        common = {key: getattr(self, key) for key in SgdConfig.model_fields.keys() - {"name"}}
        for key in common.keys() & own.keys():
            raise ConfigError(f"strategy.base.{key}: belongs in [strategy]")
        return plugin, check(plugin.Config, common | own, "strategy.base")


class Hyper(NamedTuple):
    base: Any  # the state of what is scheduled
    alpha: float
    beta: float
    before: Tree  # −Δᵗ⁻¹


def build(config: Config, task: Task) -> Strategy[Hyper]:
    plugin, inner = config.scheduled()
    return hyper(plugin.build(inner, task), config)


def hyper(base: Strategy[Any], config: Config) -> Strategy[Hyper]:
    """Any strategy of one exchange whose clients send "delta", with its rates scheduled."""
    if not isinstance(base, Strategy) or len(base.phases) != 1 or "delta" not in base.sends[0]:
        raise ConfigError("strategy.base: must be a strategy of one exchange whose clients send 'delta'")
    phase, parts, export = base.phases[0], config.variant.split("+"), base.export
    relative = config.mode == "cosine" or config.form == "released"
    high = min(config.gamma_beta * config.lr, config.max_lr or float("inf"))
    of_alpha = Rule(config.hyper_rate, config.mode, *config.alpha_bounds())
    kappa = config.hyper_rate * (config.lr if relative else 1.0)
    of_beta = Rule(kappa, config.mode, config.lr / config.gamma_beta, high)

    def init(generator: torch.Generator) -> Hyper:
        state = base.init(generator)
        return Hyper(state, config.alpha0, config.lr, tree.zeros(base.params(state)))

    def broadcast(s: Hyper) -> Payload:
        shared = dict(phase.broadcast(s.base))
        if "sl" in parts:
            shared["rates"] = {"local": next(iter(s.before.values())).new_tensor(s.beta)}
        if "cl" in parts:
            shared["previous"] = s.before
        return shared

    def finish(s: Hyper, mean: Mean) -> Hyper:
        delta = mean.value["delta"]
        alpha = s.alpha if config.variant in ("sl", "cl") else adapt(of_alpha, s.alpha, delta, s.before)
        beta = adapt(of_beta, s.beta, delta, s.before) if "sl" in parts else s.beta
        scaled = mean._replace(value=mean.value | {"delta": tree.scale(alpha, delta)})
        return Hyper(phase.finish(s.base, scaled), alpha, beta, delta)

    def gauges(s: Hyper) -> dict[str, float]:
        return (base.gauges(s.base) if base.gauges else {}) | ({"alpha": s.alpha} if "g" in config.variant else {})

    rule = client.Rule(
        config.hyper_rate, config.mode, config.form, config.gamma_beta, config.max_lr, config.epochs or 1, config.cohort
    )
    local = client.given(phase.local) if "sl" in parts else phase.local
    if "cl" in parts and config.hyper_rate:
        local = client.learned(local, rule)
    reduce = ranged(phase.reduce, "local_rate") if "cl" in parts else phase.reduce
    return base._replace(
        init=init,
        phases=(Phase(broadcast, local, reduce, finish),),
        params=lambda s: base.params(s.base),
        gauges=gauges,
        export=(lambda s: export(s.base)) if export else None,
    )
