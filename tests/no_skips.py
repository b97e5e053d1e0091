"""`--no-skips`: a test that is skipped fails, unless another machine is what it lacks. The gate runs with it.

A machine that lacks a tool must not end green by leaving out the tests of that tool.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import pytest

OPTION = "--no-skips"
# What nothing that is installed can mend.
ALLOWED = (
    "for machines without a GPU",
    "needs Linux on x86-64",
    "Core AI's packages have wheels for Linux x86-64 and macOS alone",
    "mapped files can be listed on Linux only",
    "needs a folder that nobody can write",
)
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="a skipped test fails, unless it needs another machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return judged((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return judged((yield), collector.config)


def judged(report: Report, config: pytest.Config) -> Report:
    """`report`, failed where it tells of a skip that is not allowed."""
    if not (config.getoption(OPTION) and report.skipped and isinstance(report.longrepr, tuple)):
        return report
    if hasattr(report, "wasxfail"):
        return report
    path, line, said = report.longrepr
    reason = said.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: skipped, and {OPTION} forbids it: {reason}"
    return report
