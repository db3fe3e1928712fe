"""The cluster file (deployments/*.yaml) as pydantic models. Each part is handed to the one class that it configures.

A path is taken relative to the file's own folder; `demo` names the committed pair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from tandem_serve.config_kubernetes import KubernetesConfig
from tandem_serve.errors import ConfigError
from tandem_serve.types import MAX_BLOCK_LENGTH, PolicyName

Dtype = Literal["float32", "bfloat16"]
P = TypeVar("P", bound="_Part")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaResources(_Part):
    """What Ray reserves for one replica."""

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    memory_bytes: int = Field(0, ge=0)  # 0: none is reserved
    accelerator_type: str | None = None  # a kind of node by its accelerator, e.g. H100
    label_selector: dict[str, str] = Field(default_factory=dict)  # Ray node labels, e.g. {pool: primary}
    num_threads: int = Field(1, ge=1, le=256)  # torch threads in the replica


class Autoscaling(_Part):
    """How far and how fast a pool grows and shrinks by itself."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(ge=1)
    upscale_delay_s: float = Field(5.0, ge=0)  # how long more must have been wanted, without a break
    downscale_delay_s: float = Field(60.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class PrimaryAutoscaling(Autoscaling):
    """What a primary is to carry; the most strained of these decides (serving/autoscaling.py)."""

    target_occupancy: float = Field(0.7, gt=0, le=1)  # of the batch, and of the KV cache
    target_waiting_tokens: int = Field(2048, ge=1)  # prompt tokens in a replica's queue
    target_step_time_s: float | None = Field(None, gt=0)  # mean time of an engine step; None: does not count


class DrafterAutoscaling(Autoscaling):
    """What a drafter is to carry; the most strained of these decides."""

    target_occupancy: float = Field(0.7, gt=0, le=1)  # of its time, and of its KV cache
    target_draft_wait_s: float | None = Field(None, gt=0)  # mean time from a request to its block; None: does not count


class RouterAutoscaling(Autoscaling):
    target_ongoing_requests: float = Field(64.0, gt=0)  # of one replica


class PrimaryEngineConfig(_Part):
    """The embedded torch engine of the primary pool."""

    engine: Literal["torch"] = "torch"
    dtype: Dtype = "float32"
    device: str = "cpu"
    max_num_seqs: int = Field(32, ge=1, le=4096)  # sequences in a batch
    max_num_waiting: int = Field(256, ge=0)  # queued beyond that before Overloaded
    max_num_batched_tokens: int = Field(512, ge=16)  # tokens a forward pass, prompt chunks included
    kv_cache_tokens: int = Field(65_536, ge=64)  # budget of the KV cache; requests queue when it is reserved
    kv_block_size: int = Field(16, ge=1)  # granularity of a reservation, in tokens
    max_model_len: int | None = Field(None, ge=2)  # None: what the checkpoint allows
    representation_memory_bytes: int = Field(256 << 20, ge=0)  # host memory for taps kept to re-attach drafters
    block_length: int = Field(5, ge=0, le=64)  # drafts a round where a request does not say
    policy: PolicyName = PolicyName.FIXED  # who decides how many, where a request does not say
    draft_timeout_s: float = Field(0.5, gt=0)  # after which a round goes on without drafts


class VllmEngineConfig(_Part):
    """vLLM as the engine of the primary pool (docs/vllm.md). Fields that PrimaryEngineConfig has mean the same."""

    engine: Literal["vllm"] = "vllm"
    dtype: Dtype = "float32"
    max_num_seqs: int = Field(32, ge=1, le=4096)
    max_num_waiting: int = Field(256, ge=0)
    max_num_batched_tokens: int = Field(2048, ge=32)
    kv_cache_tokens: int | None = Field(None, ge=64)  # None: what gpu_memory_utilization leaves
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    enforce_eager: bool | None = None  # no torch.compile, no CUDA graphs; None: without a GPU
    max_model_len: int | None = Field(None, ge=2)
    taps: tuple[int, ...] | None = None  # layers whose hidden states drafters read; None: those of the drafter pool
    representation_memory_bytes: int = Field(256 << 20, ge=0)
    prefix_memory_bytes: int = Field(256 << 20, ge=0)  # host memory for the taps of cached prefixes
    block_length: int = Field(5, ge=0, le=16)  # until costs have been measured; 0: no drafting
    longest_block_length: int = Field(8, ge=1, le=16)  # thereafter, at most
    adapts: bool = True  # the block length to measured costs; False: block_length, whatever it costs
    synchronous: bool = False  # nobody runs while anybody's drafts are under way: for comparison
    draft_timeout_s: float = Field(0.5, gt=0)  # at most; less where drafts are worth less
    sampling: Literal["shared_noise", "rejection"] = "shared_noise"  # rejection: vLLM's own rejection sampler
    engine_args: dict[str, Any] = Field(default_factory=dict)  # more of vLLM's EngineArgs, as they are


def _engine_tag(value: Any) -> str:
    """Which engine a YAML or model means; torch where it does not say."""
    return str(value.get("engine", "torch") if isinstance(value, dict) else getattr(value, "engine", ""))


AnyPrimaryEngine = Annotated[
    Annotated[PrimaryEngineConfig, Tag("torch")] | Annotated[VllmEngineConfig, Tag("vllm")], Discriminator(_engine_tag)
]


class DrafterEngineConfig(_Part):
    """The drafter engine."""

    dtype: Dtype = "float32"
    device: str = "cpu"
    max_num_seqs: int = Field(256, ge=1)
    kv_cache_tokens: int = Field(262_144, ge=64)
    max_block_length: int = Field(32, ge=1, le=64)
    draft_ahead: bool = True  # while a block is verified, draft what may follow it (tandem drafters)
    idle_timeout_s: float = Field(60.0, gt=0)  # a sequence not heard of for so long is dropped
    representation_dtype: Literal["bf16", "int8", "f32"] = "bf16"
    credit_bytes: int = Field(64 << 20, ge=1 << 16)  # a stream's bytes in flight
    max_message_bytes: int = Field(64 << 20, ge=16 << 20)  # a primary sends at most 4 Mi values of one sequence at once


class Pool(_Part):
    """What all pools have in common. Counts and bounds change in place; all else here restarts the pool's replicas."""

    num_replicas: int = Field(1, ge=1)  # a fixed count; with autoscaling the pool starts at min_replicas
    max_surge_percent: int = Field(0, ge=0, le=100)  # a restart starts so many new replicas before it ends old ones
    # Folder with tls.crt, tls.key and ca.crt, read again when they change. None: between pools all is in plain text.
    tls_folder: str | None = None
    resources: ReplicaResources = ReplicaResources()
    revision: str = ""  # any text; another one restarts the pool, e.g. for new weights under the same path


class PrimaryPool(Pool):
    model: str  # folder or hub id
    engine: AnyPrimaryEngine = PrimaryEngineConfig()
    autoscaling: PrimaryAutoscaling | None = None  # None: num_replicas, fixed


class DrafterPool(Pool):
    model: str
    num_replicas: int = Field(1, ge=0)  # 0: plain decoding
    engine: DrafterEngineConfig = DrafterEngineConfig()
    autoscaling: DrafterAutoscaling | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_replicas == 0 and self.autoscaling is not None:
            raise ValueError("num_replicas 0 means that there is no drafter pool; it cannot have autoscaling")
        return self


class RouterLimits(_Part):
    """What one request may ask for."""

    max_n: int = Field(16, ge=1)
    max_prompts: int = Field(64, ge=1)
    max_stop_strings: int = Field(4, ge=0)
    max_logprobs: int = Field(20, ge=0)
    max_body_bytes: int = Field(4 << 20, ge=1024)


class AdmissionConfig(_Part):
    """How many completions a router lets into the primary pool, and how many wait. A request of n counts n."""

    max_running_per_primary: int | None = Field(None, ge=1)  # None: the router's share of a primary's max_num_seqs
    max_queued: int = Field(256, ge=0)  # of all clients; beyond: 429, RESOURCE_EXHAUSTED
    max_queued_per_client: int = Field(64, ge=0)  # a client: an API key, or without one an address

    @property
    def per_primary(self) -> int:
        default: int = PrimaryEngineConfig.model_fields["max_num_seqs"].default
        return self.max_running_per_primary or default


class SpeculationConfig(_Part):
    """What the router decides for requests that leave it open. None of it changes a token."""

    # Block lengths to what drafts cost and bring at each load; False: the primary's block_length. Off until it has been
    # measured against fixed lengths on real clusters (benchmarks/block_lengths.py).
    adapts: bool = False
    longest_block_length: int = Field(8, ge=1, le=MAX_BLOCK_LENGTH)  # that it goes up to
    policy: PolicyName | None = None  # who ends blocks early; None: the primary's
    threshold: float | None = Field(None, ge=0, le=1)  # of that policy; None: its own

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.threshold is not None and self.policy in (None, PolicyName.FIXED):
            raise ValueError("threshold needs a policy other than fixed")
        return self


class PairingConfig(_Part):
    """Which primary a sequence gets: the least busy one, or one that has its prompt's beginning in its cache."""

    prefix_tokens: int | None = Field(None, ge=0)  # prompts that share so many go to one primary; 0: never; None: 64
    # in a cluster file with vLLM, which caches prefixes, else never
    prefix_slack: int = Field(4, ge=0)  # sequences that such a primary may have more than the least busy one


class RouterPool(Pool):
    """The ingress: HTTP and gRPC."""

    model_name: str  # what clients call the model
    autoscaling: RouterAutoscaling | None = None
    resources: ReplicaResources = ReplicaResources(num_cpus=0.1)
    host: str = "127.0.0.1"  # under Ray Serve of HTTP alone: its gRPC proxy listens on every address
    http_port: int = Field(8000, ge=0, le=65535)
    grpc_port: int = Field(9000, ge=0, le=65535)
    limits: RouterLimits = RouterLimits()
    api_keys_file: str | None = None  # from `tandem-serve keys new`, read again when it changes. None: open to all
    admission: AdmissionConfig = AdmissionConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    pairing: PairingConfig = PairingConfig()
    request_timeout_s: float | None = Field(None, gt=0)
    max_ongoing_requests: int = Field(1024, ge=1)


class MetricsConfig(_Part):
    """Prometheus, at a port of every replica's own."""

    port: int | None = Field(9520, ge=0, le=65520)  # the first free of 16 from here on; 0: any free one; None: none


class TracesConfig(_Part):
    """OpenTelemetry."""

    endpoint: str | None = None  # a collector's OTLP over gRPC: http://host:4317, or https://; None: no traces
    sample_ratio: float = Field(0.01, ge=0, le=1)  # of requests that do not bring a trace of their own


class LogsConfig(_Part):
    """The package's own log lines, on standard error."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: bool = False  # a line for every request that ends, in each pool


class ObservabilityConfig(_Part):
    """What every replica of every pool tells of itself."""

    metrics: MetricsConfig = MetricsConfig()
    traces: TracesConfig = TracesConfig()
    logs: LogsConfig = LogsConfig()


class ClusterConfig(_Part):
    """One cluster: three pools, three Ray Serve applications."""

    name: str = Field("tandem", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    primary: PrimaryPool
    drafter: DrafterPool
    router: RouterPool
    observability: ObservabilityConfig = ObservabilityConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    @model_validator(mode="after")
    def _check_tls(self) -> ClusterConfig:
        if self.drafter.num_replicas and (self.primary.tls_folder is None) != (self.drafter.tls_folder is None):
            raise ValueError("tls_folder: primary and drafter need one each, or neither")
        return self


def largest(pool: PrimaryPool | DrafterPool | RouterPool) -> int:
    """How many replicas a pool may have."""
    return pool.num_replicas if pool.autoscaling is None else pool.autoscaling.max_replicas


def load_cluster_config(path: Path) -> ClusterConfig:
    """Reads and checks a cluster file.

    Raises:
        ConfigError: naming the file, the field and what is wrong with it.
    """
    return _checked(ClusterConfig, _read(path), path)


def load_observability(path: Path | None) -> ObservabilityConfig:
    """The observability section of a cluster file, for plain processes; the defaults for none. Raises ConfigError."""
    content = {} if path is None else _read(path)
    section = content.get("observability", {}) if isinstance(content, dict) else content
    return _checked(ObservabilityConfig, section, path or Path())


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error


def _checked(kind: type[P], raw: Any, path: Path) -> P:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(f"{_field(e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {problems}") from error


def _field(location: tuple[int | str, ...]) -> str:
    """Where a file is wrong, without the engine's name that pydantic puts between `engine` and its fields."""
    parts = [
        str(part)
        for before, part in zip((None, *location), location, strict=False)
        if before != "engine" or part not in ("torch", "vllm")
    ]
    return ".".join(parts) or "file"


def resolve_model(model: str, relative_to: Path) -> str:
    """A model reference as a path where such a folder exists beside the file, else as it stands (a hub id)."""
    candidate = (relative_to / model).resolve()
    return str(candidate) if candidate.is_dir() else model
