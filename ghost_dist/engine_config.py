"""How and where a model is run: the sections ``engine`` and ``cluster`` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Of a configuration: frozen, and an unknown field is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class EngineConfig(Section):
    """How the model is run over the windows."""

    kind: Literal["auto", "resident", "tensor_parallel", "streaming"] = "auto"
    """resident: layers up to the last boundary on one device. tensor_parallel: every layer is
    sharded over the ranks of a replica. streaming: offloaded; layers are read one by one, each once
    per stage (on a cluster once per range), for checkpoints larger than the device or the machine.
    auto: tensor_parallel on a cluster; in one process resident if it fits, else streaming, decided
    once per run. May differ when a run is continued."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks of a replica; must divide the heads. More than 1 needs Ray."""
    data_parallel: int = Field(default=1, ge=1)
    """streaming: ranks of a replica, such as the GPUs of a node. Each reads its part of a layer,
    gets the rest from the others, and runs its part of the windows. More than 1 needs Ray."""
    replicas: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Copies of the model that share the windows; auto: as many as the cluster has room for. More
    than 1, or auto, needs Ray. May differ when a run is continued."""
    reduction: Literal["ordered", "all-reduce"] = "ordered"
    """How the sums of ranges become those of folds. ordered: read from the store and added in the
    order of their ids, bitwise the same after any failure. all-reduce: the replicas add what each
    has run and all-reduce that, equal up to float64 rounding; nothing is read back. Needs Ray."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """cpu, cuda or cuda:1; auto: a GPU if there is one, else the CPU."""
    batch: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Windows per forward; auto: as many as fill the device, of those that divide a range."""
    experts: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """streaming: routed experts of a layer that are held at once, while they run and the next ones
    are read; auto: all of them where layers fit the device, else as many as fit. May differ when a
    run is continued."""
    compile: bool = False
    """torch.compile the decoder layers, on a GPU: a quarter faster, after some ten seconds for each
    kind of layer; for long calibrations; not on a cluster. Decides the last bits of the result."""

    @model_validator(mode="after")
    def _one_device_has_one_rank(self) -> EngineConfig:
        if self.kind in ("resident", "streaming") and self.tensor_parallel > 1:
            raise ValueError(
                f"kind={self.kind} runs whole layers on one device, but tensor_parallel="
                f"{self.tensor_parallel} shares them: set kind=auto, or tensor_parallel=1"
            )
        if self.kind != "streaming" and self.data_parallel > 1:
            raise ValueError(
                f"data_parallel={self.data_parallel} shares what kind=streaming reads, and kind is "
                f"{self.kind}: set kind=streaming, or data_parallel=1 with more replicas"
            )
        return self

    @property
    def ranks(self) -> int:
        """Processes of a replica, each with a block of the columns of every sum."""
        return max(self.tensor_parallel, self.data_parallel)


class ClusterConfig(Section):
    """How Ray is used; all of it may differ when a run is continued."""

    address: str | None = None
    """auto: the running cluster of this machine or of RAY_ADDRESS; HOST:PORT of its head; null:
    inside a Ray job the job's cluster, else one of this machine alone if the engine needs it."""
    cpus_per_rank: int = Field(default=1, ge=1)
    """CPUs that Ray reserves for a rank; on a CPU cluster also its number of threads."""
    wait_s: float = Field(default=300.0, gt=0)
    """Seconds to wait for a first replica, and for another one once all are lost."""
    heartbeat_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds without an answer after which a rank counts as hung."""
    progress_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds without a finished batch after which a replica counts as hung."""
    load_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that loading the model may take."""
    fit_timeout_s: float = Field(default=7200.0, gt=0)
    """Seconds that reading the sums of a span, or one fit of it, may take on a rank."""
    max_crashes: int = Field(default=5, ge=0)
    """Replicas that may crash between two committed ranges, or fitted spans, before the run
    stops."""
    max_hangs: int = Field(default=3, ge=0)
    """The same for replicas that hang."""
    max_preemptions: int | None = Field(default=None, ge=0)
    """The same for preempted ones; null: no limit."""
