"""The manifest of a device class: what to compile for, and within which budgets."""

from __future__ import annotations

from typing import Annotated, Literal

from edgefleet_shared.contract import MAX_ACCEPTANCE_S, MAX_BUILD_S
from pydantic import Field

from edgefleet_controller.manifests.base import Bytes, Count, ManifestBase, Milliseconds, Name, Share, Strict


class Budgets(Strict):
    """What a compiled model may cost on a board of the class."""

    latency_p95_ms: Milliseconds
    memory_bytes: Bytes = Field(description="peak of the process that holds engine and model")
    size_bytes: Bytes | None = Field(default=None, description="of the compiled model")
    power_watts: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="mean of the whole board while it infers; judged on boards that measure their power"
    )


class Accuracy(Strict):
    """``min_agreement``: smallest share of held-out pictures with the float model's answer (of boxes, for a detector: both recall and
    precision). ``min_per_label``: smallest share of each label's answers, boxes or pixels that both models give, of what either gives, where
    that is often enough to tell; so that nothing rare vanishes among the rest. Labels that are rarer still count together. ``max_loss``: how much less accurate than the float model it may be, where the held-out pictures are labelled."""

    min_agreement: Share = 0.9
    min_per_label: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_loss: Annotated[float, Field(ge=0, lt=1)] | None = None


class Search(Strict):
    """How hard the compiler looks for the best artifact. ``fixed``: what the manifests say, pass or fail. ``quick``: that, and more only
    when it misses a budget. ``full``: every candidate that makes sense. ``prefer``: what is best among those within all budgets;
    only ``size`` and ``transfer`` (fewest bytes sent) let a candidate win that is slower than float. ``pruned``: whether networks that the model's
    ``prune`` made are among them."""

    effort: Literal["fixed", "quick", "full"] = "full"
    prefer: Literal["latency", "size", "transfer", "accuracy"] = "latency"
    pruned: bool = True


class AcceptanceOverrides(Strict):
    """What the board must show, where the class knows better than the defaults."""

    min_agreement: Share | None = Field(default=None, description="on the golden pictures; default: the model's")
    min_cosine: Annotated[float, Field(ge=0, le=1)] | None = None
    allowed_providers: list[str] | None = Field(default=None, min_length=1, description="default: the target's own")
    max_celsius: Annotated[float, Field(gt=0, le=125)] | None = None
    min_golden: Count | None = None
    warmup_runs: Count = 5
    timed_runs: Annotated[int, Field(ge=10)] = 40
    time_limit_s: Annotated[float, Field(gt=0, le=MAX_ACCEPTANCE_S)] = 120.0


class Shadow(Strict):
    """On the board, after acceptance and before it may serve, the candidate answers live requests too, unseen. A rollout's ``timeout_s``
    must leave time for it. Where nothing serves yet, or memory does not hold both, there is none, and the report says so."""

    requests: Count = Field(description="live requests to compare")
    min_agreement: Share = Field(default=0.95, description="of them answered like what serves")
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="median of the engine's time against what serves"
    )
    time_limit_s: Annotated[float, Field(gt=0)] = 300.0


class BuildBudget(Strict):
    """What making a plan may cost on a board of the class, where the engine needs one (tensorrt). A rollout's ``timeout_s`` must leave time
    for it."""

    time_limit_s: Annotated[float, Field(gt=0, le=MAX_BUILD_S)] = 900.0
    memory_bytes: Bytes = Field(default=2 << 30, description="resident, of the process that builds")
    disk_bytes: Bytes = Field(default=1 << 30, description="of the plan")


class Power(Strict):
    """How fast the processor may run, and how deep it may sleep, while a board of the class serves; applied on the board, undone when nothing
    asks for it."""

    governor: str | None = Field(default=None, pattern=r"^[a-z_]{1,32}$", description="cpufreq's, such as powersave")
    max_clock_mhz: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_wake_us: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(
        default=None,
        description="that an idle processor may take to wake up: a request wakes three, one after the other; 0: none sleeps, which is warm",
    )


class DeviceClassSpec(Strict):
    arch: Literal["x86_64", "aarch64", "armv7l", "riscv64"]
    cpu_features: list[str] = Field(default=[], description="kernel names that every board of the class has")
    engine: Name
    engine_version: str = Field(default="", pattern=r"^((>=|<=|==|!=|>|<)\s*[0-9][0-9A-Za-z.+-]*(\s*,\s*|$))*$")
    target: Name | None = Field(default=None, description="compile target; default: the one named like the engine")
    precision: Literal["int8", "fp16", "fp32"] = Field(
        default="int8", description="the lowest; where nothing in it fits, a search ships the float model if that does"
    )
    budgets: Budgets
    accuracy: Accuracy = Accuracy()
    search: Search = Search()
    acceptance: AcceptanceOverrides = AcceptanceOverrides()
    swap: Literal["auto", "blue-green", "in-place"] = "auto"
    shadow: Shadow | None = None
    power: Power = Power()
    build: Literal["controller", "builder", "board"] = "controller"
    build_budget: BuildBudget = BuildBudget()
    measure_on: Literal["auto", "builder"] = Field(
        default="auto",
        description="where candidates are timed: auto is the compiling host if it could be a board of the class, else a builder board; "
        "builder is a builder board always. Where there is none they stay unmeasured, and the boards' acceptance decides",
    )
    options: dict[str, str | int | float | bool] = Field(default={}, description="for the compile target")
    proven: str = Field(
        default="", description="how far this class was proven, in words; fleet apply and fleet class show them"
    )


class DeviceClass(ManifestBase):
    kind: Literal["DeviceClass"]
    spec: DeviceClassSpec

    @property
    def target(self) -> str:
        return self.spec.target or self.spec.engine
