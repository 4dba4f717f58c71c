"""The page of an outcome: counts, and groups with winner and losers to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from OpenSciDraw.datasets.batch import AXES
from OpenSciDraw.datasets.group_making import NOBODY, Groups
from OpenSciDraw.evaluation.examples import picture_name
from OpenSciDraw.preferences.groups import Scored, chances, counts
from OpenSciDraw.prepare.contact_sheet import Tile, contact_sheet
from OpenSciDraw.utils.files import write_text

_MOST = 60  # groups on the page


def write_sheet(scored: Scored, groups: Groups, pictures: Path, file: Path) -> None:
    """`pictures` is the folder of the drawn pictures."""
    tables = [(heading.capitalize(), [[heading, "count"], *([name, str(count)] for name, count in rows.items())])
              for heading, rows in counts(groups).items()]  # fmt: skip
    spread = chances(scored)
    if spread:
        columns = list(next(iter(spread.values())))
        rows = [["axis", *columns], *([axis, *(str(found[name]) for name in columns)] for axis, found in spread.items())]
        tables.append(("Prompts whose best and worst picture lie so far apart", rows))
    shown = min(_MOST, len(groups.ids))
    title = f"Preferences: {len(groups.ids)} groups of {len(scored.prompts)} prompts" + (
        f", {shown} of them shown" if shown < len(groups.ids) else ""
    )
    write_text(file, "".join(contact_sheet(title, tables, _groups(scored, groups, pictures, shown))))


def _groups(scored: Scored, groups: Groups, pictures: Path, shown: int) -> Iterator[tuple[str, list[Tile]]]:
    """The groups that are shown, evenly over all of them, with their pictures."""
    text, names = {prompt.id: prompt.prompt for prompt in scored.prompts}, scored.ids
    scores, reward = scored.scores.reshape(-1, len(AXES)), scored.reward.reshape(-1)

    def tile(role: str, at: int) -> Tile:
        said = ", ".join(f"{axis} {scores[at, n]:.2f}" for n, axis in enumerate(AXES) if np.isfinite(scores[at, n]))
        return Tile((pictures / picture_name(names[at])).read_bytes(), f"{role}, reward {reward[at]:.2f}", said)

    for group in np.linspace(0, len(groups.ids) - 1, shown).round().astype(int).tolist():
        losers = zip(AXES, groups.losers[group].tolist(), strict=True)
        tiles = [tile("winner", int(groups.winners[group]))]
        tiles += [tile(f"loser by {axis}", at) for axis, at in losers if at != NOBODY]
        yield text[groups.ids[group]], tiles
