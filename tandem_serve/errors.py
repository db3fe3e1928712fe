"""Every exception that tandem-serve raises on purpose.

TandemError
├── InvalidRequest        the caller's fault: names the field and the remedy   HTTP 400  INVALID_ARGUMENT
├── Unauthenticated       no API key, or an unknown one                         HTTP 401  UNAUTHENTICATED
├── PermissionDenied      a certificate of ours, but of another pool's role     (gRPC only) PERMISSION_DENIED
├── ModelMismatch         two peers hold models that do not fit together       HTTP 409  FAILED_PRECONDITION
├── CheckpointError       a checkpoint that cannot be loaded, and why          (start-up)
├── ConfigError           a YAML or flag that cannot be used, and why          (start-up)
├── Overloaded            queues are full; try again after retry_after_s       HTTP 429  RESOURCE_EXHAUSTED
├── DeadlineExceeded      the request's own time limit has passed              HTTP 504  DEADLINE_EXCEEDED
├── Unavailable           a pool has no replica that can serve right now       HTTP 503  UNAVAILABLE
└── RequestAborted        the request ended before its text did                HTTP 499  CANCELLED
"""

from __future__ import annotations


class TandemError(Exception):
    """Root of the tree; never raised itself."""


class InvalidRequest(TandemError):
    """A request that can never succeed as it stands.

    `field` is the offending field as the caller spelt it ("temperature", "prompt[2]"), or "" where no one field is.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Unauthenticated(TandemError):
    """The router wants an API key, and the caller has shown none that it knows."""


class PermissionDenied(TandemError):
    """A peer has shown a good certificate, of a role that has no business here."""


class ModelMismatch(TandemError):
    """Primary and drafter (or tokenizer, taps, wire version) were not made for each other."""


class CheckpointError(TandemError):
    """A checkpoint folder is missing a part, damaged, or of a family that we do not run."""


class ConfigError(TandemError):
    """A cluster file, option or environment variable has a value that cannot be used."""


class Overloaded(TandemError):
    """A bounded queue is full. Nothing was started; retrying is safe."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TandemError):
    """The time that the client or the operator gave a request is over. What it had begun was aborted."""


class Unavailable(TandemError):
    """No replica of a pool can be reached at present."""


class RequestAborted(TandemError):
    """The request was cancelled: by its client, or because its replica is going away."""
