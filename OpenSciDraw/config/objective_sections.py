"""The parts of a config that belong to one way of training each: preferences, token routing, distillation, rewards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from OpenSciDraw.config.sections import Section, key


class AxisWeights(Section):
    """How much a loser counts by what it fails at; over the losers that a group has, the weights are scaled to mean 1."""

    component: float = key(1.0, "Preference", "Weight of losers that lack components; 0 leaves the axis out.", ge=0)
    arrow: float = key(1.0, "Preference", "Weight of losers with wrong arrows; 0 leaves the axis out.", ge=0)
    text: float = key(1.0, "Preference", "Weight of losers with wrong text; 0 leaves the axis out.", ge=0)


class PreferenceConfig(Section):
    """What the objectives `dpo` and `mdpo` do, and the rules by which PreferenceGroups makes groups of scored pictures."""

    mode: Literal["contrastive", "adaptive", "mean"] = key(
        "contrastive", "Preference", "mdpo: how the comparisons with a group's losers become one loss (docs/preferences.md)."
    )
    beta: float = key(
        100.0, "Preference", "Scale of the comparison: larger values keep the policy nearer to the reference.", "1 / loss", gt=0
    )
    max_margin: float | None = key(
        0.01, "Preference", "A pair with a larger margin is not trained on: no loser is pushed away without end. None = no limit.",
        "loss", gt=0,
    )  # fmt: skip
    winner_weight: float = key(
        10.0, "Preference", "Weight of the winner's own flow-matching loss, added so that it does not rise (beta / 10).", ge=0
    )
    tau: float | None = key(
        None, "Preference", "mdpo, mode 'mean': losers weigh by exp((their loss - the winner's) / tau); None = alike.", "loss", gt=0
    )
    axis_weights: AxisWeights = key(
        AxisWeights, "Preference", "dict(component=..., arrow=..., text=...): how much each axis counts."
    )
    min_pictures: int = key(6, "Preference", "Making groups: a prompt with fewer scored pictures is left out.", "pictures", ge=2)
    min_reward: float = key(0.70, "Preference", "Making groups: least reward of a winner.", "reward")
    min_gap: float = key(
        0.30, "Preference", "Making groups: how far a loser lies below the winner on its own axis, at least.", "score", gt=0
    )
    other_gap_low: float = key(0.0, "Preference", "Making groups: how far it lies below on the other axes, at least.", "score")
    other_gap_high: float = key(0.50, "Preference", "Making groups: how far it lies below on the other axes, at most.", "score")
    min_total_gap: float = key(0.20, "Preference", "Making groups: how far its reward lies below the winner's, at least.", "reward")
    other_gap_weight: float = key(
        0.50, "Preference", "Making groups: losers rank by the gap on their axis less this times the mean of the others.", ge=0
    )


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
    include_figure: bool = key(
        False, "Prefer", "The last picture of each prompt is the data's own figure, not drawn: a winner where all drawn ones fail."
    )
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


class TokenRoutingConfig(Section):
    """Which part of a picture's tokens goes past the middle blocks while training (TREAD, docs/token-routing.md)."""

    share: float = key(
        0.0, "Token routing", "Share of a picture's tokens that goes past the routed blocks; 0 = none.", "of tokens", ge=0, lt=1
    )
    first_block: int = key(2, "Token routing", "First routed block; 0 is the transformer's first, -1 its last.", "block")
    last_block: int = key(-3, "Token routing", "Last routed block, itself included.", "block")


class DistillConfig(Section):
    """What the objective `trajectory_distillation` does. Its teacher is the model that the run starts from."""

    steps: int = key(4, "Distill", "Steps in which the student learns to draw.", "sampling steps", ge=1)
    teacher_steps: int | None = key(
        None, "Distill", "Steps of the teacher, rounded to a multiple of steps; None = num_inference_steps.", "sampling steps", ge=1
    )
    guidance: float | None = key(
        None, "Distill", "Guidance of the teacher, which the student draws with by itself; None = as in validation.", "factor", ge=0
    )
    inputs: Literal["data", "student"] = key(
        "data", "Distill",
        "Where a step of the student begins while it learns: at a noisy figure, or where its own steps from noise have come to.",
    )  # fmt: skip


class RewardConfig(Section):
    """What the objective `reward` draws, how it is scored, and how it learns from the scores (docs/reward.md)."""

    metrics: dict[str, Annotated[float, Field(ge=0)]] = key(
        {"structure.components": 1.0, "structure.arrows": 1.0, "structure.labels": 1.0}, "Reward",
        "Scores that are rewarded, 'metric.score', each with its weight; with weight 0 a score is logged and not rewarded.",
    )  # fmt: skip
    figures: str | None = key(
        None, "Reward", "What is known of each prompt's figure (as evaluate.figures, same ids as the data); None = what the data "
        "were made of: dataset.figures or encode.figures.",
    )  # fmt: skip
    group_size: int = key(8, "Reward", "Pictures drawn of each prompt, which are compared with each other.", "pictures", ge=2)
    include_figure: bool = key(
        False, "Reward", "The last picture of each group is the data's own figure: something to learn where all drawn ones fail."
    )
    figure_weight: float = key(
        0.0, "Reward", "Weight of that figure's flow-matching loss, of prompts whose pictures differ; needs include_figure.", ge=0
    )
    draw_steps: int | None = key(None, "Reward", "Steps of a drawn picture; None = num_inference_steps.", "sampling steps", ge=1)
    draw_guidance: float | None = key(None, "Reward", "Guidance of a drawn picture; None = as in validation.", "factor", ge=0)
    draw_batch: int | None = key(None, "Reward", "Pictures drawn at once; None = a micro-step's.", "pictures", ge=1)
    steps_per_round: int = key(
        1, "Reward", "Steps that learn from what one round has drawn, each at noise levels of its own.", "optimizer steps", ge=1
    )
    shared_noise: bool = key(
        True, "Reward", "All pictures of a prompt at one noise and noise level: the gradient then is of what tells them apart."
    )
    processes: int = key(2, "Reward", "Processes that score beside the training; 0 = the training process.", "processes", ge=0)
    advantage_limit: float = key(
        2.0, "Reward", "Advantages are cut here; a picture that far above its group's mean counts as wholly good.",
        "standard deviations", gt=0,
    )  # fmt: skip
    mixing: float = key(
        1.0, "Reward", "How far the good and the bad policy lie from the old one, in units of what the current one has moved.", gt=0
    )
    adaptive_weight: bool = key(True, "Reward", "Divide each picture's error by its mean absolute error, in clean latents.")
    pull: float = key(0.1, "Reward", "Weight of the squared distance to the velocity of the model at the start.", ge=0)
    old_decay_rate: float = key(
        0.001, "Reward", "After each round the policy that draws keeps min(rate x round, old_decay_max) of itself.",
        "per round", ge=0,
    )  # fmt: skip
    old_decay_max: float = key(0.5, "Reward", "Most that it keeps of itself.", "share", ge=0, lt=1)
    watch: dict[str, Annotated[float, Field(gt=0)]] = key(
        {"held_out_loss": 0.25}, "Reward",
        "Numbers of the validation that are not rewarded, and how much worse than at the start each may become.",
        "share of the start",
    )  # fmt: skip
    watch_action: Literal["stop", "warn"] = key("stop", "Reward", "What happens when one becomes worse than that.")
