"""How groups of preferences come about: the rules, and what `scienceflow prefer` draws and scores."""

from __future__ import annotations

from OpenSciDraw.config.sections import Section, key


class PreferAxes(Section):
    """By which score a picture can lose on each axis: METRIC/NAME, as in an evaluation's results. None leaves the axis out."""

    component: str | None = key("structure/components", "Prefer", "Score of the axis component, METRIC/NAME.", pattern="^[^/]+/.+$")
    arrow: str | None = key("structure/arrows", "Prefer", "Score of the axis arrow, METRIC/NAME.", pattern="^[^/]+/.+$")
    text: str | None = key("structure/labels", "Prefer", "Score of the axis text, METRIC/NAME.", pattern="^[^/]+/.+$")


class PreferConfig(Section):
    """What `scienceflow prefer` does; the rules are those of `preference` with defaults for scores that count items."""

    figures: str | None = key(
        None, "Prefer", "Prompts to draw, with what the pictures are scored by, as evaluate.figures; not those of evaluations."
    )
    limit: int | None = key(None, "Prefer", "Only the first prompts; None = all.", "prompts", ge=1)
    pictures: int = key(8, "Prefer", "Pictures of each prompt, each from noise of its own.", "pictures", ge=2)
    axes: PreferAxes = key(PreferAxes, "Prefer", "dict(component=..., arrow=..., text=...): the score of each axis.")
    min_reward: float = key(0.70, "Prefer", "Least reward of a winner; the reward is the mean of the axes' scores.", "reward")
    min_gap: float = key(
        0.15, "Prefer", "How far a loser lies below the winner on its own axis, at least: one wrong item of six.", "score", gt=0
    )
    other_gap_low: float = key(0.0, "Prefer", "How far it lies below on the other axes, at least.", "score")
    other_gap_high: float = key(1.0, "Prefer", "How far it lies below on the other axes, at most; 1 = any score.", "score")
    min_total_gap: float = key(0.05, "Prefer", "How far its reward lies below the winner's, at least.", "reward")
    other_gap_weight: float = key(
        0.50, "Prefer", "Losers rank by the gap on their axis less this times the mean of the others.", ge=0
    )
