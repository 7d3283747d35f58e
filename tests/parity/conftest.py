"""Prints which golden cases are not covered, by name, at the end of the run."""


def pytest_terminal_summary(terminalreporter):
    def reason(report):
        return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    reasons = [reason(r).removeprefix("Skipped: ") for r in terminalreporter.stats.get("skipped", [])]
    missing = sorted(r for r in reasons if r.startswith("not covered: "))
    if missing:
        terminalreporter.section("golden cases not covered")
        for line in missing:
            terminalreporter.write_line(line)
