"""Log lines, as text or as JSON, one object a line. Lines about a request carry its id, in every pool.

A line says which request it is about with `extra={"request_id": ...}`; other extras become fields of the JSON as well.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from tandem_serve.config import LogsConfig

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, pool, the extras and, of an error, its traceback."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self._pool = pool

    def format(self, record: logging.LogRecord) -> str:
        whole_s, millis = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)), int(record.msecs)
        fields: dict[str, Any] = {
            "time": f"{whole_s}.{millis:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pool": self._pool,
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Plain lines, with the request's id at their end."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", "")
        return super().formatMessage(record) + (f" [{request_id}]" if request_id else "")


def configure_logs(config: LogsConfig, pool: str) -> None:
    """Sends this package's lines to standard error, as one pool's process wants them. Replaces what was set before."""
    # The process's own: in replicas Serve makes sys.stderr a part of its log, and keeps the last 1,000 lines of that to
    # itself. Some processes have none.
    handler = logging.StreamHandler(sys.__stderr__ or sys.stderr)
    handler.setFormatter(JsonFormatter(pool) if config.format == "json" else TextFormatter())
    package = logging.getLogger("tandem_serve")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(config.level.upper())
    logging.getLogger("tandem_serve.requests").setLevel(logging.INFO if config.requests else logging.WARNING)
