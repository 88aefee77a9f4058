"""`make chaos KILLS=100 KIND=engine`: prints what happens, and then the rows of the table."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random

import warm

from chaos.campaign import HEADER, Campaign, undisturbed
from chaos.kinds import KINDS
from chaos.run import make_task


def main() -> int:
    """1 if a run was not what it would have been; an AssertionError if one did not survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="faults, of all kinds together")
    parser.add_argument("--kind", choices=[*KINDS, ""], default="", help="left out: all, evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="of every run")
    given = parser.parse_args()
    kinds = [given.kind] if given.kind else list(KINDS)
    warm.install()
    campaigns = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        task = make_task(folder / "task")
        alone = undisturbed(task, folder / "undisturbed", given.steps)
        for number, kind in enumerate(kinds):
            draw = Random(f"chaos/{given.seed}/{kind}")
            campaign = Campaign(kind, KINDS[kind](task), task, alone, draw, say)
            kills = given.kills // len(kinds) + (number < given.kills % len(kinds))
            campaign.strike(kills, folder)
            campaigns.append(campaign)
    for campaign in campaigns:
        say(f"\n{campaign.kind}: {campaign.what_happened()}")
        say("\n".join(campaign.differences) or "every run ended as the undisturbed one")
    say("\n".join(["", HEADER, *(campaign.row() for campaign in campaigns)]))
    return int(any(campaign.differences for campaign in campaigns))


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
