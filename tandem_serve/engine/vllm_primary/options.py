"""What scheduler and workers are told: the `tandem` entry of vLLM's additional_config, plain values all through."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from tandem_serve.errors import ConfigError
from tandem_serve.interfaces import LinkFactory
from tandem_serve.types import PrimaryInfo

KEY = "tandem"
GRPC_LINKS = "tandem_serve.rpc.drafting_client:GrpcLinkFactory"


@dataclass(frozen=True, slots=True)
class TandemOptions:
    """One engine's tandem part. `drafters` are those from the start; a front end may change them at any time."""

    primary: PrimaryInfo
    taps: tuple[int, ...] = ()  # what the workers hand out; () for plain drafters alone
    shared_noise: bool = True  # False: vLLM's own rejection sampler decides over sampled requests' drafts
    link_factory: str | None = None  # "module:name" of what makes an interfaces.LinkFactory; None: a front end attaches
    drafters: tuple[str, ...] = ()
    block_length: int = 5  # until costs have been measured
    longest_block_length: int = 8
    adapts: bool = True
    synchronous: bool = False  # nobody runs while anybody's drafts are under way: for comparison
    draft_timeout_s: float = 0.5
    max_num_batched_tokens: int = 512
    representation_memory_bytes: int = 256 << 20
    prefix_memory_bytes: int = 256 << 20

    def to_config(self) -> dict[str, Any]:
        """As additional_config takes it."""
        return {KEY: asdict(self)}

    @classmethod
    def from_config(cls, additional_config: Any) -> TandemOptions:
        """Raises ConfigError where the entry is missing or not what `to_config` makes."""
        found = additional_config.get(KEY) if isinstance(additional_config, dict) else None
        if not isinstance(found, dict):
            raise ConfigError(f"vLLM's additional_config has no {KEY!r} entry (docs/vllm.md)")
        try:
            values = {**found, "primary": PrimaryInfo(**found["primary"])}
            return cls(**{**values, "taps": tuple(found["taps"]), "drafters": tuple(found["drafters"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"vLLM's additional_config, entry {KEY!r}: {error!r}") from error

    def make_link_factory(self) -> LinkFactory | None:
        """Imports and calls `link_factory`."""
        if self.link_factory is None:
            return None
        module, _, name = self.link_factory.partition(":")
        factory: LinkFactory = getattr(import_module(module), name)()
        return factory
