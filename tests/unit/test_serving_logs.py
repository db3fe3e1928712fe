"""Log lines as text and as JSON, with the request that they are about."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from tandem_serve.config import LogsConfig
from tandem_serve.serving.logs import configure_logs

PACKAGE, REQUESTS = logging.getLogger("tandem_serve"), logging.getLogger("tandem_serve.requests")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = (PACKAGE.handlers, PACKAGE.propagate, PACKAGE.level, REQUESTS.level)
    yield
    PACKAGE.handlers, PACKAGE.propagate = before[0], before[1]
    PACKAGE.setLevel(before[2])
    REQUESTS.setLevel(before[3])


def test_a_json_line_is_one_object_whatever_is_in_it(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogsConfig(format="json", requests=True), "primary")
    REQUESTS.info("two\nlines, %s", "é", extra={"request_id": "r-1", "num_tokens": 3, "odd": object})
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("tandem_serve.x").exception("failed")
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert (first["message"], first["level"], first["pool"]) == ("two\nlines, é", "info", "primary")
    assert (first["request_id"], first["num_tokens"]) == ("r-1", 3)
    assert first["time"].endswith("Z")
    assert "ValueError: boom" in second["error"]


def test_text_lines_end_with_the_request_and_requests_are_told_of_on_request(
    capfd: pytest.CaptureFixture[str],
) -> None:
    configure_logs(LogsConfig(), "router")
    REQUESTS.info("finished", extra={"request_id": "r-1"})
    logging.getLogger("tandem_serve.x").debug("detail")
    logging.getLogger("tandem_serve.x").warning("odd", extra={"request_id": "r-2"})
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("WARNING tandem_serve.x: odd [r-2]")
