"""The findings of all nodes as one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from megatron_gpc.doctor.finding import Finding

Told = tuple[str, Finding]
"""(host, finding)"""
_STYLE = {"ok": "green", "note": "yellow", "problem": "bold red"}


def with_differences(told: Sequence[Told]) -> list[Told]:
    """The findings, and a problem for each host that has another version than most."""
    found = list(told)
    for check in dict.fromkeys(f.check for _, f in told if f.same):
        said = {host: f.found for host, f in told if f.check == check}
        usual = Counter(said.values()).most_common(1)[0][0]
        for host, value in said.items():
            if value != usual:
                what = f"{value}; elsewhere {usual}"
                advice = "use one environment on all nodes, or leave the node out"
                found.append((host, Finding(check, "problem", what, advice)))
    return found


def table(told: Sequence[Told]) -> Table:
    """A row for each thing that was found, with the hosts that it was found on."""
    hosts = list(dict.fromkeys(host for host, _ in told))
    rows: dict[Finding, list[str]] = {}
    for host, finding in told:
        on = rows.setdefault(finding, [])
        if host not in on:
            on.append(host)
    made = Table(title=f"doctor: {', '.join(hosts)}", title_justify="left")
    for heading in ("", "", "where", "found", "what to do"):
        made.add_column(heading, overflow="fold")
    for finding, on in rows.items():
        where = "all" if len(on) == len(hosts) else ", ".join(on)
        made.add_row(
            escape(finding.check),
            f"[{_STYLE[finding.status]}]{finding.status}[/]",
            *map(escape, (where, finding.found, finding.advice)),
        )
    return made


def last_words(told: Sequence[Told]) -> str:
    """One line: whether all is well, and which nodes to leave out if only some are bad."""
    hosts = list(dict.fromkeys(host for host, _ in told))
    bad = list(dict.fromkeys(host for host, f in told if f.status == "problem"))
    if not bad:
        return "no problem found"
    if len(bad) == len(hosts):
        return "problems found; see above what to do"
    return f"problems on {', '.join(bad)}; to go on without: sbatch --exclude={','.join(bad)}"
