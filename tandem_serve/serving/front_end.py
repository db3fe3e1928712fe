"""Everything behind the endpoints of one router, from its configuration and a Primary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tandem_serve.config import AdmissionConfig, RouterLimits, RouterPool, SpeculationConfig
from tandem_serve.models.folder import eos_token_ids, load_tokenizer, resolve_folder
from tandem_serve.serving.admission import Admission, AdmittedTextService
from tandem_serve.serving.api_keys import ApiKeys
from tandem_serve.serving.chat import load_chat_template
from tandem_serve.serving.completion import TextCompletion
from tandem_serve.serving.exposition import Target
from tandem_serve.serving.metrics import RouterMetrics
from tandem_serve.serving.observed import ObservedTextService
from tandem_serve.serving.openai_api import FrontEnd
from tandem_serve.serving.router import PairingRouter
from tandem_serve.serving.tracing import Tracing


def build_front_end(
    pool: RouterPool,
    model: str,
    router: PairingRouter,
    tracing: Tracing,
    metrics_targets: Callable[[], Sequence[Target]],
    limits: Callable[[], RouterLimits] | None = None,
    admission: Callable[[], AdmissionConfig] | None = None,
    speculation: Callable[[], SpeculationConfig] | None = None,
) -> FrontEnd:
    """The text service and what the HTTP endpoints need beside it. Reads the tokenizer of `model`, no weights.

    Args:
        metrics_targets: where the replicas that this router knows serve their metrics.
        limits, admission, speculation: as they are at present; None: always what `pool` says.

    Raises:
        CheckpointError: where the tokenizer cannot be loaded.
        ConfigError: where the API keys cannot be read.
    """
    folder = resolve_folder(model)
    tokenizer = load_tokenizer(folder)
    metrics = RouterMetrics()
    metrics.watch(router)
    limits = limits or (lambda: pool.limits)
    service = TextCompletion(
        router,
        tokenizer,
        model_name=pool.model_name,
        eos_token_ids=eos_token_ids(folder),
        limits=limits,
        speculation=speculation or (lambda: pool.speculation),
    )
    gate = Admission(admission or (lambda: pool.admission), lambda: router.num_primaries)
    admitted = AdmittedTextService(service, gate, timeout_s=pool.request_timeout_s)
    return FrontEnd(
        service=ObservedTextService(admitted, metrics, tracing),
        tokenizer=tokenizer,
        chat_template=load_chat_template(folder, tokenizer),
        model_name=pool.model_name,
        limits=limits,
        metrics=metrics,
        overview=router.overview,
        metrics_targets=metrics_targets,
        api_keys=ApiKeys(pool.api_keys_file) if pool.api_keys_file else None,
        capacity_changed=gate.refresh,
    )
